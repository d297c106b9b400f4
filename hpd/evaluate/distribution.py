"""The distance of a student's distribution is from its teacher's: on the texts of a data set, and on what the
student writes itself.

In formulas p is the teacher, q the student; nats, means over label tokens. Axes: S resamples, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from hpd.data.rendering import tokenize
from hpd.evaluate.statistics import Figure, Floats, estimate, ratio
from hpd.evaluate.text_rows import TextRow
from hpd.evaluate.token_statistics import (
    RowSums,
    TextTokens,
    answer_tokens,
    distinct_ngrams,
    longest_loop,
    repeated_ngrams,
    sum_rows,
)
from hpd.generation.engine import (
    Request,
    TransformersEngine,
    encode_prompt,
    end_token_ids,
    turns_for_template,
)
from hpd.generation.settings import GenerationSettings
from hpd.models.pairing import common_vocab, first_difference
from hpd.models.probe import probe_head
from hpd.progress import Progress

__all__ = ["METRICS", "TEXTS", "check_metrics", "distribution_metrics"]


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
"""Values of `--metrics`."""

TEXTS = ("dataset", "student")
"""The data set's completions (the teacher's, where it wrote them), and the student's own from the same
prompts."""

WRITING = GenerationSettings(temperature=1.0, max_new_tokens=256)
"""Default settings of the student's own text."""

_GAPS = (
    "forward_kl",
    "reverse_kl",
    "student_entropy",
    "teacher_entropy",
    "overlap",
    "top1_agreement",
    "acceptance",
)


def check_metrics(metrics: Sequence[str], texts: Sequence[str], has_teacher: bool) -> None:
    """Refuse unknown names, and metrics that need a teacher where there is none.

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
    settings: GenerationSettings = WRITING,
    *,
    texts: Sequence[str] = TEXTS,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    vocabulary: str = "error",
    max_length: int | None = None,
    top_k: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    r"""Measure a student's distances, entropies, likelihoods and texts, with 95 % intervals over the rows.

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
        settings: how the student writes; chat template as for `generate_answers`.
        texts: `dataset`, `student` or both; both also give the gap between them, from paired resamples.
        teacher_tokenizer: compared with the student's token by token where given.
        vocabulary: policy for heads of unequal size (`hpd.losses.heads.POLICIES`).
        max_length: tokens of prompt and completion that are read; None is the smaller context of the models.
        top_k: size of the sets whose overlap is taken.
        seed: of the resamples; draws of the student's texts follow `settings.seed`.
        progress: gets a bar for each stage.

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
    vocab = _common_vocab(student, teacher, tokenizer, teacher_tokenizer, vocabulary)
    for role, model in (("student", student), ("teacher", teacher)):
        if model is not None:
            probe_head(model, role)
    limit = _length_limit(student, teacher, max_length)
    reader = _Reader(student, teacher, tokenizer, settings, vocab, limit, top_k, progress or Progress())
    counts = {"num_rows": len(rows), "top_k": top_k, "max_length": limit, "common_vocabulary": vocab}
    return counts | _report(reader, rows, metrics, texts, seed)


