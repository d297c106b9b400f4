"""Loss curves of one run in float32, with bfloat16 products, and with the gradient filter.

    python benchmarks/curves.py RECIPE [a.b=c ...] [--steps 200] [--ways WAYS] [--output FOLDER] [--json]
    python benchmarks/curves.py --docs    # docs/performance.md from the stored result, nothing measured

RECIPE names student, teacher and data. The runs of a method see the same rows, draws and rate in the same
order, from a cached teacher that is written once. The table has the mean loss of each quarter; the mean over
steps of |loss - loss in float32|, relative to the mean loss; and the forward KL on validation rows at the
end. `nudged` is a run in float32 from weights that are off by one part in 10,000, as rounding would leave
them: how far it gets from float32 is what any small difference leads to. Finished runs are kept in FOLDER
and not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from timing import count, machine, replace_block, store_or_check, stored, table

from hpd.config import load_recipe
from hpd.models.load import load_model, load_tokenizer
from hpd.training.caching import write_cache
from hpd.training.run import train

BASE = "float32"
WAYS: dict[str, list[str]] = {
    BASE: [],
    "nudged": [],
    "bfloat16": ["train.bf16=true", "train.use_cpu=true"],
    "filter 2e-5": ["train.gradient_filter=2e-5"],
    "filter 5e-5": ["train.gradient_filter=5e-5"],
    "filter 1e-4": ["train.gradient_filter=1e-4"],
}
NUDGE = 1e-4


def curves(
    recipe: Path, overrides: list[str], methods: list[str], ways: list[str], steps: int, output: Path
) -> dict[str, Any]:
    """Losses of each step and the validation forward KL of each way of each method."""
    common = [*overrides, f"train.max_steps={steps}", "train.logging_steps=1", "train.save_strategy=no"]
    common += ["eval=null", "cache=null"]
    cache = output / "cache"
    if not cache.is_dir():
        write_cache(load_recipe(recipe, [*common, f"cache={{path: {cache}}}"]))
    nudged = output / "nudged"
    if not nudged.is_dir():
        _nudge(load_recipe(recipe, common).student, nudged)
    common += ["teacher=null", "teacher.type=cached", f"teacher.path={cache}"]
    found: dict[str, Any] = {}
    for method in methods:
        for way in [BASE, *ways]:
            folder = output / f"{method}-{way.replace(' ', '-')}"
            given = [*common, *WAYS[way], f"method={method}", f"output_dir={folder}"]
            given += [f"student.model={nudged}"] if way == "nudged" else []
            if not (folder / "summary.json").is_file():
                train(load_recipe(recipe, given), overwrite=folder.is_dir())
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            summary = json.loads((folder / "summary.json").read_text())
            found.setdefault(method, {})[way] = {
                "losses": [line["loss"] for line in lines if "loss" in line],
                "forward_kl": [summary["forward_kl before"], summary["forward_kl after"]],
            }
    return found


def _nudge(source: Any, folder: Path) -> None:
    """A copy of the student with each matrix off by one part in 10,000, as rounding would leave it."""
    model = load_model(source, "student")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + NUDGE * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    load_tokenizer(source, "student").save_pretrained(folder)


def tables(result: dict[str, Any]) -> str:
    """A stored result as docs/performance.md shows it."""
    place, steps = result["machine"], result["steps"]
    rows = []
    for method, ways in result["curves"].items():
        base = torch.tensor(ways[BASE]["losses"])
        for way, line in ways.items():
            losses = torch.tensor(line["losses"])
            parts = [float(part.mean()) for part in losses.chunk(4)]
            apart = float((losses - base).abs().mean() / base.mean())
            rows.append(
                [
                    f"`{method}`",
                    way,
                    *(f"{part:.3f}" for part in parts),
                    "" if way == BASE else f"{apart:.1e}",
                    f"{line['forward_kl'][1]:.4f}",
                ]
            )
    quarter = steps // 4
    spans = [f"loss, steps {i * quarter + 1}-{(i + 1) * quarter}" for i in range(4)]
    header = ["method", "", *spans, "from float32", "validation KL"]
    about = f"{place['cpu']}, torch {place['torch']}, {place['date']}."
    return f"{about}\n\n{table(header, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", type=Path)
    parser.add_argument("overrides", nargs="*", help="of the recipe, as in `hpd train`")
    parser.add_argument("--methods", default="hpd,forward_kl")
    parser.add_argument("--ways", default=",".join(list(WAYS)[1:]), help="to be compared with float32")
    parser.add_argument("--steps", type=count, default=200)
    parser.add_argument("--output", type=Path, default=Path("runs/curves"))
    parser.add_argument("--json", action="store_true", help="store in benchmarks/results/curves.json")
    parser.add_argument("--docs", action="store_true", help="write the stored result into the page, and stop")
    options = parser.parse_intermixed_args()
    if options.docs:
        replace_block("curves table", tables(stored("curves")))
        return
    if options.recipe is None:
        parser.error("name the recipe whose student, teacher and data are taken.")
    methods, ways = options.methods.split(","), options.ways.split(",")
    if unknown := set(ways) - set(list(WAYS)[1:]):
        parser.error(f"--ways are of {', '.join(list(WAYS)[1:])}, got {', '.join(sorted(unknown))}.")
    found = curves(options.recipe, options.overrides, methods, ways, options.steps, options.output)
    result = {"machine": machine(), "steps": options.steps, "curves": found, "ratios": {}}
    print(tables(result))
    store_or_check("curves", result, options.json, False)


if __name__ == "__main__":
    main()
