"""Tasks made for experiments: short answers of which several are right, longer chains, students of several sizes.

Each function below is a `base` of an experiment file: it writes what it needs into a folder, once, and returns a recipe. Equal
seeds give equal files.

The short task asks for a larger number: ``(47)12,85,63,91,30=`` may be answered by 85, 63 or 91. What a perfect teacher says
is known exactly, the uniform distribution over the right answers, so a student that covers its teacher spreads over all of
them and one that seeks modes settles on some: the difference between the two directions of KL that one-answer tasks cannot
show. The teacher is a 2-layer transformer trained on that distribution in a minute or two; `report.json` says how far from it
it stayed.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from hpd.demo.build_teacher import IGNORED, NUM_TRAIN_ROWS, PEAK_LEARNING_RATE, build_tokenizer, encode_rows, model_config
from hpd.demo.run import FOLDER, demo_recipe
from hpd.demo.task import SPLITS, Row, Split, generate_rows, is_correct, split_of
from hpd.evaluate import Answer, ExactMatch, Example, GenerationSettings, Verdict, generate_answers

__all__ = ["ValidAnswers", "demo_sizes", "long_answers", "reasoning_gym_sums", "right_answers", "short_answers"]

NUM_LISTED, NUM_VALID = 5, (2, 4)
"""Numbers in a problem beside the first, and how many of them may be larger than it."""
NUM_ROWS = {"train": 12000, "validation": 500, "test": 500}
SHORT_TEACHER = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
SHORT_STUDENT = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
SHORT_STEPS, SHORT_BATCH = 1500, 128
SIZES = {"x0.5": 32, "x1": 48, "x2": 72}
"""Width of a demo student; its weights grow with the square."""


def right_answers(prompt: str) -> list[int]:
    """The listed numbers that are larger than the first.

    >>> right_answers("(47)12,85,63,91,30=")
    [85, 63, 91]
    """
    first, _, listed = prompt.removeprefix("(").removesuffix("=").partition(")")
    return [number for number in map(int, listed.split(",")) if number > int(first)]


def _draw_prompt(rng: random.Random, split: Split) -> str:
    """A problem of a split; its text decides which, so splits are disjoint."""
    while True:
        first, *listed = rng.sample(range(10, 100), NUM_LISTED + 1)
        prompt = f"({first}){','.join(map(str, listed))}="
        if NUM_VALID[0] <= len(right_answers(prompt)) <= NUM_VALID[1] and split_of(prompt) == split:
            return prompt


class ValidAnswers(ExactMatch):
    """A text is correct if it is any one of the answers that the row lists, divided by spaces."""

    name = "valid-answers"

    def grade(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Verdict]:
        return [_grade(example, answer.text.strip()) for example, answer in zip(examples, answers, strict=True)]


def _grade(example: Example, given: str) -> Verdict:
    return Verdict(correct=given in example.answer.split(), extracted=given or None)


def short_answers(folder: Path, num_steps: int = SHORT_STEPS) -> dict[str, Any]:
    """The short task: teacher, student's shape, rows written by the teacher; see the module's text."""
    if not (folder / "report.json").is_file():
        _build_short(folder, num_steps)
    return {
        "student": {"model": str(folder / "student"), "init": "random"},
        "teacher": str(folder / "teacher"),
        "method": "hpd",
        "data": {"path": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl")},
        "train": {
            "max_steps": 1000, "per_device_train_batch_size": 64, "per_device_eval_batch_size": 200, "learning_rate": 3e-3,
            "lr_scheduler_type": "cosine", "warmup_steps": 50, "weight_decay": 0.01, "max_length": 32, "logging_steps": 25,
            "gradient_checkpointing": False, "metric_stride": 1, "save_strategy": "no", "dataloader_drop_last": True,
        },
    }  # fmt: skip


def _build_short(folder: Path, num_steps: int) -> None:
    tokenizer = build_tokenizer()
    teacher = _train(tokenizer, num_steps)
    teacher.save_pretrained(folder / "teacher")
    model_config(tokenizer, SHORT_STUDENT).save_pretrained(folder / "student")
    for name in ("teacher", "student"):
        tokenizer.save_pretrained(folder / name)
    rng = random.Random("short rows")
    prompts = {split: [_draw_prompt(rng, split) for _ in range(NUM_ROWS[split])] for split in SPLITS}
    for split in ("train", "validation"):
        _write_rows(folder / f"{split}.jsonl", _teacher_rows(teacher, tokenizer, prompts[split]))
    rows = [{"prompt": prompt, "answer": _listed(prompt)} for prompt in prompts["test"]]
    _write_rows(folder / "test.jsonl", rows)
    kl, mass = _against_truth(teacher, tokenizer, prompts["test"])
    report = {"kl_of_truth_to_teacher_nats": kl, "teacher_mass_on_right_answers": mass, "num_steps": num_steps}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _train(tokenizer: Any, num_steps: int) -> LlamaForCausalLM:
    """Next-token loss on answers drawn uniformly: its minimum is the truth."""
    rng = random.Random("short teacher")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(model_config(tokenizer, SHORT_TEACHER)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=num_steps, pct_start=0.1)
        for _ in range(num_steps):
            prompts = [_draw_prompt(rng, "train") for _ in range(SHORT_BATCH)]
            rows = [Row(prompt=p, completion=str(rng.choice(right_answers(p))), answer="") for p in prompts]
            ids, labels = encode_rows(tokenizer, rows)
            model(input_ids=ids, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    return model.eval()


def _teacher_rows(teacher: Any, tokenizer: Any, prompts: Sequence[str]) -> list[dict[str, str]]:
    """One draw of the teacher per problem: what a dataset written by it looks like, errors included."""
    settings = GenerationSettings(max_new_tokens=6, temperature=1.0, batch_size=500)
    answers = generate_answers(teacher, tokenizer, list(prompts), settings)
    kept = [(p, a.text) for p, a in zip(prompts, answers, strict=True) if a.text.strip()]
    return [{"prompt": p, "completion": text, "answer": _listed(p)} for p, text in kept]


def _listed(prompt: str) -> str:
    return " ".join(map(str, right_answers(prompt)))


@torch.no_grad()
def _against_truth(teacher: Any, tokenizer: Any, prompts: Sequence[str]) -> tuple[float, float]:
    """Mean KL(truth || teacher) of a whole answer, in nats, and the teacher's mass on right answers."""
    kl = mass = 0.0
    for prompt in prompts:
        answers = right_answers(prompt)
        ids, labels = encode_rows(tokenizer, [Row(prompt=prompt, completion=str(a), answer="") for a in answers])
        logprobs = teacher(input_ids=ids).logits[:, :-1].log_softmax(-1)
        targets = labels[:, 1:]
        chosen = logprobs.gather(-1, targets.clamp_min(0)[..., None])[..., 0].masked_fill(targets == IGNORED, 0.0).sum(1)
        kl += -math.log(len(answers)) - float(chosen.mean())
        mass += float(chosen.exp().sum())
    return round(kl / len(prompts), 4), round(mass / len(prompts), 4)


