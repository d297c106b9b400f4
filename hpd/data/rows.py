"""The rows of a recipe, in a format of TRL's; of `hpd generate`, its prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import Dataset, IterableDataset

from hpd.batch import BEHAVIOR_LOGPROBS
from hpd.config.schema import DataConfig
from hpd.data.checks import check_columns, check_mixed
from hpd.data.convert import convert
from hpd.data.formats import FORMATS, RowFormat, choose_format, meaning_of
from hpd.data.mixing import mix
from hpd.data.places import SUFFIXES, local_files
from hpd.data.reading import first_rows, read, why_not
from hpd.data.teacher_prompts import TEACHER_PROMPT, TeacherContext

__all__ = [
    "PromptRow",
    "Rows",
    "format_of",
    "load_prompts",
    "load_rows",
    "validation_sets",
]


# Columns without which there is nothing to write for.
_WITH_PROMPTS = {"prompt", "messages", "conversations", "instruction", "query", "chosen"}
_OF_PROMPTS = ("input", "options", "system", "history", "tools")


class Rows(NamedTuple):
    """Training rows, held-out rows, and whether they are conversations."""

    train: Dataset | IterableDataset
    validation: Dataset | IterableDataset | dict[str, Any] | None
    """Several sets by their names."""
    conversational: bool
    layouts: tuple[RowFormat, ...]
    """What the training rows are, part by part, and which columns are not read."""
    mixture: str | None = None
    """How many rows each of several datasets gives."""


class PromptRow(NamedTuple):
    """A prompt that wants a completion."""

    prompt: str | list[dict[str, str]]
    reference: str | None
    """The dataset's own answer, where it has one."""


class _Beside(NamedTuple):
    """What rows keep beside what the student reads."""

    column: str | None
    """Names their teacher."""
    context: TeacherContext | None
    """Of a teacher with a prompt of its own."""
    weight: str | None
    """Says what they weigh in a term."""
    behavior: str | None = None
    """Says how likely the student that wrote them found each token."""

    @property
    def staying(self) -> tuple[str, ...]:
        """Columns that the trainer reads."""
        named = (self.column, self.weight, self.behavior)
        return tuple(dict.fromkeys(name for name in named if name is not None))

    @property
    def columns(self) -> tuple[str, ...]:
        named = () if self.context is None else self.context.columns
        return (*named, *self.staying)


def load_rows(
    config: DataConfig,
    column: str | None = None,
    context: TeacherContext | None = None,
    *,
    weight: str | None = None,
    stored: bool = False,
    prompts: bool = False,
) -> Rows:
    """Read the dataset and bring it into a TRL format.

    Args:
        config: its place, and the meaning of its columns.
        column: one more column that rows keep (it names their teacher).
        context: of a teacher with a prompt of its own, which rows get as the column `teacher_prompt`.
        weight: one more column that rows keep (a term is weighed by it).
        stored: rows keep `behavior_logprobs` too, but for those of validation.
        prompts: prompts without completions are enough, since the student writes every row.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable or empty file, unknown columns, a row without text.
    """
    datasets.disable_progress_bars()
    beside = _Beside(column, context, weight, BEHAVIOR_LOGPROBS if stored else None)
    if config.parts:
        train, layouts, mixture = mix(config, lambda part: _read_shaped(part, beside, prompts))
    else:
        train, layout = _read_shaped(config, beside, prompts)
        layouts, mixture = [layout], None
    validation: Any = None
    if isinstance(config.validation, str):
        validation = _validation_rows(config.validation, config, beside)
    elif isinstance(config.validation, Mapping):
        validation = {name: _validation_rows(p, config, beside) for name, p in config.validation.items()}
    conversational = any(
        isinstance(row.get(k), list) for row in first_rows(train, 64) for k in ("prompt", "messages")
    )
    if config.labels == "assistant" and not conversational and "ids" not in {one.kind for one in layouts}:
        raise ValueError(
            "data.labels: assistant learns the turns of conversations, and these rows are text: set "
            "data.format: chat, or labels: completion."
        )
    if isinstance(config.validation, float):
        train, validation = _held_out(train, layouts, config.validation)
    return Rows(train, validation, conversational, tuple(layouts), mixture)


