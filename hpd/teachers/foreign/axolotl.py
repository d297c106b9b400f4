"""The rows that axolotl's distillation plugin trains on: target_logprobs, target_token_ids, target_mask.

Three lists of k a token, beside `input_ids` and perhaps `labels`. Which token a list is about is not written
down: the strategy that reads chat data puts a list at the token that it is about, and the one that asks a
server puts it at the token before, where its trainer reads it. The mask tells, since both derive it from the
labels. Log-probabilities are usually divided by the sum of the k. Source: axolotl's integrations/kd.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from hpd.batch import IGNORE_INDEX
from hpd.teachers.foreign.rows import PlaceAnswers, TeacherFile, damaged, fit, read_columns

__all__ = ["About", "AxolotlFile"]

About: TypeAlias = Literal["this", "next"]
"""Which token the list at a token is about: that token, or the one after it."""

_LOOKED_AT = 64
_SUM_IS_ONE = 1e-3


class AxolotlFile(TeacherFile):
    """Rows as axolotl's plugin prepares them.

    Args:
        path: a file, a folder or a Hub id.
        about: None: as the masks of the first rows say.

    Raises:
        FileNotFoundError, ValueError: no rows, rows of another format, or nothing tells which token a list is
            about.
    """

    def __init__(self, path: str, about: About | None = None):
        self.path = path
        needed = ("input_ids", "target_logprobs", "target_token_ids", "target_mask")
        self._rows = read_columns(path, needed, "axolotl").with_format("numpy")
        self.about: About = about or self._told()
        self.k, sums = 0, []
        for number in range(min(_LOOKED_AT, len(self))):
            found = self.answers(number)
            self.k = self.k or found.tokens.shape[1]
            sums.append(found.logprobs[found.known].double().exp().sum(-1))
        self.scaled = bool(((torch.cat(sums) - 1).abs() < _SUM_IS_ONE).all())

    def __len__(self) -> int:
        return len(self._rows)

    def _told(self) -> About:
        fits: dict[About, bool] = {"this": True, "next": True}
        if "labels" in self._rows.column_names:
            for number in range(min(_LOOKED_AT, len(self))):
                row = self._rows[number]
                masked = np.array([bool(np.any(one)) for one in row["target_mask"]])
                learned = np.asarray(row["labels"]) != IGNORE_INDEX
                if len(masked) != len(learned):
                    raise damaged(self.path, number, f"{len(masked)} masks and {len(learned)} labels")
                after = np.append(learned[1:], False)
                # The first token is about nothing that was read, whatever its label.
                fits["this"] &= bool((masked == learned)[1:].all())
                fits["next"] &= bool((masked == after).all())
        if fits["this"] == fits["next"]:
            raise ValueError(
                f"Nothing in {self.path} tells which token a row of target_logprobs is about: its masks fit "
                f"{'both ways' if fits['this'] else 'neither way'}. Say it: --about this (axolotl's chat "
                "strategy) or --about next (its collator that asks a server)."
            )
        return "this" if fits["this"] else "next"

    def ids(self, number: int) -> npt.NDArray[np.int64]:
        return np.asarray(self._rows.select_columns("input_ids")[number]["input_ids"]).astype(np.int64)

    def answers(self, number: int) -> PlaceAnswers:
        row = self._rows[number]
        try:
            logprobs, tokens, mask = (
                np.stack([np.asarray(one) for one in row[f"target_{name}"]])
                for name in ("logprobs", "token_ids", "mask")
            )
        except (ValueError, TypeError):
            raise damaged(self.path, number, "its targets are not k numbers a token") from None
        shapes = {logprobs.shape, tokens.shape, mask.shape}
        if len(shapes) > 1 or len(logprobs) != len(row["input_ids"]):
            raise damaged(self.path, number, f"{len(row['input_ids'])} tokens have targets of {shapes}")
        if self.k and logprobs.shape[1] != self.k:
            raise damaged(self.path, number, f"it has {logprobs.shape[1]} tokens a place, others {self.k}")
        values = torch.from_numpy(logprobs.astype(np.float32))
        known = torch.from_numpy(mask.astype(bool).all(-1)) & torch.isfinite(values).all(-1)
        found = torch.from_numpy(tokens.astype(np.int64))
        fit(found, torch.where(known[:, None], values, 0.0), self.path, number)
        order = values.argsort(dim=-1, descending=True, stable=True)
        values, found = values.gather(1, order), found.gather(1, order)
        first = 1 if self.about == "this" else 0
        return PlaceAnswers(found[first:], values[first:], None, known[first:])

    def digest(self) -> str:
        return f"{self._rows._fingerprint} {self.about}"
