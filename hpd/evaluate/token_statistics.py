"""Statistics of two models at every label position of some texts, without keeping `[N, V]`; summed per row.

Axes: B rows of a batch, T tokens, N label positions, C positions of a chunk, V common vocabulary, R rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hpd.batch import IGNORE_INDEX, token_batch
from hpd.evaluate.benchmarks.answers import drop_thinking
from hpd.losses.heads import Scores
from hpd.losses.products import chunks, project_
from hpd.losses.tile import sum_dtype
from hpd.methods.supports import LOGPROB_FLOOR
from hpd.models.forward import scores_of
from hpd.progress import Advance

__all__ = [
    "NUM_BINS",
    "RowSums",
    "TextTokens",
    "answer_tokens",
    "distinct_ngrams",
    "longest_loop",
    "repeated_ngrams",
    "sum_rows",
]

NUM_BINS = 15
"""Equal bins of confidence, as in Guo et al. 2017."""

_CHUNK_BYTES = 16 * 2**20


class TextTokens(NamedTuple):
    """One text: token ids, of which those after the prompt are labels."""

    ids: list[int]
    is_label: list[bool]


class RowSums(NamedTuple):
    """Sums over the label positions of each row."""

    tokens: NDArray[np.float64]
    """[R] label positions."""
    values: dict[str, NDArray[np.float64]]
    """[R] each; nats, or positions for shares."""
    bins: dict[str, NDArray[np.float64]]
    """Per model [R, bins, 3]: positions, confidence and hits of the likeliest token, by confidence."""


def sum_rows(
    student: nn.Module,
    teacher: nn.Module | None,
    texts: Sequence[TextTokens],
    *,
    vocab: int | None,
    top_k: int,
    batch_size: int,
    pad_id: int,
    progress: Advance | None = None,
) -> RowSums:
    """Run both models over the texts, longest first, and sum what they say over the label positions of each.

    Args:
        student, teacher: models that `hpd.models.forward.add_head_function` has prepared, on one device.
        texts: token ids below `vocab`, with at least one label each.
        vocab: tokens that both models have; None where there is no teacher.
        top_k: size of the sets that `overlap` compares.
        batch_size: rows per forward pass; memory and speed only.
        pad_id: any token id.
        progress: called with (rows so far, rows).
    """
    order = sorted(range(len(texts)), key=lambda row: -len(texts[row].ids))
    sums: dict[str, Tensor] = {}
    device = next(student.parameters()).device
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        inputs = _collate([texts[row] for row in rows], pad_id, device)
        batch = token_batch(inputs, vocab)
        row_of = torch.tensor(rows, device=device)[batch.index // inputs["input_ids"].shape[1]]  # [N]
        both = [
            None if model is None else _wide(scores_of(model, inputs, batch.index))
            for model in (student, teacher)
        ]
        assert both[0] is not None
        widest = max(scores.vocab for scores in both if scores)
        for chunk in chunks(len(batch.index), 4 * widest, _CHUNK_BYTES):
            sides = [None if scores is None else Scores(scores.hidden[chunk], scores.head) for scores in both]
            _add_chunk(sums, sides, batch.labels[chunk], row_of[chunk], len(texts), vocab, top_k)
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    arrays = {name: total.double().cpu().numpy() for name, total in sums.items()}
    bins = {name.removeprefix("bins/"): arrays.pop(name) for name in list(arrays) if name.startswith("bins/")}
    return RowSums(arrays.pop("tokens"), arrays, bins)


def _collate(texts: Sequence[TextTokens], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    length = max(len(text.ids) for text in texts)
    fields = {"input_ids": [], "labels": [], "attention_mask": []}
    for ids, is_label in texts:
        padding = length - len(ids)
        labels = [token if bit else IGNORE_INDEX for token, bit in zip(ids, is_label, strict=True)]
        fields["input_ids"].append(ids + [pad_id] * padding)
        fields["labels"].append(labels + [IGNORE_INDEX] * padding)
        fields["attention_mask"].append([1] * len(ids) + [0] * padding)
    return {name: torch.tensor(values, device=device) for name, values in fields.items()}


def _wide(scores: Scores) -> Scores:
    """In float32 or wider: this is measured, not trained, and rounding the logits would show in a small
    divergence."""
    dtype = torch.promote_types(scores.hidden.dtype, torch.float32)
    weight, bias = (
        None if t is None else t.detach().to(dtype) for t in (scores.head.weight, scores.head.bias)
    )
    return Scores(scores.hidden.to(dtype), scores.head._replace(weight=weight, bias=bias))


def _add_chunk(
    sums: dict[str, Tensor],
    sides: Sequence[Scores | None],
    labels: Int[Tensor, "C"],
    row_of: Int[Tensor, "C"],
    num_rows: int,
    vocab: int | None,
    top_k: int,
) -> None:
    dtype = sum_dtype(labels.device)
    logprobs: list[Float[Tensor, "C V"]] = []  # student, teacher
    values: dict[str, Float[Tensor, "C"]] = {"tokens": torch.ones_like(labels, dtype=dtype)}
    for name, scores in zip(("student", "teacher"), sides, strict=True):
        if scores is None:
            continue
        logits = project_(scores, scores.hidden.new_empty(len(labels), scores.vocab))
        if vocab is not None and scores.vocab > vocab:
            whole = logits.logsumexp(-1)
            logits = logits[:, :vocab]
            values[f"{name}_mass_outside"] = -torch.expm1(logits.logsumexp(-1) - whole)
        log_q = torch.log_softmax(logits, -1).clamp_(min=LOGPROB_FLOOR)
        values |= _one_model(name, log_q, labels)
        confidence, guess = log_q.max(-1)
        _add_bins(sums, name, confidence.exp(), guess == labels, row_of, num_rows)
        logprobs.append(log_q)
    if len(logprobs) == 2:
        values |= _two_models(logprobs[0], logprobs[1], top_k)
    for name, value in values.items():
        if name not in sums:
            sums[name] = torch.zeros(num_rows, dtype=dtype, device=labels.device)
        sums[name].index_add_(0, row_of, value.to(dtype))


def _one_model(
    name: str, log_q: Float[Tensor, "C V"], labels: Int[Tensor, "C"]
) -> dict[str, Float[Tensor, "C"]]:
    return {
        f"{name}_nll": -log_q.gather(1, labels[:, None])[:, 0],
        f"{name}_entropy": -(log_q.exp() * log_q).sum(-1),
    }


def _two_models(
    log_q: Float[Tensor, "C V"], log_p: Float[Tensor, "C V"], top_k: int
) -> dict[str, Float[Tensor, "C"]]:
    gap = log_p - log_q
    ours, theirs = (side.topk(min(top_k, side.shape[1]), -1).indices for side in (log_q, log_p))
    return {
        "forward_kl": (log_p.exp() * gap).sum(-1),
        "reverse_kl": -(log_q.exp() * gap).sum(-1),
        "acceptance": torch.minimum(log_p, log_q).exp().sum(-1),
        "overlap": (ours[:, :, None] == theirs[:, None, :]).any(-1).double().mean(-1).to(log_q.dtype),
        "top1_agreement": (ours[:, 0] == theirs[:, 0]).to(log_q.dtype),
    }


def _add_bins(
    sums: dict[str, Tensor], name: str, confidence: Tensor, hit: Tensor, row_of: Tensor, num_rows: int
) -> None:
    key = f"bins/{name}"
    dtype = sum_dtype(confidence.device)
    if key not in sums:
        sums[key] = torch.zeros(num_rows, NUM_BINS, 3, dtype=dtype, device=confidence.device)
    place = (confidence * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    values = torch.stack([torch.ones_like(confidence), confidence, hit.to(confidence.dtype)], -1).to(dtype)
    sums[key].view(-1, 3).index_add_(0, row_of * NUM_BINS + place, values)


_MAX_PERIOD_TOKENS = 256
"""Loops of a longer period are copies of whole paragraphs; repeated n-grams show those."""

_MIN_COPIES = 3
"""Two equal words in a row are language, three are a loop."""


def answer_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[int]:
    """The tokens of a text behind its thoughts; none where these never end."""
    text = str(tokenizer.decode(tokens))
    answer = drop_thinking(text)
    if answer == text:
        return tokens
    # The fewer tokens are left, the shorter their text; a token that holds both counts as thought.
    start = bisect_left(
        range(len(tokens) + 1), True, key=lambda i: len(tokenizer.decode(tokens[i:])) <= len(answer)
    )
    return tokens[start:]


def repeated_ngrams(tokens: Sequence[int], n: int) -> float:
    r"""Share of the n-grams of one text that occurred in it before, 0 to 1 (seq-rep-n); 0 for fewer than n
    tokens.

    .. math:: 1 - \frac{|\mathrm{set}(\text{n-grams})|}{|\text{n-grams}|}

    >>> repeated_ngrams([1, 2, 1, 2, 1, 2], 2)
    0.6

    Reference:
        Welleck et al., Neural Text Generation with Unlikelihood Training, 2020, section 4.1.
    """
    total = len(tokens) - n + 1
    return 1.0 - len(_ngrams(tokens, n)) / total if total > 0 else 0.0


def distinct_ngrams(texts: Sequence[Sequence[int]], n: int) -> float | None:
    """Different n-grams of all texts together, per n-gram (distinct-n); None where no text has n tokens.

    It falls with the number of texts: compare it between sets of one size only.

    >>> distinct_ngrams([[1, 2, 3], [1, 2, 4]], 2)
    0.75

    Reference:
        Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models, 2016.
    """
    total = sum(max(0, len(tokens) - n + 1) for tokens in texts)
    return len(set().union(*(_ngrams(tokens, n) for tokens in texts))) / total if total else None


def longest_loop(tokens: Sequence[int]) -> int:
    """Length, in tokens, of the longest stretch that is one phrase written three times or more; 0 where there
    is none.

    >>> longest_loop([5, 1, 2, 1, 2, 1, 2, 9]), longest_loop([1, 2, 1, 2])
    (6, 0)
    """
    ids = np.asarray(tokens)
    longest = 0
    for period in range(1, min(_MAX_PERIOD_TOKENS, len(ids) // _MIN_COPIES) + 1):
        run = _longest_run(ids[period:] == ids[:-period])
        if run >= (_MIN_COPIES - 1) * period:
            longest = max(longest, run + period)
    return longest


def _ngrams(tokens: Sequence[int], n: int) -> set[tuple[int, ...]]:
    return set(zip(*(tokens[start:] for start in range(n)), strict=False))


def _longest_run(flags: np.ndarray) -> int:
    """Longest stretch of True."""
    breaks = np.flatnonzero(~np.concatenate([[False], flags, [False]]))
    return int(np.diff(breaks).max()) - 1
