"""The trusted side of the sandbox: starts locked-down processes, bounds what they may cost, and believes none
of them.

A program and the tests that judge it run in two sandboxes that share nothing but a pair of pipes for plain
data: the tests ask, the program answers, the tests compare. So the program can change its answers only, which
    is what is being judged.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from hpd.evaluate.sandbox import wire
from hpd.evaluate.sandbox.outcomes import (
    ISOLATIONS,
    Isolation,
    Limits,
    Outcome,
    Program,
    SandboxReport,
    Status,
    Tests,
)
from hpd.progress import Advance

# Modules of every kind: frozen, Python, built as a library with others behind it.
_PROBE = "import array, ctypes, decimal, hashlib, json, math, random, re; print(decimal.Decimal(1))"
_RUNNER = Path(__file__).with_name("runner.py")
_KEPT_OUTPUT_BYTES = 8192
_MAX_LOAD = 20.0  # threads per processor that the clock's limit follows
_GRACE_SECONDS = 60.0  # for a supervisor to start and to end on a busy machine; it is killed after that
# The kernel enforces the limit on sampled processor time and reports an exact one, which can be less.
_CPU_LIMIT_SLACK = 0.7
_MAX_VERDICT_BYTES = wire.MAX_MESSAGE_BYTES


def run_program(
    source: str,
    *,
    tests: Tests | None = None,
    limits: Limits | None = None,
    isolation: Isolation | None = None,
) -> Outcome:
    """Run untrusted Python in a sandbox, and let `tests` in another judge it.

    Without tests the status says how the process ended, which the program controls: never take "finished" for
    success.

    Args:
        source: the program. Standard library only; `__name__` is "program"; standard input is empty.
        tests: None runs the program alone.
        limits: None is `Limits()`; they hold for the program and the tests, each.
        isolation: None takes the best that works here (`sandbox_report`).

    Raises:
        RuntimeError: this system can isolate nothing, or not with `isolation`.
    """
    limits = _under_load(limits or Limits())
    isolation = isolation or sandbox_report().isolation
    start = time.monotonic()
    with _started(source, tests, limits, isolation) as (program, judge):
        _attend(program, judge, limits)
    for process in filter(None, (program, judge)):
        process.require_report()
    assert program.report is not None
    status, detail, result = _judge(program, judge, limits)
    return Outcome(
        status=status,
        detail=detail,
        stdout=program.text("stdout"),
        stderr=program.text("stderr"),
        seconds=time.monotonic() - start,
        cpu_seconds=program.report["cpu_seconds"],
        peak_mib=program.report.get("peak_mib", 0),
        result=result,
        by_clock=status == "timeout" and "by the clock" in detail,
    )


def run_many(
    programs: Sequence[Program],
    *,
    num_workers: int | None = None,
    limits: Limits | None = None,
    isolation: Isolation | None = None,
    progress: Advance | None = None,
) -> list[Outcome]:
    """`run_program` for each, `num_workers` at a time (None: one per processor), in the given order.

    A program that the clock ended is run once more when all others are done, alone: that outcome counts.

    Args:
        progress: called with (done, total) after each.

    Raises:
        RuntimeError: as `run_program`.
    """
    isolation = isolation or sandbox_report().isolation
    workers = num_workers or len(os.sched_getaffinity(0))
    if workers < 1:
        raise ValueError(f"num_workers is {num_workers}; give 1 or more, or None for one per processor.")
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(workers) as pool:
        futures = [
            pool.submit(run_program, p.source, tests=p.tests, limits=p.limits or limits, isolation=isolation)
            for p in programs
        ]
        try:
            for future in futures:
                outcomes.append(future.result())
                if progress is not None:
                    progress(len(outcomes), len(programs))
        finally:
            for future in futures:
                future.cancel()
    for index, (program, outcome) in enumerate(zip(programs, outcomes, strict=True)):
        if outcome.by_clock and len(programs) > 1:
            outcomes[index] = run_program(
                program.source, tests=program.tests, limits=program.limits or limits, isolation=isolation
            )
    return outcomes


def _under_load(limits: Limits) -> Limits:
    """Limits whose clock waits as long as threads wait for a processor, on average, at this moment."""
    return replace(limits, wall_seconds=limits.wall_seconds * load_factor())


def load_factor() -> float:
    """Threads that want to run per processor, from 1 to 20; 1 where the system does not say."""
    try:
        fields = Path("/proc/loadavg").read_text("ascii").split()
        running = max(float(fields[0]), float(fields[3].partition("/")[0]))
        return min(max(1.0, running / len(os.sched_getaffinity(0))), _MAX_LOAD)
    except (AttributeError, OSError, ValueError, IndexError):
        return 1.0


@cache
def sandbox_report() -> SandboxReport:
    """Find out by trying what isolates programs on this system.

    Raises:
        RuntimeError: nothing does, so no untrusted code should run here.
    """
    reasons = {}
    for level, isolation in ISOLATIONS.items():
        try:
            outcome = run_program(_PROBE, isolation=isolation)
        except (RuntimeError, OSError, AttributeError) as error:
            reasons[level] = str(error)
            continue
        if outcome.status == "finished":
            return SandboxReport(level, isolation, _describe(isolation, reasons))
        reasons[level] = outcome.detail
    raise RuntimeError(
        "this system can isolate no program, so model-written code will not be run on it: "
        + "; ".join(f"{level}: {reason}" for level, reason in reasons.items())
        + ". Evaluate code on Linux (x86_64 or aarch64), in a container or a virtual machine if need be."
    )


def _describe(used: Isolation, reasons: dict[str, str]) -> list[str]:
    return [
        "network, processes, files: own namespaces; the standard library read-only, an empty folder in memory"
        if used.namespaces
        else f"network, processes, files: no namespaces ({reasons['full']}); sockets and all files are "
        "refused by seccomp",
        "system calls: seccomp allows computing and threads"
        + (", and files within that view" if used.namespaces else ""),
        "limits: processor and clock time, memory, output, file size, descriptors, threads; no environment, "
        "no capabilities",
        "verdict: the tests run in another sandbox and exchange plain data with the program",
    ]


class _Process:
    """One supervisor and what comes out of its sandbox."""

    def __init__(self, job: dict[str, Any], ask_fds: tuple[int, int] | None, limits: Limits) -> None:
        self.report: dict[str, Any] | None = None
        self.verdict: dict[str, Any] | None = None
        self.output_bytes = 0
        self._limits = limits
        self._content = {name: bytearray() for name in ("stdout", "stderr", "control", "verdict")}
        pipes = {
            name: os.pipe() for name in (["control", "verdict"] if job["role"] == "tests" else ["control"])
        }
        inherited = [*(pipe[1] for pipe in pipes.values()), *(ask_fds or ())]
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-S", "-s", "-B", "-X", "utf8", str(_RUNNER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=inherited,
                env=_environment(),
                cwd="/",
                start_new_session=True,
            )
        finally:
            for fd in inherited:
                os.close(fd)
        stdin, stdout, stderr = self._popen.stdin, self._popen.stdout, self._popen.stderr
        assert stdin is not None
        assert stdout is not None
        assert stderr is not None
        self._owned = [pipe[0] for pipe in pipes.values()]
        self.open = {stdout.fileno(): "stdout", stderr.fileno(): "stderr"}
        self.open |= {pipe[0]: name for name, pipe in pipes.items()}
        fds = {
            "control_fd": pipes["control"][1],
            "verdict_fd": pipes.get("verdict", (0, None))[1],
            "ask_fds": ask_fds,
        }
        with suppress(BrokenPipeError):  # it died at once: `require_report` says why
            wire.send(stdin.fileno(), job | fds)

    def read(self, fd: int) -> None:
        name = self.open[fd]
        chunk = os.read(fd, 2**16)
        if not chunk:
            del self.open[fd]
        elif name in ("stdout", "stderr"):
            self.output_bytes += len(chunk)
            self._content[name] += chunk[: _KEPT_OUTPUT_BYTES - len(self._content[name])]
            if self.output_bytes > self._limits.output_bytes:
                self.stop()
        else:
            self._content[name] += chunk
            if len(self._content[name]) > _MAX_VERDICT_BYTES:
                self.stop()
        if not chunk and name in ("control", "verdict"):
            message = _message(self._content[name])
            if name == "control":
                self.report = message
            else:
                self.verdict = message

    def give_up(self) -> None:
        """The supervisor should have ended it long ago."""
        self.report = self.report or {"ended_by": "time", "status": int(signal.SIGKILL), "cpu_seconds": 0.0}
        self.stop()

    def require_report(self) -> None:
        if self.report is None or "refused" in self.report:
            reason = (self.report or {}).get("refused", self.text("stderr").strip() or "the supervisor died")
            raise RuntimeError(f"the sandbox could not be set up: {reason}")

    def text(self, name: str) -> str:
        return self._content[name].decode("utf-8", "replace")

    def stop(self) -> None:
        """Tell the supervisor to kill the sandbox."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()

    def close(self) -> None:
        """Nothing of it is left after this."""
        self.stop()
        try:
            self._popen.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()
        for fd in self._owned:
            os.close(fd)
        for stream in filter(None, (self._popen.stdout, self._popen.stderr)):
            stream.close()


