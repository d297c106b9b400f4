"""`hpd prune`: a student cut from its teacher, written as an ordinary model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from hpd.config.data import DataConfig
from hpd.config.models import ModelConfig
from hpd.data.lengths import kept_part
from hpd.data.rendering import tokenize
from hpd.data.rows import load_rows
from hpd.data.templates import check_templates
from hpd.files import write_json
from hpd.models.adapters import require_whole
from hpd.models.export import check_new, new_folder
from hpd.models.load import load_config, load_model, load_tokenizer
from hpd.models.probe import distance_of_logits, mend_generation, rounding_of_logits
from hpd.models.pruning import (
    Importance,
    KeptParts,
    check_prunable,
    choose_cut,
    cut_model,
    measure_importance,
    with_cut,
)
from hpd.progress import Bar, Progress

__all__ = ["PruneSummary", "prune"]

_ABOUT = "pruning.json"
_ROLE = "model"


class PruneSummary(NamedTuple):
    """What was cut."""

    path: Path
    layers: int
    """Of the whole model."""
    cut: KeptParts
    importance: Importance
    parameters: tuple[int, int]
    """Before and after, each weight once."""


def prune(
    model: str,
    data: str,
    output: Path,
    *,
    layers: int | None = None,
    intermediate: float | None = None,
    columns: Mapping[str, str] | None = None,
    form: Literal["auto", "chat", "plain"] = "auto",
    limit: int = 128,
    max_length: int = 512,
    progress: Progress | None = None,
) -> PruneSummary:
    """Write the model without the layers, and the MLP columns, that do least on some text.

    Which they are is measured once, on the whole model (`measure_importance`). What was written is loaded
    again and must give the logits that the whole model gives without those parts.

    Args:
        model: folder or Hub id.
        data: file, folder or Hub id of rows as training reads them; every token of a row counts.
        output: a new folder. It gets weights in the model's own dtype, configuration, tokenizer, generation
            configuration, and pruning.json with what was measured and kept.
        layers: how many stay; None: all.
        intermediate: share of the columns of each MLP that stays, in (0, 1]; None: all.
        columns, form, limit: as `data.columns`, `data.format` and `data.limit` of a recipe.
        max_length: tokens of a row that are read.
        progress: gets a bar of the rows.

    Raises:
        FileNotFoundError, ValueError: data or a model that cannot be read; nothing to cut; numbers that the
            model does not have; a model that cannot be cut so; an output folder that holds something.
    """
    _check_numbers(layers is None and intermediate is None, limit, max_length)
    check_new(output)
    require_whole(model, "hpd prune")
    source = ModelConfig(model=model, dtype="auto")
    check_prunable(load_config(source, _ROLE), model, layers, intermediate)
    tokenizer = load_tokenizer(source, _ROLE)
    # Nothing is learned, so that rows need no answer.
    config = DataConfig(path=data, columns=columns or {}, format=form, limit=limit, labels="all")
    rows = _token_rows(config, tokenizer, max_length)
    whole = _loaded(source)
    before = whole.num_parameters()
    counted = _counted(rows, (progress or Progress()).bar("rows"))
    importance = measure_importance(whole, counted, columns=intermediate is not None)
    cut = choose_cut(importance, layers, intermediate)
    probe = max(rows, key=len)
    expected = with_cut(whole, cut, probe).cpu()
    cut_model(whole, cut)
    mend_generation(whole.generation_config)
    with new_folder(output) as draft:
        whole.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        write_json(draft / _ABOUT, _about(model, data, importance, cut))
        after = _check_written(draft, expected, probe, model)
    return PruneSummary(output, len(importance.blocks), cut, importance, (before, after))


def _check_numbers(cuts_nothing: bool, limit: int, max_length: int) -> None:
    if cuts_nothing:
        raise ValueError(
            "Nothing is to be cut: give layers, the number that stays, or intermediate, a share."
        )
    if limit < 1 or max_length < 1:
        raise ValueError(f"limit and max_length must be >= 1, got {limit} and {max_length}.")


def _loaded(source: ModelConfig) -> Any:
    model: Any = load_model(source, _ROLE)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _counted(rows: list[list[int]], bar: Bar) -> Iterator[list[int]]:
    for number, row in enumerate(rows, start=1):
        yield row
        bar(number, len(rows))


def _token_rows(config: DataConfig, tokenizer: Any, max_length: int) -> list[list[int]]:
    """Token ids of each row, as training would read it."""
    rows = load_rows(config)
    if rows.conversational:
        check_templates(rows.train, tokenizer, config.labels)
    read = [tokenize(dict(row), tokenizer, config.labels)[0] for row in rows.train]
    return [kept for ids in read if (kept := list(kept_part(ids, max_length, "keep_start")))]


def _check_written(folder: Path, expected: torch.Tensor, probe: list[int], name: str) -> int:
    """Load what was written, compare its logits, and count its parameters.

    Raises:
        ValueError: other logits: what a layer computes depends on its place.
    """
    try:
        model = _loaded(ModelConfig(model=str(folder), dtype="auto"))
    except ValueError as error:
        raise ValueError(_depends_on_place(name, f"it cannot be loaded ({error})")) from None
    with torch.no_grad():
        ids = torch.tensor([probe], device=model.device)
        found = model(input_ids=ids, use_cache=False).logits[0].cpu()
    if (distance := distance_of_logits(found, expected)) > rounding_of_logits(expected):
        said = f"its logits are {distance:.1%} off those of the whole model that passes them by"
        raise ValueError(_depends_on_place(name, said))
    return model.num_parameters()


def _depends_on_place(name: str, said: str) -> str:
    return (
        f"{name} cannot be cut so: written without these layers {said}, so what its layers are depends on "
        "their places. Nothing was written; another number of layers, or --intermediate alone, may do."
    )


def _about(model: str, data: str, importance: Importance, cut: KeptParts) -> dict[str, Any]:
    return {
        "model": Path(model).name if Path(model).exists() else model,
        "data": Path(data).name if Path(data).exists() else data,
        "positions": importance.positions,
        "block_influence": importance.blocks.tolist(),
        "layers": list(cut.layers),
        "intermediate_size": cut.width,
        "columns": None if cut.columns is None else [columns.tolist() for columns in cut.columns],
    }
