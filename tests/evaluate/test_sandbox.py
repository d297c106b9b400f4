"""The sandbox as an attacker sees it: every program of tests/hostile is judged failed, and nothing outside
notices it.

Each program ends with a right `solve` exactly if its attack worked, or with a wrong one that only a forged
verdict can pass; so `passed` means a hole. The programs know what a real attacker would have to find out
(`HOST`): paths, process ids, ports.
"""

import ast
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import hpd
from hpd.evaluate.sandbox import (
    ISOLATIONS,
    Isolation,
    Limits,
    Outcome,
    Program,
    Tests,
    run_many,
    run_program,
    sandbox_report,
    syscalls,
    wire,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is made of mechanisms of Linux")

HOSTILE = sorted((Path(__file__).parents[1] / "hostile").glob("*.py"))
SQUARES = Tests(
    source="assert program.solve(3) == 9\nassert program.solve(4) == 16\nassert program.solve(-5) == 25"
)
SECRET = "token-5f2e9c"
TIGHT = Limits(cpu_seconds=1, wall_seconds=2, memory_mib=256, output_bytes=2**18, scratch_mib=4)

LEVELS = {**ISOLATIONS, "namespaces-alone": Isolation(namespaces=True, seccomp=False)}
# What has a limit of its own says which.
EXPECTED = {
    "busy_loop": {"timeout"},
    "huge_integer": {"timeout"},
    "ignore_signals": {"timeout"},
    "infinite_error_output": {"output"},
    "infinite_output": {"output"},
    "memory_bomb": {"memory"},
    "memory_creep": {"memory"},
    "patched_time": {"timeout"},
    "sleep": {"timeout"},
    "exit_in_the_middle": {"failed"},
    "equal_to_everything": {"failed"},
    "print_the_verdict": {"failed"},
    "segfault": {"killed"},
}


class Host(NamedTuple):
    """What must not be touched, and what records that it was."""

    folder: Path
    facts: dict[str, Any]
    calls: list[bytes]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("host")
    (folder / "canary").write_text("alive")
    (folder / "canary").chmod(0o600)
    (folder / "secret").write_text(SECRET)
    (folder / "secret").chmod(0o644)
    for parent in (folder, folder.parent, folder.parent.parent):
        parent.chmod(0o755)  # readable for all: the user's own permissions must not be what protects it
    calls: list[bytes] = []
    sockets = [
        socket.create_server(("127.0.0.1", 0)),
        socket.socket(socket.AF_UNIX),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
    ]
    names = [f"hpd-test-{os.getpid()}-{kind}" for kind in ("stream", "datagram")]
    sockets[1].bind("\0" + names[0])
    sockets[1].listen()
    sockets[2].bind("\0" + names[1])
    for listener in sockets:
        listener.settimeout(0.1)
    done = threading.Event()

    def listen(listener: socket.socket) -> None:
        while not done.is_set():
            try:
                calls.append(
                    listener.recv(100)
                    if listener.type == socket.SOCK_DGRAM
                    else repr(listener.accept()).encode()
                )
            except TimeoutError:
                continue

    threads = [threading.Thread(target=listen, args=(listener,)) for listener in sockets]
    for thread in threads:
        thread.start()
    facts = {
        "canary": str(folder / "canary"),
        "secret": str(folder / "secret"),
        "secret_text": SECRET,
        "pid": os.getpid(),
        "port": sockets[0].getsockname()[1],
        "abstract_stream": names[0],
        "abstract": names[1],
        "package": str(Path(hpd.__file__).parent),
    }
    yield Host(folder, facts, calls)
    done.set()
    for thread, listener in zip(threads, sockets, strict=True):
        thread.join()
        listener.close()


def attack(host: Host, isolation: Isolation) -> dict[str, Outcome]:
    programs = [
        Program(source=f"HOST = {host.facts!r}\n{path.read_text()}", tests=SQUARES) for path in HOSTILE
    ]
    outcomes = run_many(programs, num_workers=8, limits=TIGHT, isolation=isolation)
    return {path.stem: outcome for path, outcome in zip(HOSTILE, outcomes, strict=True)}


@pytest.fixture(scope="module")
def outcomes(host: Host) -> dict[str, Outcome]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPD_TEST_SECRET", SECRET)
        return attack(host, sandbox_report().isolation)


@pytest.mark.parametrize("name", [path.stem for path in HOSTILE])
def test_hostile_program_fails(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[name]
    assert outcome.status != "passed"
    assert outcome.status in EXPECTED.get(
        name, {"failed", "error", "timeout", "killed", "memory", "output"}
    ), outcome
    assert SECRET not in f"{outcome.stdout}{outcome.stderr}{outcome.detail}"
    assert len(outcome.stdout) + len(outcome.stderr) <= 2 * 8192


def test_host_is_unharmed(host: Host, outcomes: dict[str, Outcome]) -> None:
    assert len(outcomes) >= 60
    assert_unharmed(host)


@pytest.mark.slow
@pytest.mark.parametrize("level", [level for level in LEVELS if level != "full"])
def test_hostile_programs_at_lower_levels(level: str, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """One mechanism by itself: without namespaces nothing passes; without seccomp, which is never used so,
    nothing gets out."""
    monkeypatch.setenv("HPD_TEST_SECRET", SECRET)
    outcomes = attack(host, LEVELS[level])
    passed = {name for name, outcome in outcomes.items() if outcome.status == "passed"}
    # Permitted inside namespaces, where it reaches nothing: signals to itself, sockets without a network,
    # more namespaces.
    harmless = {
        "kill_parent",
        "mount_and_unshare",
        "udp_and_raw_sockets",
        "ptrace_harness",
        "shared_memory",
        "anonymous_files",
    }
    harmless |= {
        "io_uring",
        "leave_root",
        "rename_and_chmod",
        "read_system_files",
        "kill_by_descriptor",
        "kill_everything",
    }
    assert passed <= (harmless if level == "namespaces-alone" else set())
    assert not any(SECRET in f"{o.stdout}{o.stderr}{o.detail}" for o in outcomes.values())
    assert_unharmed(host)


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root to become somebody else; without it the tests above show this"
)
@pytest.mark.parametrize("level", ISOLATIONS)
def test_hostile_programs_of_an_ordinary_user(
    level: str, host: Host, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """User namespaces instead of root's privileges; without them the program has the very user of the
    evaluating process."""
    python = next((path for path in (sys.executable, "/usr/bin/python3") if _runs_as_nobody(path)), None)
    if python is None:
        pytest.skip("no Python that other users may run")
    # pytest's folders are its user's own: all that it made on the way here are opened (a worker of xdist has
    # one more).
    base = tmp_path_factory.getbasetemp()
    opened = [tmp_path, *(parent for parent in tmp_path.parents if parent.is_relative_to(base)), base.parent]
    for folder in [*opened, *([base.parent.parent] if base.name.startswith("popen-") else [])]:
        folder.chmod(0o755)
    programs = {path.stem: f"HOST = {host.facts!r}\n{path.read_text()}" for path in HOSTILE}
    (tmp_path / "programs.json").write_text(json.dumps([programs, SQUARES.source, asdict(TIGHT)]))
    script = f"""
import json, os
from hpd.evaluate.sandbox import ISOLATIONS, Limits, Program, Tests, run_many
programs, tests, limits = json.load(open({str(tmp_path / "programs.json")!r}))
sources = [source.replace("'pid': {os.getpid()}", f"'pid': {{os.getpid()}}") for source in programs.values()]
jobs = [Program(source=source, tests=Tests(source=tests)) for source in sources]
outcomes = run_many(jobs, num_workers=8, limits=Limits(**limits), isolation=ISOLATIONS[{level!r}])
print(json.dumps({{name: [o.status, o.stdout + o.stderr + o.detail] for name, o in zip(programs, outcomes)}}))
"""
    environment = {"PYTHONPATH": str(Path(hpd.__file__).parents[1]), "HPD_TEST_SECRET": SECRET}
    done = subprocess.run(
        [python, "-c", script],
        user=65534,
        group=65534,
        extra_groups=[],
        env=environment,
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [name for name, (status, _) in found.items() if status == "passed"] == []
    assert not any(SECRET in text for _, text in found.values())
    assert_unharmed(host)


def _runs_as_nobody(python: str) -> bool:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(hpd.__file__).parents[1])!r}); import hpd.evaluate.sandbox"
    )
    try:
        done = subprocess.run(
            [python, "-c", code], user=65534, group=65534, extra_groups=[], capture_output=True, cwd="/"
        )
    except PermissionError:
        return False
    return done.returncode == 0


