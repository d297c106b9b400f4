"""`hpd prune` in a terminal."""

from __future__ import annotations

import re
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

# What is said about rows names the keys of a recipe; this command takes fewer, as options.
_AS_OPTIONS = (
    (r"data\.columns maps (prompt|completion) to", r"--\1-column is"),
    (r"map them, for example data\.columns: \{prompt: (\w+), completion: (\w+)\}",
     r"name them, for example --prompt-column \1 --completion-column \2"),
    (r"map data\.columns: \{instruction: [^}]*\}", "call the columns instruction, input and output"),
    (r"Training needs", "Rows need"),
    (r" Prompts alone are enough where [^.]*\.", ""),
    (r" To train without it, name it in data\.ignore, or remove the column\.",
     " To cut without it, remove the column."),
    (r"set data\.split \(or data\.validation\) to one of them, or give a file",
     "give --data the file of one"),
)  # fmt: skip


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
    """Have an error name what this command takes where it names a key of a recipe."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for key, option in _AS_OPTIONS:
            text = re.sub(key, option, text)
        if text == str(error):
            raise
        raise ValueError(text) from None


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
