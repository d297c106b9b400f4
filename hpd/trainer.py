"""`DistillTrainer`: TRL's SFTTrainer with the loss of the table and a teacher. Everything else is inherited."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from hpd.batch import DistillCollator, TokenBatch, uniforms
from hpd.estimators import ESTIMATORS
from hpd.forward import add_head_function, model_inputs
from hpd.losses import LossOutput, Scores, TeacherScores, reweighted_nll
from hpd.losses.operator import IMPLEMENTATIONS
from hpd.losses.tile import sum_dtype
from hpd.methods import choose_terms, name_terms
from hpd.pairing import common_vocab
from hpd.schedules import TaidPosition
from hpd.teachers import ModelTeacher, SelfTeacher, Teacher
from hpd.terms import Term, TermConfig

__all__ = ["DistillConfig", "DistillTrainer"]


@dataclass
class DistillConfig(SFTConfig):
    """Every setting of TRL's `SFTConfig`, and those of the distillation loss."""

    vocabulary: str = field(default="error", metadata={"help": "Unequal vocabularies: 'error', or 'shared_prefix'."})
    impl: str = field(
        default="chunked",
        metadata={"help": "Operator: 'chunked' (fused), 'compiled' (also torch.compile), or 'reference' (whole logits)."},
    )
    chunk_bytes: int | None = field(
        default=None,
        metadata={
            "help": "Bytes of one chunk of logits; two chunks are kept. null: 128 MiB on a CPU, 512 MiB on an accelerator."
        },
    )
    metric_stride: int = field(
        default=16,
        metadata={
            "help": "KLs, entropies and agreement on every n-th label position while training (evaluation uses all); "
            "0 turns them off. They are the only part of HPD that costs passes over the vocabulary."
        },
    )
    kl_estimator: str = field(
        default="exact",
        metadata={"help": "Also log the reverse KL as k1, k2, k3 or rao_blackwell estimate it at the drawn tokens."},
    )
    # A check of every micro-batch's loss would synchronise the device; a non-finite loss shows at the next log.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Skip non-finite losses when averaging."})

    def __post_init__(self) -> None:
        if self.impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {self.impl!r}.")
        if self.kl_estimator not in ESTIMATORS:
            raise ValueError(f"kl_estimator must be one of {', '.join(ESTIMATORS)}, got {self.kl_estimator!r}.")
        if (self.chunk_bytes is not None and self.chunk_bytes <= 0) or self.metric_stride < 0:
            raise ValueError("chunk_bytes must be > 0 and metric_stride >= 0.")
        if self.activation_offloading and not torch.accelerator.is_available():
            raise ValueError(
                "activation_offloading moves activations from an accelerator to the CPU's memory, and there is none here: "
                "remove it (gradient_checkpointing saves memory everywhere)."
            )
        if self.bf16 is None and not self.fp16:
            # TRL's default is bf16 everywhere; on a CPU its products are tens of times slower than float32's.
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()


