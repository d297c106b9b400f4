"""Help texts: an example that is a command, options in groups, names that are whole in any terminal."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from hpd.cli import app

COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]


def help_of(*words, columns="100"):
    done = CliRunner(env={"COLUMNS": columns, "TERMINAL_WIDTH": columns}).invoke(app, [*words, "--help"])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example_that_the_command_line_takes(command):
    found = re.search(r"Example: (hpd .*)", help_of(command))
    assert found is not None
    _, name, *words = shlex.split(found[1])
    assert name == command
    # Parsed, not run: an option that is not there or misses its value is an error.
    with get_command(app).commands[command].make_context(name, words) as context:  # type: ignore[attr-defined]
        assert context.info_name == command


def test_the_override_of_an_experiment_is_one():
    from hpd.experiments.experiment import read_experiment

    shown = re.search(r"such as (\S+=\S+)", " ".join(help_of("compare").replace("│", " ").split()))
    assert shown is not None
    text = (
        "name: e\nquestion: which?\nbase: demo\naxes: {method: [hpd, forward_kl], seed: [0]}\noutput_dir: e\n"
    )
    assert read_experiment(text, [shown[1]]).set == {"train.max_steps": 50}


def test_options_of_eval_are_in_groups():
    text = help_of("eval")
    for group in ("Problems", "Answers", "Speed and precision", "Judge", "Another harness"):
        assert re.search(rf"─ {group} ─", text), group


def test_names_of_options_are_whole_at_forty_columns():
    code = "from hpd.cli import app; app()"
    done = subprocess.run(
        [sys.executable, "-c", code, "eval", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "40"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout
    assert "--max-new-tokens" in done.stdout
