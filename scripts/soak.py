"""Run a recipe for an hour and watch memory, file handles and threads: does anything grow?

    python scripts/soak.py recipe.yaml [A.B=C ...] --seconds 3600 --output soak.json

The training process is sampled every ten seconds from /proc (Linux). The first tenth of the time is left out:
allocators and caches fill there. Growth is the slope of a least-squares line through the rest, per hour, and
the difference of the medians of the last and the first third. The run ends at the time limit by SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

_INTERVAL_SECONDS = 10.0


def sample(pid: int) -> dict[str, float]:
    """Resident memory (MiB), open file handles and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in status if ":" in line)
    return {
        "rss_mib": int(fields["VmRSS"].split()[0]) / 1024,
        "file_handles": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(fields["Threads"]),
    }


def watch(command: list[str], seconds: float) -> list[dict[str, float]]:
    """Samples of the command's process, until it ends or the time is over."""
    samples = []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    started = time.monotonic()
    while process.poll() is None and time.monotonic() - started < seconds:
        time.sleep(_INTERVAL_SECONDS)
        try:
            samples.append({"seconds": round(time.monotonic() - started, 1), **sample(process.pid)})
        except (FileNotFoundError, ProcessLookupError, KeyError):
            break  # it ended between two looks
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    if process.returncode not in (0, 75, -signal.SIGTERM):
        sys.exit(f"the run failed with {process.returncode}: {errors[-2000:]}")
    return samples


def growth(samples: list[dict[str, float]], name: str) -> dict[str, float]:
    """Level and trend of one figure after the first tenth of the time."""
    kept = [s for s in samples if s["seconds"] >= samples[-1]["seconds"] / 10]
    hours, values = [s["seconds"] / 3600 for s in kept], [s[name] for s in kept]
    third = max(1, len(kept) // 3)
    return {
        "median": statistics.median(values),
        "largest": max(values),
        "per_hour": round(float(np.polyfit(hours, values, 1)[0]), 3),
        "last_third_minus_first": round(
            statistics.median(values[-third:]) - statistics.median(values[:third]), 3
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--output", type=Path, default=Path("soak.json"))
    options = parser.parse_args()
    samples = watch(
        [sys.executable, "-m", "hpd", "train", options.recipe, *options.overrides], options.seconds
    )
    figures = {name: growth(samples, name) for name in ("rss_mib", "file_handles", "threads")}
    result = {"seconds": samples[-1]["seconds"], "samples": len(samples), **figures, "series": samples}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "series"}, indent=2))


if __name__ == "__main__":
    main()
