"""What a long job tells its caller."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence

import transformers

__all__ = ["Progress", "quiet_libraries"]


class Progress:
    """What the command line shows; silent unless overridden (every method is optional to override)."""

    def say(self, text: str) -> None: ...

    def evaluating(self, name: str) -> Callable[[int, int], None] | None:
        return None

    def callbacks(self) -> Sequence[transformers.TrainerCallback]:
        return ()


def quiet_libraries() -> None:
    """Libraries' notices that a user of the command line cannot act on."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