def assert_unharmed(host: Host) -> None:
    assert (host.folder / "canary").read_text() == "alive"
    assert (host.folder / "canary").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in host.folder.iterdir()) == ["canary", "secret"]
    assert host.calls == []
    assert not any(Path("/tmp", name).exists() for name in ("full", "sparse", "taken", "linked"))
    assert survivors() == []


def survivors() -> list[str]:
    """Sandboxed processes that are left: children of this process or of none."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if parent in (os.getpid(), 1) and ("sandbox/runner.py" in command or "time.sleep(3600)" in command):
            found.append(f"{folder.name}: {command}")
    return found


# --- what honest programs see ---------------------------------------------------------------------


def test_report_names_every_mechanism() -> None:
    report = sandbox_report()
    assert report.isolation == ISOLATIONS[report.level]
    text = " ".join(report.lines)
    assert all(word in text for word in ("network", "files", "seccomp", "limits", "verdict"))


@pytest.mark.parametrize("level", ISOLATIONS)
def test_standard_library_works(level: str) -> None:
    source = """
import asyncio, collections, dataclasses, datetime, decimal, fractions, functools, hashlib, heapq, itertools
import json, math, random, re, statistics, string, threading, time, typing, unicodedata, uuid, zlib

@dataclasses.dataclass
class Point:
    x: int

