"""An error is one paragraph: broken between words in a terminal, and one line in a log."""

import io
import re
import sys

import pytest

from hpd.terminal.errors import user_errors

TEXT = "The recipe is not valid: unknown key 'max_steps'; did you mean 'train.max_steps'?"


class Stream(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


def said(monkeypatch, is_terminal, columns="40"):
    import typer

    stream = Stream(is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(typer.Exit) as ended, user_errors():
        raise ValueError(TEXT)
    assert ended.value.exit_code == 2
    return re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())  # bold


def test_a_terminal_breaks_between_words(monkeypatch):
    lines = said(monkeypatch, is_terminal=True).splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 40
    words = "error: " + TEXT
    assert " ".join(line.strip() for line in lines) == words


def test_a_log_has_one_line(monkeypatch):
    assert said(monkeypatch, is_terminal=False).splitlines() == ["error: " + TEXT]
