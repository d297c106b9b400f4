"""An error is one paragraph: broken between words in a terminal, and one line in a log."""

import io
import logging
import re
import subprocess
import sys
import warnings

import pytest
from helpers.forked import hpd

from hpd.terminal.errors import user_errors, wrap_warnings

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


@pytest.mark.parametrize(("is_terminal", "columns"), [(True, 40), (True, 80), (False, 40)])
def test_a_warning_of_a_module_is_broken_like_an_error(monkeypatch, is_terminal, columns):
    handler = logging.StreamHandler(Stream(is_terminal))
    monkeypatch.setattr(sys, "stderr", handler.stream)
    monkeypatch.setattr(logging, "lastResort", handler)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    wrap_warnings()
    text = "Answers end after 52 tokens, not after max_new_tokens=512: the longest prompt has 12 tokens."
    handler.handle(logging.LogRecord("hpd.evaluate", logging.WARNING, "", 0, text, None, None))
    lines = handler.stream.getvalue().splitlines()
    assert " ".join(lines) == text
    assert max(map(len, lines)) < columns if is_terminal else len(lines) == 1


def test_a_warning_of_this_package_is_a_paragraph_and_others_keep_their_place(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "student: a\nteacher: b\nmethod: hpd\ndata: {path: c}\ntrain: {learning_rate: 1.0e-3}\n"
    )
    done = hpd("train", recipe, "--dry-run", "train={max_steps: 2}", cwd=tmp_path)
    assert done.stderr.startswith("warning: train is given as a whole, which takes learning_rate from")
    assert "UserWarning" not in done.stderr
    code = "import warnings; from hpd.terminal import errors; errors.wrap_warnings(); warnings.warn('mine')"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "UserWarning: mine" in other.stderr
