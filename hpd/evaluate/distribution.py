"""How far a student's distribution is from its teacher's: on the texts of a data set, and on what the student
writes itself.

In formulas p is the teacher, q the student; nats, means over label tokens. Axes: S resamples, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from hpd.data.lengths import tokenise
from hpd.evaluate.benchmarks.rows import read_rows
from hpd.evaluate.statistics import Estimate, Floats, Statistic, estimate, ratio, row_weights
from hpd.evaluate.token_statistics import (
    RowSums,
    TextTokens,
    distinct_ngrams,
    longest_loop,
    repeated_ngrams,
    sum_rows,
)
from hpd.generation.engine import Request, TransformersEngine, encode_prompt, end_token_ids
from hpd.generation.settings import GenerationSettings
from hpd.generation.texts import Prompt
from hpd.models.forward import add_head_function
from hpd.models.pairing import common_vocab, first_difference

__all__ = ["METRICS", "TEXTS", "TextRow", "check_metrics", "distribution_metrics", "read_text_rows"]

PROMPT_COLUMNS = ("prompt", "question", "problem", "instruction")
COMPLETION_COLUMNS = ("completion", "answer", "response", "solution", "output", "chosen")

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, rows so far, rows)."""


class Metric(NamedTuple):
    """A row of `METRICS`."""

    summary: str
    needs_teacher: bool = False


METRICS: dict[str, Metric] = {
    "kl": Metric("forward KL(p || q) and reverse KL(q || p), exact over the vocabulary", needs_teacher=True),
    "entropy": Metric("entropy of both models"),
    "perplexity": Metric("exp of the mean negative log-likelihood that each model gives the text"),
    "overlap": Metric(
        "share of the k likeliest tokens that both models name, and agreement on the first",
        needs_teacher=True,
    ),
    "calibration": Metric("expected calibration error of each model's likeliest token, on the data set only"),
    "repetition": Metric("repeated and distinct n-grams, longest loop"),
    "length": Metric("tokens per answer, share of answers cut at the limit"),
}
"""What `--metrics` takes."""

TEXTS = ("dataset", "student")
"""The data set's completions (the teacher's, where it wrote them), and the student's own from the same
prompts."""

_GAPS = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "overlap", "top1_agreement")


class TextRow(NamedTuple):
    """A prompt and its completion in the data."""

    prompt: Prompt
    completion: str


def read_text_rows(
    data: str | Path,
    *,
    limit: int | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
) -> list[TextRow]:
    """Prompts and completions of a file: columns of these names, or `messages` that end with the assistant's
    turn.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, or lacks a column or a text.
    """
    rows = read_rows(data)[:limit]
    if "messages" in rows[0] and prompt_column is None and completion_column is None:
        return [_from_messages(row.get("messages"), data, number) for number, row in enumerate(rows, start=1)]
    names = [
        _column(data, role, list(rows[0]), given, known)
        for role, given, known in (
            ("prompt", prompt_column, PROMPT_COLUMNS),
            ("completion", completion_column, COMPLETION_COLUMNS),
        )
    ]
    texts = []
    for number, row in enumerate(rows, start=1):
        prompt, completion = (row.get(name) for name in names)
        if isinstance(completion, list) and completion and isinstance(completion[-1], dict):
            completion = completion[-1].get("content")
        if not prompt or not isinstance(completion, str) or not completion.strip():
            raise ValueError(
                f"{data}: row {number} has no text in {names[0]!r} or {names[1]!r}; fill or remove it."
            )
        texts.append(TextRow(prompt, completion))
    return texts


def check_metrics(metrics: Sequence[str], texts: Sequence[str], has_teacher: bool) -> None:
    """Refuse unknown names, and metrics that need a teacher where there is none; before any model is loaded.

    Raises:
        ValueError: one of these.
    """
    for given, known, what in ((metrics, tuple(METRICS), "metrics"), (texts, TEXTS, "texts")):
        unknown = [name for name in given if name not in known]
        if unknown or not given:
            raise ValueError(f"{what} are {', '.join(known)}; got {', '.join(unknown) or 'none'}.")
    needing = [name for name in metrics if METRICS[name].needs_teacher]
    if needing and not has_teacher:
        raise ValueError(
            f"{', '.join(needing)} compare the student with a teacher: give one with --teacher, or leave "
            "them out."
        )
    if list(metrics) == ["calibration"] and "dataset" not in texts:
        raise ValueError("calibration is measured against the data set's tokens: add dataset to the texts.")


