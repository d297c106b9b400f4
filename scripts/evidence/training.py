"""Rows as tensors, pretraining that a later process goes on with, the teacher's cache, a distillation run.

Axes: R rows, T tokens of a row, C tokens of the longest solution, N label positions, D width, V vocabulary.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evidence.decoder import Decoder, Shape, write
from evidence.problems import END, PAD, Problem, WordProblems
from evidence.settings import Regime, Settings
from hpd.files import write_atomically
from hpd.losses import Head, Scores, reweighted_nll
from hpd.losses.measures import distribution_metrics
from hpd.losses.products import for_products, project_
from hpd.methods import method_terms, name_terms

_SAVE_SECONDS = 60.0
_READ_ROWS = 64
_POSITIONS_AT_ONCE = 2_048
TERTILES = ("low", "middle", "high")


class OutOfTimeError(Exception):
    """The call's minutes are over; the state is on the disk."""


class Clock:
    """The minutes of this call."""

    def __init__(self, minutes: float):
        self._end = time.monotonic() + 60 * minutes

    def need(self, seconds: float) -> None:
        """Raise OutOfTimeError where less than this is left."""
        if time.monotonic() + seconds > self._end:
            raise OutOfTimeError


class Rows(NamedTuple):
    """Prompts with solutions behind them."""

    tokens: Tensor
    """[R, T], filled with PAD."""
    counts: Tensor
    """[R], label tokens of each."""

    def labels(self, prompt_length: int) -> tuple[Tensor, Tensor]:
        """The tokens behind the prompt [R, C], and which of them are labels."""
        labels = self.tokens[:, prompt_length:]
        return labels, torch.arange(labels.shape[1], device=labels.device) < self.counts[:, None]


class Cache(NamedTuple):
    """Rows, and what the teacher says at their label positions."""

    rows: Rows
    hidden: Tensor
    """[R, C, D] in bfloat16, what predicts each solution token."""
    log_z: Tensor
    """[R, C], logarithm of the sum of exp(logit)."""
    tertile: Tensor
    """[R, C], third of the positions by the teacher's entropy, 0 to 2; -1: no label."""
    head: Tensor
    """[V, D], bfloat16."""


def tensors(language: WordProblems, problems: list[Problem]) -> Rows:
    length = language.prompt_length + language.longest_solution
    tokens = torch.full((len(problems), length), PAD)
    for row, problem in zip(tokens, problems, strict=True):
        text = problem.prompt + problem.solution
        row[: len(text)] = torch.tensor(text)
    return Rows(tokens, torch.tensor([len(problem.solution) for problem in problems]))


def drawn(language: WordProblems, name: str, count: int) -> list[Problem]:
    """The problems of a name, the same at every call."""
    rng = random.Random(name)
    return [language.draw(rng) for _ in range(count)]


