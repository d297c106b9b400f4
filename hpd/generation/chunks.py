"""Which chunks of a long piece of work are written together, the same after an interruption."""

from __future__ import annotations

from collections.abc import Container

__all__ = ["groups"]


def groups(count: int, size: int | None, done: Container[int]) -> list[list[int]]:
    """The chunks that are missing, of `count`, in groups of `size`; None: all in one.

    Groups of a size stand where they always do, so one that is missing in part is whole here: other batches
    would round otherwise, and a resumed call write other texts.

    >>> groups(5, 2, {0, 2, 3})
    [[0, 1], [4]]
    """
    missing = [chunk for chunk in range(count) if chunk not in done]
    if size is None:
        return [missing] if missing else []
    starts = dict.fromkeys(chunk // size * size for chunk in missing)
    return [list(range(start, min(start + size, count))) for start in starts]