class DistillTrainer(SFTTrainer):
    """Distil `teacher` into `model`.

    The loss is the sum over label tokens divided by the label tokens of the whole global batch (all processes, all
    accumulation steps), so that the gradient does not depend on how the batch was split.

    Args:
        model: the student: a loaded causal language model, or a path or Hub id.
        teacher: a loaded model, a path or Hub id, "self", or any `Teacher`.
        method: a name of METHODS (default hpd); `method_kwargs` are its parameters.
        terms: an explicit list of terms instead of a method.
        args: a `DistillConfig`.
        peft_config: as in TRL; an adapter on the output head is supported.
        **kwargs: everything else that `SFTTrainer` takes: train_dataset, eval_dataset, processing_class, callbacks, ...

    Raises:
        ValueError: method and terms together, unknown names, or vocabularies that differ under `vocabulary="error"`.
    """

    args: DistillConfig
    model: Any  # the student, perhaps as a PeftModel
    _tag_names = ["hpd", "distillation"]  # noqa: RUF012 (TRL's type)
    _name = "HPD"
    # The loss is already divided by the label tokens of the accumulated batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher: str | PreTrainedModel | Teacher,
        method: str | None = None,
        method_kwargs: Mapping[str, Any] | None = None,
        terms: Sequence[TermConfig | Term] = (),
        args: DistillConfig | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        args = args or DistillConfig(output_dir="hpd-student")
        self._term_configs = choose_terms(method if method or terms else "hpd", method_kwargs or {}, terms)
        self.terms = name_terms(self._term_configs)
        self._adaptive = _adaptive_positions(self._term_configs)
        model, peft_config, hide_head = _adapt_head(model, peft_config, args)
        with hide_head:
            super().__init__(model=model, args=args, peft_config=peft_config, **kwargs)  # type: ignore[arg-type]
        student = self.accelerator.unwrap_model(self.model)
        self._base_model = student.get_base_model() if hasattr(student, "get_base_model") else student
        add_head_function(self._base_model)
        # Whatever the model's own loss is, ours shifts labels and needs the label count of the accumulated batch.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self.teacher = _as_teacher(teacher, args)
        teacher_model = getattr(self.teacher, "model", None)
        vocab = common_vocab(self._base_model, teacher_model, args.vocabulary) if teacher_model is not None else None
        self.teacher.prepare(self.model, self.accelerator)
        self.data_collator = DistillCollator(self.data_collator, vocab)
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        if any(isinstance(config, TermConfig) and config.scheduled for config in self._term_configs):
            self.add_callback(_ScheduledTerms(self))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch; its statistics stay on the device until the next log."""
        if return_outputs:
            raise ValueError("The fused loss builds no logits: set prediction_loss_only=True and drop compute_metrics.")
        mode = "train" if self.model.training else "eval"
        batch = TokenBatch.pop(inputs)
        teacher = self.teacher.scores(inputs, batch)
        num_tokens = max(len(batch.labels), 1) if num_items_in_batch is None else num_items_in_batch
        scale = 1.0 / torch.as_tensor(num_tokens, device=batch.labels.device).clamp(min=1)
        if mode == "train" and self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The count covers every process and DDP averages the gradients: undo that average.
            scale = scale * (self.accelerator.num_processes // self.get_tp_size())
        output: LossOutput = model(
            **model_inputs(inputs),
            label_index=batch.index,
            head_function=lambda student: self._loss(student, teacher, batch, scale, mode),
        )
        self._count(mode, output.stats, batch, inputs)
        return output.loss

    def _loss(self, student: Scores, teacher: TeacherScores, batch: TokenBatch, scale: Tensor, mode: str) -> LossOutput:
        # Evaluation keeps its draws fixed: step -1 is no training step.
        step = self.state.global_step if mode == "train" else -1
        count, numbers = max(term.support.num_uniforms for term in self.terms), None
        if count:
            numbers = uniforms(batch.keys, seed=self.args.seed, step=step, count=count)
        return reweighted_nll(
            student, teacher, batch.labels, self.terms,
            uniforms=numbers, scale=scale, impl=self.args.impl, chunk_bytes=self.args.chunk_bytes,
            metric_stride=self.args.metric_stride if mode == "train" else 1, kl_estimator=self.args.kl_estimator,
        )  # fmt: skip

    def prediction_step(self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs), None, None

    def _count(self, mode: str, stats: dict[str, Tensor], batch: TokenBatch, inputs: dict[str, Any]) -> None:
        sums = self._sums[mode]
        seen = {"labels_dropped": batch.dropped, "num_tokens": _input_tokens(inputs), **stats}
        for name, value in seen.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log: one reduction over processes, one read from the device."""
        mode = "train" if self.model.training else "eval"
        sums = self._read(mode)
        if sums.get("tokens"):
            metrics = _means(sums, self.terms)
            if mode == "train":
                # The history is what a checkpoint restores, so a resumed run goes on counting.
                before = next((log["num_tokens"] for log in reversed(self.state.log_history) if "num_tokens" in log), 0)
                metrics["num_tokens"] = before + int(sums["num_tokens"])
            elif "eval_loss" in logs:
                # The Trainer's own average weighs batches, not tokens.
                logs["eval_loss"] = metrics.pop("value")
            metrics.pop("value", None)
            logs.update({f"{'eval_' if mode == 'eval' else ''}{name}": value for name, value in metrics.items()})
        super().log(logs, start_time)

    def build_scheduled_terms(self, progress: float) -> None:
        """Set `terms` to what the schedules say at `progress`, the share of training steps that lie behind."""
        names = [term.name for term in self.terms]
        fixed = []
        for name, config in zip(names, self._term_configs, strict=True):
            if isinstance(config, TermConfig):
                adaptive = {key: self._adaptive[f"{name}.{key}"].t for key in config.adaptive}
                config = config.at(progress, adaptive)
            fixed.append(config)
        self.terms = name_terms(fixed)

    def _read(self, mode: str) -> dict[str, float]:
        sums, self._sums[mode] = self._sums[mode], {}
        # Every process must bring the same names: a rank may have seen no label, and then lacks some.
        names = sorted(set().union(*gather_object([sorted(sums)]))) if self.accelerator.num_processes > 1 else sorted(sums)
        return self.reduce_sums(sums, names)

    def reduce_sums(self, sums: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, float]:
        """The named sums over all processes, as numbers: the one place where statistics leave the device."""
        if not names:
            return {}
        device = self.accelerator.device
        zero = torch.zeros((), device=device)
        stacked = torch.stack([sums.get(name, zero).to(device, sum_dtype(device)) for name in names])
        return dict(zip(names, cast(Tensor, self.accelerator.reduce(stacked, "sum")).tolist(), strict=True))


