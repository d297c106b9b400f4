"""What people see of a job: bars in a terminal, lines in a file, tables whose figures are whole in both."""

import io
import re

import pyte
import pytest
from rich.console import Console
from rich.table import Table

from hpd.terminal import console as module
from hpd.terminal.console import TerminalProgress, show_figures


class Shown:
    def __init__(self, file):
        self.raw = file.getvalue

    def __call__(self):
        """Every text that was ever printed, line by line."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.raw()).replace("\r", "\n")


@pytest.fixture
def screen(monkeypatch):
    """Replace the console by one of a kind and a width; returns what was printed on it."""

    def make(width, is_terminal):
        file = io.StringIO()
        console = Console(file=file, width=width, force_terminal=is_terminal, color_system=None)
        monkeypatch.setattr(module, "console", console)
        monkeypatch.setattr(module, "_display", module._Display(console=console))
        return Shown(file)

    return make


def test_a_file_gets_a_line_for_each_change_of_the_figures(screen):
    text = screen(80, False)
    bar = TerminalProgress().bar("training")
    for step in range(41):
        bar(step, 40, f"loss {4 - step // 10}.0000  KL 1.0000  1,234 tok/s")
    lines = text().splitlines()
    assert [line.partition("  ")[0] for line in lines] == [f"training {n}/40" for n in (0, 10, 20, 30, 40)]
    assert "loss 0.0000  KL 1.0000  1,234 tok/s" in lines[-1]
    assert lines[-1].endswith("left 0:00:00")


def test_a_file_gets_the_rows_below_a_bar_and_no_line_twice(screen):
    text = screen(80, False)
    bar = TerminalProgress().bar("runs")
    for _ in range(5):
        bar(0, 2, "\n  a  step 3 of 9")
    bar(2, 2)
    bar(2, 2)
    lines = text().splitlines()
    assert [line.split()[0] for line in lines] == ["runs", "a", "runs"]
    assert lines[1] == "  a  step 3 of 9"


@pytest.mark.parametrize("width", [40, 80, 120])
def test_figures_of_a_bar_are_whole_at_every_width(screen, width):
    text = screen(width, True)
    bar = TerminalProgress().bar("answers of a student of some name")
    for step in (0, 1_234, 2_500):
        bar(step, 2_500, "loss 0.0684  KL 0.0626  20,005 tok/s")
    assert "…" not in text()
    assert "loss 0.0684  KL 0.0626  20,005 tok/s" in text()
    assert "2,500/2,500" in text()


@pytest.mark.parametrize("width", [40, 80])
def test_a_bar_leaves_what_was_said_before_it(screen, width):
    """Also where the bar before it had two rows; and a figure that is left out leaves no empty column."""
    text = screen(width, True)
    for name in ("exact-match answers of runs-demo", "exact-match answers of teacher"):
        TerminalProgress().say(f"{name}: transformers in float32")
        TerminalProgress().say("the second line")
        TerminalProgress().bar(name)(20, 20)  # done before a rate can be told
    display = pyte.Screen(width, 40)
    pyte.Stream(display).feed(text.raw().replace("\n", "\r\n"))
    shown = [line.rstrip() for line in display.display if line.strip()]
    assert shown.count("the second line") == 2
    if width == 80:
        assert len(shown) == 6


def test_a_validation_is_shown_inside_training_and_goes(screen):
    text = screen(80, True)
    progress = TerminalProgress()
    training = progress.bar("training")
    training(1, 4)
    validation = progress.bar("validation")
    validation(1, 2)
    validation(2, 2)
    training(4, 4)
    assert "validation" in text()
    last = text().split("training")[-1]
    assert "4/4" in last
    assert "validation" not in last


def table():
    made = Table(title="gsm8k: 50 problems")
    for name in ("model", "accuracy", "95 % interval", "against first", "p"):
        made.add_column(name)
    made.add_row("tiny-student-of-a-long-name", "12.5%", "3.1% to 28.8%", "", "")
    made.add_row(
        "tiny-teacher-of-a-long-name", "100.0%", "89.1% to 100.0%", "+87.5% (76.0% to 99.0%)", "1e-8"
    )
    return made


def test_a_table_is_whole_where_it_fits_and_where_it_does_not(screen):
    for width, is_terminal in ((40, True), (80, True), (160, True), (80, False), (40, False)):
        text = screen(width, is_terminal)
        show_figures(table())
        shown = text()
        assert "…" not in shown
        for value in ("tiny-teacher-of-a-long-name", "+87.5% (76.0% to 99.0%)", "1e-8", "gsm8k: 50 problems"):
            assert value in " ".join(shown.split()), (width, is_terminal, value)
    assert "accuracy: 12.5%" not in shown  # a file takes the table itself


def test_a_title_is_as_wide_as_the_terminal_and_not_as_its_table(screen):
    title = "forward_kl: 12 steps in 2 s, 6 s with loading and evaluation"
    for is_terminal in (True, False):
        text = screen(80, is_terminal)
        made = Table(title=title)
        made.add_column("loss")
        made.add_row("0.0612")
        show_figures(made)
        assert text().splitlines()[0] == title
