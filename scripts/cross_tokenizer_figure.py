"""The tables and the figure of docs/any-teacher.md, from stored results of scripts/cross_tokenizer.py.

``python scripts/cross_tokenizer_figure.py`` reads docs/results/cross_tokenizer/NAME.jsonl, prints a
table for each and draws docs/images/cross-tokenizer.png: held-out bits per byte over steps.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from cross_tokenizer import ARMS, best_rate, table

from hpd.experiments.figures import Panel, to_files
from hpd.experiments.lines import Line, multiples_panel
from hpd.files import JsonLines, write_atomically

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS, IMAGE = DOCS / "results" / "cross_tokenizer", DOCS / "images" / "cross-tokenizer.png"
TITLES = {
    "smollm2_gemma": "student SmolLM2, on text of Gemma",
    "gemma_smollm2": "student Gemma, on text of SmolLM2",
    "smollm2_gemma_ten_passes": "student SmolLM2, ten passes",
}
NAMES = {
    "other": "hpd, other tokenizer",
    "same": "hpd, same tokenizer",
    "sft": "sft",
    "masked": "masked_sft, other tokenizer",
    "bytes": "forward_kl of the next byte",
}


def main() -> None:
    found = {name: list(JsonLines(RESULTS / f"{name}.jsonl").read()) for name in TITLES}
    for name, lines in found.items():
        print(f"{TITLES[name]}\n\n{table(lines)}\n")
    image = to_files(panel(found))["png"]
    write_atomically(IMAGE, lambda draft: draft.write_bytes(image))


def panel(found: dict[str, list[dict[str, Any]]]) -> Panel:
    """Bits per byte over steps, a plot for each direction and a line for each arm."""
    return multiples_panel(
        "cross-tokenizer",
        "Held-out bits per byte, by what the student learned from",
        {TITLES[name]: curves(lines) for name, lines in found.items()},
        x_label="step of 4 rows",
        note="Each arm at the rate that other held-out rows chose; mean over orders of the rows, bands from "
        "the least to the most. All start at the cut student, which is off the axis.",
    )


def curves(lines: list[dict[str, Any]]) -> dict[str, Line]:
    """The line of each arm, from the runs at its chosen rate that have a curve, at the steps of them all."""
    drawn: dict[str, Line] = {}
    for arm in sorted(ARMS, key=list(NAMES).index):
        of_arm = [line for line in lines if line["arm"] == arm]
        if not of_arm:
            continue
        rate = best_rate(of_arm, arm, of_arm[0]["seed"])
        runs = [dict(line["curve"]) for line in of_arm if line["rate"] == rate and len(line["curve"]) > 1]
        steps = sorted(set.intersection(*map(set, runs))) if runs else []
        drawn[NAMES[arm]] = [_point(step, [run[step] for run in runs]) for step in steps]
    return drawn


def _point(step: int, values: list[float]) -> tuple[float, float, float, float]:
    return step, statistics.mean(values), min(values), max(values)


if __name__ == "__main__":
    main()