def distribution_metrics(
    student: nn.Module,
    teacher: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TextRow],
    metrics: Sequence[str] = tuple(METRICS),
    settings: GenerationSettings | None = None,
    *,
    texts: Sequence[str] = TEXTS,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    vocabulary: str = "error",
    max_length: int | None = None,
    top_k: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    r"""Distances, entropies, likelihoods and text statistics of a student, with 95 % bootstrap intervals over
    the rows.

    .. math:: \frac{1}{N} \sum_n \mathrm{KL}(p_n \| q_n), \qquad
              \mathrm{ECE} = \sum_b \frac{N_b}{N} |\mathrm{acc}_b - \mathrm{conf}_b|

    Every figure is exact over the common vocabulary; logits exist for one chunk of positions at a time.
    Prompt tokens are context only. Figures on the student's texts are expectations over its draws: with
    `temperature` 1 and no truncation, the reverse KL there is the sequence-level reverse KL per token.

    Args:
        student, teacher: causal language models on one device; without a teacher, metrics that need none.
        tokenizer: the student's; it writes the token ids that both models read.
        rows: prompts and completions (`read_text_rows`).
        metrics: names of `METRICS`.
        settings: how the student writes; default: temperature 1, 256 tokens. Chat template as for
            `generate_answers`.
        texts: `dataset`, `student` or both; both also give the gap between them, from paired resamples.
        teacher_tokenizer: compared with the student's token by token where given.
        vocabulary: policy for heads of unequal size (`hpd.losses.heads.POLICIES`).
        max_length: tokens of prompt and completion that are read; None is the smaller context of the models.
        top_k: size of the sets whose overlap is taken.
        seed: of the resamples; draws of the student's texts follow `settings.seed`.
        progress: called after each batch.

    Returns:
        JSON values: `dataset` and `student` (each figure with `value` and `interval`), `gap` (student minus
        data set), counts.

    Raises:
        ValueError: unknown metrics, no teacher where one is needed, tokenizers that differ, unequal heads
            under `error`, or rows without a label within max_length.

    Reference:
        Guo et al., On Calibration of Modern Neural Networks, 2017 (ECE, 15 equal bins).
    """
    check_metrics(metrics, texts, teacher is not None)
    settings = settings or GenerationSettings(temperature=1.0, max_new_tokens=256)
    vocab = _common_vocab(student, teacher, tokenizer, teacher_tokenizer, vocabulary)
    for model in filter(None, (student, teacher)):
        add_head_function(model)
    limit = _length_limit(student, teacher, max_length)
    reader = _Reader(student, teacher, tokenizer, settings, vocab, limit, top_k, progress)
    weights = row_weights(len(rows), seed)
    report: dict[str, Any] = {
        "num_rows": len(rows),
        "top_k": top_k,
        "max_length": limit,
        "common_vocabulary": vocab,
    }
    statistics: dict[str, dict[str, Statistic]] = {}
    for text in texts:
        statistics[text], plain = _read(reader, text, rows, metrics)
        report[text] = plain | {
            name: estimate(found, weights).to_json() for name, found in statistics[text].items()
        }
    if len(statistics) == 2:
        report["gap"] = _gap(statistics, weights)
    return report


class _Reader(NamedTuple):
    """Who reads, how far, and how the student writes."""

    student: nn.Module
    teacher: nn.Module | None
    tokenizer: PreTrainedTokenizerBase
    settings: GenerationSettings
    vocab: int | None
    limit: int | None
    top_k: int
    progress: Progress | None


def _read(
    reader: _Reader, text: str, rows: Sequence[TextRow], metrics: Sequence[str]
) -> tuple[dict[str, Statistic], dict[str, Any]]:
    """Figures of one set of texts: those with an interval, and counts."""
    student, teacher, tokenizer, settings, vocab, limit, top_k, progress = reader
    own = text == "student"
    if own:
        written = _student_tokens(student, tokenizer, rows, settings, limit, progress)
    else:
        written = _dataset_tokens(tokenizer, rows, settings)
    cut, lost = _cut(written, limit, vocab)
    sums = sum_rows(
        student,
        teacher,
        cut,
        vocab=vocab,
        top_k=top_k,
        batch_size=settings.batch_size,
        pad_id=_pad_id(tokenizer),
        progress=None if progress is None else _named(progress, f"reading {text} text"),
    )
    labels = [[token for token, bit in zip(*row, strict=True) if bit] for row in written]
    statistics = _likelihood_statistics(sums, metrics, with_bins=not own)
    statistics |= _text_statistics(labels, metrics, end_token_ids(student, tokenizer) if own else None)
    distinct = _distinct(labels) if "repetition" in metrics else {}
    return statistics, {"tokens": int(sums.tokens.sum()), **lost, **distinct}


