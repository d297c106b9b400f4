"""The run folder, which is all that reports read: recipe, versions, metrics, checkpoints, model card."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

from hpd import __version__
from hpd.config.check import resolve
from hpd.config.schema import Recipe
from hpd.config.yaml_file import read_yaml
from hpd.files import JsonLines, write_atomically, write_json
from hpd.locks import empty_folder, entries
from hpd.methods.names import with_new_names
from hpd.training.arguments import train_arguments
from hpd.training.card import card_of
from hpd.training.changes import Change, changes_between, raises_steps, refused
from hpd.training.checkpoints import check_processes, check_readable, newest_complete, step_of
from hpd.training.inputs import changed_inputs

__all__ = ["MetricsWriter", "RunFolder", "environment"]

# Keys that an error names.
_NAMED = 5

_PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets")


class RunFolder:
    """A folder that belongs to one recipe.

    Args:
        recipe: what the run is; a folder that holds another recipe is refused (`hpd.training.changes`).
        overwrite: delete an existing run first.
        takes_changed: go on although data, teacher or tokenizer are others now than at the run's start.

    Raises:
        ValueError: the folder holds something else, or a finished run without more steps to do.
        CheckpointUnreadable: a file of the checkpoint that it would go on from is damaged.
    """

    def __init__(self, recipe: Recipe, overwrite: bool = False, takes_changed: bool = False):
        self.path = Path(recipe.output_dir)
        self.recipe = recipe
        self._replaces = False
        self._takes_changed = takes_changed
        self._changes: list[Change] = []
        self._inputs: dict[str, str] = {}
        self._check(overwrite)

    @property
    def checkpoint(self) -> str | None:
        """The newest complete checkpoint, to resume from."""
        found = None if self._replaces else newest_complete(self.path)
        return None if found is None else str(found)

    def check_processes(self, now: int) -> None:
        """Refuse a launch of `now` processes, where the newest checkpoint was written by more or fewer.

        Raises:
            ValueError: it was.
        """
        if not self._replaces:
            check_processes(newest_complete(self.path, quiet=True), now)

    def _check(self, overwrite: bool) -> None:
        # A kill may have come before the first file was whole.
        if all(file.name.endswith(".part") for file in entries(self.path)):
            return
        recipe_file = self.path / "recipe.yaml"
        if not recipe_file.is_file():
            raise ValueError(f"{self.path} is not empty, and not a run of hpd: choose another output_dir.")
        if overwrite:
            self._replaces = True
            return
        # Also where the run began with an earlier version, or its recipe has an earlier name.
        before, now = with_new_names(read_yaml(recipe_file)), with_new_names(_comparable(self.recipe))
        self._changes = changes_between(before, now)
        self._check_changes(before, now)
        newest = newest_complete(self.path, quiet=True)
        if self._is_finished:
            self._check_more(raises_steps(before, now), newest)
        if newest is not None:
            check_readable(newest)

    @property
    def _is_finished(self) -> bool:
        return (self.path / "summary.json").is_file()

    def _check_changes(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        """Refuse another recipe; one that only goes further, or looks at the run differently, is the same."""
        # Stages that are finished are not taken further by a change of the recipe around them.
        others = refused(self._changes, before, now, may_raise=not self.recipe.stages)
        if not others:
            return
        train_arguments(self.recipe)  # a misspelled key is that before it is another recipe
        listed = "; ".join(map(str, others[:_NAMED])) + ("; ..." if others[_NAMED:] else "")
        raise ValueError(
            f"{self.path} holds a run of another recipe ({listed}; before -> now). Choose another output_dir "
            "for this one, or continue with the run's own recipe, in which only guards, logging and saving "
            "may change and train.max_steps or train.num_train_epochs grow. (--overwrite deletes the run.)"
        )

    def _check_more(self, is_longer: bool, newest: Path | None) -> None:
        """Refuse a finished run, unless there are more steps to do and a checkpoint to do them from."""
        if not is_longer:
            more = (
                ""
                if self.recipe.stages
                else "Continue with more steps or epochs (larger train.max_steps or train.num_train_epochs), "
            )
            other = "choose another output_dir, or repeat it with --overwrite."
            raise ValueError(f"{self.path} holds this run, finished. {more or 'To repeat it, '}{other}")
        if newest is None:
            raise ValueError(
                f"{self.path} holds this run, finished, and no checkpoint to do more steps from "
                "(train.save_strategy says what is kept). Start another run from its student (student: "
                f"{self.path}, another output_dir), whose optimizer and learning rate begin again, or repeat "
                "this one with --overwrite."
            )

    def open(self) -> None:
        """Write what the run is, before its first step; a run that `overwrite` gave up is deleted now.

        Of several processes the main one calls this, after all have made their check.

        Raises:
            OSError: the folder cannot be written.
        """
        if self._replaces:
            empty_folder(self.path)
            self._replaces = False
        text = yaml.safe_dump(_comparable(self.recipe), sort_keys=False, allow_unicode=True)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for draft in self.path.glob(".*.part"):  # of a process that was killed
                draft.unlink()
            # First: a run that a kill ends before its new recipe is there is unfinished under the old one.
            (self.path / "summary.json").unlink(missing_ok=True)
            if self._changes:
                self._note_changes()
            write_atomically(self.path / "recipe.yaml", text)
            if self._inputs:
                self.write_json("inputs.json", self._inputs)
            self.write_json("environment.json", environment())
        except OSError as error:
            raise OSError(
                f"The run folder {self.path} cannot be written: {error.strerror}. Make it writable, make "
                "space, or choose another output_dir."
            ) from error

    def check_inputs(self, found: dict[str, str]) -> None:
        """Compare what the run reads now with what it read when it began; `open` notes it.

        Args:
            found: by `input_fingerprints`.

        Raises:
            ValueError: an input is another, and nobody allowed that.
        """
        file = self.path / "inputs.json"
        before = {} if self._replaces or not file.is_file() else _read_object(file, "it is written again")
        self._inputs = {**before, **found}
        changed = changed_inputs(before, found)
        if changed and not self._takes_changed:
            raise ValueError(
                f"{self.path} began with other data than there is now: its {' and '.join(changed)} changed, "
                "though the recipe names the same. Put back what was there, or choose another output_dir. To "
                "continue with what is there now, add --changed-inputs, which is noted in changes.jsonl."
            )
        self._changes += [Change(name, before[name], found[name]) for name in changed]

    def _note_changes(self) -> None:
        checkpoint = newest_complete(self.path, quiet=True)
        step = 0 if checkpoint is None else step_of(checkpoint)
        changed = {change.key: [change.old, change.new] for change in self._changes}
        JsonLines(self.path / "changes.jsonl").append({"step": step, "changed": changed, "time": _now()})
        self._changes = []

    def baselines(self) -> dict[str, Any] | None:
        """Return what was measured before the first step, if it was measured to the end.

        Raises:
            ValueError: the file of it is damaged.
        """
        file = self.path / "baselines.json"
        return _read_object(file, "it is measured again") if file.is_file() else None

    def opened_elsewhere(self) -> None:
        """Take note that the main process has called `open`."""
        self._replaces = False

    def keep_teacher(self, fingerprint: str | None) -> None:
        """Note which weights a remote teacher has, or compare them with those of the run's start.

        Raises:
            ValueError: a resumed run would go on with another teacher.
        """
        file = self.path / "teacher.json"
        if fingerprint is None:
            return
        before = _read_object(file, "it is written again")["fingerprint"] if file.is_file() else fingerprint
        if before != fingerprint:
            if not self._takes_changed:
                raise ValueError(
                    f"This run began with the teacher {before}, and the server now answers with "
                    f"{fingerprint}: start the first one again, or choose another output_dir. To continue "
                    "with this one, add --changed-inputs, which is noted in changes.jsonl."
                )
            self._changes.append(Change("teacher", before, fingerprint))
            self._note_changes()
        self.write_json("teacher.json", {"fingerprint": fingerprint})

    def write_json(self, name: str, content: Any) -> None:
        """Write a file whole or not at all."""
        write_json(self.path / name, content)

    def write_card(self, summary: dict[str, Any]) -> None:
        """Write the model card of the trained student, with the recipe that made it."""
        recipe = (self.path / "recipe.yaml").read_text(encoding="utf-8")
        text = card_of(self.recipe, self.path.name, summary, recipe).text()
        write_atomically(self.path / "README.md", text)


def _read_object(file: Path, otherwise: str) -> dict[str, Any]:
    """A JSON object of the run folder; `otherwise` says what happens without the file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, and {otherwise}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged (not a JSON object): delete it, and {otherwise}.")
    return found


def _comparable(recipe: Recipe) -> dict[str, Any]:
    return json.loads(json.dumps(resolve(recipe)))


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they change results."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "hpd": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": packages,
        "started": _now(),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _git_commit() -> str | None:
    """The commit of the checkout that hpd runs from; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


class MetricsWriter(TrainerCallback):
    """Appends every log to metrics.jsonl; a resumed run begins with the lines that its checkpoint remembers,
    and no others."""

    def __init__(self, folder: RunFolder):
        self._lines = JsonLines(folder.path / "metrics.jsonl")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._lines.write(_line(log["step"], log) for log in state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            self._lines.append(_line(state.global_step, logs))


def _line(step: int, logs: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": step, **{key: value for key, value in logs.items() if key != "step"}}
