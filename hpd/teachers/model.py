"""Live teachers: a frozen model beside the student, or the student's own base."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils.dataclasses import get_module_class_from_name
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from trl.models import prepare_deepspeed

from hpd.batch import TokenBatch
from hpd.losses import Scores
from hpd.models.forward import add_head_function, scores_of
from hpd.models.memory import own_weights
from hpd.models.pairing import CheckResult
from hpd.models.probe import probe_head, probe_packing
from hpd.models.quantized import keep_layout
from hpd.objectives.objective import check_number
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
            with _own_layers(cast(Any, plugins).fsdp_plugin, self.model):
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


@contextlib.contextmanager
def _own_layers(plugin: Any, model: nn.Module) -> Iterator[None]:
    """Shard `model` by its own layers: accelerate settles on those of the first model that it prepares, and
    the student may be of another family."""
    before = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    if any(get_module_class_from_name(model, name) is None for name in before[1] or ()):
        plugin.transformer_cls_names_to_wrap = None
    try:
        yield
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = before


class SelfTeacher(Teacher):
    r"""Self-distillation: the student as it was before training, or its moving average.

    With a PEFT student the adapter is switched off for the teacher's forward, which costs no memory; without,
    the student is copied and frozen. With a rate r the copy follows after each optimizer step,

    .. math:: \bar\theta \leftarrow (1 - r)\, \bar\theta + r\, \theta

    in float32, and starts from the student as it was; it has weights of its own for what is trained and
    shares the rest.

    Args:
        ema: r, in (0, 1]; 1 is the student itself, a step behind. None: the teacher stays.

    Raises:
        ValueError: a rate outside; from `prepare`, a student or an engine that no average is kept of.
    """

    reads_as_student = True

    def __init__(self, ema: float | None = None) -> None:
        if ema is not None:
            check_number("ema", ema, 0.0, 1.0, open_low=True)
        self.ema = ema
        self.follows = ema is not None
        self._student: nn.Module | None = None
        self._copy: ModelTeacher | None = None

    def prepare(self, student: nn.Module, accelerator: Accelerator) -> None:
        own = accelerator.unwrap_model(student)
        if self.ema is not None:
            _check_average(own, accelerator)
        elif hasattr(own, "disable_adapter"):
            self._student = student
            self._accelerator = accelerator
            return
        # What is not trained never moves, so an average shares it.
        shared = {id(p): p for p in own.parameters() if not p.requires_grad} if self.ema is not None else {}
        self._student = own
        self._copy = ModelTeacher(copy.deepcopy(own, shared))
        self._copy.prepare(student, accelerator)

    @torch.no_grad()
    def follow(self) -> None:
        for average, trained in self._pairs():
            average.lerp_(trained, self.ema or 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"average": [average for average, _ in self._pairs()]}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for (average, _), saved in zip(self._pairs(), state["average"], strict=True):
            average.copy_(saved)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """This process's part of each averaged weight, and of the trained one."""
        assert self._copy is not None, "prepare() comes first"
        assert self._student is not None
        both = zip(self._copy.model.parameters(), self._student.parameters(), strict=True)
        return [(_local(average), _local(trained)) for average, trained in both if trained.requires_grad]

    def scores(self, inputs: dict[str, Any], batch: TokenBatch) -> Scores:
        if self._copy is not None:
            return self._copy.scores(inputs, batch)
        assert self._student is not None, "prepare() comes first"
        with cast(Any, self._accelerator.unwrap_model(self._student)).disable_adapter():
            return scores_of(self._student, inputs, batch.index)


def _local(weight: Tensor) -> Tensor:
    return (weight.to_local() if isinstance(weight, DTensor) else weight).detach()


def _check_average(student: nn.Module, accelerator: Accelerator) -> None:
    """Refuse a student or an engine whose weights cannot be averaged here."""
    plugins = accelerator.state
    if getattr(plugins, "deepspeed_plugin", None) is not None:
        raise ValueError(
            "A teacher that is the student's moving average (teacher.ema) reads the student's weights after "
            "each step, which DeepSpeed keeps to itself: use DDP or FSDP2, or remove ema."
        )
    if getattr(plugins, "fsdp_plugin", None) is not None and hasattr(student, "disable_adapter"):
        raise ValueError(
            "A teacher that is the moving average of an adapter (teacher.ema with lora) shares the base's "
            "weights with the student, and FSDP shards each model's own: use DDP, or remove ema or lora."
        )
    low = {str(p.dtype).removeprefix("torch.") for p in student.parameters() if p.requires_grad}
    if low - {"float32", "float64"}:
        raise ValueError(
            "A teacher that is the student's moving average (teacher.ema) needs trained weights in float32: "
            f"in {', '.join(sorted(low))} its small steps would be rounded away. Load the student in float32 "
            "(with train.bf16 for the products)."
        )
