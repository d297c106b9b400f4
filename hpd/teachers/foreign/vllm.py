"""Dumps of vLLM's `prompt_logprobs`, one JSON object a row: a `RequestOutput`, or a server's response.

    {"prompt_token_ids": [1, 15, 7], "prompt_logprobs": [null, {"15": {"logprob": -0.2, "rank": 1}}, ...]}

A completion of the server has both under `choices`, a response about a conversation at its top, and a line of
the batch API under `response.body`. The token of the row is always among a place's tokens, so its
log-probability is known.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hpd.files import checksum_file
from hpd.methods.supports import LOGPROB_FLOOR
from hpd.teachers.foreign.dumps import as_lines, dump_files
from hpd.teachers.foreign.rows import PlaceAnswers, TeacherFile, damaged, fit

__all__ = ["VllmFile"]


class _Line(NamedTuple):
    """Where a row stands."""

    file: int
    start: int
    choice: int
    number: int
    """Of the row in its file."""


class VllmFile(TeacherFile):
    """Rows of dumps.

    Args:
        path: a file (JSON Lines, a JSON array, either of them with gzip, parquet), or a folder of them.

    Raises:
        FileNotFoundError: no such file, or a folder without any.
        ValueError: a file cannot be read, or a row is without tokens or `prompt_logprobs`.
    """

    def __init__(self, path: str):
        self.path = path
        self._files = dump_files(path)
        self._unpacked = tempfile.TemporaryDirectory(prefix="hpd-dump-")
        self._plain = [
            as_lines(file, Path(self._unpacked.name) / str(i)) for i, file in enumerate(self._files)
        ]
        self._lines: list[_Line] = []
        counts: list[int] = []
        for i, plain in enumerate(self._plain):
            with plain.open("rb") as file:
                start = number = 0
                for line in file:
                    if line.strip():
                        for choice, part in enumerate(self._parts(line, i, number)):
                            counts += [_ranked(place) for place in part[1][1:] if place]
                            counts = [min(counts)] if counts else []
                            self._lines.append(_Line(i, start, choice, number))
                        number += 1
                    start += len(line)
        if not counts:
            raise ValueError(f"{path} says nothing about any token: no prompt_logprobs are there.")
        if not counts[0]:
            raise ValueError(
                f"{path} has places with the row's own token alone, as prompt_logprobs: 0 asks for: with 1 "
                "or more vLLM gives the likeliest tokens, too."
            )
        self.k = counts[0]

    def __len__(self) -> int:
        return len(self._lines)

    def _parts(self, line: bytes, file: int, number: int) -> list[tuple[list[int], list[Any]]]:
        try:
            found = list(_rows_of(json.loads(line)))
            for ids, places in found:
                if not all(isinstance(i, int) for i in ids):
                    raise TypeError("prompt_token_ids are whole numbers")
                if len(places) != len(ids):
                    raise TypeError(f"{len(ids)} tokens have {len(places)} entries of prompt_logprobs")
                if not all(place is None or isinstance(place, dict) for place in places):
                    raise TypeError("an entry of prompt_logprobs is neither null nor an object of tokens")
        except KeyError as error:
            if error.args[0] == "prompt_token_ids":
                raise ValueError(
                    f"Row {number + 1:,} of {self._files[file]} has no prompt_token_ids, without which "
                    "nothing says what the answers are about: ask the server with return_token_ids: true, or "
                    "dump vLLM's RequestOutput."
                ) from None
            raise damaged(self._files[file], number, f"no field {error.args[0]!r}") from None
        except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise damaged(self._files[file], number, " ".join(str(error).split())[:200]) from None
        return found

    def _row(self, number: int) -> tuple[list[int], list[Any]]:
        place = self._lines[number]
        with self._plain[place.file].open("rb") as file:
            file.seek(place.start)
            return self._parts(file.readline(), place.file, place.number)[place.choice]

    def ids(self, number: int) -> npt.NDArray[np.int64]:
        return np.array(self._row(number)[0], dtype=np.int64)

    def answers(self, number: int) -> PlaceAnswers:
        ids, places = self._row(number)
        at = self._lines[number]
        where = str(self._files[at.file]), at.number
        length = max(len(ids) - 1, 0)
        tokens = torch.zeros(length, self.k, dtype=torch.int64)
        values = torch.full((length, self.k), -torch.inf)
        labels = torch.zeros(length)
        known = torch.zeros(length, dtype=torch.bool)
        for place, (label, entry) in enumerate(zip(ids[1:], places[1:], strict=True)):
            if not entry:
                continue
            try:
                found = {int(token): _logprob(told) for token, told in entry.items()}
                ranks = {int(token): _rank(told) or len(found) + 1 for token, told in entry.items()}
                ranked = sorted(found, key=lambda token: (-found[token], ranks[token], token))[: self.k]
                labels[place] = found[label]
            except (KeyError, ValueError, TypeError, AttributeError):
                raise damaged(
                    *where, f"its entry {place + 1} has no log-probability of token {label}"
                ) from None
            tokens[place] = torch.tensor(ranked)
            values[place] = torch.tensor([found[token] for token in ranked])
            known[place] = True
        fit(tokens, values, *where)
        fit(torch.tensor(ids[1:])[:, None], torch.where(known, labels, -torch.inf)[:, None], *where)
        return PlaceAnswers(tokens, values, labels, known)

    def digest(self) -> str:
        return " ".join(map(checksum_file, self._files))


def _rows_of(line: Any) -> Iterator[tuple[list[int], list[Any]]]:
    """The rows of a line: one, or as many as a response has choices."""
    if "response" in line:
        if line.get("error") or line["response"] is None:
            return  # a request of a batch that failed, whose row is not there
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


def _rank(told: Any) -> int | None:
    return told.get("rank") if isinstance(told, dict) else None


def _ranked(place: Any) -> int:
    """How many of a place's tokens are its likeliest: the token of the row comes in addition where it is none
    of them, with its own rank or none."""
    ranks = [rank for rank in map(_rank, place.values()) if rank is not None]
    if not ranks:
        return len(place)
    return next(count for count in range(len(ranks) + 1) if count + 1 not in ranks)
