"""Tables of `hpd eval`: results side by side with paired tests, distribution metrics, a harness's results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from hpd.evaluate.run import EvalResult
from hpd.evaluate.statistics import compare_paired

__all__ = ["figure_table", "harness_table", "metrics_table", "result_tables"]

_MOST_COLUMNS = 4
"""More figures than these go below the table."""


def result_tables(results: Mapping[str, EvalResult], names: Mapping[str, str]) -> list[Table]:
    """One task: its results, and a second table where it has many figures."""
    tables = [result_table(results, names)]
    if len(_figures(results)) > _MOST_COLUMNS:
        tables.append(figure_table(results, names))
    return tables


def result_table(results: Mapping[str, EvalResult], names: Mapping[str, str]) -> Table:
    """One task: a row per model, and how the others differ from the first."""
    first = next(iter(results.values()))
    samples = f", {first.num_samples} samples each" if first.num_samples > 1 else ""
    table = Table(title=f"{first.task}: {first.num_examples} problems{samples}", title_justify="left")
    figures = _figures(results)
    if len(figures) > _MOST_COLUMNS:
        figures = []
    columns = [first.metric, "95 % interval", *figures]
    differs = len(results) > 1
    for column in (
        "model",
        *columns,
        *(("against first", "p") if differs else ()),
        "tokens per answer",
        "cut off",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    for model, result in results.items():
        low, high = result.interval
        cells = [
            _shown(result.metric, result.value),
            "unknown" if low != low else f"{_shown(result.metric, low)} to {_shown(result.metric, high)}",
        ]
        cells += [_shown(key, result.figures.get(key)) for key in figures]
        if differs:
            cells += _difference(first, result)
        table.add_row(escape(names[model]), *cells, f"{result.mean_tokens:.0f}", f"{result.truncated:.1%}")
    if differs:
        table.caption = (
            "p: exact McNemar for one right or wrong answer per problem, else signs of the problems' "
            "differences flipped"
        )
        table.caption_justify = "left"
    return table


def figure_table(results: Mapping[str, EvalResult], names: Mapping[str, str]) -> Table:
    """Figures of a task beyond its metric: a row per figure, a column per model. Plain numbers, shares from 0
    to 1."""
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
        key
        for result in results.values()
        for key, value in result.figures.items()
        if isinstance(value, float)
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
    """Results of lm-eval: a row per metric."""
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


def metrics_table(name: str, report: Mapping[str, Any]) -> Table:
    """One row per figure, one column per text."""
    texts = [text for text in ("dataset", "student", "gap") if text in report]
    headings = {"dataset": "data set", "student": "its own text", "gap": "own - data set"}
    table = Table(
        title=f"{escape(name)}: {report['num_rows']} rows, 95 % intervals over rows", title_justify="left"
    )
    table.add_column("")
    for text in texts:
        table.add_column(headings[text], justify="right")
    for figure in dict.fromkeys(figure for text in texts for figure in report[text]):
        table.add_row(figure.replace("_", " "), *(_cell(report[text].get(figure)) for text in texts))
    return table


def _cell(figure: Any) -> str:
    if figure is None:
        return ""
    if not isinstance(figure, dict):
        return f"{figure:,}"
    if figure["value"] is None:
        return "none"
    if figure["interval"] is None:
        return f"{figure['value']:.4g}"
    low, high = figure["interval"]
    return f"{figure['value']:.4g} ({low:.4g} to {high:.4g})"
