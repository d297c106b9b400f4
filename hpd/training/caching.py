"""`hpd cache`: ask the teacher once about every label position of a recipe's rows.

The rows are those that training would see, prepared by the same trainer. They are cut into shards before the
first forward, and the cut depends on the rows alone: any number of processes, killed at any moment and
started again, write the same shards.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor, nn

from hpd.batch import TokenBatch, as_teacher_reads
from hpd.config.schema import CacheConfig, Recipe
from hpd.data.rows import validation_sets
from hpd.data.stored_rollouts import without_rollouts
from hpd.files import write_atomically
from hpd.locks import empty_folder, entries, holding
from hpd.losses import Head, Scores, TeacherScores
from hpd.models.buildable import without_weights
from hpd.models.load import load_model, load_tokenizer
from hpd.progress import Progress
from hpd.teachers.cache import (
    ABOUT,
    FORMAT,
    HEAD,
    PLAN,
    TEACHER,
    Cache,
    CorruptCacheError,
    describe_shard,
    read_json,
    save_index,
    save_shard,
    write_json,
)
from hpd.teachers.fingerprints import (
    differences,
    own_prompt,
    teacher_fingerprint,
    tokenizer_fingerprint,
)
from hpd.teachers.model import ModelTeacher
from hpd.teachers.sources import described_by, load_teacher
from hpd.teachers.teacher import RoutedScores, Teacher
from hpd.training.checkpoints import writing
from hpd.training.plan import Plan, plan
from hpd.training.probing import settle
from hpd.training.shards import (
    Layout,
    TeacherAnswer,
    index_bytes,
    lay_out,
    position_bytes_of,
    size_text,
    stored_dtype,
    stored_tensors,
)
from hpd.training.trainer import DistillTrainer

__all__ = ["CacheSummary", "shards_of", "write_cache"]


class CacheSummary(NamedTuple):
    """Counts of what was written."""

    path: Path
    positions: int
    bytes_per_position: int
    shard_bytes: int
    """Of all shards together."""
    written: int
    """Positions that this call asked the teacher for; the others were there."""


def write_cache(recipe: Recipe, *, overwrite: bool = False, progress: Progress | None = None) -> CacheSummary:
    """Write the cache of a recipe, or what is missing of it; a finished one is verified.

    Args:
        recipe: with `cache:`; the teacher may be of any type.
        overwrite: delete another cache at that place first.

    Raises:
        FileNotFoundError, ValueError: as `hpd.training.plan.plan`; the folder holds something else; the disk
            cannot hold the cache; another process is writing it.
        CheckpointFailed: the disk takes no more; the shards before are kept.
    """
    config = _cache_config(recipe)
    with holding(Path(config.path)):
        return _write(recipe, config, overwrite, progress or Progress())


def _write(recipe: Recipe, config: CacheConfig, overwrite: bool, progress: Progress) -> CacheSummary:
    planned = plan(recipe)
    planned.require_sound()
    planned.say_warnings(progress)
    trainer = rows_trainer(planned)
    datasets: Any = [trainer.train_dataset, *validation_sets(trainer.eval_dataset).values()]
    rows = torch.utils.data.ConcatDataset(datasets)
    position_bytes = position_bytes_of(config, planned)
    layout = lay_out(
        trainer.data_collator.rows(itertools.chain.from_iterable(datasets)),
        max(1, config.shard_bytes // position_bytes),
    )
    folder, main = Path(config.path), trainer.is_world_process_zero()
    target = _target(planned, config, layout)
    if main:
        open_folder(folder, target, overwrite)
    trainer.accelerator.wait_for_everyone()
    verify_own_share(folder, target["shards"], trainer)
    trainer.accelerator.wait_for_everyone()
    todo = [
        number for number in range(target["shards"]) if not (folder / f"shard-{number:05d}.json").is_file()
    ]
    total = len(layout.keys)
    left = sum(int(mask.sum()) for number in todo for mask in (layout.masks[i] for i in layout.shard(number)))
    if main:
        index = index_bytes(total) if todo or not (folder / ABOUT).is_file() else 0
        head = 0 if (folder / HEAD).is_file() else _head_bytes(planned, config)
        needed = left * position_bytes + index + head
        check_disk(folder, needed, total * position_bytes)
        once = {"the index": index, "the teacher's head": head}
        progress.say(
            f"{total:,} label positions of {len(rows):,} rows, {position_bytes:,} bytes each: "
            f"{size_text(total * position_bytes)} in {target['shards']:,} shard{'s'[: target['shards'] - 1]}"
            + "".join(f", {name}: {size_text(size)}" for name, size in once.items() if size)
            + f"; {size_text(needed)} to write"
        )
    if todo or not (folder / ABOUT).is_file():
        _ask(trainer, planned, config, layout, rows, todo, total - left, progress)
        trainer.accelerator.wait_for_everyone()
        if main:
            _finish(folder, planned, layout, target)
        trainer.accelerator.wait_for_everyone()
    return CacheSummary(folder, total, position_bytes, total * position_bytes, left)


def shards_of(folder: Path) -> list[Path]:
    """Descriptions of a cache's finished shards."""
    return sorted(folder.glob("shard-*.json"))