@dataclass(frozen=True)
class _Reader:
    """Models that read texts, how far, and how the student writes."""

    student: nn.Module
    teacher: nn.Module | None
    tokenizer: PreTrainedTokenizerBase
    settings: GenerationSettings
    vocab: int | None
    limit: int | None
    top_k: int
    progress: Progress

    def read(
        self, text: str, rows: Sequence[TextRow], metrics: Sequence[str]
    ) -> tuple[dict[str, Figure], dict[str, Any]]:
        """Figures of one set of texts: those with an interval, and counts."""
        by_student = text == "student"
        if by_student:
            written = _student_tokens(
                self.student, self.tokenizer, rows, self.settings, self.limit, self.progress
            )
        else:
            written = _dataset_tokens(self.tokenizer, rows, self.settings)
        cut, lost = _cut(written, self.limit, self.vocab)
        sums = sum_rows(
            self.student,
            self.teacher,
            cut,
            vocab=self.vocab,
            top_k=self.top_k,
            batch_size=self.settings.batch_size,
            pad_id=_pad_id(self.tokenizer),
            progress=self.progress.bar(f"reading {text} text"),
        )
        labels = [[token for token, bit in zip(*row, strict=True) if bit] for row in written]
        ends = end_token_ids(self.student, self.tokenizer) if by_student else None
        figures = _likelihood_figures(sums, metrics, with_bins=not by_student)
        of_texts = {"length", "repetition"} & set(metrics)
        answers = [answer_tokens(self.tokenizer, row) for row in labels] if of_texts else labels
        figures |= _text_figures(labels, answers, metrics, ends)
        distinct = _distinct(answers) if "repetition" in metrics else {}
        thinking = sum(len(answer) < len(row) for answer, row in zip(answers, labels, strict=True))
        thoughts = {"rows_with_thinking": thinking} if thinking else {}
        return figures, {"tokens": int(sums.tokens.sum()), **lost, **distinct, **thoughts}


def _report(
    reader: _Reader, rows: Sequence[TextRow], metrics: Sequence[str], texts: Sequence[str], seed: int
) -> dict[str, Any]:
    report: dict[str, Any] = {}
    figures: dict[str, dict[str, Figure]] = {}
    for text in texts:
        figures[text], plain = reader.read(text, rows, metrics)
        report[text] = plain | _estimates(figures[text], len(rows), seed)
    if len(figures) == 2:
        report["gap"] = _estimates(_gaps(figures["student"], figures["dataset"]), len(rows), seed)
    return report


def _estimates(figures: dict[str, Figure], num_rows: int, seed: int) -> dict[str, Any]:
    return {name: estimate(figure, num_rows, seed).to_json() for name, figure in figures.items()}


def _gaps(student: dict[str, Figure], dataset: dict[str, Figure]) -> dict[str, Figure]:
    """The student's own texts minus the data set's, each resample of rows taken from both."""

    def gap(name: str) -> Figure:
        return lambda weights: student[name](weights) - dataset[name](weights)

    return {name: gap(name) for name in _GAPS if name in student and name in dataset}


def _common_vocab(
    student: nn.Module,
    teacher: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    policy: str,
) -> int | None:
    if teacher is None:
        return None
    if teacher_tokenizer is not None:
        difference = first_difference(tokenizer, teacher_tokenizer)
        if difference is not None:
            read = [t.convert_ids_to_tokens(difference) for t in (tokenizer, teacher_tokenizer)]
            raise ValueError(
                f"token {difference} is {read[0]!r} for the student and {read[1]!r} for the teacher: the "
                "tokenizers are different, and a divergence between the two models has no meaning. Choose a "
                "teacher of the student's tokenizer family."
            )
    return common_vocab(student, teacher, policy)


def _length_limit(student: nn.Module, teacher: nn.Module | None, max_length: int | None) -> int | None:
    models: list[Any] = [model for model in (student, teacher) if model is not None]
    configs = [model.config.get_text_config() for model in models]
    contexts = [getattr(config, "max_position_embeddings", None) for config in configs]
    known = [length for length in (*contexts, max_length) if length is not None]
    return min(known, default=None)


def _dataset_tokens(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[TextRow], settings: GenerationSettings
) -> list[TextTokens]:
    """Tokenized exactly as for training: the template's own end of turn, or eos, is a label."""
    texts = []
    for prompt, completion in rows:
        encode_prompt(tokenizer, prompt, settings)  # refuses what the student could not be asked
        system = settings.system_prompt
        if settings.chat_template != "never" and tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            turns = [{"role": "system", "content": system}, *turns] if system else turns
            turns = turns_for_template(tokenizer, turns)
            row = {"prompt": turns, "completion": [{"role": "assistant", "content": completion}]}
        else:
            row = {"prompt": f"{system}\n\n{prompt}" if system else prompt, "completion": completion}
        texts.append(TextTokens(*tokenize(row, tokenizer, "completion")))
    return texts


