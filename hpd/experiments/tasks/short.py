"""A task of short answers of which several are right.

``(4)1,8,6,9,3=`` asks for two of the listed digits that are larger than the first, in any order: ``8,6``,
``9,8`` and four more are right. What a perfect teacher says is known exactly, the uniform distribution over
the right answers, so a student that covers its teacher spreads over all of them and one that seeks modes
settles on some: the difference between the two directions of KL that one-answer tasks cannot show. The
teacher is a 2-layer transformer trained on that distribution; `report.json` says how far from it it stayed.
The student has learned half of the task.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hpd.demo.build_teacher import IGNORED, build_tokenizer, encode_rows, model_config
from hpd.demo.task import SPLITS, SolvedProblem, Split, split_of
from hpd.evaluate import Answer, ExactMatch, Example, GenerationSettings, Verdict, generate_answers
from hpd.experiments.tasks.prepared import copy_to, distill, learn, prepare, write_rows
from hpd.files import write_json

__all__ = ["ValidAnswers", "right_answers", "short_answers"]

NUM_LISTED = 5
"""Digits in a problem beside the first."""
NUM_VALID = (2, 4)
"""Fewest and most of them that are larger than it."""
NUM_ROWS = {"train": 12000, "validation": 400, "test": 500}
SHORT_TEACHER = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SHORT_STUDENT = {
    "hidden_size": 48,
    "intermediate_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
}
TEACHER_STEPS = 1000
STUDENT_STEPS = 500
BATCH = 64
RATE = 4e-3


def right_answers(prompt: str) -> list[str]:
    """All ordered pairs of listed digits that are larger than the first.

    >>> right_answers("(7)1,8,6,9,3=")
    ['8,9', '9,8']
    """
    first, _, listed = prompt.removeprefix("(").removesuffix("=").partition(")")
    larger = [digit for digit in listed.split(",") if digit > first]
    return [",".join(pair) for pair in itertools.permutations(larger, 2)]


def _draw_prompt(rng: random.Random, split: Split) -> str:
    """A problem of a split; its text decides which, so splits are disjoint."""
    while True:
        first, *listed = rng.sample("0123456789", NUM_LISTED + 1)
        prompt = f"({first}){','.join(listed)}="
        if (
            NUM_VALID[0] <= sum(digit > first for digit in listed) <= NUM_VALID[1]
            and split_of(prompt) == split
        ):
            return prompt


class ValidAnswers(ExactMatch):
    """A text is correct if it is any one of the answers that the row lists, divided by spaces."""

    name = "valid-answers"

    def grade(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Verdict]:
        return [
            _grade(example, answer.text.strip()) for example, answer in zip(examples, answers, strict=True)
        ]


def _grade(example: Example, given: str) -> Verdict:
    return Verdict(correct=given in example.answer.split(), extracted=given or None)


def short_answers(folder: Path) -> dict[str, Any]:
    """The recipe of the task; see the module's text. `$BASE` holds `teacher`, `student`, `train.jsonl` and
    `validation.jsonl` (written by the teacher, its errors included), `test.jsonl` and `report.json`."""
    choices = [
        NUM_LISTED,
        NUM_VALID,
        NUM_ROWS,
        SHORT_TEACHER,
        SHORT_STUDENT,
        TEACHER_STEPS,
        STUDENT_STEPS,
        BATCH,
        RATE,
    ]
    return {**_tree(folder), "teacher": copy_to(folder, prepare("short_answers", choices, _build))}


def _tree(folder: Path) -> dict[str, Any]:
    return distill(
        folder,
        "student",
        max_steps=200,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=250,
        max_length=32,
        metric_stride=1,
    )


def _build(folder: Path) -> dict[str, Any]:
    tokenizer = build_tokenizer()
    shapes = model_config(tokenizer, SHORT_TEACHER), model_config(tokenizer, SHORT_STUDENT)
    large = {"num_steps": TEACHER_STEPS, "batch_size": 2 * BATCH, "rate": 0.75 * RATE}
    teacher = learn(shapes[0], tokenizer, _right, "short teacher", **large)
    student = learn(
        shapes[1], tokenizer, _right, "short student", num_steps=STUDENT_STEPS, batch_size=BATCH, rate=RATE
    )
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rng = random.Random("short rows")
    prompts = {split: [_draw_prompt(rng, split) for _ in range(NUM_ROWS[split])] for split in SPLITS}
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", _teacher_rows(teacher, tokenizer, prompts[split]))
    write_rows(
        folder / "test.jsonl", [{"prompt": prompt, "answer": _listed(prompt)} for prompt in prompts["test"]]
    )
    kl, mass = _against_truth(teacher, tokenizer, prompts["test"])
    report = {"kl_of_truth_to_teacher_nats": kl, "teacher_mass_on_right_answers": mass}
    write_json(folder / "report.json", report)
    return _tree(folder)


def _right(rng: random.Random) -> SolvedProblem:
    """Answers drawn uniformly from the right ones: the loss's minimum is the truth."""
    prompt = _draw_prompt(rng, "train")
    return SolvedProblem(prompt=prompt, completion=rng.choice(right_answers(prompt)), answer="")


def _teacher_rows(teacher: Any, tokenizer: Any, prompts: Sequence[str]) -> list[dict[str, str]]:
    """One draw of the teacher per problem: what a dataset written by it looks like, errors included."""
    settings = GenerationSettings(max_new_tokens=6, temperature=1.0, batch_size=500)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        answers = generate_answers(teacher, tokenizer, list(prompts), settings)
    kept = [(p, a.text) for p, a in zip(prompts, answers, strict=True) if a.text.strip()]
    return [{"prompt": p, "completion": text, "answer": _listed(p)} for p, text in kept]


def _listed(prompt: str) -> str:
    return " ".join(right_answers(prompt))


@torch.no_grad()
def _against_truth(teacher: Any, tokenizer: Any, prompts: Sequence[str]) -> tuple[float, float]:
    """Mean KL(truth || teacher) of a whole answer, in nats, and the teacher's mass on right answers."""
    kl = mass = 0.0
    for prompt in prompts:
        answers = right_answers(prompt)
        ids, labels = encode_rows(
            tokenizer, [SolvedProblem(prompt=prompt, completion=a, answer="") for a in answers]
        )
        logprobs = teacher(input_ids=ids).logits[:, :-1].log_softmax(-1)
        targets = labels[:, 1:]
        chosen = (
            logprobs.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
            .masked_fill(targets == IGNORED, 0.0)
            .sum(1)
        )
        kl += -math.log(len(answers)) - float(chosen.mean())
        mass += float(chosen.exp().sum())
    return round(kl / len(prompts), 4), round(mass / len(prompts), 4)
