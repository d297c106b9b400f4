"""The rows that axolotl's distillation plugin trains on: target_logprobs, target_token_ids, target_mask.

Lists of up to k a token, beside `input_ids` and perhaps `labels`. Which token a list is about is not written
down: the strategy that reads chat data puts a list at the token that it is about, and the one that asks a
server puts it at the token before, where its trainer reads it. The mask tells, since both derive it from the
labels. What a list lacks, what its mask leaves out and what has no probability in it is not told, as in
axolotl's collator, which pads shorter lists and rows with masked numbers. Log-probabilities are usually
divided by the sum of the k, after `kd_temperature` softened them. Source: axolotl's integrations/kd.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow.compute
import torch
from torch import Tensor

from hpd.batch import IGNORE_INDEX
from hpd.teachers.foreign.rows import PlaceAnswers, TeacherFile, damaged, fit, read_columns

__all__ = ["About", "AxolotlFile"]

About: TypeAlias = Literal["this", "next"]
"""Which token the list at a token is about: that token, or the one after it."""

_LOOKED_AT = 64
_SUM_IS_ONE = 1e-3
# Its collator pads log-probabilities with -1e9.
_PADDED_BELOW = -1e8


class AxolotlFile(TeacherFile):
    """Rows as axolotl's plugin prepares them.

    Args:
        path: a file, a folder or a Hub id.
        about: None: as the masks of the first rows say.
        temperature: axolotl's `kd_temperature` T. Its targets are p^(1/T) / sum of p^(1/T) over the k, and
            what is given is log p again, still divided by the sum of the k.

    Raises:
        FileNotFoundError, ValueError: no rows, rows of another format, nothing tells which token a list is
            about, or a temperature for targets that are not divided by their sum.
    """

    def __init__(self, path: str, about: About | None = None, temperature: float = 1.0):
        self.path, self._temperature = path, 1.0
        needed = ("input_ids", "target_logprobs", "target_token_ids")
        self._rows = read_columns(path, needed, "axolotl").with_format("numpy")
        self.k = _longest(self._rows.data.column("target_logprobs"))
        if not self.k:
            raise ValueError(f"{path} says nothing about any token: its target_logprobs are empty.")
        self.about: About = about or self._told()
        sums = [torch.ones(0)]
        for number in range(min(_LOOKED_AT, len(self))):
            found = self.answers(number)
            sums.append(found.logprobs[found.known].double().exp().sum(-1))
        self.scaled = bool(((torch.cat(sums) - 1).abs() < _SUM_IS_ONE).all())
        if temperature != 1.0 and not self.scaled:
            raise ValueError(
                f"--temperature undoes axolotl's kd_temperature, behind which the probabilities of a place "
                f"sum to 1; those of {path} do not, so they were not softened: remove it."
            )
        self._temperature = temperature

    def __len__(self) -> int:
        return len(self._rows)

    def _told(self) -> About:
        equal: dict[About, bool] = {"this": True, "next": True}
        inside: dict[About, bool] = {"this": True, "next": True}
        if "labels" in self._rows.column_names:
            for number in range(min(_LOOKED_AT, len(self))):
                row = self._rows[number]
                learned = np.asarray(row["labels"]) != IGNORE_INDEX
                masked = torch.isfinite(self._lists(row, number)[1]).any(-1).numpy()
                masked = np.append(masked, np.zeros(max(0, len(learned) - len(masked)), dtype=bool))
                if len(masked) != len(learned):
                    raise damaged(self.path, number, f"{len(masked)} targets and {len(learned)} labels")
                # The first token is about nothing that was read, whatever its label.
                pairs: dict[About, tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]] = {
                    "this": (masked[1:], learned[1:]),
                    "next": (masked, np.append(learned[1:], False)),
                }
                for name, (told, asked) in pairs.items():
                    equal[name] &= bool((told == asked).all())
                    inside[name] &= bool((told <= asked).all())
        # A list may be missing about a token that is learned, so equality is asked first.
        for fits in (equal, inside):
            if fits["this"] != fits["next"]:
                return "this" if fits["this"] else "next"
        raise ValueError(
            f"Nothing in {self.path} tells which token a row of target_logprobs is about: its masks fit "
            f"{'both ways' if inside['this'] else 'neither way'}. Say it: --about this (axolotl's chat "
            "strategy) or --about next (its collator that asks a server)."
        )

    def ids(self, number: int) -> npt.NDArray[np.int64]:
        return np.asarray(self._rows.select_columns("input_ids")[number]["input_ids"]).astype(np.int64)

    def _lists(self, row: dict[str, Any], number: int) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities of each list, k of each; -inf where nothing is told."""
        try:
            return self._padded(row, number)
        except TypeError:
            raise damaged(self.path, number, "its targets are not k numbers a token") from None

    def _padded(self, row: dict[str, Any], number: int) -> tuple[Tensor, Tensor]:
        names = [name for name in ("logprobs", "token_ids", "mask") if f"target_{name}" in row]
        lists = {name: list(row[f"target_{name}"]) for name in names}
        counts = {len(found) for found in lists.values()}
        if len(counts) > 1 or max(counts) > len(row["input_ids"]):
            said = ", ".join(f"{len(found)} of target_{name}" for name, found in lists.items())
            raise damaged(self.path, number, f"its {len(row['input_ids'])} tokens have {said}")
        made = {name: np.zeros((len(found), self.k)) for name, found in lists.items()}
        told = np.zeros((len(lists["logprobs"]), self.k), dtype=bool)
        for place in range(len(told)):
            sizes = {np.shape(lists[name][place]) for name in names}
            if len(sizes) > 1 or len(size := sizes.pop()) != 1 or size[0] > self.k:
                raise damaged(self.path, number, "its targets are not k numbers a token")
            for name in names:
                made[name][place, : size[0]] = lists[name][place]
            told[place, : size[0]] = True
        told &= made.get("mask", told).astype(bool)
        values = made["logprobs"].astype(np.float32)
        told &= ~(values <= _PADDED_BELOW)  # what is no number stays, and is found
        return torch.from_numpy(made["token_ids"]).long(), torch.from_numpy(np.where(told, values, -np.inf))

    def answers(self, number: int) -> PlaceAnswers:
        tokens, values = self._lists(self._rows[number], number)
        fit(tokens, values, self.path, number)
        known = torch.isfinite(values).any(-1)
        if self._temperature != 1.0:
            sharp = self._temperature * values.double()
            values = torch.where(known[:, None], torch.log_softmax(sharp, -1), -torch.inf).float()
        order = values.argsort(dim=-1, descending=True, stable=True)
        values, tokens = values.gather(1, order), tokens.gather(1, order)
        first = 1 if self.about == "this" else 0
        return PlaceAnswers(tokens[first:], values[first:], None, known[first:])

    def digest(self) -> str:
        return f"{self._rows._fingerprint} {self.about} {self._temperature}"


def _longest(column: Any) -> int:
    compute: Any = pyarrow.compute  # its functions are made at runtime
    return int(compute.max(compute.list_value_length(compute.list_flatten(column))).as_py() or 0)
