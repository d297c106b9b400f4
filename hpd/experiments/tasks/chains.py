"""A task of longer chains: five additions and subtractions, worked out one equation at a time.

``6+8-9+4-3+7=`` is answered by ``6+8=14,14-9=5,4+5=9,9-3=6,7+6=13#### 13``. The order of the equations is
fixed, that of a sum's operands is not, so the text has entropy and the answer has none. It is the demo's
family with longer chains, without parentheses. As in practice, the student has learned something before:
chains of 1 to 3 operations, and how a solution is written; it stops after three of the five equations, and
distillation teaches it to go on.

Each function below is a `base` of an experiment file. `$BASE` holds `teacher` (330,000 weights, 100 % right
when greedy and 96 % when sampled), students of half, equal and twice the size (`student-x0.5`, `student-x1`,
`student-x2`), `train.jsonl` and `validation.jsonl` (written by the teacher, its errors included),
`truth.jsonl` (the same problems as `train.jsonl`, solved right) and `test.jsonl`. They are made once, in
about four minutes on two cores; equal seeds give equal files on one machine and version of PyTorch.
"""

from __future__ import annotations

import itertools
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hpd.config.models import ModelConfig
from hpd.demo.build_teacher import build_tokenizer, model_config
from hpd.demo.task import (
    SPLITS,
    Operation,
    SolvedProblem,
    Split,
    Style,
    evaluate,
    is_correct,
    operation,
    prompt_of,
    split_of,
    write_solution,
)
from hpd.evaluate import GenerationSettings, generate_answers
from hpd.experiments.tasks.prepared import copy_to, distill, learn, prepare, write_rows
from hpd.models.load import load_model, load_tokenizer

__all__ = [
    "chain_tree",
    "chains",
    "distinct_chains",
    "draw_chain",
    "gym_chains",
    "learn_chains",
    "solve",
    "written_by",
]

NUM_OPERATIONS = 5
LARGEST_VALUE = 20
PRETRAINING_OPERATIONS = (1, 3)
"""Operations of the chains that the students have learned."""
NUM_ROWS = {"train": 12000, "validation": 400, "test": 500}
MAX_TOKENS = 80
MAX_NEW_TOKENS = 48
TEACHER = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
STUDENTS = {
    "x0.5": {
        "hidden_size": 36,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "head_dim": 12,
    },
    "x1": {
        "hidden_size": 48,
        "intermediate_size": 144,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "head_dim": 16,
    },
    "x2": {
        "hidden_size": 66,
        "intermediate_size": 216,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "head_dim": 22,
    },
}
TEACHER_STEPS = 700
STUDENT_STEPS = 600
BATCH = 64
RATE = 4e-3
CHOICES = [
    NUM_OPERATIONS,
    LARGEST_VALUE,
    PRETRAINING_OPERATIONS,
    NUM_ROWS,
    MAX_TOKENS,
    TEACHER,
    STUDENTS,
    TEACHER_STEPS,
    STUDENT_STEPS,
    BATCH,
    RATE,
]


def chains(folder: Path) -> dict[str, Any]:
    """The recipe of the task; see the module's text."""
    return _recipe(folder, prepare("chains", CHOICES, _build))


def gym_chains(folder: Path) -> dict[str, Any]:
    """The same models on reasoning-gym's `chain_sum` of six one-digit numbers.

    Problems that leave the teacher's range on the way are left out, and so are training rows whose answer it
    gets wrong, as a grader would. Needs `pip install 'hybrid-policy-distillation[gym]'`.

    Raises:
        ValueError: reasoning-gym is not installed.
    """
    try:
        import reasoning_gym  # type: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "This base needs reasoning-gym: pip install 'hybrid-policy-distillation[gym]'."
        ) from None
    return _recipe(
        folder,
        prepare(
            "gym_chains",
            [*CHOICES, "in range"],
            lambda target: _build_gym(target, reasoning_gym.create_dataset),
        ),
    )


def draw_chain(rng: random.Random, split: Split, num_operations: int = NUM_OPERATIONS) -> Operation:
    """A chain whose values on the way all lie between 0 and `LARGEST_VALUE`; its text decides its split."""
    while True:
        chain: Any = rng.randint(1, 9)
        for _ in range(num_operations):
            longer = [operation(sign, chain, digit) for sign in "+-" for digit in range(1, 10)]
            chain = rng.choice([step for step in longer if 0 <= evaluate(step) <= LARGEST_VALUE])
        if split_of(prompt_of(chain)) == split:
            return chain


def _recipe(folder: Path, prepared: Path) -> dict[str, Any]:
    evaluation = {
        "task": "exact-match",
        "data": str(folder / "test.jsonl"),
        "max_new_tokens": MAX_NEW_TOKENS,
        "batch_size": 500,
    }
    return {**chain_tree(folder), "teacher": copy_to(folder, prepared), "eval": evaluation}