class _ScheduledTerms(TrainerCallback):
    """Builds the terms of each step, and keeps the adaptive positions in the trainer's state, which checkpoints hold."""

    def __init__(self, trainer: DistillTrainer):
        self._trainer = trainer
        self._seen: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, saved in state.stateful_callbacks.get(_STATE_KEY, {}).items():
            self._trainer._adaptive[name].load_state_dict(saved)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.build_scheduled_terms(state.global_step / max(state.max_steps, 1))
        self._seen = self._totals()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self._totals()
        for name, position in self._trainer._adaptive.items():
            term = name.rsplit(".", 1)[0]
            value = now.get(f"value/{term}", 0.0) - self._seen.get(f"value/{term}", 0.0)
            tokens = now.get("tokens", 0.0) - self._seen.get("tokens", 0.0)
            position.update(value / max(tokens, 1.0), state.global_step / max(state.max_steps, 1))
            state.stateful_callbacks.setdefault(_STATE_KEY, {})[name] = position.state_dict()

    def _totals(self) -> dict[str, float]:
        """Running sums of this window over all processes; read from the device only where a position adapts."""
        if not self._trainer._adaptive:
            return {}
        names = [*(f"value/{term.name}" for term in self._trainer.terms), "tokens"]
        return self._trainer.reduce_sums(self._trainer._sums["train"], names)


_STATE_KEY = "hpd_adaptive"


def _adaptive_positions(configs: Sequence[TermConfig | Term]) -> dict[str, TaidPosition]:
    """Adaptive parameters by "term.parameter"."""
    positions = {}
    for term, config in zip(name_terms(configs), configs, strict=True):
        for key, schedule in config.adaptive.items() if isinstance(config, TermConfig) else ():
            assert schedule.end is not None
            positions[f"{term.name}.{key}"] = TaidPosition(schedule.start, schedule.end)
    return positions


def _means(sums: dict[str, float], terms: Sequence[Term]) -> dict[str, float]:
    """Sums over tokens to means per token, under the names that are logged."""
    tokens, metric_tokens = sums["tokens"], sums.get("metric_tokens", 0.0)
    on_metric_rows = {"forward_kl", "reverse_kl", "teacher_entropy", "student_entropy", "top1_agreement"}
    means = {
        name: value / (metric_tokens if name in on_metric_rows else tokens)
        for name, value in sums.items()
        if not name.startswith("value/") and name not in ("tokens", "metric_tokens", "num_tokens", "labels_dropped")
    }
    values = {term.name: sums[f"value/{term.name}"] / tokens for term in terms}
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


def _as_teacher(teacher: Any, args: DistillConfig) -> Teacher:
    if isinstance(teacher, str):
        if teacher == "self":
            return SelfTeacher()
        from hpd.models import ModelConfig, load_model

        return ModelTeacher(load_model(ModelConfig(model=teacher, trust_remote_code=args.trust_remote_code), "teacher"))
    return ModelTeacher(teacher) if isinstance(teacher, nn.Module) else teacher


def _adapt_head(
    model: Any, peft_config: PeftConfig | None, args: DistillConfig
) -> tuple[Any, PeftConfig | None, contextlib.AbstractContextManager[None]]:
    """Let SFTTrainer accept an adapter on the output head.

    It refuses one because its own fused head ignores adapters; ours does not. So such an adapter is put on here, and hidden
    from that one check.
    """
    targets = getattr(peft_config, "target_modules", None) or ()
    if isinstance(model, str) or peft_config is None or "lm_head" not in targets:
        return model, peft_config, contextlib.nullcontext()
    set_seed(args.seed)  # the adapter's random start, as SFTTrainer does
    adapted = get_peft_model(model, peft_config)
    return adapted, None, _hidden_head(adapted.get_base_model())


@contextlib.contextmanager
def _hidden_head(base: Any) -> Iterator[None]:
    head = base.get_output_embeddings()
    base.get_output_embeddings = lambda: getattr(head, "base_layer", head)
    try:
        yield
    finally:
        del base.get_output_embeddings
