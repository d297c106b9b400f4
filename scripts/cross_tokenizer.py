"""Held-out bits per byte of a student, after a teacher with another tokenizer, one with its own, and none.

``python scripts/cross_tokenizer.py RECIPE [a.b=c ...] --same FOLDER [--output DIR] [--seeds 0 1 2]``

RECIPE is one with ``train.vocabulary: bytes`` (recipes/cross_tokenizer_*.yaml). Each seed trains the same
student on the same rows for the same number of steps, as the recipe says, with three losses:

* ``sft``: the rows' likelihood;
* ``other``: the recipe's method and teacher;
* ``same``: the same method, from the teacher in FOLDER, which has the student's tokenizer.

Bits per byte are those of the answers of the recipe's held-out rows (the end not counted), so that models
with any tokenizer are compared. The untrained student and both teachers are measured too. Results are one
line each in ``results.jsonl``; a run that was killed goes on with what is missing. A share is the part of
what ``same`` gains over the untrained student that an arm gains.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd.config import load_recipe
from hpd.files import JsonLines
from hpd.training.plan import plan
from hpd.training.run import train

ARMS = ("sft", "other", "same")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="a.b=c, as hpd train takes them")
    parser.add_argument("--same", required=True, help="a teacher with the student's tokenizer")
    parser.add_argument("--output", type=Path, default=Path("runs/cross_tokenizer"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    compare(arguments.recipe, arguments.same, arguments.output, arguments.seeds, arguments.overrides)


def compare(recipe: Path, same: str, output: Path, seeds: Sequence[int], overrides: Sequence[str]) -> None:
    """Measure what is missing in `output`, and print the table."""
    output.mkdir(parents=True, exist_ok=True)
    results = JsonLines(output / "results.jsonl")
    given = load_recipe(recipe, overrides)
    held_out: Any = plan(given).rows.validation
    rows = [dict(row) for row in held_out]
    before = {
        "student": given.student.model,
        "other teacher": str(given.teacher.model),
        "same teacher": same,
    }
    for name, folder in before.items():
        if not any(line["arm"] == name for line in results.read()):
            results.append({"arm": name, "bits_per_byte": bits_per_byte(folder, rows)})
    for seed in seeds:
        for arm in ARMS:
            if any((line["arm"], line.get("seed")) == (arm, seed) for line in results.read()):
                continue
            run = output / f"{arm}-{seed}"
            changes = [*overrides, f"train.seed={seed}", f"output_dir={run}", *_changes(arm, same)]
            summary = train(load_recipe(recipe, changes))
            found = {"arm": arm, "seed": seed, "bits_per_byte": bits_per_byte(str(run), rows)}
            results.append({**found, "steps": summary["steps"], "seconds": summary["train seconds"]})
    print(table(results.read()), flush=True)


def _changes(arm: str, same: str) -> list[str]:
    if arm == "other":
        return []
    plain = ["train.vocabulary=error"]
    # Nobody asks the teacher of sft: the student itself is the smallest one at hand.
    return [*plain, "method=sft", "teacher=self"] if arm == "sft" else [*plain, f"teacher={same}"]


@torch.no_grad()
def bits_per_byte(folder: str, rows: Sequence[dict[str, Any]]) -> float:
    """Negative log-likelihood of the rows' answers behind their prompts, in bits per byte of text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats, size = 0.0, 0
    for row in rows:
        before = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        start = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
        logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum"))
        size += len(row["completion"].encode())
    return nats / math.log(2) / size


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Means over seeds, and each arm's share of what the teacher with the same tokenizer gains."""
    means = {}
    for arm in dict.fromkeys(line["arm"] for line in lines):
        values = [line["bits_per_byte"] for line in lines if line["arm"] == arm]
        means[arm] = (sum(values) / len(values), min(values), max(values), len(values))
    gain = means["student"][0] - means["same"][0]
    out = ["| | bits per byte | least, most | runs | share |", "|---|---|---|---|---|"]
    for arm, (mean, least, most, count) in means.items():
        share = f"{(means['student'][0] - mean) / gain:.0%}" if arm in ARMS else ""
        out.append(f"| {arm} | {mean:.3f} | {least:.3f}, {most:.3f} | {count} | {share} |")
    return "\n".join(out)


if __name__ == "__main__":
    main()