def _student_tokens(
    student: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TextRow],
    settings: GenerationSettings,
    limit: int | None,
    progress: Progress,
) -> list[TextTokens]:
    """Texts that the student writes, as the token ids that it drew: encoding them again may give others."""
    engine = TransformersEngine(student, tokenizer)
    prompts = [encode_prompt(tokenizer, row.prompt, settings) for row in rows]
    room = min((limit or 2**31) - max(map(len, prompts)), settings.max_new_tokens)
    if room < 1:
        raise ValueError(
            f"the longest prompt has {max(map(len, prompts))} tokens, which leaves no room for an answer in "
            f"{limit}."
        )
    written: dict[int, list[int]] = {}
    bar = progress.bar("the student writes")
    for batch in engine.batches([len(prompt) for prompt in prompts], settings):
        requests = [Request(prompts[row], (settings.seed, row, 0, 0)) for row in batch]
        written.update(zip(batch, engine.generate_tokens(requests, settings, room), strict=True))
        bar(len(written), len(rows))
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


def _likelihood_figures(sums: RowSums, metrics: Sequence[str], with_bins: bool) -> dict[str, Figure]:
    wanted = {
        "kl": ("forward_kl", "reverse_kl"),
        "entropy": ("student_entropy", "teacher_entropy"),
        "overlap": ("overlap", "top1_agreement", "acceptance"),
    }
    names = [name for metric in metrics for name in wanted.get(metric, ())]
    names += [name for name in ("student_mass_outside", "teacher_mass_outside") if name in sums.values]
    found: dict[str, Figure] = {
        name: ratio(sums.values[name], sums.tokens) for name in names if name in sums.values
    }
    for model in ("student", "teacher"):
        if "perplexity" in metrics and f"{model}_nll" in sums.values:
            found[f"{model}_perplexity"] = _exp(ratio(sums.values[f"{model}_nll"], sums.tokens))
        if "calibration" in metrics and with_bins and model in sums.bins:
            found[f"{model}_ece"] = _calibration_error(sums.bins[model])
    return found


def _exp(figure: Figure) -> Figure:
    return lambda weights: np.exp(figure(weights))


def _calibration_error(bins: Floats) -> Figure:
    """Mean over positions of |accuracy - confidence| of the position's bin; `bins` is [R, bins, 3]."""

    def error(weights: Floats) -> Floats:
        count, confidence, hits = np.moveaxis(np.tensordot(weights, bins, axes=1), -1, 0)  # [S, bins] each
        return np.abs(hits - confidence).sum(-1) / count.sum(-1)

    return error


def _text_figures(
    labels: Sequence[list[int]],
    answers: Sequence[list[int]],
    metrics: Sequence[str],
    ends: Sequence[int] | None,
) -> dict[str, Figure]:
    """Means over rows, every row with the same weight; thoughts are no part of an answer."""
    values: dict[str, list[float]] = {}
    if "length" in metrics:
        values["tokens_per_text"] = [float(len(row)) for row in answers]
        if ends is not None:
            values["cut_off"] = [float(row[-1] not in ends) for row in labels]
    if "repetition" in metrics:
        values |= {f"repeated_{n}grams": [repeated_ngrams(row, n) for row in answers] for n in (1, 2, 3, 4)}
        loops = [longest_loop(row) for row in answers]
        values["longest_loop_tokens"] = [float(loop) for loop in loops]
        values["looping"] = [float(loop > 0) for loop in loops]
    return {name: ratio(np.array(column)) for name, column in values.items()}


def _distinct(labels: Sequence[list[int]]) -> dict[str, Any]:
    # Without interval: a resample holds rows twice, whose n-grams are not distinct.
    return {f"distinct_{n}": {"value": distinct_ngrams(labels, n), "interval": None} for n in (1, 2, 3, 4)}


def _pad_id(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
