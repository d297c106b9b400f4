"""Cuts of SmolLM2-135M, before and after equal steps of forward KL: docs/evidence/prune.md.

``python scripts/prune_figure.py --teacher models/smollm2-135m --fixed models/smollm2-135m-10l --data
train.jsonl.gz --output runs/prune`` cuts the teacher to 15 and 10 layers by block influence (`hpd prune`),
puts the ten layers of `make models` and fifteen evenly spread ones next to them, trains each alike, and
prints the table. It stops and resumes anywhere: cuts, runs and checkpoints are kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hpd import load_recipe, train
from hpd.config.models import ModelConfig
from hpd.models.export import new_folder
from hpd.models.load import load_model, load_tokenizer
from hpd.models.pruning import KeptParts, cut_model
from hpd.progress import Progress
from hpd.training.prune import prune

RECIPE = Path(__file__).parents[1] / "recipes" / "gsm8k_smollm2.yaml"
# The first rows, which the recipe trains on too (but for those that it holds out).
CALIBRATION = 64
COLUMNS = {"prompt": "question", "completion": "answer"}
EVEN = tuple(round(place * 29 / 14) for place in range(15))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("teacher", "fixed", "data", "output"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=2, help="of a step")
    parser.add_argument("--max-length", type=int, default=128)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    print("| layers | chosen by | kept | forward KL before | after | its entropy after |")
    print("|---|---|---|---|---|---|")
    for layers, rule in ((10, "influence"), (10, "removal"), (15, "influence"), (15, "even")):
        student = given.fixed if rule == "removal" else cut_to(given, layers, rule)
        row = measure(given, student, given.output / f"{rule}-{layers}")
        print(f"| {layers} | {rule} | {kept_in(student)} | {row} |", flush=True)


def cut_to(given: Any, layers: int, rule: str) -> Path:
    """The folder of a cut, which is written where it is not there."""
    folder: Path = given.output / "models" / f"{rule}-{layers}"
    if folder.exists():
        return folder
    folder.parent.mkdir(exist_ok=True)
    if rule == "influence":
        prune(
            str(given.teacher),
            str(given.data),
            folder,
            layers=layers,
            columns=COLUMNS,
            form="chat",
            limit=CALIBRATION,
        )
        return folder
    source = ModelConfig(model=str(given.teacher))
    model = load_model(source, "teacher")
    cut_model(model, KeptParts(EVEN, None))
    with new_folder(folder) as draft:
        model.save_pretrained(draft)
        load_tokenizer(source, "teacher").save_pretrained(draft)
    return folder


def kept_in(folder: Path) -> str:
    """The layers, where the folder says them."""
    about = folder / "pruning.json"
    if about.is_file():
        return ", ".join(map(str, json.loads(about.read_text(encoding="utf-8"))["layers"]))
    return ", ".join(map(str, EVEN)) if folder.name.startswith("even") else "as `make models`"


def measure(given: Any, student: Path, folder: Path) -> str:
    """Train one cut, or take the finished run, and return its figures."""
    values = {
        "student": student,
        "teacher": given.teacher,
        "method": "forward_kl",
        "data.path": given.data,
        "data.name": "null",
        "data.limit": 256,
        "train.max_steps": given.steps,
        "train.per_device_train_batch_size": given.rows,
        "train.max_length": given.max_length,
        "train.save_strategy": "steps",
        "train.save_steps": 10,
        "train.save_total_limit": 1,
        "output_dir": folder,
    }
    if not (folder / "summary.json").is_file():
        train(load_recipe(RECIPE, [f"{name}={value}" for name, value in values.items()]), progress=Progress())
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return " | ".join(
        f"{summary[name]:.2f}" for name in ("forward_kl before", "forward_kl after", "student_entropy after")
    )


if __name__ == "__main__":
    main()
