"""The fit behind AlpacaEval 2's length-controlled win rate beside a model's own verdicts: how hard each
instruction is, and two copies of the baseline that were asked to be short and to be long.

`alpaca_eval_2.csv.gz` holds estimates of both. The authors publish their own as `df_gamed.csv`
(huggingface.co/datasets/tatsu-lab/alpaca_eval), which goes before the estimates where it is given. The
estimates are ours, from what AlpacaEval 2's leaderboard publishes (github.com/tatsu-lab/alpaca_eval, commit
cd543a1; scripts/alpaca_difficulty.py makes them): difficulties under which the three published
coefficients of each of 50 models are the best fit of its published verdicts, and of 192 models give the
published rate. The verdicts are under CC BY-NC 4.0, the coefficients under Apache-2.0. The errors
are in docs/evidence/grading.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpd.evaluate.benchmarks.rows import Row, read_rows
from hpd.files import digest_text

__all__ = ["BASELINE", "Copies", "LengthControl", "instruction_key", "published_control", "read_control"]

Floats = NDArray[np.float64]

BASELINE = "gpt4_1106_preview"
"""The model whose copies these are; the fit holds against no other."""

_ESTIMATES = Path(__file__).with_name("alpaca_eval_2.csv.gz")

_COPIES = ("concise", "verbose")

_PUBLISHED = ("index", "preference", "std_delta_len", "instruction_difficulty")


class Copies(NamedTuple):
    """Verdicts on the copies, [G] each."""

    length: Floats
    """tanh of the copy's length minus the baseline's, in standard deviations of that."""
    difficulty: Floats
    won: Floats
    """Of the copy against the baseline. Only two sums of it enter a fit (with length, with difficulty)."""


class LengthControl(NamedTuple):
    """What a fit needs beside verdicts and lengths."""

    difficulty: Floats
    """Of the instructions asked, [Q]."""
    copies: Copies


def instruction_key(instruction: str) -> str:
    """Name of an instruction in the file of estimates."""
    return digest_text(instruction)[:12]


def published_control(instructions: Sequence[str]) -> LengthControl:
    """Estimates for AlpacaEval's instructions.

    Raises:
        ValueError: there are others among them.
    """
    difficulty = _estimates()[0]
    unknown = [text for text in instructions if instruction_key(text) not in difficulty]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(instructions)} instructions are not AlpacaEval's (the first: "
            f"{unknown[0][:60]!r}), so no difficulty of theirs is known; give a file of difficulties "
            "(-o difficulty=FILE with the columns index and instruction_difficulty), or do without length "
            "control."
        )
    found = np.array([difficulty[instruction_key(text)] for text in instructions])
    return LengthControl(found, _copies(difficulty, _estimates()[1]))


def read_control(path: str | Path, ids: Sequence[str]) -> LengthControl:
    """A file of difficulties: the authors' `df_gamed.csv` with their copies, or one with the columns index
    and instruction_difficulty, to which the estimated copies are added.

    Args:
        path: the file.
        ids: what the instructions asked have as index there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: other columns, or an instruction has no difficulty.
    """
    rows = read_rows(path)
    index = next((name for name in ("index", "idx", "") if name in rows[0]), None)
    value = "instruction_difficulty"
    if index is None or value not in rows[0]:
        raise ValueError(
            f"{path} needs the columns index and instruction_difficulty; it has {', '.join(rows[0])}."
        )
    known = {str(row[index]): _number(path, row, value) for row in rows}
    missing = [name for name in ids if name not in known]
    if missing:
        raise ValueError(
            f"{path} has no difficulty for {len(missing)} instructions (the first is {missing[0]})."
        )
    found = np.array([known[name] for name in ids])
    if set(_PUBLISHED) <= rows[0].keys():
        columns = [np.array([_number(path, row, name) for row in rows]) for name in _PUBLISHED[1:]]
        won, length, difficulty = columns
        return LengthControl(found, Copies(np.tanh(-length), difficulty, won))
    estimated, copies = _estimates()
    # By their place among the 805, as the authors' files have it; others keep the estimates.
    placed = {key: known.get(str(place), estimated[key]) for place, key in enumerate(estimated)}
    return LengthControl(found, _copies(placed, copies))


def _copies(difficulty: Mapping[str, float], rows: Sequence[Row]) -> Copies:
    def column(name: str) -> Floats:
        return np.array([float(row[f"{copy}_{name}"]) for copy in _COPIES for row in rows])

    own = np.array([difficulty[row["key"]] for _ in _COPIES for row in rows])
    return Copies(column("length"), own, column("won"))


@lru_cache(maxsize=1)
def _estimates() -> tuple[dict[str, float], list[Row]]:
    """Difficulties by key, in AlpacaEval's order, and the rows of the file."""
    rows = read_rows(_ESTIMATES)
    return {row["key"]: float(row["difficulty"]) for row in rows}, rows


def _number(path: str | Path, row: Row, name: str) -> float:
    try:
        value = float(row[name])
    except (TypeError, ValueError, KeyError):
        value = np.nan
    if not np.isfinite(value):
        raise ValueError(f"{path}: {name} is {row.get(name)!r} in a row; it must be a number.")
    return value