def long_answers(folder: Path) -> dict[str, Any]:
    """The demo's recipe, and `$BASE/truth.jsonl`: as many rows of the same task, solved right by the task's own generator.

    The demo's rows were written by its teacher, so sft on them is sequence-level distillation (SeqKD); sft on these is not.
    """
    path = folder / "truth.jsonl"
    if not path.is_file():
        _write_rows(path, [dict(row) for row in generate_rows("train", NUM_TRAIN_ROWS, seed=1)])
    return demo_recipe(folder)


def demo_sizes(folder: Path) -> dict[str, Any]:
    """The demo's recipe, and students of half, equal and twice its size in `$BASE/student-x0.5` and so on."""
    source = json.loads((FOLDER / "student" / "config.json").read_text(encoding="utf-8"))
    for name, width in SIZES.items():
        target = folder / f"student-{name}"
        target.mkdir(parents=True, exist_ok=True)
        heads = source["num_attention_heads"]
        shape = {"hidden_size": width, "intermediate_size": 4 * width, "head_dim": 8 * round(width / heads / 8)}
        (target / "config.json").write_text(json.dumps({**source, **shape}, indent=2), encoding="utf-8")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(FOLDER / "student" / file, target / file)
    return demo_recipe(folder)


def reasoning_gym_sums(folder: Path, num_rows: int = 20000) -> dict[str, Any]:
    """The demo's pair on reasoning-gym's `chain_sum`: four one-digit numbers added or subtracted.

    The demo's teacher writes the solutions, so rows whose final answer it gets wrong are dropped. Needs
    `pip install 'hpd[gym]'`.

    Raises:
        ValueError: reasoning-gym is not installed.
    """
    try:
        import reasoning_gym  # type: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("This base needs reasoning-gym: pip install 'hpd[gym]'.") from None
    recipe = demo_recipe(folder)
    if not (folder / "gym-test.jsonl").is_file():
        dataset = reasoning_gym.create_dataset(
            "chain_sum", seed=0, size=4 * num_rows, min_terms=4, max_terms=4, min_digits=1, max_digits=1
        )  # fmt: skip
        rows = {}
        for item in dataset:
            prompt = item["metadata"]["expression"].replace(" ", "") + "="
            if int(item["answer"]) >= 0:
                rows[prompt] = {"prompt": prompt, "answer": item["answer"]}
        _write_gym(folder, list(rows.values())[:num_rows], recipe)
    for section, key, name in (("data", "path", "train"), ("data", "validation", "validation"), ("eval", "data", "test")):
        recipe[section][key] = str(folder / f"gym-{name}.jsonl")
    return recipe


def _write_gym(folder: Path, rows: list[dict[str, str]], recipe: Mapping[str, Any]) -> None:
    from hpd.config import ModelConfig
    from hpd.models import load_model, load_tokenizer

    source = ModelConfig(model=recipe["teacher"])
    settings = GenerationSettings(max_new_tokens=48, temperature=1.0, batch_size=250)
    answers = generate_answers(
        load_model(source, "teacher"), load_tokenizer(source, "teacher"), [r["prompt"] for r in rows], settings
    )
    kept = [{**r, "completion": a.text} for r, a in zip(rows, answers, strict=True) if is_correct(a.text, r["answer"])]
    sizes = {"test": len(kept) // 20, "validation": len(kept) // 20, "train": len(kept)}
    start = 0
    for name, size in sizes.items():
        _write_rows(folder / f"gym-{name}.jsonl", kept[start : start + size])
        start += size
