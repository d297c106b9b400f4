"""Dumps of vLLM's `prompt_logprobs`, one JSON object a line: a `RequestOutput`, or a server's response.

    {"prompt_token_ids": [1, 15, 7], "prompt_logprobs": [null, {"15": {"logprob": -0.2, "rank": 1}}, ...]}

A completion of the server has both under `choices`, a response about a conversation at its top, and a line of
the batch API under `response.body`. The token of the row is always among a place's tokens, so its
log-probability is known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hpd.files import checksum_file
from hpd.methods.supports import LOGPROB_FLOOR
from hpd.teachers.foreign.rows import PlaceAnswers, TeacherFile, damaged, fit

__all__ = ["VllmFile"]


class _Line(NamedTuple):
    """Where a row stands."""

    start: int
    choice: int


class VllmFile(TeacherFile):
    """Rows of a JSON Lines file.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: no such file, or a folder.
        ValueError: a line is not JSON, or without tokens or `prompt_logprobs`.
    """

    def __init__(self, path: str):
        self.path = path
        self._file = Path(path).expanduser()
        if not self._file.is_file():
            inside = sorted(self._file.glob("*.jsonl"))  # none where there is no such folder
            such = f", such as {inside[0]}" if inside else ""
            what = f"{path} is a folder" if self._file.is_dir() else f"There is no file {path}"
            raise FileNotFoundError(f"{what}: give the one JSON Lines file of a vLLM dump{such}.")
        self._lines: list[_Line] = []
        counts: list[int] = []
        with self._file.open("rb") as file:
            start = 0
            for line in file:
                if line.strip():
                    number = len(self._lines)
                    for choice, part in enumerate(self._parts(line, number)):
                        counts += [_ranked(place) for place in part[1][1:] if place]
                        counts = [min(counts)] if counts else []
                        self._lines.append(_Line(start, choice))
                start += len(line)
        if not counts or not counts[0]:
            raise ValueError(f"{path} says nothing about any token: no prompt_logprobs are there.")
        self.k = counts[0]

    def __len__(self) -> int:
        return len(self._lines)

    def _parts(self, line: bytes, number: int) -> list[tuple[list[int], list[Any]]]:
        try:
            found = list(_rows_of(json.loads(line)))
            for ids, places in found:
                if not all(isinstance(i, int) for i in ids):
                    raise TypeError("prompt_token_ids are whole numbers")
                if len(places) != len(ids):
                    raise TypeError(f"{len(ids)} tokens have {len(places)} entries of prompt_logprobs")
        except KeyError as error:
            if error.args[0] == "prompt_token_ids":
                raise ValueError(
                    f"Row {number + 1:,} of {self.path} has no prompt_token_ids, without which nothing says "
                    "what the answers are about: ask the server with return_token_ids: true, or dump vLLM's "
                    "RequestOutput."
                ) from None
            raise damaged(self.path, number, f"no field {error.args[0]!r}") from None
        except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise damaged(self.path, number, " ".join(str(error).split())[:200]) from None
        return found

    def _row(self, number: int) -> tuple[list[int], list[Any]]:
        place = self._lines[number]
        with self._file.open("rb") as file:
            file.seek(place.start)
            return self._parts(file.readline(), number)[place.choice]

    def ids(self, number: int) -> npt.NDArray[np.int64]:
        return np.array(self._row(number)[0], dtype=np.int64)

    def answers(self, number: int) -> PlaceAnswers:
        ids, places = self._row(number)
        length = max(len(ids) - 1, 0)
        tokens = torch.zeros(length, self.k, dtype=torch.int64)
        values = torch.zeros(length, self.k)
        labels = torch.zeros(length)
        known = torch.zeros(length, dtype=torch.bool)
        for place, (label, entry) in enumerate(zip(ids[1:], places[1:], strict=True)):
            if not entry:
                continue
            try:
                found = {int(token): _logprob(told) for token, told in entry.items()}
                ranked = sorted(found, key=lambda token: (-found[token], token))[: self.k]
                labels[place] = found[label]
            except (KeyError, ValueError, TypeError, AttributeError):
                raise damaged(
                    self.path, number, f"its entry {place + 1} has no log-probability of token {label}"
                ) from None
            tokens[place] = torch.tensor(ranked)
            values[place] = torch.tensor([found[token] for token in ranked])
            known[place] = True
        fit(tokens, values, self.path, number)
        return PlaceAnswers(tokens, values, labels, known)

    def digest(self) -> str:
        return checksum_file(self._file)


def _rows_of(line: Any) -> Iterator[tuple[list[int], list[Any]]]:
    """The rows of a line: one, or as many as a response has choices."""
    if "response" in line:
        line = line["response"]["body"]
    if "prompt_logprobs" in line and line["prompt_logprobs"] is not None:
        yield list(line["prompt_token_ids"]), list(line["prompt_logprobs"])
        return
    for choice in line["choices"]:
        whole = {**line, **choice}
        if whole.get("prompt_logprobs") is None:
            raise KeyError("prompt_logprobs")
        yield list(whole["prompt_token_ids"]), list(whole["prompt_logprobs"])


def _logprob(told: Any) -> float:
    """JSON has no -inf: null, a large negative number, or Python's -Infinity stand for it."""
    value = told["logprob"] if isinstance(told, dict) else told
    return LOGPROB_FLOOR if value is None else max(float(value), LOGPROB_FLOOR)


def _ranked(place: Any) -> int:
    """How many of a place's tokens are its likeliest: the token of the row comes in addition where it is none
    of them."""
    ranks = [told.get("rank") if isinstance(told, dict) else None for told in place.values()]
    if None in ranks:
        return len(ranks)
    return next(count for count in range(len(ranks) + 1) if count + 1 not in ranks)
