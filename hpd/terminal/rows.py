"""What a run will learn: one row as it is read, and counts of what is left out."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from hpd.data.byte_rows import TwoTokenizers, row_in_chunks
from hpd.data.lengths import Lengths
from hpd.data.shown import row_as_learned
from hpd.terminal.console import console
from hpd.training.arguments import label_policy
from hpd.training.plan import Plan

__all__ = ["show_rows"]

# Characters of a part that are shown, from its two ends.
_SHOWN = 600


def show_rows(planned: Plan, to: Console = console) -> None:
    """Show a row as it will be learned, the learned text in [[ ]], as a teacher with its own prompt reads it,
    and how much of the rows is read."""
    _show_row(planned, "a row as it will be learned ([[learned]]):", to)
    if planned.recipe.teacher.reads_own_rows and planned.other is None:
        _show_row(planned, "the same row as the teacher reads it ([[asked]]):", to, of_teacher=True)
    if planned.other is not None:
        _show_chunks(planned, planned.other, to)
    counts = _counts(planned.lengths, planned.args.max_length)
    to.print(counts, highlight=False, markup=False, soft_wrap=not to.is_terminal)


def _show_row(planned: Plan, title: str, to: Console, of_teacher: bool = False) -> None:
    args = planned.args
    parts = row_as_learned(
        planned.rows.train,
        planned.tokenizer,
        label_policy(args),
        args.max_length,
        args.truncation_mode,
        of_teacher=of_teacher,
    )
    text = Text()
    for part in parts:
        shown = _shorten(part.text)
        text.append(f"[[{shown}]]" if part.learned else shown, style="bold green" if part.learned else "dim")
    to.print(title, highlight=False, markup=False)
    to.print(text, soft_wrap=True)


def _show_chunks(planned: Plan, other: TwoTokenizers, to: Console) -> None:
    """Show the beginning of an answer in both tokenizations."""
    text, size = Text(), 0
    for mine, theirs, aligned in row_in_chunks(
        planned.rows.train, planned.tokenizer, other, label_policy(planned.args)
    ):
        one = len(mine) == 1 and mine == theirs
        shown = mine[0] if one else f"{'|'.join(mine)} = {'|'.join(theirs)}"
        text.append(f"[{shown}]", style="" if one else ("bold" if aligned else "bold red"))
        size += len(shown)
        if size > _SHOWN:
            text.append(" ...")
            break
    to.print(
        "its answer in chunks ([token of both], [student's = teacher's]):", highlight=False, markup=False
    )
    to.print(text, soft_wrap=True)


def _counts(lengths: Lengths, max_length: int | None) -> str:
    """Rows, tokens and labels that are read and that are not, and why."""
    cut, kept = lengths.cut, lengths.num_rows - lengths.cut.masked_rows - lengths.cut.lost_rows
    text = (
        f"first {lengths.num_rows:,} rows: {kept:,} rows with {lengths.kept_tokens:,} tokens are read, "
        f"{lengths.kept_labels:,} of them labels"
    )
    left_out = []
    if cut.masked_rows:
        left_out.append(f"{cut.masked_rows:,} rows without a label (masked)")
    if cut.lost_rows:
        left_out.append(f"{cut.lost_rows:,} rows whose labels all lie beyond max_length {max_length}")
    if cut.lost_tokens:
        left_out.append(f"their {cut.lost_tokens:,} tokens")
    if cut.cut_rows:
        left_out.append(
            f"{cut.cut_tokens:,} tokens of {cut.cut_rows:,} longer rows (max_length {max_length})"
        )
    if cut.cut_labels:
        left_out.append(f"{cut.cut_labels:,} labels (max_length)")
    return f"{text}; dropped: {', '.join(left_out) or 'nothing'}"


def _shorten(text: str) -> str:
    if len(text) <= 2 * _SHOWN:
        return text
    return f"{text[:_SHOWN]} [... {len(text) - 2 * _SHOWN:,} characters ...] {text[-_SHOWN:]}"