async def double(x):
    await asyncio.sleep(0)
    return 2 * x

def solve(x):
    results = []
    thread = threading.Thread(target=lambda: results.append(x))
    thread.start()
    thread.join()
    assert datetime.datetime.strptime("2024-02-29", "%Y-%m-%d").year == 2024
    assert hashlib.sha256(b"x").hexdigest()[0] == "2" and random.random() < 1
    return results[0] * asyncio.run(double(x)) // 2 + len(re.findall("b", "aa")) + Point(0).x
"""
    outcome = run_program(source, tests=SQUARES, isolation=ISOLATIONS[level])
    assert outcome.status == "passed", outcome


def test_scratch_folder() -> None:
    if not sandbox_report().isolation.namespaces:
        pytest.skip("files need namespaces")
    outcome = run_program(
        "open('notes', 'w').write('x' * 1000)\nimport os\nprint(os.listdir('.'), os.getcwd(), "
        "len(os.environ))"
    )
    assert (outcome.status, outcome.stdout) == ("finished", "['notes'] /tmp 0\n")


@pytest.mark.parametrize(
    ("source", "status", "detail"),
    [
        ("print('hello')", "finished", ""),
        ("def f(:", "error", "SyntaxError"),
        ("x = 1\nx.y", "error", "AttributeError"),
        ("raise SystemExit(3)", "error", "SystemExit: 3"),
        ("import numpy", "error", "ModuleNotFoundError"),
        ("input()", "error", "EOFError"),
        ("while True: pass", "timeout", "1 s of processor time"),
        ("x = bytearray(2**32)", "memory", "256 MiB"),
        ("while True: print('x' * 99999)", "output", "262144 bytes"),
        ("import os; os.abort()", "killed", "SIG"),
    ],
)
def test_status_and_detail(source: str, status: str, detail: str) -> None:
    outcome = run_program(
        source, limits=replace(TIGHT, wall_seconds=60)
    )  # a second of processor time can take many
    assert outcome.status == status
    assert detail in outcome.detail


@pytest.mark.parametrize(
    ("program", "tests", "detail"),
    [
        (
            "def f(x): return x",
            "assert program.f(1) == 2",
            "AssertionError at line 1: assert program.f(1) == 2",
        ),
        ("def f(x): return 1 / x", "program.f(0)", "ZeroDivisionError: division by zero"),
        ("def g(x): return x", "program.f(0)", "AttributeError"),
        ("class E(Exception): pass\ndef f(x): raise E('odd')", "program.f(0)", "RemoteError: E: odd"),
    ],
)
def test_failed_tests_say_where(program: str, tests: str, detail: str) -> None:
    outcome = run_program(program, tests=Tests(source=tests))
    assert outcome.status == "failed"
    assert detail in outcome.detail


def test_tests_use_objects_of_the_program() -> None:
    program = """
class Node:
    def __init__(self, value):
        self.value, self.left = value, None
    def __repr__(self):
        return f"Node({self.value})"
def depth(node):
    return 0 if node is None else 1 + depth(node.left)
def numbers():
    yield from range(3)
"""
    tests = """
root = Node(1)
root.left = Node(2)
assert depth(root) == 2 and root.left.value == 2 and str(root) == "Node(1)"
assert root == root and root != root.left
assert list(program.numbers()) == [0, 1, 2]
try:
    depth(3)
except AttributeError:
    pass
else:
    raise AssertionError
result = {"depth": depth(root), "data": data}
"""
    outcome = run_program(program, tests=Tests(source=tests, data=[(1, {2})], remote_names=("Node", "depth")))
    assert (outcome.status, outcome.result) == ("passed", {"depth": 2, "data": [(1, {2})]})


def test_many_keep_their_order_and_limits() -> None:
    programs = [Program(source=f"def solve(x): return x * x + {n % 2}", tests=SQUARES) for n in range(6)]
    programs.append(Program(source="import time; time.sleep(60)", limits=Limits(wall_seconds=0.5)))
    seen = []
    outcomes = run_many(programs, num_workers=3, progress=lambda done, total: seen.append((done, total)))
    assert [outcome.status for outcome in outcomes] == ["passed", "failed"] * 3 + ["timeout"]
    assert seen[-1] == (7, 7)
    assert survivors() == []


def test_sets_have_one_order() -> None:
    source = "print(list({'a', 'b', 'c', 'd', 'e', 'f'}))"
    assert len({run_program(source).stdout for _ in range(3)}) == 1


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_the_evaluation(end: signal.Signals) -> None:
    """The evaluating process dies while programs run: they die with it."""
    marker = f"marker-{os.getpid()}-{int(end)}"
    code = f"""
