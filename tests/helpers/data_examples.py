"""Eight datasets in eight formats and what `hpd train --dry-run` says of each, as the page shows it.

python tests/helpers/data_examples.py    writes that part of the page again
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/reference/data-examples.md"
BEGIN, END = "<!-- dry runs -->\n", "<!-- end of dry runs -->\n"


class Example(NamedTuple):
    """A dataset: its file, its rows, and what a recipe says of it besides the path."""

    title: str
    file: str
    rows: list[dict[str, Any]]
    data: str = ""
    more: str = "method: forward_kl"


def _turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


EXAMPLES = [
    Example(
        "Prompt and completion",
        "pairs.jsonl",
        [
            {"prompt": "2 + 3 =", "completion": " 5", "id": 7},
            {"prompt": "4 + 4 =", "completion": " 8", "id": 8},
        ],
    ),
    Example(
        "Messages, one turn of which is not to be learned",
        "chats.jsonl",
        [
            {
                "messages": [
                    *_turns("Say one.", "two"),
                    *_turns("No, one.", "one"),
                ]
            }
        ],
    ),
    Example(
        "ShareGPT, from a CSV export",
        "sharegpt.csv",
        [
            {
                "conversations": json.dumps(
                    [{"from": "human", "value": "Say one."}, {"from": "gpt", "value": "one"}]
                )
            }
        ],
    ),
    Example(
        "Alpaca, with a system text",
        "alpaca.jsonl",
        [{"instruction": "Add the numbers.", "input": "2 3", "output": "5", "system": "Be brief."}],
    ),
    Example(
        "Prompt, messages and an id (as ultrachat has them)",
        "ultrachat.jsonl",
        [{"prompt": "Say one.", "prompt_id": "a1", "messages": _turns("Say one.", "one")}],
    ),
    Example(
        "Token ids with a mask",
        "tokens.jsonl",
        [{"input_ids": [1, 20, 21, 3], "completion_mask": [0, 0, 1, 1]}],
    ),
    Example(
        "Text that holds its template already",
        "text.tsv",
        [{"text": "<|bos|>Say one: one<|im_end|>"}],
    ),
    Example(
        "Prompts alone, for a student that writes every row",
        "prompts.jsonl",
        [{"prompt": _turns("Say one.")}],
        more="method: opd",
    ),
]
EXAMPLES[1].rows[0]["messages"][1]["weight"] = 0  # type: ignore[index]


def write_rows(example: Example, folder: Path) -> None:
    """Write the rows as the name of their file says."""
    separator = {".csv": ",", ".tsv": "\t"}.get(Path(example.file).suffix)
    if separator is None:
        text = "".join(json.dumps(row) + "\n" for row in example.rows)
    else:
        cells = [[value.replace('"', '""') for value in row.values()] for row in example.rows]
        lines = [list(example.rows[0]), *([f'"{cell}"' for cell in row] for row in cells)]
        text = "".join(separator.join(line) + "\n" for line in lines)
    (folder / example.file).write_text(text)


def dry_run(example: Example, folder: Path) -> str:
    """What the dry run says of the rows: its verdicts on columns and text, a row as learned, and counts.

    Args:
        folder: holds a pair of models, in pair/student and pair/teacher.
    """
    from hpd.config import load_recipe
    from hpd.terminal.console import console
    from hpd.terminal.rows import show_rows
    from hpd.training.plan import plan

    write_rows(example, folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"student: {folder / 'pair/student'}\nteacher: {folder / 'pair/teacher'}\n{example.more}\n"
        f"data: {{path: {folder / example.file}{example.data}}}\ntrain: {{max_steps: 1, max_length: 128}}\n"
        f"output_dir: {folder / 'run'}\n"
    )
    planned = plan(load_recipe(recipe))
    topics = ("columns", "begin token", "end token")
    said = [f"{v.level}: {v.topic}: {v.text}" for v in planned.verdicts if v.topic in topics]
    with console.capture() as shown:
        show_rows(planned)
    return "\n".join([*said, shown.get().rstrip()])


def section(folder: Path) -> str:
    """The part of the page between its two marks."""
    parts = []
    for example in EXAMPLES:
        write_rows(example, folder)
        first = (folder / example.file).read_text().splitlines()
        shown = first[:2] if Path(example.file).suffix in (".csv", ".tsv") else first[:1]
        parts += [
            f"### {example.title}",
            "",
            f"`{example.file}`, under `{example.more}`:",
            "",
            *(f"    {line}" for line in shown),
            "",
            *(f"    {line}".rstrip() for line in dry_run(example, folder).splitlines()),
            "",
        ]
    return "\n".join([*parts, ""])


def page(folder: Path) -> str:
    """The whole page, with its dry runs made again."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    return "".join([before, begin, section(folder), end, after])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import tiny_pair

    with tempfile.TemporaryDirectory() as name:
        tiny_pair("llama", Path(name) / "pair")
        PAGE.write_text(page(Path(name)), encoding="utf-8")