def validation_sets(validation: Any) -> dict[str, Any]:
    """The validation rows by the name of their set; "" is that of a single one."""
    if isinstance(validation, Mapping):
        return dict(validation)
    return {} if validation is None else {"": validation}


def _validation_rows(place: str, config: DataConfig, beside: _Beside) -> Any:
    """The rows of a file, or of another split."""
    is_file = Path(place).suffix in SUFFIXES
    if config.parts and not is_file:
        raise ValueError("data.validation must be a share or a file, where data has several parts.")
    other = replace(config, path=place, parts=()) if is_file else config
    beside = beside._replace(behavior=None)
    rows, _ = _read_shaped(other, beside, False, "train" if is_file else place, limit=False)
    return rows


def _read_shaped(
    config: DataConfig, beside: _Beside, prompts: bool, split: str | None = None, limit: bool = True
) -> tuple[Any, RowFormat]:
    """The rows of one dataset in a format of TRL's, and their own."""
    rows = read(config.path, config, split, limit)
    if isinstance(rows, Dataset) and len(rows) == 0:
        raise ValueError(f"The dataset {config.path} (split {config.split}) has no rows.")
    try:
        layout = _layout(rows, config, beside, prompts)._replace(writers=_writers(rows))
        return _shape(rows, layout, config, beside, prompts), layout
    except UnicodeDecodeError as error:
        # JSON is taken apart without a look at its text, which fails where a row is read.
        local = local_files(config.path, config.name)
        raise ValueError(f"The dataset {config.path} cannot be read: {why_not(local, error)}") from None


def _held_out(train: Any, layouts: Sequence[RowFormat], share: float) -> tuple[Dataset, Dataset]:
    """Rows for training, and a share of them for validation."""
    if any(layout.kind in ("prompt", "bare instruction") for layout in layouts):
        raise ValueError(
            "data.validation takes its share of rows that have no completion to be compared with: give it a "
            "file with completions, or remove it."
        )
    if len(train) < 2:
        raise ValueError("data.validation as a share needs at least two rows.")
    parts = train.train_test_split(test_size=share, seed=0)
    return parts["train"], parts["test"]


def load_prompts(config: DataConfig, reference: str | None = None) -> list[PromptRow]:
    """The prompts of the dataset, as training would see them; rows need no completion.

    Args:
        config: the recipe's `data`.
        reference: column with the right answer; None: the completion, or the last turn of `messages`.

    Raises:
        FileNotFoundError, ValueError: as `load_rows`; no prompts, or no such column.
    """
    datasets.disable_progress_bars()
    rows = read(config.path, config)
    found = _columns(rows)
    if not found:
        raise ValueError(f"The dataset {config.path} (split {config.split}) has no rows.")
    if reference is not None and reference not in found:
        raise ValueError(
            f"generate.reference is {reference!r}, and the dataset has the columns {', '.join(found)}."
        )
    if not {*config.columns, *found} & _WITH_PROMPTS:
        raise ValueError(_no_prompt(0))
    layout = choose_format(
        found, config.columns, style=config.format, ignored=config.ignore,
        kept=() if reference is None else (reference,), prompts=True, texts=False,
    )  # fmt: skip
    # What says something about the answers alone does no harm here.
    layout = layout._replace(
        refused={name: text for name, text in layout.refused.items() if meaning_of(name) in _OF_PROMPTS}
    )
    return [_prompt_row(row, index, layout, config, reference) for index, row in enumerate(rows)]


def _no_prompt(index: int) -> str:
    return (
        f"Row {index} has no prompt. hpd generate needs prompt or messages: map them, for example "
        "data.columns: {prompt: question}."
    )


def _prompt_row(
    given: Any, index: int, layout: RowFormat, config: DataConfig, reference: str | None
) -> PromptRow:
    first = {"messages": "messages", "sharegpt": "conversations"}.get(layout.kind, "prompt")
    if not given.get(layout.source.get(first, layout.source.get("instruction", "chosen"))):
        raise ValueError(_no_prompt(index))
    row = convert(given, index, layout, config.labels, system_prompt=config.system_prompt, prompts=True)
    answer: Any = row.get("completion")
    answer = answer[-1]["content"] if isinstance(answer, list) and answer else answer
    return PromptRow(row["prompt"], answer if reference is None else str(given[reference]))