def _cache_config(recipe: Recipe) -> CacheConfig:
    if recipe.cache is None:
        raise ValueError(
            "cache.path is missing: give a folder to write to, in the recipe or as cache.path=FOLDER."
        )
    if "://" in recipe.cache.path or Path(recipe.cache.path).is_file():
        raise ValueError(f"cache.path {recipe.cache.path!r} is not a folder: write to one, then copy it.")
    if recipe.data.streaming:
        raise ValueError(
            "A stream has no end that a cache could hold: set data.streaming to false for hpd cache."
        )
    if recipe.teacher.type == "server":
        raise ValueError(
            "hpd cache asks a teacher that it loads: run it where the model is, with teacher.type: model."
        )
    if recipe.teacher.type == "object":
        raise ValueError(
            "hpd cache asks models, and the teacher is an object of your own: train with it, or let it keep "
            "its answers itself."
        )
    if recipe.teacher.type == "routed":
        raise ValueError(
            "A cache has one teacher: write one for each, and route rows to teachers of type cached."
        )
    if recipe.teacher.type == "mixture" and recipe.cache.kind == "hidden":
        raise ValueError(
            "A mixture has no hidden state: cache its teachers and mix the caches, or choose cache.kind: "
            "top_k."
        )
    return recipe.cache


class _Nobody(Teacher):
    """Stands for the teacher while rows are prepared: its vocabulary is known, nothing is loaded."""

    def __init__(self, vocab: int):
        self.vocab = vocab

    def scores(self, inputs: dict[str, Any], batch: TokenBatch) -> TeacherScores:
        raise AssertionError("only rows are prepared here")


class _RowsTrainer(DistillTrainer):
    """Prepares rows as training does; its student has no weights and stays nowhere."""

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None: ...


def rows_trainer(planned: Plan) -> DistillTrainer:
    student = without_weights(planned.student_config)
    vocab = min(config.get_text_config().vocab_size for config in planned.teacher_configs.values())
    return _RowsTrainer(
        model=student,
        teacher=_Nobody(vocab),
        args=planned.args,
        train_dataset=without_rollouts(planned.rows.train),
        eval_dataset=planned.rows.validation,
        processing_class=planned.tokenizer,
        teacher_tokenizer=None if planned.other is None else planned.other.tokenizer,
    )


