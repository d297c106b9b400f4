"""Runs: of one recipe, or of its stages, each of which starts from what the one before left."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from hpd.config.load import Stage, handed_on, stage_recipes
from hpd.config.schema import Recipe
from hpd.data.rows import load_rows
from hpd.data.teacher_prompts import TeacherContext
from hpd.data.weighed import weight_column
from hpd.locks import holding
from hpd.methods.table import name_terms
from hpd.models.export import write_merged
from hpd.progress import Progress, quiet_libraries
from hpd.training.arguments import check_names, train_arguments
from hpd.training.checkpoints import check_processes, newest_complete, writing
from hpd.training.dates import DATE
from hpd.training.folder import RunFolder
from hpd.training.hub import PushFailed, opened, push_asked, push_run, run_card
from hpd.training.inputs import row_fingerprints, stage_fingerprints
from hpd.training.plan import plan
from hpd.training.preferences import check_pairs, train_preferences
from hpd.training.single import open_together, train_single
from hpd.training.stopping import ends_resumable

__all__ = ["check_stages", "train", "train_stages"]


def train(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    baselines: bool = True,
    takes_changed: bool = False,
) -> dict[str, Any]:
    """Run a recipe from its start (or last checkpoint) to its end; one with stages, stage by stage.

    Args:
        recipe: what to run.
        overwrite: delete an existing run first.
        progress: told on the way.
        baselines: let teacher and untrained student do the task too.
        takes_changed: go on although data, teacher or tokenizer are others than at the run's start.

    Returns:
        The summary that is also written to the run folder: losses and KLs before and after, accuracies,
        seconds.

    Raises:
        FileNotFoundError, ValueError: as `plan`; or the run folder belongs to something else, or another
            process is writing there.
        PushFailed: the run is finished, and `train.push_to_hub` was not possible.
        RunStopped: SIGTERM or Ctrl-C (caught in the main thread only), a remote teacher that stays away, a
            disk that takes no more, or NaN: the steps done are saved, and the message says how to go on.
    """
    run = Path(recipe.output_dir)
    if run.is_file():
        raise ValueError(f"output_dir {str(run)!r} is a file: give a folder.")
    progress = progress or Progress()
    with ends_resumable(run) as signals, holding(run):
        quiet_libraries()  # the checks of a folder make settings, of which transformers has something to say
        if recipe.stages:
            summary = train_stages(
                recipe, overwrite=overwrite, progress=progress, takes_changed=takes_changed
            )
        else:
            # A key that does not exist makes another recipe of any run that the folder holds.
            check_names(recipe)
            folder = RunFolder(recipe, overwrite, takes_changed)
            with contextlib.closing(plan(recipe, fresh=overwrite)) as planned:
                planned.require_sound()
                planned.say_warnings(progress)
                _open_hub(recipe)
                summary = train_single(planned, folder, progress, baselines, signals)
    # Outside, since what ends it now is no reason to train again.
    _push(recipe, summary, progress)
    return summary


def _open_hub(recipe: Recipe) -> None:
    """Try now what would fail when the student is finished."""
    pushed = push_asked(recipe)
    if pushed is not None and _is_main():
        opened(pushed)


def _push(recipe: Recipe, summary: Mapping[str, Any], progress: Progress) -> None:
    """Send the finished student to the Hub, where the recipe asks for it."""
    pushed = push_asked(recipe)
    if pushed is None or not _is_main():
        return
    last = stage_recipes(recipe)[-1].recipe if recipe.stages else recipe
    folder = Path(last.output_dir)
    by_hand = f"hpd export {folder} --push-to-hub {pushed.repo}"
    if "stopped" in summary:
        progress.say(f"not pushed to the Hub, since training was stopped; to push it: {by_hand}")
        return
    progress.say(f"pushing the student to the Hub as {pushed.repo}")
    try:
        pushed = opened(pushed)
        address = push_run(folder, pushed, run_card(folder, pushed.repo))
    except (ValueError, OSError) as error:
        text = f"The run is finished and its student is in {folder}, and only the push failed. {error}"
        raise PushFailed(f"{text} To push it: {by_hand}", summary) from error
    progress.say(f"pushed to {address}")


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def train_stages(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    takes_changed: bool = False,
) -> dict[str, Any]:
    """Run a recipe's stages in order; finished ones are skipped, an unfinished one is resumed.

    Returns:
        The last stage's summary, with every stage's under `stages` and the seconds of all of them.

    Raises:
        ValueError: the folder holds another run, or this one, finished; or as `check_stages`.
    """
    progress = progress or Progress()
    stages = stage_recipes(recipe)
    for stage in stages:
        check_names(stage.recipe)
    folder = RunFolder(recipe, overwrite, takes_changed)
    done = set() if overwrite else {stage.name for stage in stages if _summary(stage).is_file()}
    # An input may change between two stages, too.
    found = check_stages(recipe, [stage for stage in stages if stage.name not in done])
    if _is_main():
        folder.check_inputs(found)
    _open_hub(recipe)
    args = train_arguments(recipe)
    assert args.device is not None  # asking for it joins the processes
    for stage in stages:
        if not overwrite:
            check_processes(newest_complete(Path(stage.recipe.output_dir), quiet=True), args.world_size)
    open_together(folder, args)
    processes = PartialState()
    if processes.is_main_process and not (folder.path / DATE).is_file():
        folder.write_json(DATE, {"date": datetime.date.today().isoformat()})
    processes.wait_for_everyone()
    summaries: dict[str, dict[str, Any]] = {}
    for stage, previous in zip(stages, (None, *stages), strict=False):
        if _summary(stage).is_file():
            progress.say(f"stage {stage.name}: finished already")
            summaries[stage.name] = json.loads(_summary(stage).read_text(encoding="utf-8"))
            continue
        progress.say(f"stage {stage.name}")
        if previous is not None:
            if processes.is_main_process:
                _hand_on(previous.recipe)
            processes.wait_for_everyone()
        summary = summaries[stage.name] = _train_stage(
            stage, progress, is_first=previous is None, takes_changed=takes_changed
        )
        if "stopped" in summary:
            progress.say(f"stage {stage.name} was stopped ({summary['stopped']}): later stages do not run")
            break
    total = _total(summaries)
    if len(summaries) == len(stages) and processes.is_main_process:
        folder.write_json("summary.json", total)
    return total


def _summary(stage: Stage) -> Path:
    """The file that says that a stage is finished."""
    return Path(stage.recipe.output_dir) / "summary.json"


def _hand_on(recipe: Recipe) -> None:
    """Merge a stage's adapter into its base, for the next stage."""
    target = handed_on(recipe)
    if recipe.lora is None or (target / "config.json").is_file():
        return
    for half in (target, *target.parent.glob(f".{target.name}.*.part")):  # which a kill left
        shutil.rmtree(half, ignore_errors=True)
    adapter = replace(
        recipe.student,
        model=recipe.output_dir,
        init="pretrained",
        tokenizer=None,
        revision=None,
        quantization=None,  # the sum is taken with whole weights
    )
    with writing(target):
        write_merged(adapter, target, recipe.student.dtype)


