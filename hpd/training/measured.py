"""A trainer whose evaluations and logs are means over tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import PredictionOutput

from hpd.batch import TokenBatch, as_teacher_reads, uniforms
from hpd.losses import TeacherScores
from hpd.losses.teacher_side import NOT_LINEAR, unread
from hpd.methods.terms import Term
from hpd.models.forward import model_inputs
from hpd.teachers import RoutedScores, TeacherUnavailable
from hpd.training.guarded import GuardedTrainer
from hpd.training.metrics import MetricSums, evaluated_names, means
from hpd.training.on_policy import StepState

__all__ = ["SET_NAME", "MeasuredTrainer"]

SET_NAME = "set_name"
"""Attribute of a validation loader: the name of its set, where there are several, else empty."""


class MeasuredTrainer(GuardedTrainer):
    """Evaluation, prediction and logs of a trainer whose `compute_loss` adds to `sums`."""

    terms: tuple[Term, ...]
    sums: dict[str, MetricSums]
    """Of training since the last log, and of the evaluation that runs."""
    evaluation_seconds: float = 0.0
    """Time that evaluations took since the trainer was made."""
    _step: StepState
    _runs_teacher: bool = True
    """False if no training step reads what the teacher would say; evaluations always do."""
    _shared_vocab: int = 0
    """Tokens that both models have."""
    _prefix: str = "eval"
    """Of the names that the evaluation which runs is logged under."""

    def _place_teacher(self) -> None:
        """Put the teacher beside the student, under the same engine."""
        model, slices = self.teacher.model, self._slices
        if slices is not None and model is not None:
            slices.attach(model, "teacher")
        prepared = len(self.accelerator._models)
        self.teacher.prepare(self.model, self.accelerator)
        # An evaluation before training prepares the student where no model was prepared before.
        del self.accelerator._models[prepared:]
        if slices is not None and model is not None:
            slices.probe(self.teacher.model, "teacher")

    def _teacher_failure(self, batches: Sequence[dict[str, Any]]) -> str | None:
        """Why a teacher that may fail cannot answer about `batches`; the same on all processes, and None
        where it has answered."""
        if not self.teacher.may_fail:
            return None
        failure = None
        try:
            for batch in batches:
                if "asked" not in batch:
                    read, asked = as_teacher_reads(batch, TokenBatch.pop(dict(batch)))
                    if self._slices is not None:
                        asked = asked.at(self._slices.kept(read, asked))
                    batch["asked"] = self.teacher.ask(read, asked)
            for batch in batches:
                self.teacher.wait(batch["asked"])
        except TeacherUnavailable as error:
            failure = str(error)
        if self.accelerator.num_processes > 1 and self.agree(failure is not None):
            failure = next((f for f in gather_object([failure]) if f is not None), None)
        return failure

    def _teacher_scores(self, inputs: dict[str, Any], batch: TokenBatch) -> TeacherScores | RoutedScores:
        """What the teacher says of a micro-batch, or what stands for it where a step does not read it."""
        if self.model.training and not self._runs_teacher:
            return unread(batch.labels, self._shared_vocab)
        return self.teacher.scores(*as_teacher_reads(inputs, batch))

    def _uniforms(self, batch: TokenBatch, count: int) -> Tensor | None:
        """Numbers of the draws; evaluation keeps its own fixed (step -1 is no training step)."""
        step = self.state.global_step if self.model.training else -1
        return uniforms(batch.keys, seed=self.args.seed, step=step, count=count) if count else None

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        self.stop_in_evaluation()
        if failure := self._teacher_failure([inputs]):
            raise TeacherUnavailable(failure)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
            if prediction_loss_only:
                return loss, None, None
            return loss, model(**model_inputs(inputs), use_cache=False).logits, inputs["labels"]

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """As in transformers, of rows in any format that training takes, each on its own: whole logits."""
        if not self._skip_prepare_dataset:
            test_dataset = self._prepare_dataset(
                test_dataset,
                cast(Any, self.processing_class),
                self.args,
                False,
                self._formatting_func,
                metric_key_prefix,
            )
        output = super().predict(test_dataset, ignore_keys, metric_key_prefix)
        assert output.metrics is not None
        output.metrics.update(self._evaluated(metric_key_prefix))
        return output

    def evaluation_names(self) -> set[str]:
        """Names of the metrics that evaluations log, without their prefix."""
        vocab = self._base_model.config.get_text_config().vocab_size
        names = evaluated_names(self.terms, vocab, self.args.kl_estimator)
        names -= {*NOT_LINEAR} if self.teacher.drawn else set()
        if isinstance(self.eval_dataset, dict):
            return {f"{key}_{name}" for key in self.eval_dataset for name in names}
        return names

    def _evaluated(self, prefix: str) -> dict[str, float]:
        """What the evaluation that has ended summed; the Trainer's own average weighs batches, not tokens."""
        sums = self.sums["eval"].read()
        if not sums.get("tokens"):
            return {}
        metrics = means(sums, self.terms)
        metrics["loss"] = metrics.pop("value") + self.router_aux_loss_coef * metrics.get("aux_loss", 0.0)
        return {f"{prefix}_{name}": value for name, value in metrics.items()}

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As in transformers; an adaptive share of rollouts follows the loss."""
        self._prefix = metric_key_prefix
        began = time.perf_counter()
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        # Several sets come back here one by one.
        if not isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict):
            self.evaluation_seconds += time.perf_counter() - began
        if self._step.ramp is not None and "eval_loss" in metrics:
            self._step.ramp.update(metrics["eval_loss"])
        return metrics

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As in transformers; of several sets the loader has the name, for callbacks that show it."""
        loader = super().get_eval_dataloader(eval_dataset)
        setattr(loader, SET_NAME, self._prefix.removeprefix("eval").removeprefix("_"))
        return loader

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log: one reduction over processes, one read from the device."""
        # The history is what a checkpoint restores, so a resumed run goes on counting.
        history = reversed(self.state.log_history)
        trained = next((log["num_tokens"] for log in history if "num_tokens" in log), 0)
        if not self.model.training:
            metrics = self._evaluated(self._prefix)
            if f"{self._prefix}_loss" not in logs:
                metrics.pop(f"{self._prefix}_loss", None)
            if metrics:
                seen = self.sums["train"].totals(["num_tokens"])["num_tokens"]
                metrics[f"{self._prefix}_num_tokens"] = trained + int(seen)
            logs.update(metrics)
        elif (sums := self.sums["train"].read()).get("tokens"):
            metrics = means(sums, self.terms)
            metrics.pop("value")
            logs.update({**metrics, "num_tokens": trained + int(sums["num_tokens"]), **self._step.metrics()})
        # A time of the first evaluation only, which a resumed run would log again.
        logs.pop(f"{self._prefix}_model_preparation_time", None)
        if self.model.training and "loss" in logs:
            self.guard(logs)
        super().log(logs, start_time)