def chain_tree(folder: Path) -> dict[str, Any]:
    """The task's recipe with its live teacher, on the files of a folder."""
    return distill(
        folder,
        "student-x1",
        max_steps=200,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=200,
        max_length=MAX_TOKENS,
        metric_stride=4,
    )


def _build(folder: Path) -> dict[str, Any]:
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = MAX_TOKENS
    teacher = learn_chains(tokenizer, TEACHER, (NUM_OPERATIONS, NUM_OPERATIONS), TEACHER_STEPS)
    models = {"teacher": teacher}
    models |= {
        f"student-{n}": learn_chains(tokenizer, s, PRETRAINING_OPERATIONS, STUDENT_STEPS)
        for n, s in STUDENTS.items()
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rng = random.Random("chains")
    solved = {
        split: [solve(c, rng) for c in distinct_chains(rng, split, NUM_ROWS[split])] for split in SPLITS
    }
    write_rows(folder / "truth.jsonl", solved["train"])
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", written_by(teacher, tokenizer, solved[split]))
    write_rows(
        folder / "test.jsonl", [{"prompt": row["prompt"], "answer": row["answer"]} for row in solved["test"]]
    )
    return chain_tree(folder)


def learn_chains(
    tokenizer: Any,
    shape: Mapping[str, Any],
    operations: tuple[int, int],
    num_steps: int,
    *,
    style: Style | None = "equations",
    seed: int = 0,
) -> Any:
    """A model of `shape` that learned chains of so many operations; a style of None is either of the two."""
    config = model_config(tokenizer, shape)
    config.max_position_embeddings = MAX_TOKENS

    def draw(rng: random.Random) -> SolvedProblem:
        return solve(draw_chain(rng, "train", rng.randint(*operations)), rng, style)

    name = f"chains {operations}" + (f" {seed}" if seed else "")
    return learn(config, tokenizer, draw, name, num_steps=num_steps, batch_size=BATCH, rate=RATE, seed=seed)


def solve(chain: Operation, rng: random.Random, style: Style | None = "equations") -> SolvedProblem:
    """One of the right solutions of a chain."""
    return SolvedProblem(
        prompt=prompt_of(chain), completion=write_solution(chain, rng, style), answer=str(chain.value)
    )


def distinct_chains(rng: random.Random, split: Split, number: int) -> list[Operation]:
    """Chains of a split, no two alike."""
    found: dict[str, Operation] = {}
    while len(found) < number:
        chain = draw_chain(rng, split)
        found.setdefault(prompt_of(chain), chain)
    return list(found.values())


def written_by(teacher: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One draw of the teacher per problem, wrong ones included; texts that are empty or do not come to an end
    are left out."""
    settings = GenerationSettings(max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, batch_size=400)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        answers = generate_answers(teacher, tokenizer, [row["prompt"] for row in rows], settings)
    pairs = zip(rows, answers, strict=True)
    return [
        {**row, "completion": answer.text}
        for row, answer in pairs
        if answer.finish_reason == "stop" and answer.text
    ]


def _build_gym(folder: Path, create_dataset: Callable[..., Any]) -> dict[str, Any]:
    copied = shutil.ignore_patterns("cache", "*.jsonl")
    shutil.copytree(prepare("chains", CHOICES, _build), folder, ignore=copied)
    size = NUM_ROWS["train"]
    terms = NUM_OPERATIONS + 1
    dataset = create_dataset(
        "chain_sum", seed=0, size=8 * size, min_terms=terms, max_terms=terms, min_digits=1, max_digits=1
    )
    problems = {}
    for item in dataset:
        prompt = item["metadata"]["expression"].replace(" ", "") + "="
        on_the_way = itertools.accumulate(map(int, re.findall(r"[+-]?\d+", prompt)))
        if all(0 <= value <= LARGEST_VALUE for value in on_the_way):
            problems[prompt] = {"prompt": prompt, "answer": item["answer"]}
    source = ModelConfig(model=str(folder / "teacher"))
    rows = written_by(
        load_model(source, "teacher"), load_tokenizer(source, "teacher"), list(problems.values())[:size]
    )
    splits: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    for row in rows:
        splits[split_of(row["prompt"])].append(row)
    for split in ("train", "validation"):
        right = [row for row in splits[split] if is_correct(row["completion"], row["answer"])]
        write_rows(folder / f"{split}.jsonl", right[: NUM_ROWS[split]])
    asked = [{"prompt": row["prompt"], "answer": row["answer"]} for row in splits["test"]]
    write_rows(folder / "test.jsonl", asked[: NUM_ROWS["test"]])
    return chain_tree(folder)
