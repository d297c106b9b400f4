"""What `hpd eval` shows: bars with the time left, results side by side, paired tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.markup import escape
from rich.table import Table

from hpd.display import console, progress_bar
from hpd.evaluate.command import EvalCommand, EvalProgress, evaluate_models, names_of
from hpd.evaluate.generate import Progress
from hpd.evaluate.run import EvalResult
from hpd.evaluate.statistics import compare_paired
from hpd.train import quiet_libraries

__all__ = ["TerminalEvalProgress", "evaluate_with_display", "harness_table", "judging_bar", "result_table"]

_MOST_COLUMNS = 4
"""More figures than these go below the table."""


class TerminalEvalProgress(EvalProgress):
    def __init__(self, names: Mapping[str, str]):
        self._names = names

    def say(self, text: str) -> None:
        console.print(escape(text), highlight=False)

    def answers(self, model: str, task: str) -> Progress:
        return progress_bar(f"{task} answers of {self._names[model]}")


def judging_bar(task: str) -> Callable[[int, int], None]:
    """Progress of a judge."""
    return progress_bar(f"{task} verdicts")


def evaluate_with_display(command: EvalCommand) -> None:
    """`hpd eval`: answer, grade, print."""
    quiet_libraries()
    names = names_of(command.models)
    results = evaluate_models(command, TerminalEvalProgress(names))
    for task in command.tasks:
        console.print(result_table(results[task.name], names))
        if len(_figures(results[task.name])) > _MOST_COLUMNS:
            console.print(figure_table(results[task.name], names))
        for model, result in results[task.name].items():
            if result.num_ungraded:
                console.print(f"[yellow]{escape(names[model])}: {result.num_ungraded} answers could not be graded.[/]")
    folders = list(dict.fromkeys(str(folder) for model in command.models if (folder := command.folder(model))))
    if folders:
        console.print(f"evals.json and every answer in {', '.join(folders)}", highlight=False)


def result_table(results: Mapping[str, EvalResult], names: Mapping[str, str]) -> Table:
    """One task: a row per model, and how the others differ from the first."""
    first = next(iter(results.values()))
    samples = f", {first.num_samples} samples each" if first.num_samples > 1 else ""
    table = Table(title=f"{first.task}: {first.num_examples} problems{samples}", title_justify="left")
    figures = _figures(results)
    figures = figures if len(figures) <= _MOST_COLUMNS else []
    columns = [first.metric, "95 % interval", *figures]
    differs = len(results) > 1
    for column in ("model", *columns, *(("against first", "p") if differs else ()), "tokens per answer", "cut off"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for model, result in results.items():
        low, high = result.interval
        cells = [_shown(result.metric, result.value), f"{_shown(result.metric, low)} to {_shown(result.metric, high)}"]
        cells += [_shown(key, result.figures.get(key)) for key in figures]
        if differs:
            cells += _difference(first, result)
        table.add_row(escape(names[model]), *cells, f"{result.mean_tokens:.0f}", f"{result.truncated:.1%}")
    if differs:
        table.caption = "p: exact McNemar for one right or wrong answer per problem, else paired bootstrap over problems"
    return table


def figure_table(results: Mapping[str, EvalResult], names: Mapping[str, str]) -> Table:
    """What a task sums up beyond its metric: a row per figure, a column per model. Plain numbers, shares from 0 to 1."""
    table = Table(box=None, show_header=len(results) > 1)
    table.add_column("")
    for model in results:
        table.add_column(escape(names[model]), justify="right")
    for key in _figures(results):
        values = [result.figures.get(key) for result in results.values()]
        table.add_row(key.replace("_", " "), *("" if value is None else f"{value:.6g}" for value in values))
    return table


def _figures(results: Mapping[str, EvalResult]) -> list[str]:
    """Names of the figures that are numbers; avg@n is the metric itself."""
    known = dict.fromkeys(
        key for result in results.values() for key, value in result.figures.items() if isinstance(value, float)
    )
    return [key for key in known if not key.startswith("avg@")]


def _difference(first: EvalResult, other: EvalResult) -> list[str]:
    if other is first:
        return ["", ""]
    comparison = compare_paired(first.scores(), other.scores())
    low, high = comparison.interval
    text = [_shown(other.metric, value, sign=True) for value in (comparison.difference, low, high)]
    return [f"{text[0]} ({text[1]} to {text[2]})", f"{comparison.p_value:.3g}"]


def _shown(metric: str, value: float | None, *, sign: bool = False) -> str:
    """Shares as percentages, scores as they are."""
    if value is None:
        return ""
    plus = "+" if sign else ""
    return f"{value:{plus}.2f}" if metric.endswith("score") or abs(value) > 1 else f"{value:{plus}.1%}"


def harness_table(model: str, found: Mapping[str, Mapping[str, float]]) -> Table:
    """What lm-eval found."""
    table = Table(title=f"{model}, graded by lm-eval", title_justify="left")
    for column in ("task", "metric,filter", "value", "standard error"):
        table.add_column(column, justify="left" if column in ("task", "metric,filter") else "right")
    for task, values in found.items():
        for key, value in values.items():
            metric, _, where = key.partition(",")
            if not where or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{where}")
            table.add_row(task, key, f"{value:.4f}", "" if error is None else f"{error:.4f}")
    return table