def _train_stage(stage: Stage, progress: Progress, *, is_first: bool, takes_changed: bool) -> dict[str, Any]:
    if stage.dpo is not None:
        return train_preferences(stage, progress=progress, takes_changed=takes_changed)
    # The first stage's summary says what the student and the teacher were before.
    return train(stage.recipe, progress=progress, baselines=is_first, takes_changed=takes_changed)


def _total(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The summary of a run of these stages."""
    listed = list(summaries.values())
    kept = {
        key: value
        for key, value in listed[0].items()
        if key.endswith(" before") or key.startswith(("student before", "teacher"))
    }
    seconds = {
        key: round(sum(summary.get(key, 0.0) for summary in listed), 1)
        for key in ("seconds", "train seconds")
    }
    return {**kept, **listed[-1], "stages": dict(summaries), **seconds}


def check_stages(recipe: Recipe, stages: Sequence[Stage]) -> dict[str, str]:
    """Check configurations, tokenizers and data of all these stages before the first of them trains or writes
    anything.

    A stage whose student (or teacher, under `teacher: previous`) is not there yet is looked at with the
    recipe's student, which has the same tokenizer and architecture. A teacher behind a server may be started
    later: of such a stage the rows are read.

    Returns:
        Fingerprints of the inputs that do not come from other stages, by name and stage.

    Raises:
        ValueError: as `hpd.training.plan.plan`, with the stage's name.
    """
    found: dict[str, str] = {}
    for number, stage in enumerate(stages):
        try:
            if number and stage.recipe.teacher.type == "server":
                prompts = stage.recipe.choose_regime().needs_prompts_only
                teacher = stage.recipe.teacher
                rows = load_rows(
                    stage.recipe.data,
                    teacher.column,
                    TeacherContext.of(teacher),
                    weight=weight_column(name_terms(stage.recipe.choose_terms())),
                    stored=stage.recipe.choose_regime().prefixes.stored,
                    prompts=prompts,
                )
                found |= _of_stage(stage, row_fingerprints(rows, stage.recipe.data))
                continue
            planned = plan(_with_what_is_there(stage.recipe, recipe))
            planned.close()
            planned.require_sound()
            found |= _of_stage(stage, stage_fingerprints(planned, stage.recipe))
            if stage.dpo is not None:
                check_pairs(planned, stage.dpo)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"stages: {stage.name}: {error}") from None
    return found


def _of_stage(stage: Stage, found: Mapping[str, str]) -> dict[str, str]:
    return {f"{name} of stage {stage.name}": digest for name, digest in found.items()}


def _with_what_is_there(stage: Recipe, recipe: Recipe) -> Recipe:
    """A stage's recipe with the run's own student in the place of models that earlier stages will write."""
    run = Path(recipe.output_dir)
    student = recipe.student
    if _is_to_come(stage.student.model, run):
        stage = replace(stage, student=student)
    if _is_to_come(stage.teacher.model, run):
        teacher = replace(
            stage.teacher, model=student.model, tokenizer=student.tokenizer, revision=student.revision
        )
        stage = replace(stage, teacher=teacher)
    return stage


def _is_to_come(model: str | None, run: Path) -> bool:
    """True if a stage of the run in this folder will write the model."""
    return model is not None and run in Path(model).parents and not (Path(model) / "config.json").is_file()
