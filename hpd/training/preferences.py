"""A stage of preference optimization (DPO) on the distilled student, by TRL's DPOTrainer."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import PrinterCallback
from transformers.trainer_utils import TrainOutput
from trl import DPOConfig, DPOTrainer
from trl.data_utils import is_conversational

from hpd.batch import uniforms
from hpd.config.load import Stage, is_push_key
from hpd.config.schema import DpoStageConfig
from hpd.data.preferences import load_preferences
from hpd.generation.rollouts import make_engine
from hpd.methods.prefixes import RolloutConfig
from hpd.models.load import load_model
from hpd.models.quantized import put_back, trained_data
from hpd.progress import Progress
from hpd.training.adapting import lora_of
from hpd.training.checkpoints import writing
from hpd.training.engines import check_launch
from hpd.training.folder import MetricsWriter, RunFolder
from hpd.training.inputs import input_fingerprints, rows_digest
from hpd.training.plan import Plan, plan
from hpd.training.resumable import Resumable
from hpd.training.single import evaluate_task, open_together
from hpd.training.slicing import refuse_slices
from hpd.training.stopping import Interrupted, Signals, ends_resumable

__all__ = ["check_pairs", "dpo_arguments", "preference_rows", "train_preferences"]


_LOGGER = logging.getLogger(__name__)


class _PreferenceTrainer(Resumable, DPOTrainer):
    """TRL's DPOTrainer with checkpoints that are complete or do not count."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, within `resuming`."""
        with self.resuming(resume_from_checkpoint) as checkpoint:
            return super().train(checkpoint, *args, **kwargs)
        return TrainOutput(self.state.global_step, float("nan"), {})


def train_preferences(stage: Stage, *, progress: Progress, takes_changed: bool = False) -> dict[str, Any]:
    """Run a DPO stage from its start (or last checkpoint) to its end; returns its summary.

    Raises:
        ValueError: rows without the columns that `dpo.pairs` asks for, or settings that DPOConfig does not
            have.
        RunStopped: as `hpd.training.run.train`.
    """
    with ends_resumable(Path(stage.recipe.output_dir)) as signals:
        return _train(stage, progress, signals, takes_changed)


def _train(stage: Stage, progress: Progress, signals: Signals, takes_changed: bool) -> dict[str, Any]:
    recipe, dpo = stage.recipe, stage.dpo
    assert dpo is not None
    planned = plan(recipe)
    # Preferences need no teacher.
    planned.close()
    refuse_slices(planned.args, "a stage of preferences (dpo)")
    check_launch(planned.args)
    folder = RunFolder(recipe, takes_changed=takes_changed)
    if int(os.environ.get("RANK", "0")) == 0:
        found = {k: v for k, v in input_fingerprints(planned).items() if not k.startswith("teacher")}
        if dpo.pairs == "data":
            found["pairs"] = rows_digest(load_preferences(recipe.data))
        folder.check_inputs(found)
    open_together(folder, planned.args)
    started = time.perf_counter()
    student = load_model(recipe.student, "student", planned.args.seed)
    rows = preference_rows(planned, student, dpo, stage.rollouts)
    trained = trained_data(student)
    trainer = _PreferenceTrainer(
        model=student,
        args=dpo_arguments(planned, dpo),
        train_dataset=rows,
        processing_class=planned.tokenizer,
        peft_config=lora_of(recipe),
        callbacks=[MetricsWriter(folder), *progress.callbacks()],
    )
    put_back(trainer.model, trained)
    trainer.remove_callback(PrinterCallback)
    before = time.perf_counter()
    with signals.stopping(trainer):
        trainer.train(resume_from_checkpoint=folder.checkpoint)
    if trainer.stop_reason is not None:
        raise Interrupted(trainer.stop_reason)
    summary: dict[str, Any] = {"method": "dpo", "train seconds": round(time.perf_counter() - before, 1)}
    with writing(folder.path):
        trainer.save_model()
    summary |= evaluate_task(
        planned, trainer.accelerator.unwrap_model(trainer.model), "student after", folder, progress
    )
    summary |= {"seconds": round(time.perf_counter() - started, 1), "steps": trainer.state.global_step}
    if trainer.is_world_process_zero():
        folder.write_card(summary)
        folder.write_json("summary.json", summary)
    return summary


