"""Run the commands that pages show, and write what they print below them, or --check the pages.

A page says of a listing how its commands are run:

    <!-- terminal: columns=80 -->
    ```console
    $ hpd doctor recipe.yaml
    ```
    <!-- end -->

`columns=N` is a terminal of that width, `pipe` is none; `head=N` and `tail=N` keep so many lines of each
command's output. All pages share one folder, in the order of PAGES: a command finds what earlier ones left.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import termios
from collections.abc import Sequence
from pathlib import Path

import pyte

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [
    DOCS / "start/install.md",
    DOCS / "start/first-run.md",
    DOCS / "start/own-pair.md",
    DOCS / "guides/generate.md",
    DOCS / "guides/cache.md",
    DOCS / "guides/evaluate.md",
    DOCS / "guides/on-policy.md",
    DOCS / "guides/memory.md",
    DOCS / "guides/compare.md",
    DOCS / "guides/troubleshooting.md",
    DOCS / "reference/terminal.md",
]
BLOCK = re.compile(r"(<!-- terminal: (.*?) -->\n```console\n)(.*?)(```\n<!-- end -->)", re.DOTALL)
_ROWS = 2_000
"""Of the training file."""
_LINES = 2_000
"""That the terminal remembers."""
_ROWS_SHOWN = 50


def prepare(folder: Path) -> None:
    """What stands in the folder of the commands: a teacher, rows and problems of the packaged demo, and the
    experiment of the page about experiments."""
    import hpd.demo

    demo = Path(hpd.demo.__file__).parent
    shutil.copytree(demo / "teacher", folder / "models/teacher")
    shutil.copy(demo / "data/test.jsonl", folder)
    with gzip.open(demo / "data/train.jsonl.gz", "rt", encoding="utf-8") as rows:
        (folder / "train.jsonl").write_text("".join(itertools.islice(rows, _ROWS)), encoding="utf-8")
    page = (DOCS / "guides/compare.md").read_text(encoding="utf-8")
    (folder / "grid.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    program = folder.parent / "bin/hpd"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m hpd "$@"\n')
    program.chmod(0o755)


def run(command: str, folder: Path, columns: int | None) -> str:
    """What a command shows: in a terminal of so many columns, or in a pipe."""
    environment = {
        **os.environ,
        "PATH": f"{folder.parent / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TERM": "xterm-256color",
    }
    environment.pop("COLUMNS", None)
    environment.pop("CI", None)
    if columns is None:
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        shown, code = done.stdout, done.returncode
    else:
        shown, code = _in_terminal(command, folder, environment, columns)
    if code not in (0, 2):
        raise RuntimeError(f"{command} ended with exit code {code}:\n{shown}")
    for place in (folder, ROOT):
        shown = shown.replace(f"{place}/", "").replace(str(place), ".")
    return shown


def _in_terminal(command: str, folder: Path, environment: dict[str, str], columns: int) -> tuple[str, int]:
    """The text that is left on the screen, and the exit code."""
    screen = pyte.Screen(columns, _LINES)
    stream = pyte.ByteStream(screen)
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (_ROWS_SHOWN, columns))
    process = subprocess.Popen(
        ["sh", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,  # a command that asks would wait for an answer
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    while True:
        try:
            read = os.read(master, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not read:
            break
        stream.feed(read)
    os.close(master)
    code = process.wait()
    return "\n".join(line.rstrip() for line in screen.display).rstrip() + "\n", code


def filled(text: str, folder: Path) -> str:
    """A page with the output of its commands made again."""

    def fill(match: re.Match[str]) -> str:
        options = dict(pair.partition("=")[::2] for pair in match[2].split())
        columns = None if "pipe" in options else int(options["columns"])
        parts = []
        for command in commands(match[3]):
            shown = run(command, folder, columns).rstrip().splitlines()
            parts += [f"$ {command}", *_kept(shown, options), ""]
        return "".join([match[1], "\n".join(parts[:-1]), "\n", match[4]])

    return BLOCK.sub(fill, text)


def commands(listing: str) -> list[str]:
    """The commands of a listing."""
    return [line[2:] for line in listing.splitlines() if line.startswith("$ ")]


def _kept(lines: list[str], options: dict[str, str]) -> list[str]:
    head, tail = int(options.get("head", 0)), int(options.get("tail", 0))
    if not (head or tail) or len(lines) <= head + tail:
        return lines
    return [*lines[:head], "...", *(lines[-tail:] if tail else [])]


def masked(text: str) -> list[str]:
    """Lines without what changes from run to run: figures, the length of bars and columns."""
    plain = re.sub(r"[\d,.]+|[━╸╺─┏┓┗┛┡┩└┘╇┳┻┴┬╭╮╰╯]+", "#", text)
    return [" ".join(line.split()) for line in plain.splitlines()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Exit with 1 where a page shows something else.")
    check = parser.parse_args(arguments).check
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "work"
        folder.mkdir()
        prepare(folder)
        for page in PAGES:
            before = page.read_text(encoding="utf-8")
            after = filled(before, folder)
            if not check:
                page.write_text(after, encoding="utf-8")
            elif masked(before) != masked(after):
                sys.exit(f"{page.relative_to(ROOT)} is out of date: run python scripts/make_outputs.py")


if __name__ == "__main__":
    main()
