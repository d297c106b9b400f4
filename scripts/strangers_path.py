"""The way of a stranger, timed: from a clone to the demo, from rows of their own to a dry run, from a run
to an answer. Writes `docs/evidence/strangers-path.md` with `--write`.

    python scripts/strangers_path.py --write

Every step is a command as a person types it, in an empty folder and without a network. The libraries (torch
and the others) are those of the Python that runs this script: their download is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "evidence" / "strangers-path.md"
OWN_ROWS = 200
OWN_STEPS = 20


class Step(NamedTuple):
    """A command and what it took."""

    part: str
    command: str
    wall: float
    """Seconds that the person waits."""
    busy: float
    """Seconds of processor time, children included."""


class Way:
    """The steps that were taken, in a folder of their own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.steps: list[Step] = []
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        # Of the clone, not of where this script lies.
        self.environment.pop("PYTHONPATH", None)

    def take(self, part: str, shown: str, command: Sequence[str], said: str = "", typed: str = "") -> None:
        """Run a command; it has to succeed, and to say `said`.

        Raises:
            RuntimeError: it did not.
        """
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, input=typed, capture_output=True, text=True
        )
        wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode or said not in done.stdout + done.stderr:
            raise RuntimeError(f"{shown} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
        busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.steps.append(Step(part, shown, wall, busy))
        print(f"{wall:7.1f} s  {busy:7.1f} s  {shown}", flush=True)


def walk(folder: Path, demo_steps: int) -> list[Step]:
    """Take every step in `folder`."""
    way = Way(folder)
    clone = folder / "hybrid-policy-distillation"
    way.take("Clone to demo", "git clone ...", ["git", "clone", "-q", str(ROOT), str(clone)])
    way.environment["PYTHONPATH"] = str(clone)  # instead of pip install
    hpd = [sys.executable, "-m", "hpd"]
    way.take("Clone to demo", "hpd --version", [*hpd, "--version"], "hpd ")
    demo = f"hpd demo train.max_steps={demo_steps}"
    way.take("Clone to demo", demo, [*hpd, "demo", f"train.max_steps={demo_steps}"], "student and metrics in")
    rows = [{"question": f"{i}+{i + 1}=", "answer": f" {2 * i + 1}"} for i in range(OWN_ROWS)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    models = clone / "hpd" / "demo"
    init = ["--student", "runs/demo", "--teacher", str(models / "teacher"), "--data", "mine.jsonl"]
    shown = "hpd init --student ... --teacher ... --data mine.jsonl"
    columns = ["--prompt-column", "question", "--completion-column", "answer", "--output-dir", "runs/mine"]
    way.take("Own data to dry run", shown, [*hpd, "init", *init, *columns])
    dry = "hpd train recipe.yaml --dry-run"
    way.take("Own data to dry run", dry, [*hpd, "train", "recipe.yaml", "--dry-run"], "learned")
    steps = [f"train.max_steps={OWN_STEPS}", "train.save_strategy=no"]
    shown = f"hpd train recipe.yaml train.max_steps={OWN_STEPS} train.save_strategy=no"
    way.take("Run to chat", shown, [*hpd, "train", "recipe.yaml", *steps], "student and metrics in")
    chat = [*hpd, "chat", "runs/mine", "--max-new-tokens", "20"]
    way.take("Run to chat", "hpd chat runs/mine --max-new-tokens 20", chat, typed="3+4=\n")
    return way.steps


def page(steps: Sequence[Step]) -> str:
    """The page of these steps."""
    parts = dict.fromkeys(step.part for step in steps)
    lines = []
    for part in parts:
        own = [step for step in steps if step.part == part]
        lines += [f"| {part} | `{s.command}` | {s.wall:.0f} | {s.busy:.0f} |" for s in own]
        lines.append(
            f"| **{part}** | | **{sum(s.wall for s in own):.0f}** | **{sum(s.busy for s in own):.0f}** |"
        )
    table = "\n".join(["| part | command | waited, s | processor, s |", "|---|---|---|---|", *lines])
    machine = f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"""# A stranger's path, timed

How long the first commands take, typed one after the other. Label: measured (CPU).

    python scripts/strangers_path.py --write

{table}

Machine: {machine}, {time.strftime("%Y-%m-%d")}. The load average over five minutes was
{os.getloadavg()[1]:.1f} and the commands ran at priority {os.nice(0)} (0 is usual, 19 the lowest): with other
programs running, the waiting is longer than on an idle machine, and processor time is what to compare.
Method: each command once, in an empty folder, without a network; the time is that of the whole process,
imports included. The clone is of a local repository.

**Not in it**: the installation of torch and the libraries, a download of some gigabytes; reading; and models
that come from the Hub. Own data are {OWN_ROWS} rows of sums, the student is the demo's (0.11 M weights), the
teacher has 0.8 M: with a real pair everything but the imports takes longer.

Next: [install](../start/install.md)
"""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument("--demo-steps", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = page(walk(Path(folder), options.demo_steps))
    if options.write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