def precision(device: torch.device) -> torch.autocast:
    """bfloat16 products on an accelerator, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")


class _Batches(torch.utils.data.Dataset):
    """Fresh rows for each pretraining step."""

    def __init__(self, language: WordProblems, name: str, first: int, last: int, batch: int):
        self.language, self.name, self.batch = language, name, batch
        self.steps = range(first, last)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Rows:
        if index >= len(self):
            raise IndexError
        return tensors(self.language, drawn(self.language, f"{self.name} {self.steps[index]}", self.batch))


def pretrain(
    path: Path,
    shape: Shape,
    seed: int,
    steps: int,
    settings: Settings,
    language: WordProblems,
    device: torch.device,
    clock: Clock,
    gap: Callable[[Decoder], float] | None = None,
) -> dict[str, Any]:
    """Train a decoder from scratch on solutions, going on from `path`; the state, which ends up there too.

    Args:
        gap: pretraining ends early where this is at most `settings.student_gap`; then the rate is constant.
    """
    state = torch.load(path, map_location=device) if path.exists() else {"step": 0, "losses": []}
    if state.get("done"):
        return state
    model = Decoder(shape, settings.vocab, seed).to(device)
    optimizer = _optimizer(model, settings.pretrain_rate)
    if state["step"]:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def save(step: int, **more: Any) -> dict[str, Any]:
        found = {"step": step, "losses": state["losses"], "model": model.state_dict(), **more}
        if not more:
            found["optimizer"] = optimizer.state_dict()
        write_atomically(path, lambda draft: torch.save(found, draft))
        return found

    saved = time.monotonic()
    batches = _Batches(language, path.stem, state["step"], steps, settings.pretrain_batch)
    workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
    for step, rows in enumerate(
        torch.utils.data.DataLoader(batches, batch_size=None, num_workers=workers), state["step"] + 1
    ):
        decay = 1.0 if gap else _cosine(step / steps)
        _set_rate(optimizer, settings.pretrain_rate * min(1.0, step / 100) * decay)
        loss = _pretraining_step(model, optimizer, Rows(*(part.to(device) for part in rows)), language)
        if step % settings.look_every and step < steps:
            continue
        state["losses"].append([step, round(float(loss), 4)])
        reached = gap(model) if gap else None
        kl = "" if reached is None else f", KL from the teacher {reached:.4f}"
        print(f"{path.stem}: step {step} of {steps}, loss {loss:.4f}{kl}", flush=True)
        if step == steps or (reached is not None and reached <= settings.student_gap):
            return save(step, done=True, gap=reached)
        try:
            clock.need(15.0)
        except OutOfTimeError:
            save(step)
            raise
        if time.monotonic() - saved > _SAVE_SECONDS:
            save(step)
            saved = time.monotonic()
    raise AssertionError("the last step returns")


def _pretraining_step(
    model: Decoder, optimizer: torch.optim.Optimizer, rows: Rows, language: WordProblems
) -> Tensor:
    labels, mask = rows.labels(language.prompt_length)
    with precision(rows.tokens.device):
        hidden = model(rows.tokens[:, :-1])[:, language.prompt_length - 1 :]
        logits = hidden[mask] @ model.head.t()
    loss = F.cross_entropy(logits.float(), labels[mask])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@torch.no_grad()
def cache(teacher: Decoder, rows: Rows, language: WordProblems) -> Cache:
    """Ask the teacher about every label position once."""
    hidden = torch.cat([_hidden(teacher, part, language) for part in rows.tokens.split(_READ_ROWS)])
    hidden, head = hidden.bfloat16(), teacher.head.detach().bfloat16()
    _, mask = rows.labels(language.prompt_length)
    log_z = torch.zeros(mask.shape, device=mask.device)
    entropy = torch.zeros_like(log_z)
    where = mask.nonzero()
    for part in where.split(_POSITIONS_AT_ONCE):
        at = tuple(part.t())
        z = _logits(hidden[at], head)
        log_z[at] = torch.logsumexp(z, -1)
        logs = torch.log_softmax(z, -1)
        entropy[at] = -(logs.exp() * logs).sum(-1)
    tertile = torch.full(mask.shape, -1, device=mask.device)
    order = entropy[tuple(where.t())].argsort()
    for third, part in enumerate(order.tensor_split(3)):
        tertile[tuple(where[part].t())] = third
    return Cache(rows, hidden, log_z, tertile, head)


def _hidden(model: Decoder, tokens: Tensor, language: WordProblems) -> Tensor:
    with precision(tokens.device):
        return model(tokens[:, :-1])[:, language.prompt_length - 1 :]


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    """Logits as the operator multiplies them, float32."""
    scores = for_products(Scores(hidden, Head(head)), len(head))
    return project_(scores, torch.empty(len(hidden), len(head), device=hidden.device))


@torch.no_grad()
def measure(model: Decoder, held_out: Cache, language: WordProblems) -> dict[str, float]:
    """Both KLs and entropies, nats per label token, and forward KL by tertile of the teacher's entropy."""
    hidden = torch.cat([_hidden(model, part, language) for part in held_out.rows.tokens.split(_READ_ROWS)])
    labels = held_out.rows.tokens[:, language.prompt_length :]
    totals: dict[str, Tensor] = {}
    found: dict[str, float] = {}
    for third, name in enumerate(TERTILES):
        sums: dict[str, Tensor] = {}
        for part in (held_out.tertile == third).nonzero().split(_POSITIONS_AT_ONCE):
            at = tuple(part.t())
            with precision(hidden.device):
                z = _logits(hidden[at], model.head)
            log_p = torch.log_softmax(_logits(held_out.hidden[at], held_out.head), -1)
            distribution_metrics(log_p, torch.log_softmax(z, -1), labels[at], sums)
        found[f"forward_kl_{name}"] = float(sums["forward_kl"] / sums["metric_tokens"])
        for key, value in sums.items():
            totals[key] = totals.get(key, 0.0) + value
    names = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy")
    return {name: float(totals[name] / totals["metric_tokens"]) for name in names} | found


