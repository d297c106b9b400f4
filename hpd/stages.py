"""Runs in stages: each is a recipe of its own in a folder of its own, which starts from what the one before left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hpd.config import Recipe, check_tree, resolve
from hpd.stage_config import DpoStageConfig, StageConfig

if TYPE_CHECKING:
    from hpd.train import Progress

__all__ = ["Stage", "check_stages", "stage_recipes", "train_stages"]

# Parts of a recipe that a stage changes key by key; the others it replaces.
_MERGED = ("rollouts", "guards", "data", "train", "eval", "method_kwargs")


class Stage(NamedTuple):
    """A stage, as a run of its own."""

    name: str
    recipe: Recipe
    dpo: DpoStageConfig | None


def stage_recipes(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, each resolved and checked.

    Raises:
        ValueError: two stages of one name, a stage that is no valid recipe (with its name), or a first stage without a teacher
            to follow.
    """
    base = resolve(replace(recipe, stages=()))
    stages, student = [], base["student"]
    for stage in recipe.stages:
        if stage.repeat < 1:
            raise ValueError(f"stages: {stage.name}: repeat must be >= 1, got {stage.repeat}.")
        for number in range(1, stage.repeat + 1):
            name = stage.name if stage.repeat == 1 else f"{stage.name}-{number}"
            tree = _changed(base, stage, student, bool(stages))
            tree["output_dir"] = str(Path(recipe.output_dir) / name)
            try:
                stages.append(Stage(name, check_tree(tree), stage.dpo))
            except ValueError as error:
                raise ValueError(f"stages: {name}: {error}") from None
            left = _handed_on(stages[-1].recipe)
            student = {**base["student"], "model": str(left), "init": "pretrained", "revision": None, "tokenizer": None}
    names = [stage.name for stage in stages]
    if double := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"stages: each needs a folder of its own, and {', '.join(double)} is named twice.")
    return stages


def _summary(stage: Stage) -> Path:
    """What says that a stage is finished."""
    return Path(stage.recipe.output_dir) / "summary.json"


def _handed_on(recipe: Recipe) -> Path:
    """Where the next stage finds a whole model: an adapter is merged into its base for it."""
    return Path(recipe.output_dir) / "merged" if recipe.lora else Path(recipe.output_dir)


def _hand_on(recipe: Recipe) -> None:
    target = _handed_on(recipe)
    if recipe.lora is None or (target / "config.json").is_file():
        return
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    AutoPeftModelForCausalLM.from_pretrained(recipe.output_dir).merge_and_unload().save_pretrained(target)  # type: ignore[operator]
    AutoTokenizer.from_pretrained(recipe.output_dir).save_pretrained(target)


def _changed(base: Mapping[str, Any], stage: StageConfig, student: Mapping[str, Any], has_previous: bool) -> dict[str, Any]:
    """The recipe's tree with a stage's changes and the student that it starts from."""
    tree = {**base, "student": dict(student)}
    if stage.method is not None or stage.terms is not None:
        # Another method brings its own regime and parameters.
        tree |= {"method": None, "terms": (), "method_kwargs": {}, "prefixes": None, "rollouts": None, "strategy": None}
    for key in ("method", "terms", "prefixes", "strategy", *_MERGED):
        change = getattr(stage, key)
        if change is None:
            continue
        old = tree.get(key)
        tree[key] = {**old, **change} if key in _MERGED and isinstance(old, Mapping) and isinstance(change, Mapping) else change
    if stage.teacher == "previous":
        if not has_previous:
            raise ValueError(f"stages: {stage.name}: there is no stage before the first: teacher: previous needs one.")
        tree["teacher"] = {"type": "model", "model": student["model"], "tokenizer": student["tokenizer"]}
    elif stage.teacher is not None:
        tree["teacher"] = stage.teacher
    return tree


def check_stages(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Check configurations, tokenizers and data of all these stages before the first of them trains or writes anything.

    A stage whose student (or teacher, under `teacher: previous`) is not there yet is looked at with the recipe's student, which
    has the same tokenizer and architecture. A teacher behind a server may be started later: of such a stage the rows are read.

    Raises:
        ValueError: as `hpd.train.plan`, with the stage's name.
    """
    from hpd.data import load_preferences, load_rows
    from hpd.preferences import dpo_arguments
    from hpd.train import plan

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
        return model is not None and run in Path(model).parents and not (Path(model) / "config.json").is_file()

    if is_to_come(stage.student.model):
        stage = replace(stage, student=own)
    if is_to_come(stage.teacher.model):
        stage = replace(stage, teacher=replace(stage.teacher, model=own.model, tokenizer=own.tokenizer))
    return stage


def train_stages(recipe: Recipe, *, overwrite: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Run a recipe's stages in order; finished ones are skipped, an unfinished one goes on from its last checkpoint.

    Returns:
        The last stage's summary, with every stage's under `stages` and the seconds of all of them.

    Raises:
        ValueError: the folder holds another run, or this one, finished; or as `check_stages`.
    """
    from accelerate import PartialState

    from hpd.config import train_arguments
    from hpd.runs import RunFolder
    from hpd.train import Progress, open_together, train

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
            from hpd.preferences import train_preferences

            summaries[stage.name] = train_preferences(stage.recipe, stage.dpo, progress=progress)
        else:
            # What the student and the teacher were before is in the first stage's summary already.
            summaries[stage.name] = train(stage.recipe, progress=progress, baselines=not summaries)
        if "stopped" in summaries[stage.name]:
            progress.say(f"stage {stage.name} was stopped ({summaries[stage.name]['stopped']}): later stages do not run")
            break
    first, last = next(iter(summaries.values())), list(summaries.values())[-1]
    kept = {
        key: value for key, value in first.items() if key.endswith(" before") or key.startswith(("student before", "teacher"))
    }
    total = {
        **kept, **last, "stages": summaries,
        **{key: round(sum(s.get(key, 0.0) for s in summaries.values()), 1) for key in ("seconds", "train seconds")},
    }  # fmt: skip
    if len(summaries) == len(stages) and processes.is_main_process:
        folder.write_json("summary.json", total)
    return total
