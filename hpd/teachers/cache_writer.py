"""`hpd cache`: ask the teacher once about every label position of a recipe's rows.

The rows are those that training would see, prepared by the same trainer. They are cut into shards before the first forward, and
the cut depends on the rows alone: any number of processes, killed at any moment and started again, write the same shards.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hpd.batch import TokenBatch
from hpd.config import CacheConfig, Recipe
from hpd.losses import Head, Scores, TeacherScores, TopKScores
from hpd.losses.products import for_products, project_
from hpd.models import load_model, load_tokenizer
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
    write_atomically,
    write_json,
)
from hpd.teachers.cached import stored_hidden
from hpd.teachers.fingerprint import differences, teacher_fingerprint, tokenizer_fingerprint
from hpd.teachers.model import ModelTeacher, Teacher
from hpd.teachers.sources import described_by, load_teacher
from hpd.train import Plan, plan
from hpd.trainer import DistillTrainer

__all__ = ["CacheProgress", "CacheSummary", "write_cache"]

_CHUNK_BYTES = 64 * 2**20
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


class CacheSummary(NamedTuple):
    """What was written."""

    path: Path
    positions: int
    bytes_per_position: int
    shard_bytes: int
    """Of all shards together."""
    written: int
    """Positions that this call asked the teacher for; the others were there."""


class CacheProgress:
    """What the command line shows; silent unless overridden."""

    def say(self, text: str) -> None: ...

    def update(self, done: int, total: int) -> None: ...


class _Layout(NamedTuple):
    """Which rows and positions go where."""

    rows: npt.NDArray[np.int64]
    """Numbers of the rows with something new, shard after shard."""
    starts: npt.NDArray[np.int64]
    """Where in `rows` each shard starts, and the end."""
    masks: list[npt.NDArray[np.bool_]]
    """Of each row in `rows`: which of its label positions are stored (one seen before is not)."""
    keys: npt.NDArray[np.int64]
    """Of all stored positions, in the order of `rows`."""

    def shard(self, number: int) -> range:
        return range(int(self.starts[number]), int(self.starts[number + 1]))


def write_cache(recipe: Recipe, *, overwrite: bool = False, progress: CacheProgress | None = None) -> CacheSummary:
    """Write the cache of a recipe, or what is missing of it; a finished one is verified.

    Args:
        recipe: with `cache:`; the teacher may be of any type.
        overwrite: delete another cache at that place first.

    Raises:
        FileNotFoundError, ValueError: as `hpd.train.plan`; the folder holds something else; the disk cannot hold the cache.
    """
    progress = progress or CacheProgress()
    config = _cache_config(recipe)
    planned = plan(recipe)
    planned.require_sound()
    trainer = _rows_trainer(planned)
    datasets = [rows for rows in (trainer.train_dataset, trainer.eval_dataset) if rows is not None]
    rows = torch.utils.data.ConcatDataset(datasets)
    position_bytes = _position_bytes(config, planned)
    layout = _lay_out(trainer.data_collator.rows(itertools.chain.from_iterable(datasets)), max(1, config.shard_bytes // position_bytes))
    folder, main = Path(config.path), trainer.is_world_process_zero()
    target = _target(planned, config, layout)
    if main:
        _open_folder(folder, target, overwrite)
    trainer.accelerator.wait_for_everyone()
    _verify_own_share(folder, target["shards"], trainer)
    trainer.accelerator.wait_for_everyone()
    todo = [number for number in range(target["shards"]) if not (folder / f"shard-{number:05d}.json").is_file()]
    total = len(layout.keys)
    left = sum(int(mask.sum()) for number in todo for mask in (layout.masks[i] for i in layout.shard(number)))
    if main:
        _check_disk(folder, left * position_bytes, total * position_bytes, planned, config)
        progress.say(
            f"{total:,} label positions of {len(rows):,} rows, {position_bytes:,} bytes each: {_size(total * position_bytes)} in "
            f"{target['shards']} shards; {_size(left * position_bytes)} to write"
        )
    if todo or not (folder / ABOUT).is_file():
        _ask(trainer, planned, config, layout, rows, todo, total - left, progress)
        trainer.accelerator.wait_for_everyone()
        if main:
            _finish(folder, planned, layout, target)
        trainer.accelerator.wait_for_everyone()
    return CacheSummary(folder, total, position_bytes, total * position_bytes, left)


def _cache_config(recipe: Recipe) -> CacheConfig:
    if recipe.cache is None:
        raise ValueError("cache.path is missing: give a folder to write to, in the recipe or as cache.path=FOLDER.")
    if recipe.data.streaming:
        raise ValueError("A stream has no end that a cache could hold: set data.streaming to false for hpd cache.")
    if recipe.teacher.type == "routed":
        raise ValueError("A cache has one teacher: write one for each, and route rows to teachers of type cached.")
    if recipe.teacher.type == "mixture" and recipe.cache.kind == "hidden":
        raise ValueError("A mixture has no hidden state: cache its teachers and mix the caches, or choose cache.kind: top_k.")
    return recipe.cache


class _Nobody:
    """Stands for the teacher while rows are prepared: its vocabulary is known, nothing is loaded."""

    def __init__(self, vocab: int):
        self.vocab = vocab

    def prepare(self, student: nn.Module, accelerator: Any) -> None: ...

    def scores(self, inputs: dict[str, Any], batch: TokenBatch) -> TeacherScores:
        raise AssertionError("only rows are prepared here")


class _RowsTrainer(DistillTrainer):
    """Prepares rows as training does; its student has no weights and stays nowhere."""

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None: ...


def _rows_trainer(planned: Plan) -> DistillTrainer:
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(planned.student_config)
    vocab = min(config.get_text_config().vocab_size for config in planned.teacher_configs.values())
    return _RowsTrainer(
        model=student, teacher=_Nobody(vocab), terms=planned.recipe.choose_terms(), args=planned.args,
        train_dataset=planned.rows.train, eval_dataset=planned.rows.validation, processing_class=planned.tokenizer,
    )  # fmt: skip


def _lay_out(rows: Iterator[tuple[Any, TokenBatch]], shard_positions: int) -> _Layout:
    keys, lengths = [], []
    for row, batch in rows:
        keys.append(batch.keys.numpy())
        lengths.append(len(row["input_ids"]))
    ends = np.cumsum([len(k) for k in keys])
    if not len(ends) or not ends[-1]:
        raise ValueError("Every label is masked: no row keeps a completion token within train.max_length.")
    everything = np.concatenate(keys)
    new = np.zeros(len(everything), dtype=bool)
    new[np.unique(everything, return_index=True)[1]] = True
    masks = np.split(new, ends[:-1])
    counts = np.array([mask.sum() for mask in masks])
    # A row lies in one shard whole: the one in which its first position falls.
    number = (np.cumsum(counts) - counts) // shard_positions
    # Rows of a length beside each other, or half of every batch would be padding.
    order = np.lexsort((lengths, number))
    order = order[counts[order] > 0]
    starts = np.concatenate([[0], np.flatnonzero(np.diff(number[order])) + 1, [len(order)]])
    chosen = [masks[i] for i in order]
    return _Layout(order, starts, chosen, np.concatenate([keys[i][mask] for i, mask in zip(order, chosen, strict=True)]))


def _position_bytes(config: CacheConfig, planned: Plan) -> int:
    dtype = _stored_dtype(config, planned)
    if config.kind == "top_k":
        return int(config.top_k or 0) * (4 + dtype.itemsize) + 4
    width = next(iter(planned.teacher_configs.values())).get_text_config().hidden_size
    return width * dtype.itemsize + 4 + (4 if dtype == torch.int8 else 0)


def _stored_dtype(config: CacheConfig, planned: Plan) -> torch.dtype:
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    teacher = planned.recipe.teacher
    if config.kind == "top_k":
        return torch.float32
    if teacher.quantization:
        return torch.bfloat16
    if teacher.type == "model" and teacher.dtype != "auto":
        return _DTYPES[teacher.dtype]
    if teacher.type == "self":
        return _DTYPES.get(planned.recipe.student.dtype, torch.float32)
    return getattr(next(iter(planned.teacher_configs.values())), "dtype", None) or torch.float32


def _target(planned: Plan, config: CacheConfig, layout: _Layout) -> dict[str, Any]:
    """What this cache is: kept in plan.json while it is written, and in cache.json."""
    recipe = planned.recipe
    teacher = recipe.student if recipe.teacher.type == "self" else recipe.teacher
    fingerprint = {
        "name": recipe.teacher.title, "data": recipe.data.path, "teacher": teacher_fingerprint(teacher),
        "rows": xxhash.xxh3_128_hexdigest(np.sort(layout.keys).tobytes()),
        **tokenizer_fingerprint(load_tokenizer(recipe.student, "student"), planned.args),
    }  # fmt: skip
    return {
        "format": FORMAT, "kind": config.kind, "dtype": str(_stored_dtype(config, planned)).removeprefix("torch."),
        "top_k": config.top_k, "shard_bytes": config.shard_bytes, "shards": len(layout.starts) - 1,
        "positions": len(layout.keys), "fingerprint": fingerprint,
    }  # fmt: skip


def _open_folder(folder: Path, target: dict[str, Any], overwrite: bool) -> None:
    if folder.is_file():
        raise ValueError(f"cache.path {str(folder)!r} is a file: give a folder.")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / PLAN).is_file() and not any(path.name.startswith(f".{PLAN}") for path in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and no cache of hpd: choose another cache.path.")
        if overwrite:
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for draft in folder.glob(".*.part"):
        draft.unlink()
    if not (folder / PLAN).is_file():
        write_json(folder / PLAN, target)
        return
    try:
        there = read_json(folder / PLAN)
    except CorruptCacheError:
        raise ValueError(f"{folder / PLAN} is damaged, so nothing says what this cache is: delete it with --overwrite.") from None
    flat = [{**content, **content["fingerprint"], "fingerprint": None} for content in (there, target)]
    changed = [name for name in differences(*flat) if not name.startswith(("name", "data"))]
    if changed:
        raise ValueError(
            f"{folder} holds a cache with another {', another '.join(changed)}. Choose another cache.path, or delete it with "
            "--overwrite."
        )


def _verify_own_share(folder: Path, num_shards: int, trainer: DistillTrainer) -> None:
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


def _check_disk(folder: Path, left: int, total: int, planned: Plan, config: CacheConfig) -> None:
    head = 0
    if config.kind == "hidden":
        text = next(iter(planned.teacher_configs.values())).get_text_config()
        head = text.vocab_size * text.hidden_size * (4 if _stored_dtype(config, planned) == torch.float32 else 2)
    free, needed = shutil.disk_usage(folder).free, left + head
    if needed > free:
        raise ValueError(
            f"The cache needs {_size(needed)} more ({_size(total)} of answers in all), and {folder} has {_size(free)} free. Choose a "
            "place with room, a narrower cache.dtype, cache.kind: top_k, or fewer rows (data.limit)."
        )


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def _ask(
    trainer: DistillTrainer, planned: Plan, config: CacheConfig, layout: _Layout, rows: Any, todo: list[int], done: int,
    progress: CacheProgress,
) -> None:  # fmt: skip
    """Load the teacher and write this process's part of the missing shards."""
    teacher = _load(planned)
    teacher.prepare(trainer.model, trainer.accelerator)
    folder, dtype = Path(config.path), _stored_dtype(config, planned)
    world, rank = trainer.args.world_size, trainer.args.process_index
    # Weights sharded over processes are gathered by all of them together: each runs as many forwards as the busiest.
    lockstep = any(getattr(trainer.accelerator.state, name, None) is not None for name in ("deepspeed_plugin", "fsdp_plugin"))
    first = _answers(teacher, trainer, layout, rows, range(1))
    if rank == 0:
        _save_teacher(folder, planned, first, config)
    counted = done
    for group in (todo[i : i + world] for i in range(0, len(todo), world)):
        mine = layout.shard(group[rank]) if rank < len(group) else range(0)
        parts: list[dict[str, Tensor]] = []
        for batch in _batches(mine, [layout.shard(n) for n in group], trainer.args.per_device_eval_batch_size, lockstep):
            answer = _answers(teacher, trainer, layout, rows, batch or range(1))
            if batch:
                parts.append(_stored(answer, config, dtype))
                counted += world * len(next(iter(parts[-1].values())))
                progress.update(min(counted, len(layout.keys)), len(layout.keys))
        if parts:
            save_shard(folder, group[rank], {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    progress.update(len(layout.keys), len(layout.keys))


def _load(planned: Plan) -> Teacher:
    if planned.recipe.teacher.type == "self":
        return ModelTeacher(load_model(planned.recipe.student, "student", planned.args.seed))
    return load_teacher(planned.recipe.teacher)


def _batches(mine: range, group: list[range], size: int, lockstep: bool) -> Iterator[range]:
    count = -(-max(map(len, group)) // size) if lockstep else -(-len(mine) // size)
    for i in range(count):
        yield mine[i * size : (i + 1) * size]


class _Answer(NamedTuple):
    scores: TeacherScores
    labels: Tensor


def _answers(teacher: Teacher, trainer: DistillTrainer, layout: _Layout, rows: Any, chosen: range) -> _Answer:
    """What the teacher says of the stored positions of some rows."""
    collated = trainer.data_collator([rows[int(layout.rows[i])] for i in chosen])
    mask = torch.from_numpy(np.concatenate([layout.masks[i] for i in chosen]))
    inputs: Any = trainer._prepare_inputs(collated)
    batch = TokenBatch.pop(inputs)
    assert len(mask) == len(batch.keys), "the collator keeps rows and their order"
    mask = mask.to(batch.keys.device)
    batch = TokenBatch(batch.index[mask], batch.labels[mask], batch.keys[mask], batch.dropped)
    with torch.no_grad():
        return _Answer(teacher.scores(inputs, batch), batch.labels)


def _stored(answer: _Answer, config: CacheConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a shard."""
    scores = answer.scores
    if config.kind == "top_k":
        return {name: tensor.cpu().contiguous() for name, tensor in _likeliest(answer, config.top_k or 0, dtype).items()}
    if not isinstance(scores, Scores) or scores.head.weight is None:
        raise ValueError("This teacher gives no hidden states: choose cache.kind: top_k.")
    stored: dict[str, Tensor] = {}
    if dtype == torch.int8:
        hidden = scores.hidden.float()
        stored["scale"] = hidden.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / 127.0
        stored["hidden"] = (hidden / stored["scale"][:, None]).round().to(torch.int8)
    else:
        stored["hidden"] = scores.hidden.to(dtype)
        if not torch.isfinite(stored["hidden"]).all():
            raise ValueError(f"A hidden state of the teacher does not fit into {dtype}: choose cache.dtype: bfloat16 or float32.")
    # Of what is stored, not of what was computed: so the cached distribution sums to one.
    kept = scores._replace(hidden=stored_hidden(stored))
    stored["log_z"] = torch.cat([torch.logsumexp(logits, -1) for logits in _logits(kept)]).float()
    return {name: tensor.cpu().contiguous() for name, tensor in stored.items()}


def _logits(scores: Scores) -> Iterator[Tensor]:
    ready = for_products(scores, scores.vocab)
    rows = max(1, _CHUNK_BYTES // (4 * scores.vocab))
    for start in range(0, len(scores.hidden), rows):
        hidden = ready.hidden[start : start + rows]
        yield project_(ready._replace(hidden=hidden), hidden.new_empty(len(hidden), scores.vocab, dtype=torch.float32))


def _likeliest(answer: _Answer, k: int, dtype: torch.dtype) -> dict[str, Tensor]:
    scores, labels = answer
    if isinstance(scores, TopKScores):
        if scores.tokens.shape[1] != k:
            raise ValueError(f"The teacher gives {scores.tokens.shape[1]} tokens a position, and cache.top_k asks for {k}.")
        tokens, logprobs, label_logprobs = scores.tokens, scores.logprobs, scores.label_logprobs
    else:
        if k > scores.vocab:
            raise ValueError(f"cache.top_k {k} is more than the {scores.vocab} tokens of the teacher.")
        parts, first = [], 0
        for logits in _logits(scores):
            logprobs = torch.log_softmax(logits, -1)
            top = logprobs.topk(k, -1)
            own = labels[first : first + len(logits), None]
            parts.append((top.indices, top.values, logprobs.gather(1, own)[:, 0]))
            first += len(logits)
        tokens, logprobs, label_logprobs = (torch.cat(column) for column in zip(*parts, strict=True))
    return {"tokens": tokens.int(), "logprobs": logprobs.to(dtype), "label_logprobs": label_logprobs.float()}


def _save_teacher(folder: Path, planned: Plan, answer: _Answer, config: CacheConfig) -> None:
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


def _finish(folder: Path, planned: Plan, layout: _Layout, target: dict[str, Any]) -> None:
    shards = [read_json(folder / f"shard-{number:05d}.json") for number in range(target["shards"])]
    about = {**target, **read_json(folder / "teacher.json")}
    about.pop("shards")
    save_index(folder, layout.keys, shards, about)
