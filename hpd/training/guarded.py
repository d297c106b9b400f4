"""A trainer that looks at the numbers of every step and log: some are undone, of others it warns."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hpd.config.schema import GuardsConfig
from hpd.losses import TeacherScores
from hpd.teachers import RoutedScores, Teacher
from hpd.training.guards import check_metrics
from hpd.training.nonfinite import (
    NonFinite,
    NonFiniteFinding,
    NonFiniteWatch,
    StepRecord,
    row_likelihoods,
    write_report,
)
from hpd.training.student import StudentTrainer

__all__ = ["GuardedTrainer"]

_LOGGER = logging.getLogger(__name__)

# Of a run, where guards.max_skipped_steps does not say: some bad rows, not a run that has diverged.
_MAX_SKIPPED_STEPS = 10


class GuardedTrainer(StudentTrainer):
    """Guards around the steps of a `StudentTrainer`.

    Args:
        guards: thresholds, and what happens at NaN.
        *args, **kwargs: as `StudentTrainer` takes them.
    """

    teacher: Teacher

    def __init__(self, guards: GuardsConfig, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stopped_by: str | None = None
        """The guard that ended training."""
        self._guards = guards
        self._watch = NonFiniteWatch(
            guards.non_finite, guards.max_skipped_steps or _MAX_SKIPPED_STEPS, self.accelerator
        )
        self._record: StepRecord | None = None

    def begin_record(self, batches: Sequence[dict[str, Any]], before: Mapping[str, Any]) -> None:
        """Note the micro-batches of the next step, and the state to go back to."""
        if self._watch.active:
            # The loss takes fields out of a batch; the tensors are shared.
            self._record = StepRecord([dict(batch) for batch in batches], before)

    def record_loss(self, loss: Tensor, teacher: TeacherScores | RoutedScores) -> None:
        """Note what a micro-batch of the step came to."""
        if self._record is not None:
            self._record.losses.append(loss.detach())
            self._record.teacher_finite.append(self._watch.check_teacher(teacher))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.last_step = {"grad_norm": grad_norm, "learning_rate": self._get_learning_rate()}
        record, self._record = self._record, None
        if record is not None and record.losses:
            finding = self._watch.check(record.losses, grad_norm, record.teacher_finite)
            if finding is not None:
                self._undo_step(finding, record)
                return None
        self.end_step()
        return grad_norm

    def end_step(self) -> None:
        """Follow a step that is done but for its optimizer's part."""

    def _undo_step(self, finding: NonFiniteFinding, record: StepRecord) -> None:
        """Write down a step that is not finite and take it back, before the optimizer's.

        Raises:
            NonFinite: training does not go on without it.
        """
        rows = None
        if not self.is_sharded:
            student = self.accelerator.unwrap_model(self.model)
            rows = row_likelihoods(
                record.batches, student, self.teacher, self._prepare_inputs, self._tokenizer.decode
            )
        text = write_report(
            Path(str(self.args.output_dir)) / "nonfinite",
            finding,
            record,
            self.model,
            step=self.state.global_step + 1,
            rank=self.accelerator.process_index if self.accelerator.num_processes > 1 else None,
            notes={
                "policy": self._guards.non_finite,
                "learning_rate": self._get_learning_rate(),
                "rows": rows,
            },
        )
        self.model.zero_grad(set_to_none=True)  # an optimizer passes over a parameter without gradient
        if not finding.skip:
            self.put_state(record.before)
            raise NonFinite(text)
        self.put_state({name: record.before[name] for name in ("sums", "window")})
        self._watch.skipped_steps = skipped = finding.skipped_steps
        self._globalstep_last_logged += 1  # the next log averages the steps that were done
        most = self._watch.max_skipped
        _LOGGER.warning("%s The step is left out (%d of at most %d).", text, skipped, most)

    def guard(self, logs: dict[str, float]) -> None:
        """Compare a step's metrics with the thresholds; add to them what was crossed, and warn or stop."""
        if self._watch.skipped_steps:
            logs["skipped_steps"] = self._watch.skipped_steps
        for guard, level, text in check_metrics(self._guards, logs, self.state.log_history):
            seen = any(f"guard/{guard}" in log for log in self.state.log_history[-1:])
            logs[f"guard/{guard}"] = 1.0
            if level == "stop":
                self.stopped_by = f"{guard}: {text}"
                self.control.should_training_stop = self.control.should_save = True
            if not seen or level == "stop":
                _LOGGER.warning("guard %s at step %d: %s", guard, self.state.global_step, text)
