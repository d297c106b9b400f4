"""The bases of real_pair.yaml and real_pair_gpu.yaml: SmolLM2-135M, its repaired cut student, and two texts.

`make models` writes the pair to models/. The problems are GSM8K's training rows: `GSM8K` is a file with the
columns question and answer (JSON Lines, gzip allowed); without it they come from the Hub.

Made once, a part at a time, and kept in `$HPD_HOME/tasks`, each part resumed where it was stopped:

* `rows/teacher.jsonl`: solutions that the teacher wrote at temperature 1, cut ones left out;
* `rows/human.jsonl`: GSM8K's own solutions of the same problems in the same order;
* `validation/teacher.jsonl`, `validation/human.jsonl`: other problems, in the same two texts;
* `test.jsonl`: problems of which no solution is read, for a student to continue by itself;
* `student`: the cut student after some steps of forward KL on other rows that the teacher wrote;
* `cache`: the teacher's hidden states over both texts and the validation rows.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hpd.config.load import load_recipe
from hpd.data.rows import load_prompts
from hpd.experiments.tasks.prepared import copy_to, home, prepare, write_rows
from hpd.files import JsonLines, digest_json
from hpd.generate import generate
from hpd.training.run import train

TEACHER, CUT = "models/smollm2-135m", "models/smollm2-135m-10l"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is written, repaired and learned; lengths in tokens, of a solution and of a whole row."""

    repair_rows: int
    repair_steps: int
    batch: int
    most_rows: int
    held_out: int
    new_tokens: int
    max_length: int


CPU = Sizes(
    repair_rows=224, repair_steps=300, batch=4, most_rows=240, held_out=48, new_tokens=96, max_length=224
)
GPU = Sizes(
    repair_rows=1024, repair_steps=400, batch=16, most_rows=1024, held_out=128, new_tokens=256, max_length=448
)


def real_pair(folder: Path) -> dict[str, Any]:
    """The recipe of a run: hpd on the teacher's text, from the cache."""
    return _recipe_of(folder, CPU)


def real_pair_gpu(folder: Path) -> dict[str, Any]:
    """The same with four times the rows, longer solutions and larger batches."""
    return _recipe_of(folder, GPU)


def _recipe_of(folder: Path, sizes: Sizes) -> dict[str, Any]:
    choices = [*dataclasses.astuple(sizes), _source(), TEACHER, CUT]
    written = _written(home() / "tasks" / f"real_pair-text-{digest_json(choices)[:8]}", sizes)
    made = prepare("real_pair", choices, lambda target: _build(target, written, sizes))
    for name in ("rows", "validation"):
        copy_to(folder / name, made / name)
    teacher = {"type": "cached", "model": TEACHER, "path": str(made / "cache")}
    test = {"task": "exact-match", "data": str(made / "test.jsonl"), "max_new_tokens": sizes.new_tokens}
    return {**_recipe(made, made / "rows" / "teacher.jsonl", sizes), "teacher": teacher, "eval": test}


def _source() -> str:
    return os.environ.get("GSM8K", "openai/gsm8k")


def _data(path: str, **others: Any) -> dict[str, Any]:
    return {"path": path, "columns": {"prompt": "question", "completion": "answer"}, **others}


def _written(folder: Path, sizes: Sizes) -> Path:
    """The teacher's solutions at temperature 1, written where they are missing."""
    output = folder / "written.jsonl"
    if not output.exists():
        folder.mkdir(parents=True, exist_ok=True)
        questions = folder / "questions.jsonl"
        if not questions.exists():
            write_rows(questions, _questions(sizes))
        tree = {
            "student": CUT,
            "teacher": TEACHER,
            "data": {"path": str(questions)},
            "generate": {
                "output": str(output),
                "temperature": 1.0,
                "max_new_tokens": sizes.new_tokens,
                "batch_size": 1024 if torch.cuda.is_available() else 32,
            },
            "output_dir": str(folder / "unused"),
        }
        generate(load_recipe(tree))
    return output


def _questions(sizes: Sizes) -> list[dict[str, str]]:
    """Problems as plain prompts, with GSM8K's own solutions."""
    source = _source()
    name = {} if Path(source).exists() else {"name": "main"}
    tree = {"student": CUT, "teacher": TEACHER, "data": _data(source, **name), "output_dir": "unused"}
    found = []
    # A solution may be cut, and its problem is then left out: a third of them ends in time.
    most = (sizes.repair_rows + sizes.most_rows + sizes.held_out) * 3
    for row in load_prompts(load_recipe(tree).data)[:most]:
        found.append({"prompt": f"Question: {row.prompt}\nAnswer:", "completion": f" {row.reference}"})
    return found


def _build(target: Path, written: Path, sizes: Sizes) -> Mapping[str, Any]:
    questions = list(JsonLines(written.parent / "questions.jsonl").read())
    human = {row["prompt"]: row["completion"] for row in questions}
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in JsonLines(written).read()]
    if len(rows) < (needed := sizes.held_out + sizes.most_rows + sizes.repair_rows):
        raise ValueError(
            f"The teacher finished {len(rows)} solutions within {sizes.new_tokens} tokens, and {needed} are "
            "needed: give more problems (GSM8K), or raise new_tokens in real_pair.py."
        )
    held_out = rows[: sizes.held_out]
    shared = rows[sizes.held_out :][: sizes.most_rows]
    repair = rows[sizes.held_out + sizes.most_rows :][: sizes.repair_rows]
    used = {row["prompt"] for row in (*held_out, *shared, *repair)}
    test = [row for row in questions if row["prompt"] not in used][: sizes.held_out]
    _write_texts(target / "validation", held_out, human)
    write_rows(target / "test.jsonl", [{"prompt": r["prompt"], "answer": r["completion"]} for r in test])
    _write_texts(target / "rows", shared, human)
    write_rows(target / "repair.jsonl", repair)
    repaired = written.parent / "repaired"
    if not (repaired / "summary.json").exists():
        tree = _recipe(target, target / "repair.jsonl", sizes)
        settings = {
            "learning_rate": 5.0e-4,
            "max_steps": sizes.repair_steps,
            "save_steps": 50,
            "save_strategy": "steps",
        }
        train(
            load_recipe(
                {
                    **tree,
                    "student": CUT,
                    "method": "forward_kl",
                    "train": {**tree["train"], **settings},
                    "output_dir": str(repaired),
                }
            )
        )
    (target / "student").symlink_to(repaired, target_is_directory=True)
    return {**_recipe(target, target / "rows", sizes), "student": str(repaired)}


def _write_texts(folder: Path, rows: list[dict[str, str]], human: Mapping[str, str]) -> None:
    """The same problems with the teacher's solutions and with people's."""
    write_rows(folder / "teacher.jsonl", rows)
    write_rows(folder / "human.jsonl", [{**row, "completion": human[row["prompt"]]} for row in rows])


def _recipe(made: Path, rows: Path, sizes: Sizes) -> dict[str, Any]:
    return {
        "student": str(made / "student"),
        "teacher": TEACHER,
        "method": "hpd",
        "data": {
            "path": str(rows),
            "validation": {text: str(made / "validation" / f"{text}.jsonl") for text in ("teacher", "human")},
        },
        "train": {
            "learning_rate": 2.0e-4,
            "per_device_train_batch_size": sizes.batch,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "warmup_steps": 5,
            "weight_decay": 0.0,
            "max_length": sizes.max_length,
            "gradient_checkpointing": False,
            "logging_steps": 8,
            "save_strategy": "no",
        },
    }