def _target(planned: Plan, config: CacheConfig, layout: Layout) -> dict[str, Any]:
    """The identity of this cache: kept in plan.json while it is written, and in cache.json."""
    recipe = planned.recipe
    teacher = recipe.student if recipe.teacher.type == "self" else recipe.teacher
    fingerprint = {
        "name": recipe.teacher.title,
        "data": recipe.data.path,
        "teacher": teacher_fingerprint(teacher),
        "rows": xxhash.xxh3_128_hexdigest(np.sort(layout.keys).tobytes()),
        **tokenizer_fingerprint(load_tokenizer(recipe.student, "student"), planned.args),
        **own_prompt(recipe.teacher),
        **({} if planned.other is None else {"train.vocabulary": "bytes"}),
    }
    return {
        "format": FORMAT,
        "kind": config.kind,
        "dtype": str(stored_dtype(config, planned)).removeprefix("torch."),
        "top_k": config.top_k,
        **({"draws": config.draws, "seed": config.seed} if config.kind == "sampled" else {}),
        "shard_bytes": config.shard_bytes,
        "shards": len(layout.starts) - 1,
        "positions": len(layout.keys),
        "date": planned.date and planned.date.isoformat(),
        "fingerprint": fingerprint,
    }


def open_folder(folder: Path, target: dict[str, Any], overwrite: bool) -> None:
    if found := entries(folder):
        if not (folder / PLAN).is_file() and not any(path.name.startswith(f".{PLAN}") for path in found):
            raise ValueError(f"{folder} is not empty and no cache of hpd: choose another cache.path.")
        if overwrite:
            empty_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Ours, and those that safetensors writes through.
    for draft in (path for path in entries(folder) if path.name.startswith(".") and path.is_file()):
        draft.unlink()
    if not (folder / PLAN).is_file():
        write_json(folder / PLAN, target)
        return
    try:
        there = read_json(folder / PLAN)
    except CorruptCacheError:
        raise ValueError(
            f"{folder / PLAN} is damaged, so nothing says what this cache is: delete it with --overwrite."
        ) from None
    flat = [{**content, **content["fingerprint"], "fingerprint": None} for content in (there, target)]
    changed = [name for name in differences(*flat) if not name.startswith(("name", "data"))]
    if changed:
        raise ValueError(
            f"{folder} holds a cache with another {', another '.join(changed)}. Choose another cache.path, "
            "or delete it with --overwrite."
        )


def verify_own_share(folder: Path, num_shards: int, trainer: DistillTrainer) -> None:
    """Each process reads its share of the finished shards; what is damaged goes, and is written again."""
    for number in range(trainer.args.process_index, num_shards, trainer.args.world_size):
        description = folder / f"shard-{number:05d}.json"
        if description.is_file() and describe_shard(folder, number) is None:
            description.unlink()
            (folder / ABOUT).unlink(missing_ok=True)
    if trainer.is_world_process_zero() and (folder / ABOUT).is_file():
        try:
            Cache(folder)
        except CorruptCacheError:
            (folder / ABOUT).unlink()


def _head_bytes(planned: Plan, config: CacheConfig) -> int:
    """Size of the output head, which a cache of hidden states keeps once."""
    if config.kind != "hidden":
        return 0
    text = next(iter(planned.teacher_configs.values())).get_text_config()
    return text.vocab_size * text.hidden_size * (4 if stored_dtype(config, planned) == torch.float32 else 2)


def check_disk(folder: Path, needed: int, total: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"The cache needs {size_text(needed)} more ({size_text(total)} of answers in all), and {folder} "
            f"has {size_text(free)} free. Choose a place with room, a narrower cache.dtype, cache.kind: "
            "top_k, or fewer rows (data.limit)."
        )