@contextmanager
def _started(
    source: str, tests: Tests | None, limits: Limits, isolation: Isolation
) -> Iterator[tuple[_Process, _Process | None]]:
    shared = {"limits": asdict(limits), **isolation._asdict()}
    job = {"role": "program", "source": source, "data": None, "remote_names": [], **shared}
    started: list[_Process] = []
    try:
        if tests is None:
            started.append(_Process(job, None, limits))
            yield started[0], None
            return
        data, names = wire.encode(tests.data), list(tests.remote_names)
        judge_job = {"role": "tests", "source": tests.source, "data": data, "remote_names": names, **shared}
        question, answer = os.pipe(), os.pipe()
        started.append(_Process(job, (question[0], answer[1]), limits))
        started.append(_Process(judge_job, (answer[0], question[1]), limits))
        yield started[0], started[1]
    finally:
        for process in started:
            process.close()


def _attend(program: _Process, judge: _Process | None, limits: Limits) -> None:
    """Read what comes until both sandboxes are gone; the program is stopped when the verdict is there."""
    deadline = time.monotonic() + limits.wall_seconds + _GRACE_SECONDS
    processes = [process for process in (program, judge) if process is not None]
    with selectors.DefaultSelector() as selector:
        for process in processes:
            for fd in process.open:
                selector.register(fd, selectors.EVENT_READ, process)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                for process in processes:
                    process.give_up()
                return
            for key, _ in selector.select(left):
                process = key.data
                process.read(key.fd)
                if key.fd not in process.open:
                    selector.unregister(key.fd)
                if judge is not None and process is judge and "verdict" not in judge.open.values():
                    program.stop()


