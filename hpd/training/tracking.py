"""Trackers (`train.report_to`): a run's project, what they keep of its recipe, and their start.

The values themselves are logged by transformers' callbacks.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback, TrainerState
from transformers.integrations.integration_utils import default_logdir

from hpd.config.check import resolve
from hpd.config.schema import Recipe
from hpd.training.arguments import DistillConfig

__all__ = ["Trackers", "check_trackers", "described"]

# Environment variables by which trackers without a setting of their own take a project.
_PROJECTS = ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME")

# Callbacks that can be started without a model.
_EARLY = ("WandbCallback", "MLflowCallback", "TrackioCallback")


def described(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe without its secrets as one flat mapping, `recipe.student.model` and so on.

    Flat, because MLflow keeps a parameter as text of bounded length.
    """
    return dict(_leaves("recipe", resolve(recipe)))


def _leaves(path: str, tree: Any) -> list[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        return [leaf for name, part in tree.items() for leaf in _leaves(f"{path}.{name}", part)]
    if isinstance(tree, Sequence) and not isinstance(tree, str) and any(isinstance(p, Mapping) for p in tree):
        return [leaf for i, part in enumerate(tree) for leaf in _leaves(f"{path}.{i}", part)]
    return [(path, tree)]


def check_trackers(args: DistillConfig) -> None:
    """Refuse unknown or missing trackers, which the Trainer would notice with all models loaded.

    Raises:
        ValueError: what `train.report_to` names is not known or not installed.
    """
    _make(args)


class Trackers:
    """The trackers of a run as one callback: started before the models are loaded, where what is wrong with
    an address or a key costs nothing, and ended after the evaluation that follows the last step (transformers
    ends them before it: MLflow would keep it as another run, trackio refuse it).

    Args:
        args: of the run.
        project_given: `args.project` is the recipe's choice, which goes before the environment's.

    Raises:
        ValueError: a tracker cannot be started, and why.
    """

    def __init__(self, args: DistillConfig, project_given: bool):
        for variable in _PROJECTS:
            if project_given or not os.environ.get(variable):
                os.environ[variable] = args.project
        self._callbacks = _make(args)
        self._at_end: Callable[[], None] = _nothing
        self._ours = [callback for callback in self._callbacks if not _is_running(callback)]
        state = TrainerState(is_world_process_zero=int(os.environ.get("RANK", "0")) == 0)
        for callback in self._callbacks:
            if type(callback).__name__ in _EARLY:
                _set_up(callback, args, state)
            elif getattr(callback, "logging_dir", "") is None:
                # TensorBoard's: the evaluation before training would open one below the current folder.
                callback.logging_dir = str(Path(str(args.output_dir)) / default_logdir())  # type: ignore

    def join(self, trainer: Any) -> None:
        """Take the place of the callbacks that a trainer made of `report_to`."""
        for callback in self._callbacks:
            trainer.remove_callback(type(callback))
        if self._callbacks:
            trainer.add_callback(self)

    def end(self) -> None:
        """Let the trackers finish their runs, but for those that were there before."""
        self._at_end()
        for callback in self._ours:
            if (wandb := getattr(callback, "_wandb", None)) is not None and wandb.run is not None:
                wandb.finish()  # a run of another stage would go on in it

    def __getattr__(self, event: str) -> Callable[..., None]:
        if not event.startswith("on_"):
            raise AttributeError(event)
        return functools.partial(self._tell, event)

    def _tell(self, event: str, *args: Any, **kwargs: Any) -> None:
        if event == "on_train_end":
            self._at_end = functools.partial(self._tell_all, event, *args, **kwargs)
        else:
            self._tell_all(event, *args, **kwargs)

    def _tell_all(self, event: str, *args: Any, **kwargs: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, event)(*args, **kwargs)


def _nothing() -> None: ...


def _is_running(callback: TrainerCallback) -> bool:
    """True where the program that calls has a run of Weights & Biases already, such as a sweep's."""
    wandb = getattr(callback, "_wandb", None)
    return wandb is not None and wandb.run is not None


def _set_up(callback: Any, args: DistillConfig, state: TrainerState) -> None:
    try:
        callback.setup(args, state, None)
    except Exception as error:  # of the tracker's own kinds, and of its database's and its network's
        name = type(callback).__name__.removesuffix("Callback").lower()
        said = " ".join(str(error).split())[:500]
        raise ValueError(
            f"train.report_to: {name} could not be started ({type(error).__name__}: {said}). Correct its "
            "settings (environment variables, train.project, train.run_name), log in, or take it out of "
            "train.report_to."
        ) from None


def _make(args: DistillConfig) -> list[TrainerCallback]:
    try:
        kinds = transformers.integrations.get_reporting_integration_callbacks(args.report_to)
        return [kind() for kind in kinds]
    except (RuntimeError, ValueError, ImportError) as error:
        raise ValueError(f"train.report_to: {' '.join(str(error).split())}") from None
