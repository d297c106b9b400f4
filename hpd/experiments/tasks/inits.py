"""Chains with several teachers and students, and rows of other writers: for questions about methods.

A method's lead over another may belong to one pair of models. `chain_inits` gives two teachers and nine
students that differ in their first weights and in what they read, so that a grid can be paired over them;
`foreign_chains` the same students and two teachers that write in two ways, with rows that the teachers did
not write.

`$BASE` holds `student-0` to `student-8` (the last one for tuning), `test.jsonl`, and for each teacher a
folder `teacher-0`, `teacher-1` with `model`, `cache`, `validation.jsonl` (written by it) and `rows`:

* `own.jsonl`: written by the teacher, its errors included;
* `operands.jsonl` (foreign chains): right solutions in both of the teacher's ways, but an addition's left
  operand stands first in four of five equations; in the teacher's text it does so in half of them;
* `one_sided.jsonl` (foreign chains): right solutions in equations only. The teacher rewrites the whole
  expression in half of its answers; no row shows how such an answer goes on, and the students have never
  seen one;
* `four_fifths.jsonl` (foreign chains): `one_sided` with the other way in a fifth of the rows.

All files of a teacher solve the same problems in the same order.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpd.demo.build_teacher import build_tokenizer
from hpd.demo.task import ANSWER_MARK, SPLITS, Operation, SolvedProblem, Style, evaluate, prompt_of
from hpd.experiments.tasks.chains import (
    CHOICES,
    MAX_NEW_TOKENS,
    MAX_TOKENS,
    NUM_OPERATIONS,
    NUM_ROWS,
    PRETRAINING_OPERATIONS,
    STUDENTS,
    TEACHER,
    chain_tree,
    distinct_chains,
    learn_chains,
    solve,
    written_by,
)
from hpd.experiments.tasks.prepared import copy_to, prepare, write_rows

__all__ = ["chain_inits", "foreign_chains"]

NUM_TEACHERS = 2
NUM_STUDENTS = 9
"""Eight for a grid and one for tuning."""
NUM_FOREIGN_ROWS = 1000
MOSTLY = 0.8
"""Share of the left operand first, and of equations."""
STUDENT_STEPS = 600
TEACHER_STEPS: dict[Style | None, int] = {"equations": 1400, None: 2000}
"""By the style that the teacher writes; None: both."""


def chain_inits(folder: Path) -> dict[str, Any]:
    """The recipe of teacher 0 and student 0; see the module's text."""
    return _base(folder, "chain_inits", "equations")


def foreign_chains(folder: Path) -> dict[str, Any]:
    """The same with teachers of two styles and rows of other writers."""
    return _base(folder, "foreign_chains", None)


def _base(folder: Path, name: str, style: Style | None) -> dict[str, Any]:
    shared = [*CHOICES, STUDENT_STEPS, TEACHER_STEPS[style], NUM_FOREIGN_ROWS, MOSTLY]
    for number in range(NUM_TEACHERS):
        made = prepare(
            f"{name}-teacher-{number}",
            [*shared, number],
            lambda target, seed=number: _build_teacher(target, seed, style),
        )
        own = folder / f"teacher-{number}"
        copy_to(own, made)
        if not (own / "cache").exists():
            (own / "cache").symlink_to(made / "cache", target_is_directory=True)
    for number in range(NUM_STUDENTS):
        made = prepare(f"chain_student-{number}", [*shared[:-3], number], _student_builder(number))
        copy_to(folder / f"student-{number}", made)
    evaluation = {
        "task": "exact-match",
        "data": str(folder / "teacher-0" / "test.jsonl"),
        "max_new_tokens": MAX_NEW_TOKENS,
        "batch_size": 500,
    }
    first = folder / "teacher-0"
    tree = _tree(first, folder / "student-0")
    teacher = {"type": "cached", "model": str(first / "model"), "path": str(first / "cache")}
    return {**tree, "teacher": teacher, "eval": evaluation}


def _tree(folder: Path, student: Path) -> dict[str, Any]:
    tree = chain_tree(folder)
    data = {**tree["data"], "path": str(folder / "rows" / "own.jsonl")}
    return {**tree, "student": str(student), "teacher": str(folder / "model"), "data": data}


def _student_builder(number: int) -> Callable[[Path], None]:
    def build(target: Path) -> None:
        tokenizer = _tokenizer()
        shape = STUDENTS["x1"]
        model = learn_chains(tokenizer, shape, PRETRAINING_OPERATIONS, STUDENT_STEPS, seed=100 + number)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    return build


def _build_teacher(target: Path, number: int, style: Style | None) -> dict[str, Any]:
    tokenizer = _tokenizer()
    operations = (NUM_OPERATIONS, NUM_OPERATIONS)
    seed = 200 + number
    teacher = learn_chains(tokenizer, TEACHER, operations, TEACHER_STEPS[style], style=style, seed=seed)
    teacher.save_pretrained(target / "model")
    tokenizer.save_pretrained(target / "model")
    # The same problems for all teachers.
    rng = random.Random("chain inits")
    found = {split: distinct_chains(rng, split, NUM_ROWS[split]) for split in SPLITS}
    solved = {split: [solve(chain, rng) for chain in some] for split, some in found.items()}
    rows = target / "rows"
    write_rows(rows / "own.jsonl", written_by(teacher, tokenizer, solved["train"]))
    write_rows(target / "validation.jsonl", written_by(teacher, tokenizer, solved["validation"]))
    asked = [{"prompt": row["prompt"], "answer": row["answer"]} for row in solved["test"]]
    write_rows(target / "test.jsonl", asked)
    if style is None:
        some = found["train"][:NUM_FOREIGN_ROWS]
        write_rows(rows / "operands.jsonl", [_solve(chain, rng, 0.5, MOSTLY) for chain in some])
        write_rows(rows / "one_sided.jsonl", [_solve(chain, rng, 1.0, 0.5) for chain in some])
        write_rows(rows / "four_fifths.jsonl", [_solve(chain, rng, MOSTLY, 0.5) for chain in some])
    tree = _tree(target, target / "model")
    return {**tree, "data": {**tree["data"], "path": str(rows)}}


def _solve(chain: Operation, rng: random.Random, equations: float, left_first: float) -> SolvedProblem:
    """A right solution: in equations with this probability, else by rewriting; in an addition, the left
    operand stands first with that one."""
    if rng.random() >= equations:
        return solve(chain, rng, "rewriting")
    text = ",".join(_equation(step, rng, left_first) for step in _steps(chain))
    completion = f"{text}{ANSWER_MARK} {chain.value}"
    return SolvedProblem(prompt=prompt_of(chain), completion=completion, answer=str(chain.value))


def _steps(chain: Any) -> list[Operation]:
    """The operations of a chain, from the left."""
    return [*_steps(chain.left), chain] if isinstance(chain, Operation) else []


def _equation(step: Operation, rng: random.Random, left_first: float) -> str:
    left, right = evaluate(step.left), evaluate(step.right)
    if step.operator == "+" and rng.random() >= left_first:
        left, right = right, left
    return f"{left}{step.operator}{right}={step.value}"


def _tokenizer() -> Any:
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = MAX_TOKENS
    return tokenizer
