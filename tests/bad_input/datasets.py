"""Malformed data sets."""

# ruff: noqa: E501 (a case is a line)

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .case import Case

__all__ = ["DATASETS", "GENERATE", "PROBLEMS"]

_GOOD = b'{"prompt": "add one", "completion": " two"}\n'
_TURNS = {"u": "user", "a": "assistant", "s": "system", "x": "robot"}


def raw(content: bytes, *overrides: str, name: str = "rows.jsonl") -> Callable[[Path], list[str]]:
    """`hpd train` on a file with this content."""

    def build(folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        return ["train", "{recipe}", f"data.path={folder / name}", *overrides]

    return build


def rows(*given: Any, then: tuple[str, ...] = ()) -> Callable[[Path], list[str]]:
    """`hpd train` on JSON lines."""
    return raw(b"".join(json.dumps(row).encode() + b"\n" for row in given), *then)


def talk(turns: str) -> dict[str, Any]:
    """A conversation: u, a, s for who speaks."""
    return {"messages": [{"role": _TURNS[turn], "content": f"turn {i}"} for i, turn in enumerate(turns)]}


def pair(prompt: Any, completion: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **more}


def _folder(folder: Path) -> list[str]:
    (folder / "data").mkdir()
    (folder / "data" / "notes.txt").write_text("hello")
    return ["train", "{recipe}", f"data.path={folder / 'data'}"]


def _mixed_folder(folder: Path) -> list[str]:
    (folder / "data").mkdir()
    (folder / "data" / "a.jsonl").write_bytes(_GOOD)
    (folder / "data" / "b.csv").write_text("prompt,completion\na,b\n")
    return ["train", "{recipe}", f"data.path={folder / 'data'}"]


_IMAGE = {"type": "image", "image": "cat.png"}
_PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
_GZ = gzip.compress(_GOOD * 1000)

# fmt: off
DATASETS: dict[str, Case] = {
    "no file": Case(lambda f: ["train", "{recipe}", f"data.path={f / 'none.jsonl'}"], "No dataset at"),
    "empty file": Case(raw(b""), "is empty"),
    "blank lines only": Case(raw(b"\n\n\n"), "no rows|is empty"),
    "unknown suffix": Case(raw(_GOOD, name="rows.txt"), "give a .jsonl"),
    "folder without data": Case(_folder, "holds no .jsonl"),
    "folder of two formats": Case(_mixed_folder, "files of several formats"),
    "broken second line": Case(raw(_GOOD + b'{"prompt": \n' + _GOOD), "cannot be read.*line 2"),
    "cut last line": Case(raw(_GOOD * 3 + b'{"prompt": "a", "comple'), "cannot be read.*line 4"),
    "a list in a line": Case(raw(_GOOD + b"[1, 2]\n"), "cannot be read.*line 2.*object"),
    "a number in a line": Case(raw(b"1\n2\n"), "cannot be read.*line 1.*object"),
    "null in a line": Case(raw(_GOOD + b"null\n"), "Row 1 .*prompt that is null"),
    "not json at all": Case(raw(_PNG), "cannot be read.*UTF-8"),
    "invalid utf-8": Case(raw(_GOOD + b'{"prompt": "caf\xe9", "completion": "b"}\n'), "cannot be read: line 2 is not UTF-8"),
    "utf-16": Case(raw(_GOOD.decode().encode("utf-16")), "cannot be read.*UTF-8"),
    "gz cut short": Case(raw(_GZ[: len(_GZ) // 2], name="rows.jsonl.gz"), "cannot be read"),
    "gz that is not": Case(raw(_GOOD, name="rows.jsonl.gz"), "cannot be read"),
    "parquet that is not": Case(raw(_GOOD, name="rows.parquet"), "cannot be read"),
    "parquet cut short": Case(raw(b"PAR1" + bytes(100), name="rows.parquet"), "cannot be read"),
    "csv with ragged rows": Case(raw(b"prompt,completion\na,b\na,b,c\n", name="r.csv"), "cannot be read"),
    "csv without a header": Case(raw(b"a,b\nc,d\n", name="r.csv"), "has the columns a, b"),
    "csv with an empty cell": Case(raw(b"prompt,completion\na,b\nc,\n", name="r.csv"), "Row 1 .* completion"),
    "other columns": Case(rows({"question": "a", "answer": "b"}), "columns question, answer.*map them"),
    "only prompts": Case(rows({"prompt": "a"}, {"prompt": "b"}), "Training needs prompt and completion"),
    "columns of nothing": Case(rows(pair("a", "b"), then=("data.columns={prompt: q}",)), "maps prompt to 'q'"),
    "empty completion": Case(rows(pair("a", "b"), pair("a", "")), "Row 1 has an empty completion"),
    "empty prompt": Case(rows(pair("", "b")), "Row 0 has an empty prompt"),
    "null completion": Case(rows(pair("a", "b"), pair("a", None)), "Row 1 .*completion"),
    "all null": Case(rows(pair(None, None)), "Row 0 .*prompt"),
    "missing in later rows": Case(rows(pair("a", "b"), {"prompt": "c"}), "Row 1 .*completion"),
    "nan": Case(raw(b'{"prompt": NaN, "completion": "b"}\n'), "Row 0 .*prompt|cannot be read"),
    "numbers": Case(rows(pair("a", 1), pair("b", 2)), "Row 0 .*completion.*a number"),
    "mixed types": Case(rows(pair("a", "b"), pair("a", 3)), "cannot be read|Row 1"),
    "text beside messages": Case(rows(pair("a", "b"), pair([{"role": "user", "content": "a"}], "b")), "cannot be read|Row 1"),
    "truth values": Case(rows(pair(True, False)), "Row 0 .*prompt"),
    "nested objects": Case(rows(pair({"q": "a"}, {"a": "b"})), "Row 0 .*prompt.*an object"),
    "list of strings": Case(rows(pair(["a"], ["b"])), "Row 0: turn 0 of prompt.*role and content"),
    "text is a number": Case(rows({"text": 7}), "Row 0 .*text.*a number"),
    "ids are text": Case(rows({"input_ids": ["a", "b"]}), "Row 0 .*input_ids.*whole numbers"),
    "ids are one number": Case(rows({"input_ids": 3}), "Row 0 .*input_ids.*whole numbers"),
    "ids beyond the vocabulary": Case(rows({"input_ids": [5, 6, 70_000]}), "Row 0 .*70000.*300"),
    "ids below zero": Case(rows({"input_ids": [5, -6]}), "Row 0 .*-6"),
    "no ids": Case(rows({"input_ids": []}), "Row 0 has an empty input_ids"),
    "labels of another length": Case(rows({"input_ids": [5, 6, 7], "labels": [5]}), "Row 0 .*3 input_ids and 1 labels"),
    "unknown role": Case(rows(talk("ua"), talk("xa")), "Row 1: .*'robot'"),
    "ends with the user": Case(rows(talk("uau"), then=("data.labels=last_turn",)), "ends with a user message"),
    "nothing from an assistant": Case(rows(talk("ua"), talk("su")), "Row 1 .*no assistant message"),
    "empty conversation": Case(rows(talk("ua"), {"messages": []}), "Row 1 has an empty messages"),
    "empty turn": Case(rows({"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]}), "Row 0: turn 1 .*empty"),
    "turn without a role": Case(rows({"messages": [{"content": "a"}]}), "Row 0: .*role"),
    "turn without content": Case(rows({"messages": [{"role": "user"}, {"role": "assistant"}]}), "Row 0: .*content"),
    "turns under other names": Case(rows({"messages": [{"from": "human", "value": "a"}]}), "Row 0: .*from, value.*role and content"),
    "messages are text": Case(rows({"messages": "user: hello"}), "Row 0 .*messages.*role and content"),
    "an image in a turn": Case(rows({"messages": [{"role": "user", "content": [_IMAGE]}, {"role": "assistant", "content": [_IMAGE]}]}), "Row 0: .*image.*text"),
    "an image column": Case(rows(pair("a", "b", image="cat.png")), "column image.*text"),
    "prompts alone within max_length": Case(rows(*[pair("a " * 200, "b")] * 4), "Every label is masked"),
    "a million tokens before the answer": Case(rows(pair("one " * 1_000_000, "b")), "Every label is masked.*max_length=64"),
    "share of one row": Case(rows(pair("a", "b"), then=("data.validation=0.5",)), "at least two rows"),
    "validation file missing": Case(rows(pair("a", "b"), then=("data.validation=./none.jsonl",)), "No dataset at ./none.jsonl"),
    "validation split missing": Case(rows(pair("a", "b"), then=("data.validation=test",)), "test"),
    "slice without rows": Case(rows(pair("a", "b"), then=("data.split='train[5:]'",)), "has no rows"),
}


def problems(content: bytes, *options: str, name: str = "p.jsonl") -> Callable[[Path], list[str]]:
    """`hpd eval` on a file with this content."""

    def build(folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        return ["eval", "{student}", "--data", str(folder / name), "--output", str(folder / "out"), *options]

    return build


def prompts(content: bytes, *overrides: str) -> Callable[[Path], list[str]]:
    """`hpd generate` for a file with this content."""
    return lambda folder: ["generate", *raw(content, f"generate.output={folder / 'out.jsonl'}", *overrides)(folder)[1:]]


_PROBLEM = b'{"prompt": "add one", "answer": "two"}\n'

PROBLEMS: dict[str, Case] = {
    "empty": Case(problems(b""), "has no rows"),
    "broken line": Case(problems(_PROBLEM + b"{"), "line 2"),
    "a list": Case(problems(b"[[1]]"), "row 1 is a list"),
    "no answers": Case(problems(b'{"prompt": "a"}\n'), "answer"),
    "no prompts": Case(problems(b'{"answer": "a"}\n'), "prompt"),
    "null answers": Case(problems(b'{"prompt": "a", "answer": null}\n'), "answer"),
    "answers of a wrong kind": Case(problems(b'{"prompt": "a", "answer": {"b": [1]}}\n'), "answer"),
    "prompts of a wrong kind": Case(problems(b'{"prompt": {"q": 1}, "answer": "b"}\n'), "prompt"),
    "not utf-8": Case(problems(b'{"prompt": "caf\xe9", "answer": "b"}\n'), "utf-8"),
    "gz cut short": Case(problems(_GZ[:50], name="p.jsonl.gz"), "is not a readable"),
    "parquet that is not": Case(problems(_PROBLEM, name="p.parquet"), "is not a readable"),
    "ragged csv": Case(problems(b"prompt,answer\na,b,c\n", name="p.csv"), "more fields than the header"),
    "unknown suffix": Case(problems(_PROBLEM, name="p.txt"), "unknown format"),
    "unknown task": Case(problems(_PROBLEM, "--tasks", "gsm9k"), "gsm9k.*gsm8k"),
    "unknown option": Case(problems(_PROBLEM, "-o", "color=red"), "color"),
    "unknown preset": Case(problems(_PROBLEM, "--preset", "best"), "best"),
    "unknown engine": Case(problems(_PROBLEM, "--engine", "steam"), "Unknown engine 'steam'"),
    "unknown metric": Case(problems(b'{"prompt": "a", "completion": "b"}\n', "--metrics", "klm", "--teacher", "{teacher}"), "klm"),
    "top_p": Case(problems(_PROBLEM, "--top-p", "2", "--temperature", "1"), "top_p"),
}

GENERATE: dict[str, Case] = {
    "no prompts": Case(prompts(b'{"completion": "b"}\n'), "Row 0 has no prompt"),
    "null prompts": Case(prompts(b'{"prompt": null}\n'), "Row 0 has no prompt"),
    "numbers": Case(prompts(b'{"prompt": 4}\n'), "Row 0 .*prompt.*a number"),
    "turns under other names": Case(prompts(b'{"messages": [{"from": "human", "value": "a"}]}\n'), "Row 0.* role and content"),
    "no such reference": Case(prompts(_GOOD, "generate.filter=correct", "generate.reference=gold"), "generate.reference is 'gold'"),
    "no references": Case(prompts(b'{"prompt": "a"}\n', "generate.filter=correct"), "needs right answers"),
    "samples": Case(prompts(_GOOD, "generate.samples=0"), "samples must be >= 1"),
    "suffix": Case(prompts(_GOOD, "generate.output=out.txt"), "must end with .jsonl"),
}
# fmt: on
