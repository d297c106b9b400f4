"""The frames of this package between a call and a function: how many hands a step passes through."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import hpd

__all__ = ["Way", "way_to"]

_PACKAGE = Path(hpd.__file__).parent


class Way(NamedTuple):
    """The frames of a call that lie in `hpd/`, outermost first, each as "file:function"."""

    frames: tuple[str, ...]

    @property
    def files(self) -> set[str]:
        return {frame.partition(":")[0] for frame in self.frames}


def way_to(is_target: Callable[[CodeType], bool], call: Callable[[], Any]) -> Way:
    """The way to the first call of a target inside `call`, the target included.

    Raises:
        AssertionError: no target was called.
    """
    found: list[Way] = []

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and not found and is_target(frame.f_code):
            found.append(_stack(frame))

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    assert found, "the target was not called"
    return found[0]


def _stack(frame: FrameType | None) -> Way:
    frames: list[str] = []
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(_PACKAGE):
            frames.append(f"{file.relative_to(_PACKAGE)}:{frame.f_code.co_name}")
        frame = frame.f_back
    return Way(tuple(reversed(frames)))