def _ask(
    trainer: DistillTrainer,
    planned: Plan,
    config: CacheConfig,
    layout: Layout,
    rows: Any,
    todo: list[int],
    done: int,
    progress: Progress,
) -> None:
    """Load the teacher and write this process's part of the missing shards."""
    teacher = _load(planned)
    teacher.prepare(trainer.model, trainer.accelerator)
    settle(teacher.probe(trainer.padding_free))
    folder, dtype = Path(config.path), stored_dtype(config, planned)
    world, rank = trainer.args.world_size, trainer.args.process_index
    # Weights sharded over processes are gathered by all of them together: each runs as many forwards as the
    # busiest.
    lockstep = any(
        getattr(trainer.accelerator.state, name, None) is not None
        for name in ("deepspeed_plugin", "fsdp_plugin")
    )
    first = _answers(teacher, trainer, layout, rows, range(1))
    if rank == 0:
        with writing(folder):
            _save_teacher(folder, planned, first, config)
    counted = done
    bar = progress.bar("label positions")
    for group in (todo[i : i + world] for i in range(0, len(todo), world)):
        mine = layout.shard(group[rank]) if rank < len(group) else range(0)
        parts: list[dict[str, Tensor]] = []
        for batch in _batches(
            mine, [layout.shard(n) for n in group], trainer.args.per_device_eval_batch_size, lockstep
        ):
            answer = _answers(teacher, trainer, layout, rows, batch or range(1))
            if batch:
                parts.append(stored_tensors(answer, config, dtype))
                counted += world * len(next(iter(parts[-1].values())))
                bar(min(counted, len(layout.keys)), len(layout.keys))
        if parts:
            whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            with writing(folder):
                save_shard(folder, group[rank], whole)
    bar(len(layout.keys), len(layout.keys))


def _load(planned: Plan) -> Teacher:
    if planned.recipe.teacher.type == "self":
        return ModelTeacher(load_model(planned.recipe.student, "student", planned.args.seed))
    return load_teacher(planned.recipe.teacher)


def _batches(mine: range, group: list[range], size: int, lockstep: bool) -> Iterator[range]:
    count = -(-max(map(len, group)) // size) if lockstep else -(-len(mine) // size)
    for i in range(count):
        yield mine[i * size : (i + 1) * size]


def _answers(
    teacher: Teacher, trainer: DistillTrainer, layout: Layout, rows: Any, chosen: range
) -> TeacherAnswer:
    """The teacher's answers at the stored positions of some rows."""
    collated = trainer.data_collator([rows[int(layout.rows[i])] for i in chosen])
    mask = torch.from_numpy(np.concatenate([layout.masks[i] for i in chosen]))
    inputs: Any = trainer._prepare_inputs(collated)
    inputs, batch = as_teacher_reads(inputs, TokenBatch.pop(inputs))
    assert len(mask) == len(batch.keys), "the collator keeps rows and their order"
    mask = mask.to(batch.keys.device)
    batch = batch.at(mask.nonzero().flatten())
    with torch.no_grad():
        scores = teacher.scores(inputs, batch)
    assert not isinstance(scores, RoutedScores), "a cache has one teacher"
    return TeacherAnswer(scores, batch.labels, batch.keys)


def _save_teacher(folder: Path, planned: Plan, answer: TeacherAnswer, config: CacheConfig) -> None:
    """Head, configuration and tokenizer: what training needs of the teacher beside its answers."""
    (source,) = list(described_by(planned.recipe).items())[:1]
    load_tokenizer(source[1], source[0]).save_pretrained(folder / TEACHER)
    planned.teacher_configs[source[0]].save_pretrained(folder / TEACHER)
    about: dict[str, Any] = {"vocab": answer.scores.vocab, "head": None}
    if config.kind == "hidden" and isinstance(answer.scores, Scores):
        head: Head = answer.scores.head
        tensors = {"weight": head.weight, "bias": head.bias}
        kept = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items() if t is not None}
        write_atomically(folder / HEAD, lambda draft: save_file(kept, draft))
        about["head"] = {"scale": head.scale, "softcap": head.softcap}
    write_json(folder / "teacher.json", about)


def _finish(folder: Path, planned: Plan, layout: Layout, target: dict[str, Any]) -> None:
    shards = [read_json(folder / f"shard-{number:05d}.json") for number in range(target["shards"])]
    about = {**target, **read_json(folder / "teacher.json")}
    about.pop("shards")
    with writing(folder):
        save_index(folder, layout.keys, shards, about)
