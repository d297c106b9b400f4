"""The program that `host` starts for each sandbox: a supervisor that forks the locked-down process and ends
it.

Runs as a script of its own with an empty environment and without site-packages, so it imports the standard
library and its neighbors only. The supervisor (trusted, in the host's process table) kills the process at
the wall-clock limit, or as soon as the host closes standard input, which it also does by dying. In a process
namespace the kernel then kills all the rest.
"""

import ast
import builtins
import importlib
import os
import select
import signal
import sys
import time
import traceback
from types import ModuleType
from typing import Any, NamedTuple

import lockdown
import wire

# Loaded on first use by functions of the standard library; without a file system view they must be there
# before.
_LAZY_MODULES = (
    "_strptime",
    "calendar",
    "concurrent.futures.thread",
    "linecache",
    "locale",
    "traceback",
    "tokenize",
)
# They act when imported.
_NEVER_PRELOADED = {"antigravity", "this", "idlelib", "tkinter", "turtle", "turtledemo"}
_MAX_DETAIL_CHARS = 300


class SandboxJob(NamedTuple):
    """Message of the host that starts a sandbox."""

    role: str
    """"program": untrusted code that then answers requests; "tests": code that asks and decides."""
    source: str
    data: Any
    """tests: encoded value that the code finds as `data`."""
    remote_names: list[str]
    """tests: names that mean the program's, whatever else they mean in the tests."""
    limits: dict[str, Any]
    namespaces: bool
    seccomp: bool
    control_fd: int
    """The supervisor reports here; never open in the sandboxed process."""
    verdict_fd: int | None
    """tests: where the verdict goes; never open in the program's process."""
    ask_fds: tuple[int, int] | None
    """(read, write) ends towards the other process."""


def main() -> None:
    sys.path.pop(0)  # this folder: nothing more is imported from it
    job = SandboxJob(**wire.receive(0))
    try:
        null = os.open("/dev/null", os.O_RDWR)
        if job.namespaces:
            lockdown.enter_namespaces(job.limits["scratch_mib"])
        supervisor_pid = os.getpid()
        wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waker)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        pid = os.fork()
    except OSError as error:
        wire.send(job.control_fd, {"refused": str(error)})
        return
    if pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(null, 0)
        for fd in (null, wake, waker):
            os.close(fd)
        _sandboxed(job, supervisor_pid)
    for fd in (1, 2, null, job.verdict_fd, *(job.ask_fds or ())):
        if fd is not None:
            os.close(fd)
    wire.send(job.control_fd, _supervise(pid, wake, job.limits["wall_seconds"]))


def _supervise(pid: int, wake: int, wall_seconds: float) -> dict[str, Any]:
    """Wait for the process, kill it at the limit or when the host lets go, and say how it ended."""
    start = time.monotonic()
    poller = select.poll()
    poller.register(0, select.POLLHUP)
    poller.register(wake, select.POLLIN)
    ended_by = "itself"
    released = False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        left = start + wall_seconds - time.monotonic()
        if released or left <= 0:
            ended_by = "host" if released else "time"
            os.kill(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            break
        events = dict(poller.poll(left * 1000))
        released = 0 in events
        if wake in events:
            os.read(wake, 512)
    return {
        "ended_by": ended_by,
        "status": status,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "wall_seconds": time.monotonic() - start,
        "peak_mib": usage.ru_maxrss // 1024,
    }


def _sandboxed(job: SandboxJob, supervisor_pid: int) -> None:
    """The process that never comes back."""
    code = 70
    try:
        limits = job.limits
        lockdown.limit_resources(
            cpu_seconds=limits["cpu_seconds"],
            memory_mib=limits["memory_mib"],
            scratch_mib=limits["scratch_mib"],
            open_files=limits["open_files"],
            threads=limits["threads"],
        )
        os.environ.clear()
        if not job.namespaces:
            _preload(job.source)
        lockdown.drop_privileges(supervisor_pid)
        if job.seccomp:
            lockdown.filter_system_calls(files=job.namespaces)
    except OSError as error:
        wire.send(job.control_fd, {"refused": str(error)})
        os._exit(code)
    os.close(job.control_fd)
    try:
        if job.role == "program":
            code = _run_program(job)
        else:
            _run_tests(job)
            code = 0
    finally:
        os._exit(code)


def _run_program(job: SandboxJob) -> int:
    """Run untrusted code, then answer for it. Whatever it does to this interpreter, it can only change its
    own answers."""
    module = ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(job.source, "<program>", "exec"), module.__dict__)
    except BaseException as error:
        print(_describe(error, job.source), file=sys.stderr, flush=True)
        return 1
    if job.ask_fds is not None:
        wire.serve(module, *job.ask_fds)
    sys.stdout.flush()
    sys.stderr.flush()
    return 0


def _run_tests(job: SandboxJob) -> None:
    assert job.verdict_fd is not None
    value = None
    try:
        program = wire.connect(*job.ask_fds) if job.ask_fds is not None else None
        names = _Names(program, job.remote_names)
        names["__name__"] = "tests"
        names["program"] = program
        names["wire"] = wire
        names["data"] = wire.decode(job.data)
        names["__builtins__"] = builtins
        for name in job.remote_names:
            names.pop(name, None)
        exec(compile(job.source, "<tests>", "exec"), names)
        value = wire.encode(names.get("result"))
        verdict = {"passed": True, "detail": ""}
    except BaseException as error:
        verdict = {"passed": False, "detail": _describe(error, job.source)}
    wire.send(job.verdict_fd, verdict | {"result": value})


class _Names(dict[str, Any]):
    """Globals of the tests: the remote names are looked up in the program when they are used."""

    def __init__(self, program: wire.Remote | None, remote_names: list[str]) -> None:
        super().__init__()
        self._program = program
        self._remote_names = frozenset(remote_names)

    def __missing__(self, name: str) -> Any:
        if name in self._remote_names:
            return getattr(self._program, name)
        raise KeyError(name)


def _describe(error: BaseException, source: str) -> str:
    """One line: the exception, and the last line of the source that it went through."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename in ("<program>", "<tests>")
    ]
    lines = source.split("\n")
    number = frames[-1].lineno if frames else None
    where = f" at line {number}: {lines[number - 1].strip()}" if number and number <= len(lines) else ""
    return (
        " ".join(f"{type(error).__name__}: {error}"[:_MAX_DETAIL_CHARS].rstrip(": ").split())
        + where[:_MAX_DETAIL_CHARS]
    )


def _preload(source: str) -> None:
    """Import what the source imports, since it will not be able to open a file."""
    names = list(_LAZY_MODULES)
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # running it will say so
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    for name in names:
        root = name.split(".")[0]
        if root in sys.stdlib_module_names and root not in _NEVER_PRELOADED:
            try:
                importlib.import_module(name)
            except ImportError:
                continue  # a function rather than a module, or the program's own problem


if __name__ == "__main__":
    main()