def _common_vocab(
    student: nn.Module, teacher: nn.Module | None, ours: PreTrainedTokenizerBase, theirs: Any, policy: str
) -> int | None:
    if teacher is None:
        return None
    difference = None if theirs is None else first_difference(ours, theirs)
    if theirs is not None and difference is not None:
        a, b = (tokenizer.convert_ids_to_tokens(difference) for tokenizer in (ours, theirs))
        raise ValueError(
            f"token {difference} is {a!r} for the student and {b!r} for the teacher: the tokenizers are "
            "different, and a divergence between the two models has no meaning. Choose a teacher of the "
            "student's tokenizer family."
        )
    return common_vocab(student, teacher, policy)


def _length_limit(student: nn.Module, teacher: nn.Module | None, max_length: int | None) -> int | None:
    configs = [model.config.get_text_config() for model in (student, teacher) if model is not None]  # type: ignore[union-attr,operator]
    contexts = [getattr(config, "max_position_embeddings", None) for config in configs]
    known = [length for length in (*contexts, max_length) if length is not None]
    return min(known, default=None)


def _dataset_tokens(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[TextRow], settings: GenerationSettings
) -> list[TextTokens]:
    """Tokenised exactly as for training: the template's own end of turn, or eos, is a label."""
    texts = []
    for prompt, completion in rows:
        encode_prompt(tokenizer, prompt, settings)  # refuses what the student could not be asked
        system = settings.system_prompt
        if settings.chat_template != "never" and tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            turns = [{"role": "system", "content": system}, *turns] if system else turns
            row = {"prompt": turns, "completion": [{"role": "assistant", "content": completion}]}
        else:
            row = {"prompt": f"{system}\n\n{prompt}" if system else prompt, "completion": completion}
        texts.append(TextTokens(*tokenise(row, tokenizer, "completion")))
    return texts


def _student_tokens(
    student: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TextRow],
    settings: GenerationSettings,
    limit: int | None,
    progress: Progress | None,
) -> list[TextTokens]:
    """What the student writes, as the token ids that it drew: decoding and encoding again may give others."""
    engine = TransformersEngine(student, tokenizer)
    prompts = [encode_prompt(tokenizer, row.prompt, settings) for row in rows]
    room = min((limit or 2**31) - max(map(len, prompts)), settings.max_new_tokens)
    if room < 1:
        raise ValueError(
            f"the longest prompt has {max(map(len, prompts))} tokens, which leaves no room for an answer in "
            f"{limit}."
        )
    written: dict[int, list[int]] = {}
    for batch in engine.batches([len(prompt) for prompt in prompts], settings):
        requests = [Request(prompts[row], (settings.seed, row, 0, 0)) for row in batch]
        written.update(zip(batch, engine.generate_tokens(requests, settings, room), strict=True))
        if progress is not None:
            progress("the student writes", len(written), len(rows))
    return [
        TextTokens([*prompt, *written[row]], [False] * len(prompt) + [True] * len(written[row]))
        for row, prompt in enumerate(prompts)
    ]


def _cut(
    texts: Sequence[TextTokens], limit: int | None, vocab: int | None
) -> tuple[list[TextTokens], dict[str, int]]:
    """Texts as far as both models can read them, and what that took away."""
    cut = []
    for ids, mask in texts:
        # A token that one model lacks ends the text: that model has no embedding to read it with.
        foreign = next(
            (place for place, token in enumerate(ids) if vocab is not None and token >= vocab), None
        )
        end = min((place for place in (foreign, limit) if place is not None), default=None)
        cut.append(TextTokens(ids[:end], mask[:end]))
    empty = [number for number, text in enumerate(cut, start=1) if not any(text.is_label[1:])]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(cut)} rows (the first is row {empty[0]}) have no completion token that "
            f"both models can read within {limit} tokens: raise max_length up to the models' context, or "
            "leave these rows out."
        )
    pairs = list(zip(texts, cut, strict=True))
    return cut, {
        "rows_cut": sum(len(text.ids) > len(short.ids) for text, short in pairs),
        "labels_dropped": sum(sum(text.is_label) - sum(short.is_label) for text, short in pairs),
    }


