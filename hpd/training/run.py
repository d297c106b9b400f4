"""Runs in stages: each is a recipe of its own in a folder of its own, which starts from what the one before
left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from hpd.config.load import Stage, _handed_on, stage_recipes
from hpd.config.schema import Recipe
from hpd.data.rows import load_rows
from hpd.progress import Progress
from hpd.training.arguments import train_arguments
from hpd.training.folder import RunFolder
from hpd.training.plan import plan
from hpd.training.single import _run
from hpd.training.stopping import ends_resumable

if TYPE_CHECKING:
    from hpd.progress import Progress

__all__ = ["check_stages", "train", "train_stages"]


def _summary(stage: Stage) -> Path:
    """What says that a stage is finished."""
    return Path(stage.recipe.output_dir) / "summary.json"


def _hand_on(recipe: Recipe) -> None:
    target = _handed_on(recipe)
    if recipe.lora is None or (target / "config.json").is_file():
        return
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    AutoPeftModelForCausalLM.from_pretrained(recipe.output_dir).merge_and_unload().save_pretrained(target)  # type: ignore[operator]
    AutoTokenizer.from_pretrained(recipe.output_dir).save_pretrained(target)


def check_stages(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Check configurations, tokenizers and data of all these stages before the first of them trains or writes
    anything.

    A stage whose student (or teacher, under `teacher: previous`) is not there yet is looked at with the
    recipe's student, which has the same tokenizer and architecture. A teacher behind a server may be started
    later: of such a stage the rows are read.

    Raises:
        ValueError: as `hpd.training.plan.plan`, with the stage's name.
    """
    from hpd.data.rows import load_preferences
    from hpd.training.plan import plan
    from hpd.training.preferences import dpo_arguments

    for number, stage in enumerate(stages):
        try:
            if number and stage.recipe.teacher.type == "server":
                load_rows(stage.recipe.data, stage.recipe.teacher.column)
                continue
            planned = plan(_with_what_is_there(stage.recipe, recipe))
            if planned.served is not None:
                planned.served.close()
            planned.require_sound()
            if stage.dpo is not None:
                dpo_arguments(planned, stage.dpo)
                if stage.dpo.pairs == "data":
                    load_preferences(stage.recipe.data)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"stages: {stage.name}: {error}") from None


def _with_what_is_there(stage: Recipe, recipe: Recipe) -> Recipe:
    """A stage's recipe with the run's own student in the place of models that earlier stages will write."""
    run, own = Path(recipe.output_dir), recipe.student

    def is_to_come(model: str | None) -> bool:
        return (
            model is not None and run in Path(model).parents and not (Path(model) / "config.json").is_file()
        )

    if is_to_come(stage.student.model):
        stage = replace(stage, student=own)
    if is_to_come(stage.teacher.model):
        stage = replace(stage, teacher=replace(stage.teacher, model=own.model, tokenizer=own.tokenizer))
    return stage


def train_stages(
    recipe: Recipe, *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Run a recipe's stages in order; finished ones are skipped, an unfinished one goes on from its last
    checkpoint.

    Returns:
        The last stage's summary, with every stage's under `stages` and the seconds of all of them.

    Raises:
        ValueError: the folder holds another run, or this one, finished; or as `check_stages`.
    """

    from hpd.progress import Progress
    from hpd.training.folder import RunFolder
    from hpd.training.single import open_together

    progress = progress or Progress()
    stages = stage_recipes(recipe)
    folder = RunFolder(recipe, overwrite)
    done = set() if overwrite else {stage.name for stage in stages if _summary(stage).is_file()}
    check_stages(recipe, [stage for stage in stages if stage.name not in done])
    open_together(folder, train_arguments(recipe))
    processes = PartialState()
    summaries: dict[str, Any] = {}
    for stage in stages:
        if _summary(stage).is_file():
            progress.say(f"stage {stage.name}: finished already")
            summaries[stage.name] = json.loads(_summary(stage).read_text(encoding="utf-8"))
            continue
        progress.say(f"stage {stage.name}")
        for before in stages[: len(summaries)][-1:]:
            if processes.is_main_process:
                _hand_on(before.recipe)
            processes.wait_for_everyone()
        if stage.dpo is not None:
            from hpd.training.preferences import train_preferences

            summaries[stage.name] = train_preferences(stage.recipe, stage.dpo, progress=progress)
        else:
            # What the student and the teacher were before is in the first stage's summary already.
            summaries[stage.name] = train(stage.recipe, progress=progress, baselines=not summaries)
        if "stopped" in summaries[stage.name]:
            progress.say(
                f"stage {stage.name} was stopped ({summaries[stage.name]['stopped']}): later stages do not "
                "run"
            )
            break
    first, last = next(iter(summaries.values())), list(summaries.values())[-1]
    kept = {
        key: value
        for key, value in first.items()
        if key.endswith(" before") or key.startswith(("student before", "teacher"))
    }
    total = {
        **kept,
        **last,
        "stages": summaries,
        **{
            key: round(sum(s.get(key, 0.0) for s in summaries.values()), 1)
            for key in ("seconds", "train seconds")
        },
    }
    if len(summaries) == len(stages) and processes.is_main_process:
        folder.write_json("summary.json", total)
    return total


def train(
    recipe: Recipe, *, overwrite: bool = False, progress: Progress | None = None, baselines: bool = True
) -> dict[str, Any]:
    """Run a recipe from start (or its last checkpoint) to finish; one with stages, stage by stage.

    Args:
        recipe: what to run.
        overwrite: delete an existing run first.
        progress: what is told on the way.
        baselines: let teacher and untrained student do the task too.

    Returns:
        The summary that is also written to the run folder: losses and KLs before and after, accuracies,
        seconds.

    Raises:
        FileNotFoundError, ValueError: as `plan`; or the run folder belongs to something else.
        RunStopped: SIGTERM or Ctrl-C (caught in the main thread only), a remote teacher that stays away, a
            disk that takes no more, or NaN: the steps done are saved, and the message says how to go on.
    """
    with ends_resumable(Path(recipe.output_dir)) as signals:
        if recipe.stages:
            return train_stages(recipe, overwrite=overwrite, progress=progress)
        folder = RunFolder(recipe, overwrite)
        planned = plan(recipe)
        planned.require_sound()
        try:
            return _run(planned, folder, progress or Progress(), baselines, signals)
        finally:
            if planned.served is not None:
                planned.served.close()
