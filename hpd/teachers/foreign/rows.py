"""What a foreign file says about a row, and the rows of one that `datasets` reads.

Axes: L places of a row, k tokens. Place j is about the token j + 1 of the row, as in `hpd.batch`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hpd.config.data import DataConfig
from hpd.data.reading import read

__all__ = ["PlaceAnswers", "TeacherFile", "damaged", "fit", "read_columns"]


class PlaceAnswers(NamedTuple):
    """A teacher's answers about the places of a row."""

    tokens: Int[Tensor, "L k"]
    """The likeliest tokens, likeliest first."""
    logprobs: Float[Tensor, "L k"]
    """Nats, as the file's own reader gives them; -inf: the file has fewer tokens there."""
    label_logprobs: Float[Tensor, "L"] | None
    """Of the row's next token, in nats; None: known where it is one of the k."""
    known: Bool[Tensor, "L"]
    """Which places the file says anything about."""


class TeacherFile:
    """Rows with a teacher's answers.

    Args:
        path: a file, a folder or a Hub id.
    """

    path: str
    k: int
    """Tokens a place."""
    dtype: torch.dtype = torch.float32
    """Of the log-probabilities, as the file's own reader gives them."""
    scaled: bool = False
    """True if the k probabilities of a place are divided by their sum: the mass outside is lost."""

    def __len__(self) -> int:
        raise NotImplementedError

    def ids(self, number: int) -> npt.NDArray[np.int64]:
        """The tokens of a row.

        Raises:
            ValueError: the row is damaged; the text names it.
        """
        raise NotImplementedError

    def answers(self, number: int) -> PlaceAnswers:
        """The teacher's answers about a row.

        Raises:
            ValueError: as `ids`.
        """
        raise NotImplementedError

    def digest(self) -> str:
        """What changes when the rows do."""
        raise NotImplementedError


def damaged(path: str | Path, number: int, why: str) -> ValueError:
    """The error about a row, counted from 1."""
    return ValueError(
        f"Row {number + 1:,} of {path} cannot be read: {why}. The file is damaged, or of another format."
    )


def fit(tokens: Tensor, logprobs: Tensor, path: str, number: int) -> None:
    """Look at the answers of a row.

    Raises:
        ValueError: shapes that differ, no number, a log-probability above 0, or a token twice at a place.
    """
    if tokens.shape != logprobs.shape or tokens.dim() != 2:
        raise damaged(
            path,
            number,
            f"its tokens are {tuple(tokens.shape)} and log-probabilities {tuple(logprobs.shape)}",
        )
    if torch.isnan(logprobs).any():
        raise damaged(path, number, "a log-probability is not a number")
    # Codes of a few bits overshoot; a logit or a probability in place of a log-probability lies far above.
    if len(logprobs) and float(logprobs.max()) > 0.5:
        raise damaged(path, number, f"a log-probability is {float(logprobs.max()):g}, above 0")
    if len(tokens) and int(tokens.min()) < 0:
        raise damaged(path, number, f"a token has the number {int(tokens.min())}")
    own = -1 - torch.arange(tokens.shape[1]).expand_as(tokens)  # what is not told is no token
    ordered = torch.where(torch.isfinite(logprobs), tokens, own).sort(-1).values
    if (twice := ordered[:, 1:] == ordered[:, :-1]).any():
        token = int(ordered[:, 1:][twice][0])
        raise damaged(path, number, f"a place has the token {token} twice")


def read_columns(path: str, needed: tuple[str, ...], title: str) -> Any:
    """The rows of a file, a folder or a Hub dataset that has these columns.

    Raises:
        FileNotFoundError, ValueError: as `hpd.data.reading.read`; or a column is not there.
    """
    rows = read(path, DataConfig(path=path))
    missing = [name for name in needed if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"{path} has the columns {', '.join(rows.column_names)}, and rows of {title} have "
            f"{', '.join(needed)}. Missing: {', '.join(missing)}. --format names another format."
        )
    return rows
