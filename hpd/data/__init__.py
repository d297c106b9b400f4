"""From files to rows: formats, chat templates, checks of every row, and the order rows are read in."""

from hpd.data.lengths import Lengths, check_ids, measure
from hpd.data.preferences import load_preferences
from hpd.data.rows import PromptRow, Rows, load_prompts, load_rows

__all__ = [
    "Lengths",
    "PromptRow",
    "Rows",
    "check_ids",
    "load_preferences",
    "load_prompts",
    "load_rows",
    "measure",
]
