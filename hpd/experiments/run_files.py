"""The files of a run as a report reads them: what is damaged is named by file and line, and left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpd.files import whole_characters
from hpd.methods.names import new_metrics

__all__ = ["RunFiles"]

_MOST_NAMED = 5
"""Damaged lines of one file that are named each; more are counted."""


class RunFiles:
    """Reads files and keeps a sentence for each damage."""

    def __init__(self) -> None:
        self.damages: list[str] = []

    def object(self, path: Path) -> dict[str, Any]:
        """A JSON object; empty where there is no file, or none that is one."""
        if not path.is_file():
            return {}
        try:
            value = _parse(path.read_bytes())
        except _Unreadable as error:
            self._note(path, [f"{error} (left out)"])
            return {}
        if isinstance(value, dict):
            return value
        self._note(path, [f"holds {_kind(value)}, not an object (left out)"])
        return {}

    def entries(self, path: Path) -> list[dict[str, Any]]:
        """The objects of a JSON list; of a list that is cut or damaged those before the damage.

        Raises:
            ValueError: the file is not JSON at all.
        """
        if not path.is_file():
            return []
        content = path.read_bytes()
        if not content.strip():
            self._note(path, ["is empty (a write of it was cut)"])
            return []
        try:
            values = _parse(content)
        except _Unreadable as error:
            values = list(_whole_entries(content))
            if not values:
                raise ValueError(
                    f"{path} is not JSON: {error}. Repair it, move it away, or leave the run out."
                ) from None
            self._note(path, [f"{error}; the {len(values)} entries before it are used"])
        if not isinstance(values, list):
            raise ValueError(
                f"{path} holds {_kind(values)}, not a list of evaluations. Repair it, move it away, or leave "
                "the run out."
            )
        good = [value for value in values if isinstance(value, dict) and isinstance(value.get("id"), str)]
        odd = [number for number, value in enumerate(values, start=1) if value not in good]
        self._note(path, [f"entry {number} is not an evaluation with an id (left out)" for number in odd])
        return good

    def lines(self, path: Path) -> list[dict[str, Any]]:
        """The objects of a JSON Lines file.

        Raises:
            ValueError: none of its lines is one.
        """
        if not path.is_file():
            return []
        found: list[dict[str, Any]] = []
        damages = []
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                value = _parse(line)
            except _Unreadable as error:
                damages.append(f"line {number} {error} (left out)")
                continue
            if isinstance(value, dict):
                found.append(value)
            else:
                damages.append(f"line {number} holds {_kind(value)}, not an object (left out)")
        if damages and not found:
            raise ValueError(
                f"{path} is not JSON Lines: {damages[0].removesuffix(' (left out)')}, and no line is whole. "
                "Repair it, move it away, or leave the run out."
            )
        self._note(path, damages)
        return found

    def logs(self, path: Path) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that have a step; values that are no numbers are left out.

        Raises:
            ValueError: see `lines`.
        """
        damages: list[str] = []
        logs = []
        if path.exists() and not path.is_file():
            damages.append("is not a file (left out)")
        elif path.is_file() and not path.read_bytes().strip() and self.object(path.parent / "summary.json"):
            # Of a run that is not finished the first line may still come.
            damages.append("is empty (a write of it was cut)")
        for log in map(new_metrics, self.lines(path)):
            step = log.get("step")
            if not isinstance(step, int) or isinstance(step, bool) or step < 0:
                damages.append(f"has a line whose step is {_shown(step)} (left out)")
                continue
            odd = {name: value for name, value in log.items() if not _is_plain(value)}
            damages += [
                f"has {_shown(value)} as {name} at step {step} (left out)" for name, value in odd.items()
            ]
            logs.append({name: value for name, value in log.items() if name not in odd})
        self._note(path, damages)
        return logs

    def _note(self, path: Path, damages: list[str]) -> None:
        self.damages += [f"{path}: {damage}" for damage in damages[:_MOST_NAMED]]
        if len(damages) > _MOST_NAMED:
            self.damages.append(f"{path}: and {len(damages) - _MOST_NAMED} more of this kind")


class _Unreadable(Exception):
    """Says what is wrong with a content."""


def _parse(content: bytes) -> Any:
    try:
        return whole_characters(json.loads(content.decode("utf-8")))
    except UnicodeDecodeError as error:
        raise _Unreadable(f"is not UTF-8 text (byte {error.start + 1})") from None
    except RecursionError:
        raise _Unreadable("is nested too deeply") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise _Unreadable(f"cannot be read at {place}: {error.msg}") from None
    except ValueError as error:  # an integer of more than 4,300 digits
        raise _Unreadable(f"cannot be read: {error}") from None


def _whole_entries(content: bytes) -> Iterator[Any]:
    """The values of a list up to the first that is not whole."""
    text = content.decode("utf-8", errors="replace").lstrip()
    decoder = json.JSONDecoder()
    position = 1 if text.startswith("[") else len(text)
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            return
        if not isinstance(value, dict):
            return
        yield whole_characters(value)


def _is_plain(value: Any) -> bool:
    """A number, or what loggers write beside numbers."""
    return value is None or isinstance(value, (bool, int, float))


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _shown(value: Any) -> str:
    return json.dumps(value)[:40]