def _judge(program: _Process, judge: _Process | None, limits: Limits) -> tuple[Status, str, Any]:
    """The verdict, and where there is none or a failed one, what the program's end adds to it."""
    assert program.report is not None
    ended = _how_it_ended(program, limits)
    status: Status
    if judge is None:
        status, detail = ended or ("finished", "")
        return status, detail, None
    verdict = judge.verdict
    if verdict is not None and verdict["passed"] is True:
        return "passed", "", wire.decode(verdict["result"])
    if ended is not None:
        return (*ended, None)
    if verdict is None:
        status, detail = _how_it_ended(judge, limits) or ("error", "no verdict")
        return status, f"the tests: {detail}", None
    return "failed", str(verdict["detail"]), None


def _how_it_ended(process: _Process, limits: Limits) -> tuple[Status, str] | None:
    """Status and detail of a process that did not end well by itself; None of one that did, or that the host
    ended."""
    report = process.report
    assert report is not None
    if process.output_bytes > limits.output_bytes:
        return "output", f"more than {limits.output_bytes} bytes of output"
    if report["ended_by"] == "time":
        return "timeout", f"more than {limits.wall_seconds:g} s by the clock"
    last_line = (process.text("stderr").strip().splitlines() or [""])[-1][:300]
    code = os.waitstatus_to_exitcode(report["status"])
    if code < 0 and report["cpu_seconds"] >= _CPU_LIMIT_SLACK * limits.cpu_seconds:
        return "timeout", f"more than {limits.cpu_seconds} s of processor time"
    # The host ends a program with SIGKILL; one that was ending by itself at that moment shows its own status.
    if code == 0 or (report["ended_by"] == "host" and code == -signal.SIGKILL):
        return None
    if code < 0:
        return "killed", f"killed by {signal.Signals(-code).name}"
    if last_line.startswith("MemoryError"):
        return "memory", f"more than {limits.memory_mib} MiB of memory"
    return "error", last_line or f"exited with status {code}"


def _message(content: bytearray) -> dict[str, Any] | None:
    # A supervisor that refused may be followed by its own report; the first message counts.
    if len(content) < 4:
        return None
    length = int.from_bytes(content[:4], "little")
    return json.loads(content[4 : 4 + length]) if len(content) >= 4 + length else None


def _environment() -> dict[str, str]:
    # The seed makes the order of sets, and so verdicts, reproducible. Some interpreters find their library by
    # the other.
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return kept | {"PYTHONHASHSEED": "0"}
