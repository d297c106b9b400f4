"""A trainer that may stop at any moment and goes on as if nothing had happened, beyond what transformers
does."""

from __future__ import annotations

import contextlib
import copy
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy

from hpd.training.checkpoints import (
    CheckpointFailed,
    check_processes,
    check_readable,
    check_whole,
    is_complete,
    mark_complete,
    newest_complete,
    read_mark,
    reading,
    remove_incomplete,
    rotate,
    weights_file,
    writing,
)
from hpd.training.state import EARLIER_NAMES, follow_schedule, get_random, read_state, set_random, write_state
from hpd.training.stopping import ends_with_program

__all__ = ["Resumable", "Stateful", "StopTraining"]

_OF_A_WINDOW = {"loss", "last_logged", "last_step"}


class StopTraining(Exception):
    """Leaves the training loop of transformers, which would otherwise finish as a run that has ended does.

    That is: load the best model, delete checkpoints, and log the averages of a whole run.
    """


class Stateful(Protocol):
    """Anything that a checkpoint holds; the state does not change with what it was taken from."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


class Resumable(Trainer):
    """A Trainer whose checkpoints are complete or do not count, and that stops when it is told to.

    A stop is carried out before the next step, or in an evaluation before its next batch; that evaluation is
    then done again as a whole where training goes on.
    """

    stop_reason: str | None = None
    """Why training was told to stop."""
    stateful: Mapping[str, Stateful] = {}
    """State that a checkpoint holds beside transformers' own, by name."""
    needs_own_state: bool = False
    """True if a process cannot go on without the state that it had itself."""
    _window: Mapping[str, Any] | None = None
    """Entries of the resumed checkpoint for the next log, until training begins."""
    _unfinished: dict[str, Any] | None = None
    """The evaluation that runs: what it consists of, and the state before it."""
    _to_repeat: dict[str, Any] | None = None
    """The evaluation that the resumed checkpoint says was broken off."""
    last_step: dict[str, Any] | None = None
    """grad_norm and learning_rate of the last step, where they are needed at the end of an epoch."""
    _epoch_ended_at: int | None = None
    """The step after which an epoch was last ended: evaluated, logged and saved, as far as its strategies
    say."""
    _to_end: bool = False
    """True if the resumed checkpoint was saved behind the last step of an epoch that had not ended yet."""
    _random: dict[str, Any] | None = None
    """Random numbers after what was caught up with before the first step."""
    _planned_steps: int | None = None
    """Steps that the run had when the resumed checkpoint was saved."""
    _follow: TrainerCallback | None = None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        ends_with_program(self)

    def stop_cleanly(self, reason: str) -> None:
        """Save a checkpoint and end training before the next step; safe to call from a signal handler or a
        callback.

        `train` then returns as usual and `stop_reason` says why. With several processes, one that is asked
        stops all.
        """
        self.stop_reason = reason

    @contextlib.contextmanager
    def resuming(
        self, checkpoint: str | bool | None, saved_by: tuple[type[Exception], ...] = ()
    ) -> Iterator[str | None]:
        """Train inside this context: it gives the checkpoint to go on from, and saves what a stop ends.

        Args:
            checkpoint: as in transformers; True takes the newest complete checkpoint.
            saved_by: errors before which the steps done are saved.

        Raises:
            ValueError: it is True, and there is none; or another number of processes wrote it.
            CheckpointUnreadable: a file of it is damaged.
            CheckpointFailed: a checkpoint could not be written; the one before it is as it was.
        """
        if checkpoint is True:
            checkpoint = str(newest_complete(self._run) or "")
            if not checkpoint:
                raise ValueError(f"There is no complete checkpoint in {self._run}.")
        if checkpoint:
            check_processes(Path(checkpoint), self.args.world_size)
            check_readable(Path(checkpoint))
            self._resume_notes(Path(checkpoint))
        if self._follow is not None:
            self.remove_callback(self._follow)
        # Last of the callbacks: those before ask for what an epoch ends with.
        self._follow = _Follow(self, str(checkpoint or ""))
        self.add_callback(self._follow)
        try:
            yield str(checkpoint) if checkpoint else None
        except StopTraining:
            self.end_early()
        except saved_by:
            self.end_early()
            raise

    def _resume_notes(self, checkpoint: Path) -> None:
        notes = read_mark(checkpoint) or {}
        self._to_repeat = notes.get("evaluation")
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self._planned_steps = state.max_steps
        ended = notes.get("epoch_ended", True)
        self._epoch_ended_at = state.global_step if ended else None
        self._to_end = not ended and float(state.epoch).is_integer()

    def end_early(self) -> None:
        """Save what was done so far, and tell the callbacks that training is over."""
        try:
            if self._unfinished is not None:
                before = self._unfinished
                del self.state.log_history[before["logs"] :]
                self.state.stateful_callbacks = before["callbacks"]
                self.put_state(before["state"])
                set_random(before["random"])
            self.save_checkpoint()
        finally:
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            self.is_in_train = False

    def take_state(self) -> dict[str, Any]:
        """The state of everything that has one, and of the log that comes next, by name."""
        state = {name: part.state_dict() for name, part in self.stateful.items()}
        if hasattr(self, "_tr_loss"):  # since training began
            last_logged, last_step = self._globalstep_last_logged, self.last_step
            window = {"loss": self._tr_loss.clone(), "last_logged": last_logged, "last_step": last_step}
            state["window"] = window
        return state

    def put_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `take_state` was called, as far as `state` holds it."""
        if window := state.get("window"):
            self._tr_loss.copy_(window["loss"])
            self._globalstep_last_logged = window["last_logged"]
            self.last_step = window["last_step"]
        for name, part in self.stateful.items():
            if name in state:
                part.load_state_dict(state[name])

    def save_checkpoint(self) -> None:
        """Write the checkpoint of the steps done so far, unless it is there; without a step there is nothing
        to keep."""
        if self.state.global_step:
            self._save_checkpoint(self.model, trial=None)

    def agree(self, flag: bool) -> bool:
        """True if the flag is set on any process: the same answer on all of them."""
        if self.accelerator.num_processes == 1:
            return flag
        count = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, "sum") > 0)  # type: ignore[operator]

    def stop_if_asked(self) -> None:
        """Raise StopTraining, on all processes or on none, where any was told to stop."""
        if self.agree(self.stop_reason is not None):
            self.stop_reason = self.stop_reason or "Another process was told to stop."
            raise StopTraining

    def stop_in_evaluation(self) -> None:
        """`stop_if_asked`, if this is an evaluation of training: others have no checkpoint to go on from."""
        if self._unfinished is not None:
            self.stop_if_asked()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.stop_if_asked()
        return super().get_batch_samples(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        self.stop_in_evaluation()
        return super().prediction_step(*args, **kwargs)

    def evaluation_plan(self) -> dict[str, Any]:
        """The next evaluation's parts, as JSON; nothing, where all are alike."""
        return {}

    def plan_evaluation(self, plan: dict[str, Any]) -> None:
        """Have the next evaluation consist of that."""

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False
    ) -> dict[str, float]:
        self._unfinished = {
            "plan": self.evaluation_plan(),
            "logs": len(self.state.log_history),
            "callbacks": copy.deepcopy(self.state.stateful_callbacks),
            "state": self.take_state(),
            "random": get_random(),
        }
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        self._unfinished = None
        return metrics

    def catch_up(self, checkpoint: str) -> None:
        """Do what the resumed checkpoint was saved before: the rest of an evaluation, and the end of its
        epoch."""
        if not checkpoint:
            return
        # The Trainer goes on with the intervals that the checkpoint was saved under, whatever they are now.
        self.state.compute_steps(self.args, self.state.max_steps)
        if self._planned_steps != self.state.max_steps:
            follow_schedule(self.lr_scheduler, self.optimizer)
        if self._window is not None:
            # Not earlier: the Trainer starts its own sums when training begins.
            self.put_state({"window": self._window})
            self._window = None
        # An evaluation leaves the model in evaluation mode until the next step, and logs go by that.
        last = self.state.log_history[-1] if self.state.log_history else {}
        evaluated = last.get("step") == self.state.global_step and any(
            name.startswith("eval_") for name in last
        )
        self.model.train(not evaluated)  # type: ignore[union-attr]
        if self._to_repeat is None and not self._to_end:
            return
        # An evaluation draws a number for its loader, as it did in the run that nothing disturbed.
        self._load_rng_state(checkpoint)
        plan, self._to_repeat = self._to_repeat, None
        if plan is not None:
            self.plan_evaluation(plan)
            is_best = self._determine_best_metric(self._evaluate(None, None), None)
            if is_best and self.args.save_strategy == SaveStrategy.BEST:
                self._save_checkpoint(self.model, None)
        if self._to_end:
            self._end_epoch()
        self._random = get_random()

    def _end_epoch(self) -> None:
        """Do what the Trainer does behind the last step of an epoch, and skips where it goes on from
        there."""
        self._to_end = False
        step = self.last_step or {}
        model: Any = self.model
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        self._maybe_log_save_evaluate(
            self._tr_loss,
            step.get("grad_norm"),
            model,
            None,
            self.state.epoch,
            None,
            time.time(),
            learning_rate=step.get("learning_rate"),
        )

    def end_of_epoch(self, control: TrainerControl) -> None:
        """Note that an epoch ends here, or keep what was done at this step already from being done twice."""
        if self._epoch_ended_at == self.state.global_step:
            control.should_log = control.should_evaluate = control.should_save = False
            self.drop_evaluation()
        self._epoch_ended_at = self.state.global_step

    def drop_evaluation(self) -> None:
        """Forget what the next evaluation was to consist of."""

    @property
    def _run(self) -> Path:
        return Path(str(self.args.output_dir))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.agree(is_complete(folder)):
            # Saved before: writing it again in place could spoil it. Which one is best may have been found
            # since.
            self._name_best(folder.parent)
            return
        if self.args.should_save:
            remove_incomplete(folder)
        self.accelerator.wait_for_everyone()
        # transformers would delete older checkpoints before this one counts.
        limit = self.args.save_total_limit
        self.args.save_total_limit = None
        try:
            with writing(folder):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    mark_complete(folder, self._notes())
        except CheckpointFailed:
            if self.args.should_save:  # half a checkpoint on a full disk is in the way of the next one
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate(folder.parent, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _notes(self) -> dict[str, Any]:
        step, unfinished = self.state.global_step, self._unfinished or {}
        return {
            "step": step,
            "evaluation": unfinished.get("plan"),
            "epoch_ended": self._epoch_ended_at == step,
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with reading(weights_file(Path(resume_from_checkpoint))):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # transformers goes on with a warning, which leaves what the file lacks as it was before training.
        if check_whole(self.model, load_result):  # type: ignore[arg-type]
            super()._issue_warnings_after_load(load_result)

    def _load_best_model(self) -> None:
        with reading(weights_file(Path(str(self.state.best_model_checkpoint)))):
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(Path(checkpoint or "") / "optimizer.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_state(Path(checkpoint))

    def _load_state(self, checkpoint: Path) -> None:
        """Go on with the state of a checkpoint."""
        rank, device = self.accelerator.process_index, self.accelerator.device.type
        names = ("window", *self.stateful)
        saved = read_state(checkpoint, rank, device, names, required=self.needs_own_state)
        with reading(saved.file):
            self._window = saved.parts.pop("window", None)
            if self._window is not None and (lacking := _OF_A_WINDOW - self._window.keys()):
                raise ValueError(f"its window lacks {', '.join(sorted(lacking))}")
            self.put_state(saved.parts)
        callbacks: dict[str, Any] = self.state.stateful_callbacks  # type: ignore[assignment]
        for name in EARLIER_NAMES:
            callbacks.pop(name, None)

    def _save_rng_state(self, output_dir: str) -> None:
        # By every process, before the checkpoint counts as complete.
        super()._save_rng_state(output_dir)
        state = self.take_state()
        last_step = state["window"]["last_step"] or {}
        state["window"]["last_step"] = {name: float(value) for name, value in last_step.items()}
        write_state(Path(output_dir), self.accelerator.process_index, state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._random is not None:
            set_random(self._random)
            self._random = None
            return
        rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        with reading(Path(checkpoint or "") / f"rng_state{rank}.pth"):
            super()._load_rng_state(checkpoint)

    def _name_best(self, run: Path) -> None:
        best = run / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and best.is_dir():
            self.state.best_model_checkpoint = str(best)


class _Follow(TrainerCallback):
    """Before a resumed run's first step, while no random number of training is drawn; behind each epoch."""

    def __init__(self, trainer: Resumable, checkpoint: str):
        self._trainer, self._checkpoint = trainer, checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.catch_up(self._checkpoint)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.end_of_epoch(control)
