"""`hpd eval` as people see it: bars with the time left, then tables."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.markup import escape

from hpd.evaluate.command import EvalCommand, eval_sections, evaluate_models, names_of
from hpd.evaluate.distribution import TEXTS, WRITING
from hpd.evaluate.generate import unfinished
from hpd.evaluate.harness import HarnessCommand, run_harness
from hpd.evaluate.measure import MetricsCommand, measure_models
from hpd.evaluate.tasks import task_and_settings
from hpd.generation.vllm_engine import VllmOptions
from hpd.progress import quiet_libraries
from hpd.terminal.console import TerminalProgress, console, show_figures, show_next
from hpd.terminal.eval_options import HarnessOptions, MetricsOptions, TaskOptions
from hpd.terminal.evaluation_tables import harness_table, metrics_table, result_tables
from hpd.training.stopping import ends_kept

__all__ = [
    "evaluate_with_display",
    "harness_with_display",
    "measure_with_display",
    "run_eval",
]


def run_eval(options: TaskOptions | MetricsOptions | HarnessOptions) -> None:
    """`hpd eval` in the mode that was asked for."""
    if isinstance(options, MetricsOptions):
        measure_with_display(_metrics_command(options))
    elif isinstance(options, HarnessOptions):
        harness_with_display(_harness_command(options))
    else:
        evaluate_with_display(_task_command(options))


def _task_command(options: TaskOptions) -> EvalCommand:
    judge = {"url": options.judge_url, "model": options.judge_model}
    sections = eval_sections(
        options.tasks,
        options.data,
        [
            *(options.option or ()),
            *(f"judge.{name}={value}" for name, value in judge.items() if value is not None),
        ],
        limit=options.limit,
        limit_seed=options.limit_seed,
        few_shot=options.few_shot,
        few_shot_data=options.few_shot_data and str(options.few_shot_data),
        preset=options.preset,
        num_samples=options.samples,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        system_prompt=options.system_prompt,
    )
    progress = TerminalProgress()
    return EvalCommand(
        models=tuple(options.models),
        tasks=[
            task_and_settings(section, progress, top_k=options.top_k, chat_template=options.chat_template)
            for section in sections
        ],
        engine=options.engine,
        vllm=VllmOptions(
            tensor_parallel=options.tensor_parallel,
            memory_share=options.memory_share,
            max_length=options.max_length,
            eager=options.eager,
        ),
        dtype=options.dtype,
        output=options.output,
    )


def _metrics_command(options: MetricsOptions) -> MetricsCommand:
    if options.data is None:
        raise ValueError("--metrics needs texts: --data FILE with prompts and completions.")
    given = {key: value for key, value in options.generation().items() if value is not None}
    return MetricsCommand(
        models=tuple(options.models),
        teacher=options.teacher,
        data=options.data,
        metrics=_names(options.metrics or ""),
        texts=TEXTS if options.metrics_on is None else _names(options.metrics_on),
        vocabulary=options.vocabulary or "error",
        limit=options.limit,
        settings=replace(WRITING, **given),
        dtype=options.dtype,
        output=options.output,
    )


def _harness_command(options: HarnessOptions) -> HarnessCommand:
    return HarnessCommand(
        models=tuple(options.models),
        harness=options.harness or "",
        tasks=_names(options.tasks),
        include=options.data,
        limit=options.limit,
        few_shot=options.few_shot,
        generation=options.generation(),
        dtype=options.dtype,
        output=options.output,
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def evaluate_with_display(command: EvalCommand) -> None:
    """Answer, grade, print."""
    quiet_libraries()
    names = names_of(command.models)
    folders = [folder for model in command.models if (folder := command.folder(model)) is not None]

    def kept() -> str | None:
        found = [str(folder) for folder in dict.fromkeys(folders) if unfinished(folder)]
        return f"answers are in {', '.join(found)}" if found else None

    with ends_kept(Path(*folders[:1]), "The evaluation", kept):
        results = evaluate_models(command, TerminalProgress())
    for found in results.values():
        for table in result_tables(found, names):
            show_figures(table)
        for model, result in found.items():
            if result.num_ungraded:
                console.print(
                    f"[yellow]{escape(names[model])}: {result.num_ungraded} answers could not be graded.[/]"
                )
    if folders:
        shown = ", ".join(map(str, dict.fromkeys(folders)))
        console.print(f"evals.json and every answer in {shown}", highlight=False)
    show_next(f"hpd chat {shlex.quote(str(command.models[-1]))}")


def measure_with_display(command: MetricsCommand) -> None:
    """Measure each model against the teacher and show a table."""
    quiet_libraries()
    with _starting_again(command.output):
        for model, report in measure_models(command, TerminalProgress()):
            show_figures(metrics_table(Path(model).name, report))
            if command.output is not None:
                console.print(f"figures in {command.output / 'evals.json'}", highlight=False)


def harness_with_display(command: HarnessCommand) -> None:
    """Let the harness evaluate each model and show a table."""
    quiet_libraries()
    with _starting_again(command.output):
        for model, results in run_harness(command):
            show_figures(harness_table(Path(model).name, results))


@contextlib.contextmanager
def _starting_again(output: Path | None) -> Iterator[None]:
    """Signals end what keeps whole results only, which the same command replaces by equal ones."""
    with ends_kept(output or Path(), "The evaluation", lambda: None):
        yield
