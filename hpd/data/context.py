"""Rows that are longer than a model reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from hpd.data.rendering import tokenize
from hpd.models.buildable import without_weights
from hpd.models.pairing import CheckResult

__all__ = ["check_context", "context_of"]

# Names of a context's length in configurations that do not map theirs to the first of them.
_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")

# Bytes that a template puts around a row's texts, at most; and rows of a table of positions beyond its
# context (padding, as in OPT).
_FRAME_BYTES = 4096
_OFFSET = 16


def context_of(config: Any) -> int | None:
    """Tokens that a model was made to read; None where its configuration does not say."""
    text = config.get_text_config()
    length = next((v for name in _NAMES if isinstance(v := getattr(text, name, None), int) and v > 1), None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    factor, original = (rope.get(name) for name in ("factor", "original_max_position_embeddings"))
    if length is not None and factor and original:
        return max(length, int(factor * original))
    return length


def check_context(
    rows: Any,
    tokenizer: Any,
    labels: str,
    max_length: int | None,
    configs: Mapping[str, Any],
) -> list[CheckResult]:
    """Compare the longest rows with the contexts of student and teachers.

    Rows are counted only where train.max_length does not keep them short enough.

    Args:
        rows: of training; of a stream, the first ones.
        tokenizer: the student's.
        labels: the recipe's `data.labels`.
        max_length: tokens that a row keeps; None: all.
        configs: of each model, by its role in messages.

    Returns:
        A verdict for each model whose context rows exceed: an error where it has no position for them.
    """
    contexts = {role: context_of(config) for role, config in configs.items()}
    limit = getattr(tokenizer, "model_max_length", None)
    short = {role: c for role, c in contexts.items() if c and (max_length is None or c < max_length)}
    if not short:
        return []
    beyond = _longer(rows, tokenizer, labels, min(short.values()))
    lengths = [min(length, max_length or length) for length in beyond]
    found = []
    for role, context in short.items():
        count = sum(length > context for length in lengths)
        if not count:
            continue
        fails = _has_position_table(configs[role], context)
        outcome = (
            "it has no positions beyond, and training would fail there"
            if fails
            else "it would be trained and asked outside the range that it was made for"
        )
        also = f"; the tokenizer says {limit}" if isinstance(limit, int) and limit < 10**9 else ""
        found.append(
            CheckResult(
                "error" if fails else "warning",
                "context",
                f"{count} rows are longer than the {role} reads ({max(lengths)} tokens, its context has "
                f"{context}{also}): {outcome}. Set train.max_length: {context} or less, or shorten the rows.",
            )
        )
    return found


def _longer(rows: Any, tokenizer: Any, labels: str, context: int) -> list[int]:
    """Lengths of the rows with more tokens than `context`."""
    found = []
    for row in rows:
        # A token has a byte at least, so most rows need not be tokenized.
        if row.get("input_ids") is None and sum(_sizes(row)) + _FRAME_BYTES < context:
            continue
        length = len(tokenize(row, tokenizer, labels)[0])
        if length > context:
            found.append(length)
    return found


def _sizes(value: Any) -> Iterator[int]:
    """Bytes of all texts within a row."""
    if isinstance(value, str):
        yield len(value.encode("utf-8", "ignore"))
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _sizes(part)
    elif isinstance(value, list):
        for part in value:
            yield from _sizes(part)


def _has_position_table(config: Any, context: int) -> bool:
    """True if a model looks positions up in a table, which ends with its context."""
    try:
        model = without_weights(config)
    except Exception:  # code of a model's own may not run without its weights; then nothing is known
        return False
    tokens = model.get_input_embeddings()
    return any(
        isinstance(module, nn.Embedding)
        and module is not tokens
        and context <= module.num_embeddings <= context + _OFFSET
        for module in model.modules()
    )
