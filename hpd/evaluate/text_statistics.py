"""Repetition and length of token sequences: what shows a student that loops, rambles or stops short."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["distinct_ngrams", "longest_loop", "repeated_ngrams"]

_MAX_PERIOD_TOKENS = 256
"""Loops of a longer period are copies of whole paragraphs; repeated n-grams show those."""
_MIN_COPIES = 3
"""Two equal words in a row are language, three are a loop."""


def repeated_ngrams(tokens: Sequence[int], n: int) -> float:
    r"""Share of the n-grams of one text that occurred in it before, 0 to 1 (seq-rep-n); 0 for fewer than n tokens.

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
    """Length, in tokens, of the longest stretch that is one phrase written three times or more; 0 where there is none.

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