def accuracies(
    model: Decoder, problems: list[Problem], settings: Settings, language: WordProblems, device: torch.device
) -> dict[str, float]:
    """Share of right answers: greedy, at T 0.7 with top-p 0.95 as the paper samples, and at T 1."""
    prompts = torch.tensor([problem.prompt for problem in problems], device=device)
    found = {}
    for name, temperature, top_p in (("greedy", 0.0, 1.0), ("paper", 0.7, 0.95), ("t1", 1.0, 1.0)):
        count = settings.samples if temperature else 1
        with precision(device):
            texts = write(
                model,
                prompts.repeat(count, 1),
                language.longest_solution + 8,
                END,
                temperature=temperature,
                top_p=top_p,
            )
        # What ended has an end token behind it, in a column of its own for the longest.
        right = [
            language.answer(text) == problem.answer
            for text, problem in zip(texts.tolist(), problems * count, strict=True)
        ]
        found[f"accuracy_{name}"] = sum(right) / len(right)
    return found


def distill(
    start: dict[str, Tensor],
    method: str,
    regime: Regime,
    rate: float,
    order: int,
    settings: Settings,
    language: WordProblems,
    rows: Cache,
    held_out: Cache,
) -> tuple[Decoder, dict[str, Any]]:
    """Train a student by a method on cached rows; the student and its curve on held-out rows."""
    device = rows.hidden.device
    model = Decoder(settings.student, settings.vocab, seed=0).to(device)
    model.load_state_dict(start)
    optimizer = _optimizer(model, rate)
    terms = name_terms(method_terms(method, {}))
    steps = regime.rows * regime.epochs // settings.batch
    draws = torch.Generator(device).manual_seed(order)
    curve, norms = [], []
    for step, chosen in enumerate(_orders(regime, settings.batch, order), 1):
        _set_rate(optimizer, rate * min(1.0, step / settings.warmup) * _cosine(step / steps))
        part = Rows(*(field[chosen] for field in rows.rows))
        labels, mask = part.labels(language.prompt_length)
        uniforms = torch.rand(int(mask.sum()), 1, dtype=torch.float64, device=device, generator=draws)
        with precision(device):
            hidden = model(part.tokens[:, :-1])[:, language.prompt_length - 1 :][mask]
            loss = reweighted_nll(
                Scores(hidden, Head(model.head)),
                Scores(rows.hidden[chosen][mask], Head(rows.head), rows.log_z[chosen][mask]),
                labels[mask],
                terms,
                uniforms=uniforms,
                scale=1.0 / len(uniforms),
                metric_stride=0,
            ).loss
        loss.backward()
        # Not clipped: a limit that nobody tuned would hit the methods differently.
        norms.append(
            torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        )
        optimizer.step()
        optimizer.zero_grad()
        if step * settings.points % steps < settings.points:
            found = measure(model, held_out, language)
            curve.append({"epoch": round(step * settings.batch / regime.rows, 3), **found})
    return model, {"curve": curve, "largest_gradient_norm": round(float(torch.stack(norms).max()), 3)}


def _orders(regime: Regime, batch: int, seed: int) -> list[list[int]]:
    """Rows of each step: every row once an epoch, in an order of the epoch's own."""
    rng = random.Random(f"order {seed}")
    every: list[int] = []
    for _ in range(regime.epochs):
        every += rng.sample(range(regime.rows), regime.rows)
    return [every[first : first + batch] for first in range(0, len(every) - batch + 1, batch)]


def _optimizer(model: Decoder, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _cosine(done: float) -> float:
    """From 1 to 0.1, as in the paper."""
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
