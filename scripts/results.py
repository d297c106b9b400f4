"""Writes docs/results/NAME (report, plots, data) from finished grids, and their tables in docs/evidence.

    python scripts/results.py [NAME ...] [--runs runs]

The HTML page is left out of the repository: `hpd report runs/NAME` builds it.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpd.experiments.output import markdown_table, write_report
from hpd.experiments.report import Report, build_report
from hpd.experiments.table import Table
from hpd.experiments.tasks.prepared import home

ROOT = Path(__file__).resolve().parent.parent
PAGES, TARGET = sorted((ROOT / "docs" / "evidence").glob("*.md")), ROOT / "docs" / "results"
COLUMNS: dict[str, tuple[str, ...] | None] = {
    "results": (
        "accuracy",
        "top p accuracy",
        "sampled accuracy",
        "forward kl",
        "reverse kl",
        "student entropy",
        "own entropy",
        "own reverse kl",
    ),
    "stability": None,
    "tuning": None,
    "ablation": None,
    "cost": None,
}
"""Table -> the columns that a page shows beside those that name the row; None: all."""
_BLOCK = re.compile(r"<!-- table (\w+) (\w+)(?: ([^>]+?))? -->\n(?:.*?\n)??<!-- end -->", re.DOTALL)


def copy_report(name: str, runs: Path) -> Report:
    """The report of a grid, written to docs/results/NAME."""
    report = build_report([runs / name])
    folder = write(report, name)
    # Where this machine keeps tasks concerns no reader.
    for file in (folder / "report.md", *folder.glob("data/*.csv")):
        file.write_text(file.read_text(encoding="utf-8").replace(str(home()), "$HPD_HOME"), encoding="utf-8")
    return report


def write(report: Report, name: str) -> Path:
    """A report at docs/results/NAME, in place of the one that is there."""
    folder = TARGET / name
    shutil.rmtree(folder, ignore_errors=True)
    write_report(report, folder).unlink()
    return folder


def read_options(about: str | None, known: Sequence[str]) -> tuple[list[str], Path]:
    """The names of the command line, which may be those of `known`, and the folder of runs."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    options = parser.parse_args()
    if unknown := set(options.names) - set(known):
        parser.error(f"there is no {', '.join(sorted(unknown))} among {', '.join(known)}.")
    return options.names, options.runs


def table_of(report: Report, key: str) -> str:
    """A table of a report as Markdown, cut to the columns above."""
    table = next(t for section in report.sections for t in section.tables if t.key == key)
    chosen = COLUMNS[key]
    named = [c for c in table.columns if chosen is None or c in chosen or c in _axes(table)]
    places = [table.columns.index(c) for c in named]
    return markdown_table(
        Table(key, "", "", tuple(named), [tuple(row[i] for i in places) for row in table.rows])
    )


def verdicts_of(report: Report) -> str:
    """Every test in one table, and before it what the seeds cannot decide."""
    assert report.verdicts is not None
    warnings = [f"**Warning.** {text}\n" for text in report.warnings]
    return "\n".join([*warnings, markdown_table(report.verdicts)])


def fill_pages(reports: Mapping[str, Report], pages: Sequence[Path], runs: Path | None = None) -> None:
    """Renew the tables of these reports on the pages.

    Args:
        runs: where the grids lie, for tests against another baseline than theirs.
    """

    def fill(found: re.Match[str]) -> str:
        name, key, baseline = found.groups()
        if name not in reports:
            return found[0]
        if key == "verdicts":
            other = build_report([runs / name], baseline) if runs is not None and baseline else None
            table = verdicts_of(other or reports[name])
        else:
            table = table_of(reports[name], key)
        head = found[0].partition("\n")[0]
        return f"{head}\n{table}\n<!-- end -->"

    for page in pages:
        page.write_text(_BLOCK.sub(fill, page.read_text(encoding="utf-8")), encoding="utf-8")


def _axes(table: Table) -> tuple[str, ...]:
    """The columns that name the row: those before the first figure."""
    if table.key != "results":
        return ()
    figures = COLUMNS["results"] or ()
    first = next(i for i, column in enumerate(table.columns) if column in figures)
    return tuple(table.columns[:first])


def main() -> None:
    # docs/results has NAME_joined and NAME_more of scripts/joined.py, too.
    known = sorted(path.parent.name for path in TARGET.glob("*/data") if path.parent.name[-7:] != "_joined")
    names, runs = read_options(__doc__, known)
    shown = {found[1] for page in PAGES for found in _BLOCK.finditer(page.read_text(encoding="utf-8"))}
    chosen = names or sorted(shown.intersection(known))
    fill_pages({name: copy_report(name, runs) for name in chosen}, PAGES, runs)


if __name__ == "__main__":
    main()
