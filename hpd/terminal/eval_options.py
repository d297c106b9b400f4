"""Options of `hpd eval`: a frozen dataclass per mode, and all of them together, as typer reads them.

Without `from __future__ import annotations`: typer needs the annotations themselves.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

__all__ = ["EvalOptions", "HarnessOptions", "MetricsOptions", "TaskOptions", "with_options"]

Options = TypeVar("Options")

# Groups of `hpd eval --help`; options without one stand first.
_PROBLEMS = "Problems"
_ANSWERS = "Answers"
_SPEED = "Speed and precision"
_JUDGE = "Judge"
_METRICS = "Distributions instead of tasks"
_HARNESS = "Another harness"


def with_options(kind: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Turn a function of a dataclass into a command with an option per field."""

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            function(kind(**given))

        signature = inspect.signature(kind)
        command.__doc__ = function.__doc__
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
        return command

    return decorate


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of every mode."""

    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Folders or Hub ids; compared with the first.", show_default=False
        ),
    ]
    data: Annotated[
        Path | None,
        typer.Option(
            help="A file, or a folder with one subfolder per task; without it, the Hub.",
            rich_help_panel=_PROBLEMS,
        ),
    ] = None
    limit: Annotated[
        int | None, typer.Option(help="First n problems of each task only.", min=1, rich_help_panel=_PROBLEMS)
    ] = None
    samples: Annotated[
        int | None, typer.Option(help="Answers per problem.", min=1, rich_help_panel=_ANSWERS)
    ] = None
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy.", min=0.0, rich_help_panel=_ANSWERS)
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the likeliest tokens with this mass.", rich_help_panel=_ANSWERS),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(help="Draw from this many tokens; 0 is all.", min=0, rich_help_panel=_ANSWERS),
    ] = None
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer, in tokens.", min=1, rich_help_panel=_ANSWERS)
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of sampled answers.", min=0, rich_help_panel=_ANSWERS)] = 0
    chat_template: Annotated[
        str | None, typer.Option(help="auto, never or always.", rich_help_panel=_ANSWERS)
    ] = None
    system_prompt: Annotated[
        str | None, typer.Option(help='Instead of the task\'s; "" is none.', rich_help_panel=_ANSWERS)
    ] = None
    batch_size: Annotated[
        int, typer.Option(help="Prompts generated at once.", min=1, rich_help_panel=_SPEED)
    ] = 32
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_SPEED)
    ] = "auto"
    output: Annotated[
        Path | None, typer.Option(help="Folder of evals.json and every answer; resumes there.")
    ] = None

    def generation(self) -> dict[str, Any]:
        """Fields of `GenerationSettings`; None: not given."""
        names = ("temperature", "top_p", "top_k", "max_new_tokens", "seed", "chat_template", "system_prompt")
        given = {name: getattr(self, name) for name in (*names, "batch_size")}
        return {"num_samples": self.samples, **given}


@dataclass(frozen=True, kw_only=True)
class NamedTaskOptions(ModelOptions):
    """Options of the modes that take names of tasks."""

    tasks: Annotated[
        str,
        typer.Option(
            "--tasks", "--task", "-t", help="Names with commas between them; name=FILE gives a task its file."
        ),
    ] = "exact-match"
    few_shot: Annotated[
        int,
        typer.Option(
            help="Worked examples in a plain-text prompt; 0 is none.", min=0, rich_help_panel=_PROBLEMS
        ),
    ] = 0


@dataclass(frozen=True, kw_only=True)
class TaskOptions(NamedTaskOptions):
    """Options of an evaluation on tasks of our own."""

    preset: Annotated[
        str | None,
        typer.Option(
            help="greedy, or paper: T 0.7, top-p 0.95, 10,240 tokens, 8 or 32 samples.",
            rich_help_panel=_ANSWERS,
        ),
    ] = None
    limit_seed: Annotated[
        int | None,
        typer.Option(help="Draw the n problems with this seed instead.", rich_help_panel=_PROBLEMS),
    ] = None
    few_shot_data: Annotated[
        Path | None,
        typer.Option(help="Their file; without it, the task's training file.", rich_help_panel=_PROBLEMS),
    ] = None
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="A task's option: name=value, or task.name=value."),
    ] = None
    judge_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint of the judge.", rich_help_panel=_JUDGE)
    ] = None
    judge_model: Annotated[
        str | None, typer.Option(help="The judge's name there.", rich_help_panel=_JUDGE)
    ] = None
    engine: Annotated[str, typer.Option(help="transformers or vllm.", rich_help_panel=_SPEED)] = (
        "transformers"
    )
    tensor_parallel: Annotated[
        int, typer.Option(help="vLLM: GPUs that share a model.", min=1, rich_help_panel=_SPEED)
    ] = 1
    memory_share: Annotated[
        float | None,
        typer.Option(
            help="vLLM: share of a GPU's memory, in (0, 1]; its own choice without it.",
            rich_help_panel=_SPEED,
        ),
    ] = None
    max_length: Annotated[
        int | None,
        typer.Option(
            help="vLLM: most tokens of prompt and answer; else the model's context.", rich_help_panel=_SPEED
        ),
    ] = None
    eager: Annotated[
        bool,
        typer.Option("--eager", help="vLLM: no CUDA graphs, a faster start.", rich_help_panel=_SPEED),
    ] = False


@dataclass(frozen=True, kw_only=True)
class MetricsOptions(ModelOptions):
    """Options of an evaluation of distributions."""

    metrics: Annotated[
        str | None,
        typer.Option(
            help="Instead of tasks: kl,entropy,... on the texts of --data.", rich_help_panel=_METRICS
        ),
    ] = None
    metrics_on: Annotated[
        str | None,
        typer.Option(
            help="Texts of --metrics: dataset, student or both (default).", rich_help_panel=_METRICS
        ),
    ] = None
    teacher: Annotated[
        str | None, typer.Option(help="Model that --metrics compares with.", rich_help_panel=_METRICS)
    ] = None
    vocabulary: Annotated[
        str | None,
        typer.Option(help="Unequal heads: error (default) or shared_prefix.", rich_help_panel=_METRICS),
    ] = None


@dataclass(frozen=True, kw_only=True)
class HarnessOptions(NamedTaskOptions):
    """Options of an evaluation by another harness."""

    harness: Annotated[
        str | None,
        typer.Option(help="lm-eval: run its --tasks with its own grading.", rich_help_panel=_HARNESS),
    ] = None


@dataclass(frozen=True, kw_only=True)
class EvalOptions(HarnessOptions, MetricsOptions, TaskOptions):
    """Everything that `hpd eval` takes."""

    def mode(self) -> TaskOptions | MetricsOptions | HarnessOptions:
        """The options of the mode that was chosen.

        Raises:
            ValueError: two modes, or an option that has no effect on the chosen one.
        """
        kind: type[TaskOptions | MetricsOptions | HarnessOptions] = TaskOptions
        name = "an evaluation of tasks"
        if self.metrics is not None and self.harness is not None:
            raise ValueError("--metrics and --harness are different evaluations: give one of them.")
        if self.metrics is not None:
            kind = MetricsOptions
            name = "--metrics"
        elif self.harness is not None:
            kind = HarnessOptions
            name = "--harness"
        used = {field.name: getattr(self, field.name) for field in fields(kind)}
        for field in fields(self):
            if field.name not in used and getattr(self, field.name) != field.default:
                option = field.name.replace("_", "-")
                raise ValueError(f"--{option} has no effect on {name}; leave it out.")
        return kind(**used)
