"""`hpd prune` in a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from hpd.progress import quiet_libraries
from hpd.terminal.console import TerminalProgress, console, show_next
from hpd.terminal.prune_options import PruneOptions

if TYPE_CHECKING:
    from hpd.training.prune import PruneSummary

__all__ = ["run_prune"]


def run_prune(options: PruneOptions) -> None:
    """Cut a model, and say what stays."""
    options.check()
    from hpd.training.prune import prune  # seconds

    quiet_libraries()
    with _naming_options():
        summary = prune(
            options.model,
            options.data,
            options.output,
            layers=options.layers,
            intermediate=options.intermediate,
            columns=options.columns,
            form=cast(Any, options.form),
            limit=options.limit,
            max_length=options.max_length,
            progress=TerminalProgress(),
        )
    _say(summary)
    output, model, data = (shlex.quote(str(name)) for name in (options.output, options.model, options.data))
    asked = "".join(f" --{role}-column {shlex.quote(name)}" for role, name in options.columns.items())
    show_next(f"hpd init recipe.yaml --student {output} --teacher {model} --data {data}{asked}")


@contextmanager
def _naming_options() -> Iterator[None]:
    """Have an error that names keys of a recipe end with what this command has in their place."""
    try:
        yield
    except ValueError as error:
        if "data." not in str(error):
            raise
        raise ValueError(
            f"{error} (Here data.columns is --prompt-column and --completion-column, data.path is --data; "
            "other keys under data have no option: change the file.)"
        ) from None


def _say(summary: PruneSummary) -> None:
    blocks, kept = summary.importance.blocks.tolist(), summary.cut.layers
    dropped = [value for place, value in enumerate(blocks) if place not in kept]
    lines = [f"layers kept, {len(kept)} of {summary.layers}: {', '.join(map(str, kept))}"]
    if dropped:
        lines.append(
            f"block influence on {summary.importance.positions:,} tokens: {min(dropped):.3f} to "
            f"{max(dropped):.3f} of the layers dropped, {min(blocks[place] for place in kept):.3f} or more "
            "of those kept"
        )
    if summary.cut.columns is not None and summary.importance.columns is not None:
        scores = [summary.importance.columns[place] for place in kept]
        share = [
            float(all_[stay].sum() / all_.sum())
            for all_, stay in zip(scores, summary.cut.columns, strict=True)
        ]
        lines.append(
            f"columns kept in each MLP, {summary.cut.width:,} of {len(scores[0]):,}: {min(share):.0%} to "
            f"{max(share):.0%} of what they write"
        )
    before, after = summary.parameters
    lines.append(f"{before:,} parameters before, {after:,} after, in {summary.path}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
