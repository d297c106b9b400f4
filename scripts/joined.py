"""Two grids of one experiment as one: their runs in one report, tested together (docs/results/NAME_joined).

    python scripts/joined.py [NAME ...] [--runs runs]

A grid that stopped after some of its students, and a file with the others at the rates that it chose:
`epochs` and `epochs_more`, `foreign` and `foreign_more`. The second part's figures are copied from `--runs`
where they are there; all else comes out of the tables in docs/results.
"""

from __future__ import annotations

import csv
from pathlib import Path

from results import PAGES, TARGET, fill_pages, read_options, write

from hpd.experiments.experiment import Experiment, load_experiment
from hpd.experiments.grid import group_key, short
from hpd.experiments.report import Report, report_on
from hpd.experiments.results import Results, Run, read_results
from hpd.experiments.tables import run_table

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("epochs", "foreign")
SECTIONS = ("results", "tests", "thirds", "scaling", "sensitivity")
"""Of the report: those that are made of the runs' figures alone."""


def parts(name: str) -> tuple[Path, Path]:
    """The tables of runs of both grids."""
    return TARGET / name / "data" / "runs.csv", TARGET / f"{name}_more" / "runs.csv"


def joined(name: str) -> Report:
    """The report on the runs of both grids.

    Raises:
        ValueError: they measured different figures, or share a student.
    """
    experiment = load_experiment(ROOT / "experiments" / f"{name}.yaml")
    first, second = (read_runs(path, experiment) for path in parts(name))
    if set(first[0].figures) != set(second[0].figures):
        raise ValueError(f"{name}: the two parts have different figures.")
    if shared := {run.unit for run in first} & {run.unit for run in second}:
        raise ValueError(f"{name}: both parts have {', '.join(sorted(shared))}.")
    axes = _axes(experiment)
    order = {axis: [run.axes[axis] for run in first] for axis in axes}
    runs = sorted([*first, *second], key=lambda run: [order[axis].index(run.axes[axis]) for axis in axes])
    results = Results(
        title=f"{name} and {name}_more",
        question=experiment.question,
        runs=runs,
        axes=axes,
        experiment=experiment,
        teacher=_teacher(TARGET / name / "data" / "results.csv"),
    )
    report = report_on(results)
    units = {run.unit for run in runs}
    return report._replace(
        status=f"{len(runs)} runs, {len(units)} students, out of {name}'s and {name}_more's tables of runs",
        sections=[section for section in report.sections if section.key in SECTIONS],
    )


def read_runs(path: Path, experiment: Experiment) -> list[Run]:
    """The runs of a table, as far as figures go."""
    axes = _axes(experiment)
    columns = {axis: "method" if axis == "variant" else short(axis) for axis in axes}
    runs = []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            labels = {axis: row.pop(column) for axis, column in columns.items()}
            *paired, seed = row.pop("seed").split(", ")
            runs.append(
                Run(
                    folder=path.parent,
                    axes=labels,
                    group=group_key(labels, axes),
                    seed=int(seed.removeprefix("seed ")),
                    recipe={},
                    figures={name.replace(" ", "_"): float(value) for name, value in row.items()},
                    logs=[],
                    records={},
                    answers={},
                    environment={},
                    cost={},
                    teacher={},
                    paired=tuple(paired),
                )
            )
    return runs


def _axes(experiment: Experiment) -> tuple[str, ...]:
    return ("variant", *(axis for axis in experiment.axes if axis not in experiment.repeats))


def _teacher(path: Path) -> dict[str, float]:
    """The teacher's figures, which both grids share."""
    with path.open(encoding="utf-8", newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["method"] == "teacher")
    return {name.replace(" ", "_"): float(value) for name, value in row.items() if value and name != "method"}


def main() -> None:
    names, runs = read_options(__doc__, NAMES)
    reports = {}
    for name in names or NAMES:
        source, target = runs / f"{name}_more", parts(name)[1]
        if source.is_dir():
            target.parent.mkdir(exist_ok=True)
            target.write_text(run_table(read_results([source])).as_csv(), encoding="utf-8")
        reports[f"{name}_joined"] = report = joined(name)
        write(report, f"{name}_joined")
    fill_pages(reports, PAGES)


if __name__ == "__main__":
    main()