from hpd.evaluate.sandbox import Program, run_many
run_many([Program(source="import time; print({marker!r}); time.sleep(3600)")] * 2, num_workers=2)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    time.sleep(3)
    process.send_signal(end)
    process.wait()
    deadline = time.monotonic() + 10
    while survivors() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert survivors() == []


def test_system_without_isolation_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that offers neither: nothing is run, with the reasons."""
    monkeypatch.setattr("hpd.evaluate.sandbox.host._RUNNER", Path(__file__).with_name("no_such_runner.py"))
    with pytest.raises(RuntimeError, match="can isolate no program.*full: .*no-namespaces: "):
        sandbox_report.__wrapped__()


@pytest.mark.parametrize("limit", ["cpu_seconds", "memory_mib", "threads"])
def test_limits_must_be_positive(limit: str) -> None:
    with pytest.raises(ValueError, match=f"{limit} is 0"):
        Limits(**{limit: 0})


# --- the parts ------------------------------------------------------------------------------------


def test_wire_keeps_plain_data() -> None:
    from collections import Counter, deque, namedtuple
    from datetime import date, datetime
    from decimal import Decimal
    from fractions import Fraction

    pair = namedtuple("pair", "a b")
    values = [
        None,
        True,
        0,
        -1,
        2**63,
        -(10**5000),
        0.1,
        float("inf"),
        -0.0,
        "a\ud800\u2028",
        b"\0x",
        bytearray(b"y"),
        1 + 2j,
        (1, (2, [3])),
        {1: {2: 3}, (1, 2): None},
        {1, "a"},
        frozenset({2}),
        range(3, 9, 2),
        deque([1]),
        Decimal("1.10"),
        Fraction(1, 3),
        date(2024, 2, 29),
        datetime(2024, 2, 29, 1, 2),
        {"h": 1},
        {"d": [[1, 2]]},
        [],
        int,
        type(None),
    ]
    for value in values:
        copy = wire.decode(wire.encode(value))
        assert copy == value
        assert type(copy) is type(value)
    assert wire.decode(wire.encode(pair(1, 2))) == (1, 2)
    assert wire.decode(wire.encode(Counter("aab"))) == {"a": 2, "b": 1}
    assert wire.decode(wire.encode({1: 2}.keys())) == {1}
    with pytest.raises(TypeError, match="cannot leave the sandbox"):
        wire.encode(object())


def test_system_call_numbers() -> None:
    """The table against this machine's kernel headers."""
    names = {"x86_64": "asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}
    machine = platform.machine()
    headers = list(Path("/usr/include").glob(f"**/{names.get(machine)}"))
    if machine not in names or not headers:
        pytest.skip("no kernel headers here")
    lines = [line.split() for line in headers[0].read_text().splitlines() if line.startswith("#define __NR")]
    numbers = {
        name.removeprefix("__NR_").removeprefix("__NR3264_"): value
        for _, name, value, *_ in (x for x in lines if len(x) > 2)
    }
    column = syscalls.ARCHITECTURES[machine][0]
    for table in (syscalls._COMPUTE, syscalls._FILES, syscalls._REFUSED):
        for name, both in table.items():
            if both[column] is not None:
                assert numbers[name if (machine, name) != ("aarch64", "newfstatat") else "fstatat"] == str(
                    both[column]
                ), name


@pytest.mark.parametrize("machine", syscalls.ARCHITECTURES)
def test_filter_is_well_formed(machine: str) -> None:
    filter_ = syscalls.seccomp_filter(machine, 1, files=True)
    assert len(filter_) % 8 == 0
    assert len(filter_) // 8 < 4096  # the kernel's limit
    assert len(syscalls.seccomp_filter(machine, 1, files=False)) == len(filter_)
    with pytest.raises(OSError, match="no system call table"):
        syscalls.seccomp_filter("mips", 1, files=True)


def test_runner_needs_the_standard_library_only() -> None:
    folder = Path(wire.__file__).parent
    # The runner's folder comes first on its path.
    assert not {path.stem for path in folder.glob("*.py")} & sys.stdlib_module_names
    for name in ("runner", "lockdown", "syscalls", "wire"):
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                root = module.split(".")[0]
                assert root in sys.stdlib_module_names or root in ("lockdown", "syscalls", "wire"), (
                    name,
                    module,
                )