def format_of(
    rows: Any, columns: Mapping[str, str], prompts: bool, kept: Sequence[str] = ()
) -> RowFormat | None:
    """The format of rows that come from Python; None: they are prepared already, or not to be read.

    Args:
        rows: a dataset or a stream.
        columns: as `data.columns`.
        prompts: as `load_rows` takes it.
        kept: columns that the trainer reads beside the row.

    Raises:
        ValueError: no format of docs/reference/data-formats.md.
    """
    found = _columns(rows)
    # TRL refuses a dataset with a transform, which may draw.
    transformed = isinstance(rows, Dataset) and rows.format["type"] == "custom"
    if not found or {"input_ids", "labels"} <= {*found} or transformed:
        return None
    return choose_format(found, columns, kept=[TEACHER_PROMPT, *kept], prompts=prompts)


def _columns(rows: Any) -> list[str]:
    if isinstance(rows, Dataset):
        return list(rows.column_names)
    return list(next(iter(rows), {}))


def _writers(rows: Any) -> tuple[str, ...]:
    """The models that wrote the first rows, in the columns of `hpd generate`."""
    if not {"model", "source_row", "sample"} <= {*_columns(rows)}:
        return ()
    return tuple(dict.fromkeys(str(row["model"]) for row in first_rows(rows, 64)))


def _layout(rows: Any, config: DataConfig, beside: _Beside, prompts: bool) -> RowFormat:
    """The format of the rows.

    Raises:
        ValueError: as `choose_format`; or `data.labels` that these rows do not have.
    """
    found = _columns(rows)
    check_columns(found)
    column = beside.column
    if column is not None and column not in found:
        raise ValueError(
            f"teacher.column is {column!r}, which the dataset does not have: {', '.join(found)}."
        )
    if beside.weight is not None and beside.weight not in found:
        raise ValueError(
            f"weight.column is {beside.weight!r}, which the dataset does not have: {', '.join(found)}."
        )
    if beside.behavior is not None and beside.behavior not in found:
        raise ValueError(
            f"prefixes.stored needs the column {beside.behavior}, and {config.path} has {', '.join(found)}: "
            "write rollouts with hpd generate and generate.logprobs: true."
        )
    if beside.context is not None:
        beside.context.check(found, f"the dataset {config.path}")
    layout = choose_format(
        found,
        config.columns,
        style=config.format,
        ignored=config.ignore,
        kept=beside.columns,
        prompts=prompts,
    )
    check_mixed(rows, layout.source)
    return layout


def _shape(rows: Any, layout: RowFormat, config: DataConfig, beside: _Beside, prompts: bool) -> Any:
    """Every row as `convert` makes it."""
    # Formats that change from row to row are columns with nulls, whose types are seen in all rows together.
    mixes = (
        isinstance(rows, Dataset)
        and bool(layout.others)
        and any(rows.data.column(layout.source[part]).null_count for part in FORMATS[layout.kind])
    )
    at_once: Any = {"writer_batch_size": len(rows)} if mixes else {}
    return rows.map(
        convert,
        with_indices=True,
        fn_kwargs={
            "layout": layout,
            "labels": config.labels,
            "system_prompt": config.system_prompt,
            "prompts": prompts,
            "kept": beside.staying,
            "context": beside.context,
            "whole": _columns_of(layout, config.labels, prompts) if mixes else (),
        },
        remove_columns=_columns(rows),
        **at_once,
    )


def _columns_of(layout: RowFormat, labels: str, prompts: bool) -> tuple[str, ...]:
    """The columns of converted rows, of whichever of the formats each is."""
    found: list[str] = []
    for one in (layout, *layout.others):
        whole = one.kind in ("messages", "sharegpt") and labels != "last_turn" and not prompts
        named = {"ids": ("input_ids", "labels"), "text": ("text",)}
        found += ("messages",) if whole else named.get(one.kind, ("prompt", "completion"))
        found += [name for name in ("tools", "chat_template_kwargs") if name in one.source]
    return tuple(dict.fromkeys(found))