def _likelihood_statistics(sums: RowSums, metrics: Sequence[str], with_bins: bool) -> dict[str, Statistic]:
    wanted = {
        "kl": ("forward_kl", "reverse_kl"),
        "entropy": ("student_entropy", "teacher_entropy"),
        "overlap": ("overlap", "top1_agreement"),
    }
    names = [name for metric in metrics for name in wanted.get(metric, ())]
    names += [name for name in ("student_mass_outside", "teacher_mass_outside") if name in sums.values]
    found: dict[str, Statistic] = {
        name: ratio(sums.values[name], sums.tokens) for name in names if name in sums.values
    }
    for model in ("student", "teacher"):
        if "perplexity" in metrics and f"{model}_nll" in sums.values:
            found[f"{model}_perplexity"] = _exp(ratio(sums.values[f"{model}_nll"], sums.tokens))
        if "calibration" in metrics and with_bins and model in sums.bins:
            found[f"{model}_ece"] = _calibration_error(sums.bins[model])
    return found


def _exp(statistic: Statistic) -> Statistic:
    return lambda weights: np.exp(statistic(weights))


def _calibration_error(bins: Floats) -> Statistic:
    """Mean over positions of |accuracy - confidence| of the position's bin; `bins` is [R, bins, 3]."""

    def error(weights: Floats) -> Floats:
        count, confidence, hits = np.moveaxis(np.tensordot(weights, bins, axes=1), -1, 0)  # [S, bins] each
        return np.abs(hits - confidence).sum(-1) / count.sum(-1)

    return error


def _text_statistics(
    labels: Sequence[list[int]], metrics: Sequence[str], ends: Sequence[int] | None
) -> dict[str, Statistic]:
    """Means over rows, every row with the same weight."""
    ones = np.ones(len(labels))
    values: dict[str, list[float]] = {}
    if "length" in metrics:
        values["tokens_per_text"] = [float(len(row)) for row in labels]
        if ends is not None:
            values["cut_off"] = [float(row[-1] not in ends) for row in labels]
    if "repetition" in metrics:
        values |= {f"repeated_{n}grams": [repeated_ngrams(row, n) for row in labels] for n in (1, 2, 3, 4)}
        loops = [longest_loop(row) for row in labels]
        values["longest_loop_tokens"] = [float(loop) for loop in loops]
        values["looping"] = [float(loop > 0) for loop in loops]
    return {name: ratio(np.array(column), ones) for name, column in values.items()}


def _distinct(labels: Sequence[list[int]]) -> dict[str, Any]:
    # Without interval: a resample holds rows twice, whose n-grams are not distinct.
    return {f"distinct_{n}": {"value": distinct_ngrams(labels, n), "interval": None} for n in (1, 2, 3, 4)}


def _gap(statistics: dict[str, dict[str, Statistic]], weights: Floats) -> dict[str, Any]:
    own, data = statistics["student"], statistics["dataset"]

    def difference(name: str) -> Estimate:
        return estimate(lambda w: own[name](w) - data[name](w), weights)

    return {name: difference(name).to_json() for name in _GAPS if name in own and name in data}


def _named(progress: Progress, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(stage, done, total)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id  # type: ignore[return-value]


def _column(data: str | Path, role: str, columns: list[str], given: str | None, known: Sequence[str]) -> str:
    found = next((name for name in ((given,) if given else known) if name in columns), None)
    if found is None:
        wanted = given or " | ".join(known)
        raise ValueError(
            f"{data} has no {role} column {wanted}; it has {', '.join(columns)}. Name it with "
            f"--{role}-column."
        )
    return found


def _from_messages(messages: Any, data: str | Path, number: int) -> TextRow:
    turns = messages if isinstance(messages, list) else []
    if (
        len(turns) < 2
        or not isinstance(turns[-1], dict)
        or turns[-1].get("role") != "assistant"
        or not turns[-1]["content"]
    ):
        raise ValueError(
            f"{data}: the messages of row {number} do not end with an assistant turn; fill or remove the row."
        )
    return TextRow(turns[:-1], turns[-1]["content"])
