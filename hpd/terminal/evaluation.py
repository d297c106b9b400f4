"""What `hpd eval` shows: bars with the time left, results side by side, paired tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from hpd.evaluate.command import EvalCommand, evaluate_models, names_of
from hpd.evaluate.run import EvalResult, write_entry
from hpd.evaluate.statistics import compare_paired
from hpd.generation.settings import GenerationSettings
from hpd.progress import quiet_libraries
from hpd.terminal.console import TerminalProgress, console

__all__ = [
    "evaluate_with_display",
    "harness_table",
    "measure_with_display",
    "metrics_table",
    "result_table",
    "run_eval",
]


_MOST_COLUMNS = 4
"""More figures than these go below the table."""


def evaluate_with_display(command: EvalCommand) -> None:
    """`hpd eval`: answer, grade, print."""
    quiet_libraries()
    names = names_of(command.models)
    results = evaluate_models(command, TerminalProgress())
    for task in command.tasks:
        console.print(result_table(results[task.name], names))
        if len(_figures(results[task.name])) > _MOST_COLUMNS:
            console.print(figure_table(results[task.name], names))
        for model, result in results[task.name].items():
            if result.num_ungraded:
                console.print(
                    f"[yellow]{escape(names[model])}: {result.num_ungraded} answers could not be graded.[/]"
                )
    folders = list(
        dict.fromkeys(str(folder) for model in command.models if (folder := command.folder(model)))
    )
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
            f"{_shown(result.metric, low)} to {_shown(result.metric, high)}",
        ]
        cells += [_shown(key, result.figures.get(key)) for key in figures]
        if differs:
            cells += _difference(first, result)
        table.add_row(escape(names[model]), *cells, f"{result.mean_tokens:.0f}", f"{result.truncated:.1%}")
    if differs:
        table.caption = (
            "p: exact McNemar for one right or wrong answer per problem, else paired bootstrap over problems"
        )
    return table


def figure_table(results: Mapping[str, EvalResult], names: Mapping[str, str]) -> Table:
    """What a task sums up beyond its metric: a row per figure, a column per model. Plain numbers, shares from
    0 to 1."""
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


def measure_with_display(
    models: Sequence[str],
    teacher: str | None,
    data: Path | None,
    metrics: str,
    *,
    texts: str = "dataset,student",
    vocabulary: str = "error",
    limit: int | None = None,
    generation: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    output: Path | None = None,
) -> None:
    """Measure each model against the teacher, show a table, and put the figures into `evals.json`.

    Args:
        models, teacher: folders or Hub ids; the teacher may be left out where no metric needs it.
        data: file with prompts and completions.
        metrics, texts: names of `METRICS` and `TEXTS`, with commas between them.
        vocabulary: policy for heads of unequal size.
        limit: first n rows.
        generation: fields of `GenerationSettings` for the students' texts; None values are left at the
            defaults here: temperature 1, 256 tokens.
        dtype: of the weights.
        output: folder of evals.json; None writes nothing.

    Raises:
        FileNotFoundError, ValueError: before a model is loaded, where it can be known.
    """
    from hpd.evaluate.distribution import check_metrics, read_text_rows
    from hpd.losses.heads import POLICIES

    chosen, read = (_names(text) for text in (metrics, texts))
    check_metrics(chosen, read, teacher is not None)
    if data is None:
        raise ValueError("--metrics needs texts: --data FILE with prompts and completions.")
    if vocabulary not in POLICIES:
        raise ValueError(f"vocabulary must be one of {', '.join(POLICIES)}, got {vocabulary!r}.")
    given = {key: value for key, value in (generation or {}).items() if value is not None}
    settings = GenerationSettings(**{"temperature": 1.0, "max_new_tokens": 256, **given})
    if settings.num_samples > 1 or settings.stop:
        raise ValueError(
            "--metrics reads one text per row, to its end: leave out --samples and stop strings."
        )
    rows = read_text_rows(data, limit=limit)
    from hpd.progress import quiet_libraries

    quiet_libraries()
    loaded = _load(teacher, "teacher", dtype) if teacher is not None else (None, None)
    for model in models:
        report = _measure(_load(model, "student", dtype), loaded, rows, chosen, settings, read, vocabulary)
        console.print(metrics_table(Path(model).name, report))
        identity = {
            "model": model,
            "teacher": teacher,
            "data": str(data),
            "limit": limit,
            "metrics": chosen,
            "texts": read,
            "vocabulary": vocabulary,
            "settings": dataclasses.asdict(settings),
        }
        _keep_report(output, identity, report)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _load(path: str, role: str, dtype: str) -> tuple[Any, Any]:
    import torch

    from hpd.config.models import ModelConfig
    from hpd.models.load import load_model, load_tokenizer

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")
    source = ModelConfig(model=path, dtype=dtype)
    tokenizer = load_tokenizer(source, role)
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(source, role).to(device), tokenizer


def _measure(
    student: tuple[Any, Any],
    teacher: tuple[Any, Any],
    rows: Any,
    metrics: Sequence[str],
    settings: GenerationSettings,
    texts: Sequence[str],
    vocabulary: str,
) -> dict[str, Any]:
    from hpd.evaluate.distribution import distribution_metrics

    return distribution_metrics(
        student[0],
        teacher[0],
        student[1],
        rows,
        metrics,
        settings,
        texts=texts,
        teacher_tokenizer=teacher[1],
        vocabulary=vocabulary,
        progress=TerminalProgress(),
    )


def _keep_report(folder: Path | None, identity: dict[str, Any], report: dict[str, Any]) -> None:
    if folder is not None:
        write_entry(folder, identity, {"distribution": report})
        console.print(f"figures in {folder / 'evals.json'}", highlight=False)


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


_METRICS_USE = (
    "models",
    "data",
    "limit",
    "generation",
    "dtype",
    "output",
    "metrics",
    "metrics_on",
    "teacher",
    "vocabulary",
)


_HARNESS_USES = (
    "models",
    "tasks",
    "data",
    "limit",
    "generation",
    "few_shot",
    "dtype",
    "output",
    "harness",
)


_TASKS_USE = (
    "models",
    "tasks",
    "data",
    "limit",
    "limit_seed",
    "preset",
    "generation",
    "few_shot",
    "few_shot_data",
    "options",
    "judge_url",
    "judge_model",
    "engine",
    "tensor_parallel",
    "dtype",
    "output",
)


_UNSET: dict[str, Any] = {
    "tasks": "exact-match",
    "few_shot": 0,
    "options": (),
    "engine": "transformers",
    "tensor_parallel": 1,
}


def run_eval(**given: Any) -> None:
    """`hpd eval` with the options of the command line, by their names there.

    Raises:
        ValueError: an option that the chosen mode does not use.
    """
    if given["metrics"] is not None and given["harness"] is not None:
        raise ValueError("--metrics and --harness are different evaluations: give one of them.")
    if given["metrics"] is not None:
        _require_used(given, _METRICS_USE, "--metrics")
        _metrics(given)
    elif given["harness"] is not None:
        _require_used(given, _HARNESS_USES, "--harness")
        _harness(given)
    else:
        _require_used(given, _TASKS_USE, "an evaluation of tasks")
        _tasks(given)


def _require_used(given: Mapping[str, Any], used: tuple[str, ...], mode: str) -> None:
    unused = [name for name, value in given.items() if name not in used and value != _UNSET.get(name)]
    if unused:
        raise ValueError(f"--{unused[0].replace('_', '-')} has no effect on {mode}; leave it out.")


def _tasks(given: Mapping[str, Any]) -> None:
    from hpd.evaluate.command import EvalCommand
    from hpd.evaluate.tasks import build_tasks

    judge = [
        f"judge.{name}={given[f'judge_{name}']}"
        for name in ("url", "model")
        if given[f"judge_{name}"] is not None
    ]
    tasks = build_tasks(
        given["tasks"],
        given["data"],
        [*given["options"], *judge],
        limit=given["limit"],
        limit_seed=given["limit_seed"],
        few_shot=given["few_shot"],
        few_shot_data=given["few_shot_data"],
        progress=TerminalProgress(),
    )
    names = ("models", "preset", "generation", "engine", "tensor_parallel", "dtype", "output")
    evaluate_with_display(EvalCommand(tasks=tasks, **{name: given[name] for name in names}))


def _metrics(given: Mapping[str, Any]) -> None:
    measure_with_display(
        given["models"],
        given["teacher"],
        given["data"],
        given["metrics"],
        texts=given["metrics_on"] or "dataset,student",
        vocabulary=given["vocabulary"] or "error",
        limit=given["limit"],
        generation=given["generation"],
        dtype=given["dtype"],
        output=given["output"],
    )


def _harness(given: Mapping[str, Any]) -> None:
    from hpd.evaluate.harness import HARNESSES, run_harness
    from hpd.progress import quiet_libraries
    from hpd.terminal.console import console

    if given["harness"] not in HARNESSES:
        raise ValueError(f"Unknown harness {given['harness']!r}; known: {', '.join(HARNESSES)}.")
    quiet_libraries()
    generation = dict(given["generation"])
    unused = [key for key in ("num_samples", "top_k") if generation[key] is not None]
    if unused or generation["seed"]:
        raise ValueError(f"{(unused or ['seed'])[0]} is not passed on to lm-eval; leave it out.")
    sampling = {key: generation[key] for key in ("temperature", "top_p") if generation[key] is not None}
    if sampling.get("temperature"):
        sampling["do_sample"] = True
    if generation["max_new_tokens"] is not None:
        sampling["max_gen_toks"] = generation["max_new_tokens"]
    tasks = [name.strip() for name in given["tasks"].split(",") if name.strip()]
    for model in given["models"]:
        found = run_harness(
            model,
            tasks,
            include=given["data"],
            limit=given["limit"],
            num_few_shot=given["few_shot"] or None,
            batch_size=generation["batch_size"],
            dtype=given["dtype"],
            generation=sampling,
            chat_template=generation["chat_template"] == "always",
            system_prompt=generation["system_prompt"],
        )
        console.print(harness_table(Path(model).name, found))
        identity = {
            "model": model,
            "harness": "lm-eval",
            "tasks": tasks,
            "limit": given["limit"],
            "few_shot": given["few_shot"],
            "settings": generation,
        }
        if given["output"] is not None:
            write_entry(given["output"], identity, {"results": found})
