"""The logging window: sums since the last log, which a checkpoint between two logs must hold, or the next log
is wrong."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hpd.methods.terms import Term
from hpd.training.checkpoints import reading

if TYPE_CHECKING:
    from hpd.training.trainer import DistillTrainer

__all__ = ["Window"]


_LOGGER = logging.getLogger(__name__)


_PARTS = ("sums", "rollouts", "loss", "last_logged", "skipped_steps")


class Window:
    """Takes and restores what a trainer has summed since its last log: statistics, losses, rollouts, steps
    left out."""

    def __init__(self, trainer: DistillTrainer):
        self._trainer = trainer
        self._loaded: dict[str, Any] | None = None
        trainer.add_callback(_RestoreWindow(self))

    def take(self) -> dict[str, Any]:
        """A copy that later steps do not change."""
        trainer, mixer = self._trainer, self._trainer._step.mixer
        return {
            "sums": dict(trainer._sums["train"]),
            "rollouts": {} if mixer is None else dict(mixer._sums),
            "loss": trainer._tr_loss.clone(),
            "last_logged": trainer._globalstep_last_logged,
            "skipped_steps": trainer.skipped_steps,
            "last_step": {name: float(value) for name, value in (trainer.last_step or {}).items()},
        }

    def put(self, state: dict[str, Any]) -> None:
        """Go on where `take` was called."""
        trainer, mixer = self._trainer, self._trainer._step.mixer
        trainer._sums["train"] = dict(state["sums"])
        if mixer is not None:
            mixer._sums = defaultdict(float, state["rollouts"])
        trainer._tr_loss.copy_(state["loss"])
        trainer._globalstep_last_logged = state["last_logged"]
        trainer.skipped_steps = state["skipped_steps"]
        trainer.last_step = state.get("last_step")

    def save(self, checkpoint: str) -> None:
        """Write this process's part of a checkpoint."""
        torch.save(self.take(), self._file(checkpoint))

    def load(self, checkpoint: str) -> None:
        """Read it again; it is put back when training begins, since the Trainer starts its own sums in
        between."""
        file = self._file(checkpoint)
        if file.is_file():
            # Several processes on a CPU call it cpu:0, which torch.load does not know.
            device = self._trainer.accelerator.device.type
            with reading(file):
                found = torch.load(file, weights_only=True, map_location=device)
                if lacking := [name for name in _PARTS if name not in found]:
                    raise ValueError(f"it lacks {', '.join(lacking)}")
            self._loaded = found
        else:
            _LOGGER.warning(
                "%s holds no %s (it was written by fewer processes): the next log covers the steps from here "
                "on only.",
                checkpoint,
                file.name,
            )

    def restore(self) -> None:
        """Put back what `load` read."""
        if self._loaded is not None:
            self.put(self._loaded)
            self._loaded = None

    def _file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"window-rank{self._trainer.accelerator.process_index}.pt"


class _RestoreWindow(TrainerCallback):
    def __init__(self, window: Window):
        self._window = window

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._window.restore()


# Sums with a denominator of their own, or that are no metrics.
_SPECIAL = ("tokens", "metric_tokens", "num_tokens", "labels_dropped", "support_overlap", "overlap_rows")


def _means(sums: dict[str, float], terms: Sequence[Term]) -> dict[str, float]:
    """Sums over tokens to means per token, under the names that are logged."""
    tokens, metric_tokens = sums["tokens"], sums.get("metric_tokens", 0.0)
    on_metric_rows = {"forward_kl", "reverse_kl", "teacher_entropy", "student_entropy", "top1_agreement"}
    means = {
        name: value / (metric_tokens if name in on_metric_rows else tokens)
        for name, value in sums.items()
        if not name.startswith(("value/", "gap/")) and name not in _SPECIAL
    }
    # A term on the student's text alone has no value where a window held none.
    values = {term.name: sums.get(f"value/{term.name}", 0.0) / tokens for term in terms}
    if sums.get("overlap_rows"):
        means["support_overlap"] = sums["support_overlap"] / sums["overlap_rows"]
    if len(terms) > 1:
        means.update({f"loss/{name}": value for name, value in values.items()})
    means["value"] = sum(term.weight * values[term.name] for term in terms)
    if sums["labels_dropped"]:
        means["labels_dropped"] = sums["labels_dropped"]
    return means


def _input_tokens(inputs: dict[str, Any]) -> Tensor:
    if "attention_mask" in inputs:
        return inputs["attention_mask"].sum()
    return torch.tensor(inputs["input_ids"].numel(), device=inputs["input_ids"].device)
