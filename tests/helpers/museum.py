"""An exhibit of the museum: a property that the code has, and a published bug put into it that breaks the
property."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

__all__ = ["Measured", "distance", "exhibit", "swap"]

# A mutant has to break its property by more than rounding ever could.
_CLEARLY = 100.0
_HOLDERS = ("hpd", "trl")

Measured = Tensor | float | Sequence[Any]


class _Pair(NamedTuple):
    got: Measured
    wanted: Measured


def exhibit(
    measure: Callable[[], tuple[Measured, Measured]],
    mutate: Callable[[pytest.MonkeyPatch], None],
    tolerance: float = 1e-5,
) -> None:
    """Assert that the property holds, and that it does not hold of the mutant.

    Args:
        measure: returns what the code gives and what is right, found in another way.
        mutate: puts the bug in, by `swap`.
        tolerance: of the distance, relative to the largest number that is right (1 where all are zero).
    """
    ours = _Pair(*measure())
    assert distance(*ours) <= tolerance, f"ours is wrong: {ours}"
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        theirs = _Pair(*measure())
    found = distance(*theirs)
    assert found > _CLEARLY * tolerance, f"the mutant is not caught (distance {found:.2e}): {theirs}"


def distance(got: Measured, wanted: Measured) -> float:
    """Largest difference relative to the largest number of `wanted`; of lists and counts 0 if they are equal,
    and infinite otherwise."""
    if not isinstance(got, (Tensor, float)):
        return 0.0 if got == wanted else float("inf")
    ours, right = (torch.as_tensor(side).detach().double().flatten() for side in (got, wanted))
    if len(ours) != len(right) or not bool(torch.isfinite(ours).all()):
        return float("inf")
    size = right.abs().max().item()
    return (ours - right).abs().max().item() / (size or 1.0)


def swap(patch: pytest.MonkeyPatch, target: str, make: Callable[[Any], Any]) -> None:
    """Replace something by `make(original)`, wherever a module of ours, or of TRL's, holds it.

    Args:
        patch: takes it back.
        target: "module:name", or "module:Class.name".
        make: the mutant.
    """
    module, _, path = target.partition(":")
    *classes, name = path.split(".")
    try:
        owner: Any = importlib.import_module(module)
        for part in classes:
            owner = getattr(owner, part)
        # As it stands there, be it a static method or a base class's.
        original = inspect.getattr_static(owner, name)
    except (ImportError, AttributeError):
        pytest.fail(f"the bug of this exhibit is put into {target}, which is gone: name what took its place")
    mutant = make(original)
    if classes:
        patch.setattr(owner, name, mutant)
        return
    for holder in [m for key, m in sys.modules.items() if key.partition(".")[0] in _HOLDERS]:
        if vars(holder).get(name) is original:
            patch.setattr(holder, name, mutant)
