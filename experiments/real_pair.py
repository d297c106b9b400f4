"""The base of real_pair.yaml: SmolLM2-135M, its cut student after repair, and problems solved in two texts.

`make models` writes the pair to models/. The problems are GSM8K's training rows: `GSM8K` is a file with the
columns question and answer (JSON Lines, gzip allowed); without it they come from the Hub.

Made once, a part at a time, and kept in `$HPD_HOME/tasks`, each part resumed where it was stopped:

* `rows/teacher.jsonl`: solutions that the teacher wrote at temperature 1, cut ones left out;
* `rows/human.jsonl`: GSM8K's own solutions of the same problems in the same order;
* `validation/teacher.jsonl`, `validation/human.jsonl`: other problems, in the same two texts;
* `test.jsonl`: problems of which no solution is read, for a student to continue by itself;
* `student`: the cut student after REPAIR_STEPS of forward KL on other rows that the teacher wrote;
* `cache`: the teacher's hidden states over both texts and the validation rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpd.config.load import load_recipe
from hpd.data.rows import load_prompts
from hpd.experiments.tasks.prepared import copy_to, home, prepare, write_rows
from hpd.files import JsonLines, digest_json
from hpd.generate import generate
from hpd.training.run import train

TEACHER, CUT = "models/smollm2-135m", "models/smollm2-135m-10l"
REPAIR_ROWS, REPAIR_STEPS, REPAIR_BATCH = 224, 300, 4
MOST_ROWS, HELD_OUT = 240, 48
NEW_TOKENS, MAX_LENGTH = 96, 224


def real_pair(folder: Path) -> dict[str, Any]:
    """The recipe of a run: hpd on the teacher's text, from the cache."""
    sizes = [REPAIR_ROWS, REPAIR_STEPS, REPAIR_BATCH, MOST_ROWS, HELD_OUT, NEW_TOKENS, MAX_LENGTH]
    choices = [*sizes, _source(), TEACHER, CUT]
    written = _written(home() / "tasks" / f"real_pair-text-{digest_json(choices)[:8]}")
    made = prepare("real_pair", choices, lambda target: _build(target, written))
    for name in ("rows", "validation"):
        copy_to(folder / name, made / name)
    teacher = {"type": "cached", "model": TEACHER, "path": str(made / "cache")}
    test = {"task": "exact-match", "data": str(made / "test.jsonl"), "max_new_tokens": NEW_TOKENS}
    return {**_recipe(made, made / "rows" / "teacher.jsonl"), "teacher": teacher, "eval": test}


def _source() -> str:
    return os.environ.get("GSM8K", "openai/gsm8k")


def _data(path: str, **others: Any) -> dict[str, Any]:
    return {"path": path, "columns": {"prompt": "question", "completion": "answer"}, **others}


def _written(folder: Path) -> Path:
    """The teacher's solutions at temperature 1, written where they are missing."""
    output = folder / "written.jsonl"
    if not output.exists():
        folder.mkdir(parents=True, exist_ok=True)
        questions = folder / "questions.jsonl"
        if not questions.exists():
            write_rows(questions, _questions())
        tree = {
            "student": CUT,
            "teacher": TEACHER,
            "data": {"path": str(questions)},
            "generate": {
                "output": str(output),
                "temperature": 1.0,
                "max_new_tokens": NEW_TOKENS,
                "batch_size": 32,
            },
            "output_dir": str(folder / "unused"),
        }
        generate(load_recipe(tree))
    return output


def _questions() -> list[dict[str, str]]:
    """Problems as plain prompts, with GSM8K's own solutions."""
    source = _source()
    name = {} if Path(source).exists() else {"name": "main"}
    tree = {"student": CUT, "teacher": TEACHER, "data": _data(source, **name), "output_dir": "unused"}
    found = []
    # A solution may be cut, and its problem is then left out: a third of them ends in time.
    most = (REPAIR_ROWS + MOST_ROWS + HELD_OUT) * 3
    for row in load_prompts(load_recipe(tree).data)[:most]:
        found.append({"prompt": f"Question: {row.prompt}\nAnswer:", "completion": f" {row.reference}"})
    return found


def _build(target: Path, written: Path) -> Mapping[str, Any]:
    questions = list(JsonLines(written.parent / "questions.jsonl").read())
    human = {row["prompt"]: row["completion"] for row in questions}
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in JsonLines(written).read()]
    if len(rows) < (needed := HELD_OUT + MOST_ROWS + REPAIR_ROWS):
        raise ValueError(
            f"The teacher finished {len(rows)} solutions within {NEW_TOKENS} tokens, and {needed} are "
            "needed: give more problems (GSM8K), or raise NEW_TOKENS in real_pair.py."
        )
    held_out = rows[:HELD_OUT]
    shared = rows[HELD_OUT:][:MOST_ROWS]
    repair = rows[HELD_OUT + MOST_ROWS :][:REPAIR_ROWS]
    used = {row["prompt"] for row in (*held_out, *shared, *repair)}
    test = [row for row in questions if row["prompt"] not in used][:HELD_OUT]
    _write_texts(target / "validation", held_out, human)
    write_rows(target / "test.jsonl", [{"prompt": r["prompt"], "answer": r["completion"]} for r in test])
    _write_texts(target / "rows", shared, human)
    write_rows(target / "repair.jsonl", repair)
    repaired = written.parent / "repaired"
    if not (repaired / "summary.json").exists():
        tree = _recipe(target, target / "repair.jsonl")
        settings = {
            "learning_rate": 5.0e-4,
            "max_steps": REPAIR_STEPS,
            "save_steps": 50,
            "save_strategy": "steps",
        }
        train(
            load_recipe(
                {
                    **tree,
                    "student": CUT,
                    "method": "forward_kl",
                    "train": {**tree["train"], **settings, "per_device_train_batch_size": REPAIR_BATCH},
                    "output_dir": str(repaired),
                }
            )
        )
    (target / "student").symlink_to(repaired, target_is_directory=True)
    return {**_recipe(target, target / "rows"), "student": str(repaired)}


def _write_texts(folder: Path, rows: list[dict[str, str]], human: Mapping[str, str]) -> None:
    """The same problems with the teacher's solutions and with people's."""
    write_rows(folder / "teacher.jsonl", rows)
    write_rows(folder / "human.jsonl", [{**row, "completion": human[row["prompt"]]} for row in rows])


def _recipe(made: Path, rows: Path) -> dict[str, Any]:
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
            "per_device_train_batch_size": 4,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "warmup_steps": 5,
            "weight_decay": 0.0,
            "max_length": MAX_LENGTH,
            "gradient_checkpointing": False,
            "logging_steps": 8,
            "save_strategy": "no",
        },
    }
