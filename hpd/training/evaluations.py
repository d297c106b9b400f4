"""Tasks of a recipe, done by the student while it trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback

from hpd.evaluate.generate import Group, answer_examples
from hpd.evaluate.run import EvalResult, grade_answers, identify, write_result
from hpd.generation.engine import TransformersEngine
from hpd.training.measured import MeasuredTrainer
from hpd.training.plan import PlannedEval, task_names

__all__ = ["TaskEvaluation"]


class TaskEvaluation(MeasuredTrainer):
    """Mixed into a trainer, adds tasks to its evaluation, each at its own steps.

    Their metrics are logged like any other, so every tracker has them, and `metric_for_best_model` can name
    them: with `save_strategy: best`, or with `load_best_model_at_end`, the checkpoint that does best on a
    task is kept. Generation uses no global random numbers, so training goes on as if there had been no
    evaluation.

    With several processes, each answers a share of the problems (all of them together where the weights are
    sharded, since a sharded model can only run everywhere at once), and the first grades. The answers are
    those of one process.

    Args:
        evals: those with `every`.
        folder: the run folder, for evals.json and the answers; None: neither is written.
    """

    def __init__(self, *args: Any, evals: Sequence[PlannedEval], folder: Path | None = None, **kwargs: Any):
        self._evals = tuple(planned for planned in evals if planned.config.every is not None)
        self._folder = folder
        self._due: list[PlannedEval] = []
        self._validation_due = True
        super().__init__(*args, **kwargs)
        self.add_callback(_TaskSchedule(self._evals, self.schedule))

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss on the validation rows where it is due, then the tasks that are due."""
        has_rows = eval_dataset is not None or self.eval_dataset is not None
        metrics: dict[str, float] = {}
        if has_rows and self._validation_due:
            metrics = super().evaluate(eval_dataset, *args, **kwargs)
        due = self._due
        self.drop_evaluation()
        for planned in due:
            began = time.perf_counter()
            metrics |= self._run_task(planned)
            self.evaluation_seconds += time.perf_counter() - began
        return metrics

    def evaluation_names(self) -> set[str]:
        """Names of the metrics that evaluations log, without their prefix."""
        return super().evaluation_names() | task_names(self._evals)

    def schedule(self, due: Sequence[PlannedEval], validation_due: bool) -> None:
        """Have the next `evaluate` run these tasks, and the validation rows only if they are due
        themselves."""
        self._due += due
        self._validation_due = validation_due

    def evaluation_plan(self) -> dict[str, Any]:
        return {"tasks": [planned.label for planned in self._due], "validation": self._validation_due}

    def plan_evaluation(self, plan: dict[str, Any]) -> None:
        self.schedule(
            [planned for planned in self._evals if planned.label in plan["tasks"]], plan["validation"]
        )

    def drop_evaluation(self) -> None:
        self._due = []
        self._validation_due = True

    def _run_task(self, planned: PlannedEval) -> dict[str, float]:
        model = self.accelerator.unwrap_model(self.model)
        engine = TransformersEngine(model, self.processing_class)  # type: ignore[arg-type]
        examples = planned.task.examples()
        # Alone, a process may stop between two batches; several would have to agree at each.
        alone = self.accelerator.num_processes == 1
        progress = (lambda done, total: self.stop_in_evaluation()) if alone else None
        generated = answer_examples(engine, examples, planned.settings, progress, group=self._group())
        shared: list[Any] = [None]
        if self.is_world_process_zero():
            result = grade_answers(
                planned.task, examples, generated, planned.settings.num_samples, engine.dtype
            )
            if self._folder is not None:
                name = f"student step {self.state.global_step}"
                write_result(
                    self._folder, identify(name, planned.task, planned.settings, engine.name), result
                )
            shared = [_logged(planned, result)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(shared)
        metrics: dict[str, float] = shared[0]
        student: Any = self.model
        training = student.training
        student.eval()  # `log` then leaves the running sums of training alone
        self.log(dict(metrics))
        student.train(training)
        return metrics

    def _group(self) -> Group | None:
        size = self.accelerator.num_processes
        if size == 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None
        gather: Callable[[Any], list[Any]] = lambda share: gather_object([share])  # noqa: E731
        return Group(self.accelerator.process_index, size, gather)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = f"eval_{(self.args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        of_tasks = {f"eval_{planned.label}" for planned in self._evals}
        # Tasks and validation rows have steps of their own: a figure that is not there now is not the best
        # now.
        if name not in metrics and (
            name in of_tasks or metrics.keys() <= {f"eval_{name}" for name in task_names(self._evals)}
        ):
            return False
        return super()._determine_best_metric(metrics, trial)


class _TaskSchedule(TrainerCallback):
    """Asks for an evaluation at the steps of the tasks."""

    def __init__(self, evals: Sequence[PlannedEval], schedule: Callable[[Sequence[PlannedEval], bool], None]):
        self._evals, self._schedule = evals, schedule

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ask(control, lambda every: isinstance(every, int) and state.global_step % every == 0)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ask(control, lambda every: every == "epoch")

    def _ask(self, control: Any, is_due: Callable[[Any], bool]) -> None:
        due = [planned for planned in self._evals if is_due(planned.config.every)]
        if due:
            # The Trainer's own flow comes first: its flag says whether the validation rows are due.
            self._schedule(due, control.should_evaluate)
            control.should_evaluate = True


def _logged(planned: PlannedEval, result: EvalResult) -> dict[str, float]:
    base = planned.label.removesuffix(f"_{result.metric}")
    return {
        f"eval_{planned.label}": result.value,
        f"eval_{base}_tokens": result.mean_tokens,
        f"eval_{base}_truncated": result.truncated,
    }
