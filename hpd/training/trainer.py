"""`DistillTrainer`: TRL's SFTTrainer with the loss of the table and a teacher. Everything else is
inherited."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import SFTTrainer

from hpd.batch import DistillCollator, TokenBatch, uniforms
from hpd.config.schema import GuardsConfig
from hpd.data.samplers import FilledOrder, fill, fills_last_batch
from hpd.losses import LossOutput, Scores, TeacherScores
from hpd.losses.by_source import label_gaps, loss_by_source
from hpd.losses.tile import sum_dtype
from hpd.methods.prefixes import Prefixes, RolloutConfig
from hpd.methods.regime import choose_regime
from hpd.methods.schedules import SkewPosition
from hpd.methods.strategy import StrategyConfig
from hpd.methods.table import choose_terms, name_terms
from hpd.methods.terms import Term, TermConfig, as_evaluated, num_uniforms
from hpd.models.forward import adapt_head, add_head_function, model_inputs
from hpd.models.pairing import common_vocab
from hpd.teachers import RoutedScores, Teacher, TeacherUnavailable
from hpd.teachers.sources import as_teacher
from hpd.training.arguments import DistillConfig, check_engine
from hpd.training.guards import NonFinite, NonFiniteWatch, check_metrics, support_overlap
from hpd.training.metrics import Window, _input_tokens, _means
from hpd.training.on_policy import StepState
from hpd.training.resumable import Resumable
from hpd.training.scheduled import ScheduledTerms, adaptive_positions

__all__ = ["DistillTrainer"]


class DistillTrainer(Resumable, SFTTrainer):
    """Distil `teacher` into `model`.

    The loss is the sum over label tokens divided by the label tokens of the whole global batch (all
    processes, all accumulation steps), so that the gradient does not depend on how the batch was split.

    Args:
        model: the student: a loaded causal language model, or a path or Hub id.
        teacher: a loaded model, a path or Hub id, "self", or any `Teacher`.
        method: a name of METHODS (default hpd); `method_kwargs` are its parameters.
        terms: an explicit list of terms instead of a method.
        prefixes: shares of dataset and student rows; None: the method's own, which is the dataset alone for
            most.
        rollouts: how the student writes its rows.
        strategy: how weights meet the gradient: a `StrategyConfig`, or its type.
        guards: thresholds that warn, or stop and save.
        args: a `DistillConfig`.
        peft_config: as in TRL; an adapter on the output head is supported.
        **kwargs: everything else that `SFTTrainer` takes: train_dataset, eval_dataset, processing_class,
            callbacks, ...

    Raises:
        ValueError: method and terms together, unknown names, or vocabularies that differ under
            `vocabulary="error"`.
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
        prefixes: Prefixes | None = None,
        rollouts: RolloutConfig | None = None,
        strategy: StrategyConfig | str | None = None,
        guards: GuardsConfig | None = None,
        args: DistillConfig | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        args = args or DistillConfig(output_dir="hpd-student")
        method = method if method or terms else "hpd"
        self._term_configs = choose_terms(method, method_kwargs or {}, terms)
        self.terms = name_terms(self._term_configs)
        self.regime = choose_regime(method, self.terms, prefixes, rollouts, strategy)
        self._guards, self.stopped_by = guards or GuardsConfig(), None
        self._adaptive = adaptive_positions(self._term_configs)
        model, peft_config, hide_head = adapt_head(model, peft_config, args.seed)
        with hide_head:
            super().__init__(model=model, args=args, peft_config=peft_config, **kwargs)  # type: ignore[arg-type]
        check_engine(args, self.accelerator, recomputes=self.regime.strategy.type == "policy_gradient")
        student = self.accelerator.unwrap_model(self.model)
        self._base_model = student.get_base_model() if hasattr(student, "get_base_model") else student
        add_head_function(self._base_model)
        # Whatever the model's own loss is, ours shifts labels and needs the label count of the accumulated
        # batch.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self.teacher = as_teacher(teacher, args.trust_remote_code)
        vocab = self.teacher.vocab
        if vocab is not None:
            vocab = common_vocab(self._base_model, vocab, args.vocabulary)
        self.teacher.prepare(self.model, self.accelerator)
        self.skipped_steps = 0
        self._watch = self._make_watch()
        self.data_collator = DistillCollator(self.data_collator, vocab)
        self._introduce_rows()
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        if any(isinstance(config, TermConfig) and config.scheduled for config in self._term_configs):
            self.add_callback(ScheduledTerms(self))
        self._step = StepState(self)
        self.add_callback(self._step.callback)
        self.window = Window(self)

    def _make_watch(self) -> NonFiniteWatch:
        policy = self._guards.non_finite
        if policy == "skip" and self.is_deepspeed_enabled:
            raise ValueError(
                "guards.non_finite: skip: DeepSpeed applies a step before it can be left out: use stop or "
                "warn."
            )
        return NonFiniteWatch(self, policy, self._guards.max_skipped_steps or _MAX_SKIPPED_STEPS)

    def _introduce_rows(self) -> None:
        """Show the teacher the rows of the datasets, once; from then on batches ask it as they are collated,
        one ahead of the step."""
        held_out = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        # A stream has no end that one could wait for; there, the lookup itself finds a missing row.
        known = [rows for rows in (self.train_dataset, *held_out) if isinstance(rows, Dataset)]
        self.teacher.register_rows(itertools.chain.from_iterable(map(self.data_collator.rows, known)))
        # A loader's workers have no connection, a stream's batches travel from one process to the others, and
        # rows that are not trained on need no answer.
        dispatched = self.accelerator.num_processes > 1 and not isinstance(self.train_dataset, Dataset)
        elsewhere = self.args.dataloader_num_workers > 0 or dispatched
        late = self.teacher.remote and (elsewhere or self.regime.prefixes.on_policy)
        self.data_collator.ask = self.teacher.ask if self.teacher.asks_ahead and not late else None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch; its statistics stay on the device until the next log."""
        if return_outputs:
            raise ValueError(
                "The fused loss builds no logits: set prediction_loss_only=True and drop compute_metrics."
            )
        mode = "train" if self.model.training else "eval"
        batch = TokenBatch.pop(inputs)
        teacher = self.teacher.scores(inputs, batch)
        num_tokens = max(len(batch.labels), 1) if num_items_in_batch is None else num_items_in_batch
        scale = 1.0 / torch.as_tensor(num_tokens, device=batch.labels.device).clamp(min=1)
        replicas = 1
        if mode == "train" and self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The count covers every process and DDP averages the gradients: undo that average.
            replicas = self.accelerator.num_processes // self.get_tp_size()
            scale = scale * replicas
        stats: dict[str, Tensor] = {}

        def head_function(student: Scores) -> Tensor:
            output = self._loss(student, teacher, batch, scale, mode, replicas)
            stats.update(
                output.stats
            )  # as a result of the forward they would be cast to FSDP2's bfloat16, counts and all
            return output.loss

        loss = model(**model_inputs(inputs), label_index=batch.index, head_function=head_function)
        if mode == "train":
            self._watch.see(teacher, loss)
        self._count(mode, stats, batch, inputs)
        return loss

    def _loss(
        self,
        student: Scores,
        teacher: TeacherScores | RoutedScores,
        batch: TokenBatch,
        scale: Tensor,
        mode: str,
        replicas: int,
    ) -> LossOutput:
        if isinstance(teacher, RoutedScores):
            return self._loss_of_parts(student, teacher, batch, scale, mode, replicas)
        # Evaluation keeps its draws fixed (step -1 is no training step) and reads the dataset's rows only.
        training = mode == "train"
        terms = self.terms if training else as_evaluated(self.terms)
        count, numbers = num_uniforms(terms), None
        if count:
            step = self.state.global_step if training else -1
            numbers = uniforms(batch.keys, seed=self.args.seed, step=step, count=count)
        if training and self.regime.strategy.type == "policy_gradient":
            output = self._step.policy_gradient(student, teacher, batch, scale, numbers, replicas)
        else:
            output = loss_by_source(
                student,
                teacher,
                batch,
                terms,
                uniforms=numbers,
                scale=scale,
                impl=self.args.impl,
                chunk_bytes=self.args.chunk_bytes,
                metric_stride=self.args.metric_stride if training else 1,
                kl_estimator=self.args.kl_estimator,
            )
        if training and any(isinstance(position, SkewPosition) for position in self._adaptive.values()):
            output.stats.update(label_gaps(student, teacher, batch, self.args.metric_stride))
        if training and self._guards.overlap:
            shared, rows = support_overlap(
                student, teacher, batch.labels, self._guards.overlap_top_k, self.args.metric_stride
            )
            output.stats.update({"support_overlap": shared, "overlap_rows": rows})
        return output

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return self._step.sampler(super()._get_train_sampler(rows), rows)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        if fills_last_batch(self.args, dataset) and not (is_training and self.regime.repeats):
            count, dataset = len(dataset), fill(dataset, batch_size * self.args.world_size)
            shuffled = is_training and self.args.train_sampling_strategy == "random"
            sampler_fn = lambda rows: FilledOrder(count, len(rows), shuffled, self.args.data_seed)  # noqa: E731
        return super()._get_dataloader(
            dataset, description, batch_size, sampler_fn, is_training, dataloader_key
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole student, loadable by `from_pretrained` in one process, whatever engine shards
        it."""
        if self.is_fsdp_enabled and not _internal_call:
            # The Trainer writes nothing here, without a word, where checkpoints are sharded.
            self._save(
                output_dir or self.args.output_dir, state_dict=self.accelerator.get_state_dict(self.model)
            )
            return
        super().save_model(output_dir, _internal_call)

    def _save_rng_state(self, output_dir: str) -> None:
        # Rollouts in use are random state too: written by every process, before the checkpoint counts as
        # complete.
        super()._save_rng_state(output_dir)
        self._step.save(output_dir)
        self.window.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._step.load(checkpoint)
            self.window.load(checkpoint)

    def _loss_of_parts(
        self,
        student: Scores,
        routed: RoutedScores,
        batch: TokenBatch,
        scale: Tensor,
        mode: str,
        replicas: int,
    ) -> LossOutput:
        """The loss is a sum over positions, so each teacher's positions may be summed on their own."""
        loss, stats = torch.zeros((), device=scale.device), {}
        for positions, teacher in routed.parts:
            part = self._loss(
                student._replace(hidden=student.hidden[positions]),
                teacher,
                batch.at(positions),
                scale,
                mode,
                replicas,
            )
            loss = loss + part.loss
            for name, value in part.stats.items():
                stats[name] = stats[name] + value if name in stats else value
        return LossOutput(loss, stats)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Resumable`. What training cannot go on with ends it with a checkpoint of the steps done.

        Raises:
            TeacherUnavailable: a remote teacher stayed away.
            NonFinite: a loss or gradient was NaN or infinite, and the guard's policy is to stop.
        """
        try:
            return super().train(*args, **kwargs)
        except (TeacherUnavailable, NonFinite):
            self.end_early()
            raise

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of the next step; none where a resumed run has no step left to do."""
        self.stop_if_asked()
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return [], None
        before = self._step.state()
        # Rollouts come in before the label tokens are counted.
        samples = self._step.begin(list(itertools.islice(epoch_iterator, num_batches)))
        # Here, before the step: no process has entered a collective operation that the others would wait in.
        if failure := self._teacher_failure(samples):
            self._step.restore(before)
            raise TeacherUnavailable(failure)
        self._watch.begin(samples, before)
        return samples, self._get_num_items_in_batch(samples, device)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.last_step = {"grad_norm": grad_norm, "learning_rate": self._get_learning_rate()}
        return self._watch.check(grad_norm)

    def _teacher_failure(self, batches: Sequence[dict[str, Any]]) -> str | None:
        """Why a remote teacher cannot answer about `batches`; the same on all processes, and None where it
        has answered."""
        if not self.teacher.remote:
            return None
        failure = None
        try:
            for batch in batches:
                if "asked" not in batch:
                    batch["asked"] = self.teacher.ask(batch, TokenBatch.pop(dict(batch)))
            for batch in batches:
                self.teacher.wait(batch["asked"])
        except TeacherUnavailable as error:
            failure = str(error)
        if self.accelerator.num_processes > 1:
            failure = next((f for f in gather_object([failure]) if f is not None), None)
        return failure

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        self.stop_in_evaluation()
        if failure := self._teacher_failure([inputs]):
            raise TeacherUnavailable(failure)
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
                before = next(
                    (log["num_tokens"] for log in reversed(self.state.log_history) if "num_tokens" in log), 0
                )
                metrics["num_tokens"] = before + int(sums["num_tokens"])
                metrics.update(self._step.metrics())
            elif "eval_loss" in logs:
                # The Trainer's own average weighs batches, not tokens.
                logs["eval_loss"] = metrics.pop("value")
            metrics.pop("value", None)
            logs.update(
                {f"{'eval_' if mode == 'eval' else ''}{name}": value for name, value in metrics.items()}
            )
        if mode == "train" and "loss" in logs:
            if self.skipped_steps:
                logs["skipped_steps"] = self.skipped_steps
            self._guard(logs)
        super().log(logs, start_time)

    def _guard(self, logs: dict[str, float]) -> None:
        for guard, level, text in check_metrics(self._guards, logs, self.state.log_history):
            seen = any(f"guard/{guard}" in log for log in self.state.log_history[-1:])
            logs[f"guard/{guard}"] = 1.0
            if level == "stop":
                self.stopped_by = f"{guard}: {text}"
                self.control.should_training_stop = self.control.should_save = True
            if not seen or level == "stop":
                _LOGGER.warning("guard %s at step %d: %s", guard, self.state.global_step, text)

    def build_scheduled_terms(self, progress: float) -> None:
        """Set `terms` to what the schedules say at `progress`, the share of training steps that lie
        behind."""
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
        names = (
            sorted(set().union(*gather_object([sorted(sums)])))
            if self.accelerator.num_processes > 1
            else sorted(sums)
        )
        return self.reduce_sums(sums, names)

    def reduce_sums(self, sums: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, float]:
        """The named sums over all processes, as numbers: the one place where statistics leave the device."""
        if not names:
            return {}
        device = self.accelerator.device
        zero = torch.zeros((), device=device)
        stacked = torch.stack([sums.get(name, zero).to(device, sum_dtype(device)) for name in names])
        return dict(zip(names, cast(Tensor, self.accelerator.reduce(stacked, "sum")).tolist(), strict=True))


_LOGGER = logging.getLogger(__name__)


# Of a run, where guards.max_skipped_steps does not say: some bad rows, not a run that has diverged.
_MAX_SKIPPED_STEPS = 10
