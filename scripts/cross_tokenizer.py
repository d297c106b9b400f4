"""Held-out bits per byte of a student, after a teacher with another tokenizer, one with its own, and none.

``python scripts/cross_tokenizer.py RECIPE [a.b=c ...] --same FOLDER [--rates 2e-4 5e-4] [--seeds 0 1 2]``

RECIPE is one with ``train.vocabulary: bytes`` (recipes/cross_tokenizer_*.yaml). Each run trains the same
student on the same rows for the same number of steps, as the recipe says, in one of these arms:

* ``sft``: the rows' likelihood (sequence-level distillation where the teacher wrote them);
* ``masked``: the likelihood of what the other teacher finds likelier than the student;
* ``bytes``: forward KL of the next byte, from the other teacher;
* ``other``: the recipe's method and teacher;
* ``same``: the same method, from the teacher in FOLDER, which has the student's tokenizer.

Bits per byte are those of the answers of the recipe's held-out rows (the end not counted), so that models
with any tokenizer are compared. Half of these rows choose each arm's rate, on the first seed, and the other
seeds run at that rate; the table is of the other half. The
untrained student and both teachers are measured too, and so is each checkpoint that the recipe saves
(``train.save_strategy=steps train.save_steps=10``). Results are one line each in ``results.jsonl``; a run
that was killed goes on with what is missing. A share is the part of what ``same`` gains over the untrained
student that an arm gains.

Rows that the other teacher wrote, for all arms:
``hpd generate RECIPE "generate={output: rows.jsonl, max_new_tokens: 48, truncated: keep}"``, then
``data.path=rows.jsonl data.name=null "data.columns={prompt: prompt, completion: completion}"``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd.config import load_recipe
from hpd.files import JsonLines
from hpd.training.plan import plan
from hpd.training.run import train

ARMS = ("sft", "masked", "bytes", "other", "same")
_FIGURES = ("tuning", "bits_per_byte")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="a.b=c, as hpd train takes them")
    parser.add_argument("--same", required=True, help="a teacher with the student's tokenizer")
    parser.add_argument("--output", type=Path, default=Path("runs/cross_tokenizer"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates; default: the recipe's")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    given = parser.parse_args()
    compare(given.recipe, given.same, given.output, given.seeds, given.overrides, given.rates, given.arms)


def compare(
    recipe: Path,
    same: str,
    output: Path,
    seeds: Sequence[int],
    overrides: Sequence[str],
    rates: Sequence[float] | None = None,
    arms: Sequence[str] = ARMS,
) -> None:
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
            results.append({"arm": name, **measured(folder, rows)})
    for seed in seeds:
        for arm in arms:
            tried = rates or [given.train["learning_rate"]]
            if seed != seeds[0]:
                tried = [best_rate(results.read(), arm, seeds[0])]
            for rate in tried:
                key = {"arm": arm, "rate": rate, "seed": seed}
                if any(key.items() <= line.items() for line in results.read()):
                    continue
                run = output / f"{arm}-{rate:g}-{seed}"
                about = [f"train.seed={seed}", f"train.learning_rate={rate}", f"output_dir={run}"]
                changed = load_recipe(recipe, [*overrides, *about, *_changes(arm, same)])
                # A run may have ended and its line be missing: it was killed in between.
                done = run / "summary.json"
                summary = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else train(changed)
                found = {"steps": summary["steps"], "seconds": summary["train seconds"]}
                ended = measured(str(run), rows)
                saved = _saved(run, found["steps"])
                curve = [[step, measured(folder, rows)["bits_per_byte"]] for step, folder in saved]
                curve.append([found["steps"], ended["bits_per_byte"]])
                results.append({**key, **ended, **found, "curve": curve})
    print(table(results.read()), flush=True)


def _changes(arm: str, same: str) -> list[str]:
    plain = ["train.vocabulary=error"]
    return {
        # Nobody asks the teacher of sft: the student itself is the smallest one at hand.
        "sft": [*plain, "method=sft", "teacher=self"],
        "masked": ["method=masked_sft"],
        "bytes": ["method=forward_kl"],
        "other": [],
        "same": [*plain, f"teacher={same}"],
    }[arm]


def _saved(run: Path, steps: int) -> Iterator[tuple[int, str]]:
    """Steps and folder of each checkpoint before the end of a run: at the end stands the student itself."""
    for step in sorted(int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*")):
        if step < steps:
            yield step, str(run / f"checkpoint-{step}")


def measured(folder: str, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Bits per byte of the rows that choose a rate, and of the others."""
    parts = dict(zip(_FIGURES, (rows[::2], rows[1::2]), strict=True))
    return {name: bits_per_byte(folder, part) for name, part in parts.items()}


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
    """Means over seeds at each arm's best rate, and its share of what the teacher with the same tokenizer
    gains."""
    means = {}
    for arm in dict.fromkeys(line["arm"] for line in lines):
        chosen = [line for line in lines if line["arm"] == arm]
        if arm in ARMS:
            rate = best_rate(chosen, arm, chosen[0]["seed"])
            chosen = [line for line in chosen if line["rate"] == rate]
        values = [line["bits_per_byte"] for line in chosen]
        means[arm] = (sum(values) / len(values), min(values), max(values), len(values), chosen[0].get("rate"))
    gain = means["student"][0] - means["same"][0] if "same" in means else math.nan
    out = ["| | rate | bits per byte | least, most | seeds | share |", "|---|---|---|---|---|---|"]
    for arm, (mean, least, most, count, rate) in means.items():
        share = f"{(means['student'][0] - mean) / gain:.0%}" if arm in ARMS and "same" in means else ""
        shown = "" if rate is None else f"{rate:g}"
        out.append(f"| {arm} | {shown} | {mean:.3f} | {least:.3f}, {most:.3f} | {count} | {share} |")
    return "\n".join(out)


def best_rate(lines: Sequence[dict[str, Any]], arm: str, seed: int) -> float:
    """The rate with which the arm's run of the first seed ended best on the rows for tuning."""
    of_seed = [line for line in lines if line["arm"] == arm and line["seed"] == seed]
    return float(min(of_seed, key=lambda line: line["tuning"])["rate"])


if __name__ == "__main__":
    main()