def check_pairs(planned: Plan, dpo: DpoStageConfig) -> None:
    """Look at everything of a DPO stage that needs no model.

    Raises:
        ValueError: rows without the columns that `dpo.pairs` asks for, or as `dpo_arguments`.
    """
    dpo_arguments(planned, dpo)
    rows = planned.rows.train
    if dpo.pairs == "data":
        load_preferences(planned.recipe.data)
    elif not isinstance(rows, Dataset) or not {"prompt", "completion"} <= set(rows.column_names):
        raise ValueError(
            "dpo.pairs: rollouts needs rows with prompt and completion (no stream): give them, or pairs: "
            "data."
        )


def preference_rows(planned: Plan, student: Any, dpo: DpoStageConfig, rollouts: RolloutConfig) -> Dataset:
    """Rows of prompt, chosen and rejected: the dataset's own, or its completions against the student's."""
    if dpo.pairs == "data":
        return load_preferences(planned.recipe.data)
    check_pairs(planned, dpo)
    rows = cast(Dataset, planned.rows.train)
    args = planned.args
    if args.max_steps > 0:
        needed = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
        rows = rows.select(range(min(len(rows), needed)))
    listed = cast("list[dict[str, Any]]", list(rows))
    answers = _answers(planned, student, listed, rollouts)
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": answer}
        for row, answer in zip(listed, answers, strict=True)
        if answer is not None and _text(row["completion"]) != _text(answer)
    ]
    if cut := answers.count(None):
        # TRL, or the chat template, would put an end behind what has none, and training would dislike that.
        _LOGGER.warning(
            "dpo: %d of %d rollouts were cut at rollouts.max_new_tokens and make no pair.", cut, len(answers)
        )
    if not pairs:
        raise ValueError(
            f"There is nothing to prefer: of {len(answers)} rollouts of the student {cut} were cut at "
            "rollouts.max_new_tokens, and the others equal the dataset's completions. Take dpo.pairs: data, "
            "or a student that has learned to end its answers."
        )
    return Dataset.from_list(pairs)


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _answers(planned: Plan, student: Any, rows: list[dict[str, Any]], config: RolloutConfig) -> list[Any]:
    """The student's completion of every prompt, in the rows' own format; None where it did not end."""
    tokenizer: Any = planned.tokenizer
    chat = is_conversational(rows[0])
    if chat:
        encoded: Any = [
            tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
            for row in rows
        ]
    else:
        encoded = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    accelerator = Accelerator(cpu=planned.args.use_cpu)
    student.to(accelerator.device)
    engine = make_engine(config, lambda: student, student, accelerator, tokenizer, None)
    limit = config.max_new_tokens
    draws = uniforms(torch.arange(len(encoded)), seed=planned.args.seed, step=0, count=limit)
    written = engine.generate(encoded, [limit] * len(encoded), draws, 0)
    texts = [
        tokenizer.decode(rollout.tokens, skip_special_tokens=True) if rollout.ended else None
        for rollout in written
    ]
    if not chat:
        return texts
    return [None if text is None else [{"role": "assistant", "content": text}] for text in texts]


def dpo_arguments(planned: Plan, dpo: DpoStageConfig) -> DPOConfig:
    """Return `train` as far as DPOConfig knows it, and `dpo.args`.

    Raises:
        ValueError: `dpo.args` names a field that DPOConfig does not have, or has a value that it refuses.
    """
    known = {f.name for f in dataclasses.fields(DPOConfig) if f.init}
    if unknown := [key for key in dpo.args if key not in known]:
        close = get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"dpo.args.{unknown[0]} is not a field of TRL's DPOConfig{hint}")
    if pushes := [key for key in dpo.args if is_push_key(key)]:
        raise ValueError(f"dpo.args.{pushes[0]}: the run is pushed, not a stage: set train.push_to_hub.")
    given = [key for key in planned.recipe.train if key in known and not is_push_key(key)]
    shared = {key: getattr(planned.args, key) for key in given}
    fixed = {
        "output_dir": planned.recipe.output_dir,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": planned.args.bf16,
    }
    try:
        return DPOConfig(**{**fixed, **shared, "use_cpu": planned.args.use_cpu, **dpo.args})
    except (TypeError, ValueError) as error:
        raise ValueError(f"dpo.args: {' '.join(str(error).split())}") from None
