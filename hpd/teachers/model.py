"""Live teachers: a frozen model beside the student, or the student's own base."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from jaxtyping import Int
from torch import Tensor, nn
from trl.models import prepare_deepspeed

from hpd.batch import TokenBatch
from hpd.losses import Scores, TeacherScores
from hpd.models.forward import add_head_function, scores_of

__all__ = ["ModelTeacher", "RemoteTeacher", "RoutedScores", "SelfTeacher", "Teacher"]


class RoutedScores(NamedTuple):
    """The answers of several teachers, each for its own positions of a batch."""

    parts: tuple[tuple[Int[Tensor, "n"], TeacherScores], ...]
    """(positions among the batch's label positions, what their teacher says of them); at least one."""


class Teacher(Protocol):
    """Anything that can score the label positions of a batch."""

    def prepare(self, student: nn.Module, accelerator: Accelerator) -> None:
        """Place the teacher like the student; called once, before the first step."""
        ...

    def scores(self, inputs: dict[str, Any], batch: TokenBatch) -> TeacherScores | RoutedScores:
        """What the teacher knows of the label positions: hidden states and head, or likeliest tokens; no
        gradient.

        A live teacher reads `inputs` at `batch.index`; one that remembers looks `batch.keys` up. A teacher
        may have two more methods. `fetch(inputs, batch)` runs where batches are collated, ahead of the step,
        and what it returns is `inputs["fetched"]` here. `read_rows(rows)` sees every (row, TokenBatch) of the
        datasets once, before training.
        """
        ...


@runtime_checkable
class RemoteTeacher(Teacher, Protocol):
    """A teacher that takes its time and can fail: asked early, waited for at the start of a step."""

    def request(self, inputs: dict[str, Any]) -> None:
        """Start asking about a collated batch; returns at once."""
        ...

    def wait(self, inputs: dict[str, Any]) -> None:
        """Return when `scores` has the answer about a collated batch; raises TeacherUnavailable."""
        ...


class ModelTeacher:
    """A frozen causal language model: no gradient, no optimiser state, dropout off.

    Args:
        model: any transformers causal language model, in any dtype or quantised; its parameters are frozen in
            place.
    """

    def __init__(self, model: nn.Module):
        self.model: Any = add_head_function(model.requires_grad_(False).eval())

    def prepare(self, student: nn.Module, accelerator: Accelerator) -> None:
        plugins = accelerator.state
        if getattr(plugins, "deepspeed_plugin", None) is not None:
            self.model = prepare_deepspeed(self.model, accelerator)
        elif getattr(plugins, "fsdp_plugin", None) is not None:
            # Layer by layer, as the student; TRL's prepare_fsdp makes one unit of the teacher and gathers all
            # of it at once.
            self.model = fsdp2_prepare_model(accelerator, self.model)
        else:
            # A model placed by quantisation or a device map must not be moved.
            placed = getattr(self.model, "hf_device_map", None) or getattr(
                self.model, "quantization_method", None
            )
            self.model = accelerator.prepare_model(
                self.model, device_placement=False if placed else None, evaluation_mode=True
            )

    def scores(self, inputs: dict[str, Any], batch: TokenBatch) -> Scores:
        return scores_of(self.model, inputs, batch.index)


class SelfTeacher:
    """Self-distillation: the student as it was before training.

    With a PEFT student the adapter is switched off for the teacher's forward, which costs no memory; without,
    the student is copied and frozen.
    """

    def __init__(self) -> None:
        self._student: nn.Module | None = None
        self._copy: ModelTeacher | None = None

    def prepare(self, student: nn.Module, accelerator: Accelerator) -> None:
        if hasattr(accelerator.unwrap_model(student), "disable_adapter"):
            self._student, self._accelerator = student, accelerator
            return
        self._copy = ModelTeacher(copy.deepcopy(accelerator.unwrap_model(student)))
        self._copy.prepare(student, accelerator)

    def scores(self, inputs: dict[str, Any], batch: TokenBatch) -> Scores:
        if self._copy is not None:
            return self._copy.scores(inputs, batch)
        assert self._student is not None, "prepare() comes first"
        with cast(Any, self._accelerator.unwrap_model(self._student)).disable_adapter():
            return scores_of(self._student, inputs, batch.index)
