"""Live teachers: a frozen model beside the student, or the student's own base."""

from __future__ import annotations

import copy
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from trl.models import prepare_deepspeed

from hpd.batch import TokenBatch
from hpd.losses import Scores
from hpd.models.forward import add_head_function, scores_of
from hpd.models.memory import own_weights
from hpd.models.pairing import CheckResult
from hpd.models.probe import probe_head, probe_packing
from hpd.models.quantized import keep_layout
from hpd.teachers.teacher import Teacher

__all__ = ["ModelTeacher", "SelfTeacher"]


class ModelTeacher(Teacher):
    """A frozen causal language model: no gradient, no optimizer state, dropout off.

    Args:
        model: any transformers causal language model, in any dtype or quantized; its parameters are frozen in
            place.
    """

    def __init__(self, model: nn.Module):
        own_weights(model)
        keep_layout(model)
        self.model = add_head_function(model.requires_grad_(False).eval())
        # Read now: what engines wrap a model in has a `config` of another kind.
        self.vocab = cast(Any, model).config.get_text_config().vocab_size

    def prepare(self, student: nn.Module, accelerator: Accelerator) -> None:
        plugins = accelerator.state
        if getattr(plugins, "deepspeed_plugin", None) is not None:
            self.model = prepare_deepspeed(self.model, accelerator)
        elif getattr(plugins, "fsdp_plugin", None) is not None:
            # Layer by layer, as the student; TRL's prepare_fsdp makes one unit of the teacher and gathers all
            # of it at once.
            self.model = fsdp2_prepare_model(accelerator, self.model)
        else:
            # A model placed by quantization or a device map must not be moved.
            placed = getattr(self.model, "hf_device_map", None) or getattr(
                self.model, "quantization_method", None
            )
            self.model = accelerator.prepare_model(
                self.model, device_placement=False if placed else None, evaluation_mode=True
            )

    def probe(self, packed: bool) -> list[CheckResult]:
        found = [probe_head(self.model, "teacher")]
        return [*found, probe_packing(self.model, "teacher")] if packed else found

    def scores(self, inputs: dict[str, Any], batch: TokenBatch) -> Scores:
        return scores_of(self.model, inputs, batch.index)


class SelfTeacher(Teacher):
    """Self-distillation: the student as it was before training.

    With a PEFT student the adapter is switched off for the teacher's forward, which costs no memory; without,
    the student is copied and frozen.
    """

    reads_as_student = True

    def __init__(self) -> None:
        self._student: nn.Module | None = None
        self._copy: ModelTeacher | None = None

    def prepare(self, student: nn.Module, accelerator: Accelerator) -> None:
        if hasattr(accelerator.unwrap_model(student), "disable_adapter"):
            self._student = student
            self._accelerator = accelerator
            return
        self._copy = ModelTeacher(copy.deepcopy(accelerator.unwrap_model(student)))
        self._copy.prepare(student, accelerator)

    def scores(self, inputs: dict[str, Any], batch: TokenBatch) -> Scores:
        if self._copy is not None:
            return self._copy.scores(inputs, batch)
        assert self._student is not None, "prepare() comes first"
        with cast(Any, self._accelerator.unwrap_model(self._student)).disable_adapter():
            return scores_of(self._student, inputs, batch.index)
