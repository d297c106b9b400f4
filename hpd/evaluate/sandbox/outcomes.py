"""Inputs and outputs of the sandbox: limits, levels of isolation, programs with their tests, outcomes."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

Status: TypeAlias = Literal["passed", "failed", "finished", "error", "timeout", "memory", "output", "killed"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Hard limits of one sandboxed process."""

    cpu_seconds: int = 10
    """Processor time."""
    wall_seconds: float = 20.0
    """Time by the clock on an idle machine; it ends what sleeps. Where more threads than processors want to
    run, the limit grows in proportion."""
    memory_mib: int = 1024
    """Address space."""
    output_bytes: int = 2**20
    """Of standard output and error together; the first `8192` bytes of each are kept."""
    scratch_mib: int = 16
    """Files in memory: the empty folder that the process may write to, and the size of each."""
    open_files: int = 64
    """Descriptors."""
    threads: int = 32
    """Threads; processes are refused altogether."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise ValueError(f"{name} is {value!r}; a limit of the sandbox must be above 0.")


class Isolation(NamedTuple):
    """Mechanisms of the kernel that are used."""

    namespaces: bool
    """Own processes, network, mounts, users where needed: there is nothing to reach."""
    seccomp: bool
    """System calls that reach for anything fail; without namespaces no file can be opened either."""


ISOLATIONS: dict[str, Isolation] = {
    "full": Isolation(namespaces=True, seccomp=True),
    "no-namespaces": Isolation(namespaces=False, seccomp=True),
}
"""The levels that are good enough for untrusted code, best first: the first that works here is used."""


class SandboxReport(NamedTuple):
    """Isolation on this system."""

    level: str
    """Key of `ISOLATIONS`."""
    isolation: Isolation
    lines: list[str]
    """One sentence per mechanism, missing ones with the system's reason."""


@dataclass(frozen=True, kw_only=True)
class Tests:
    """Trusted code that judges a program: it passes if it runs to its end.

    It sees `program`, the program's module (attributes, calls; plain data by value), `data`, and the module
    `wire`, with which it can ask for long answers by their digests.
    What it leaves in a variable `result` comes back as `Outcome.result`.
    """

    __test__ = False  # not a test class, whatever pytest reads from its name

    source: str
    data: Any = None
    remote_names: tuple[str, ...] = ()
    """Global names of `source` that mean the program's."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """Untrusted code, and who judges it."""

    source: str
    tests: Tests | None = None
    limits: Limits | None = None
    """None is those of the whole run."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """End of a program."""

    status: Status
    """passed, failed: what the tests found. finished: without tests, the code ran to its end, or said so.
    error: it raised or exited. timeout, memory, output: over that limit. killed: by a signal."""
    detail: str
    """One line for people."""
    stdout: str
    stderr: str
    seconds: float
    """By the clock, start of the sandbox included."""
    cpu_seconds: float
    """Processor time of the program."""
    peak_mib: int = 0
    """Most memory that the program held."""
    result: Any = None
    """Value that the tests left in `result`."""
    by_clock: bool = False
    """True if the clock ended it: on a loaded machine that says little about the program."""
