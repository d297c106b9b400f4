"""The command line: every command is one call into the package."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from hpd._version import __version__

app = typer.Typer(
    help="Distil language models: HPD and every other method as one row of one table.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(help="Recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[A.B=C]...", help="Values that replace the recipe's, such as train.max_steps=50."),
]
BatchSize = Annotated[int, typer.Option(help="Prompts generated at once.", min=1)]


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"hpd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None: ...


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """A mistake in the input is one paragraph and exit code 2; HPD_DEBUG=1 shows where it was raised."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("HPD_DEBUG"):
            raise
        from rich.console import Console

        text = str(error) if str(error) else type(error).__name__
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_escape(text)}", highlight=False)
        raise typer.Exit(2) from None


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the resolved recipe, load no weights.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an existing run in output_dir first.")] = False,
) -> None:
    """Distil a student from a teacher. An unfinished run in output_dir is resumed from its last checkpoint."""
    with _user_errors():
        from hpd.config import load_recipe

        loaded = load_recipe(recipe, overrides or ())
        if dry_run:
            _dry_run(loaded)
            return
        from hpd.display import show_summary, train_with_display

        show_summary(loaded, train_with_display(loaded, overwrite=overwrite))


def _dry_run(recipe: Any) -> None:
    import yaml

    from hpd.config import resolve
    from hpd.display import show_verdicts
    from hpd.train import plan

    planned = plan(recipe)
    typer.echo(yaml.safe_dump(resolve(recipe), sort_keys=False, allow_unicode=True), nl=False)
    show_verdicts(planned.verdicts)
    planned.require_sound()


@app.command()
def doctor(
    recipe: RecipeFile,
    overrides: Overrides = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory that a step may take, such as 24GiB: shows the largest batch and chunk.")
    ] = None,
) -> None:
    """Show what a recipe will load, whether the pair fits, how long the rows are and the memory that a step needs."""
    with _user_errors():
        from hpd.config import load_recipe
        from hpd.doctor import diagnose

        if not diagnose(load_recipe(recipe, overrides or ()), memory):
            raise typer.Exit(1)


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the model.", show_default=False)],
    data: Annotated[Path, typer.Option(help="File with prompts and answers (.jsonl, .json, .csv, .parquet, also .gz).")],
    task: Annotated[str, typer.Option(help="How answers are graded.")] = "exact-match",
    limit: Annotated[int | None, typer.Option(help="First n examples only.", min=1)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 512,
    batch_size: BatchSize = 32,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampled answers.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder for evals.json and the answers of each example.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Let a model answer a file of problems and grade the final answers."""
    with _user_errors():
        from hpd.display import evaluate_with_display

        settings = {
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "temperature": temperature,
            "seed": seed,
        }
        evaluate_with_display(model, task, data, limit, settings, output, dtype)


@app.command()
def methods() -> None:
    """Print the table of methods."""
    with _user_errors():
        from hpd.display import show_methods

        show_methods()


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an existing demo run first.")] = False,
) -> None:
    """Distil a tiny model on this machine, without any download, and show what changed."""
    with _user_errors():
        from hpd.demo.run import run_demo

        run_demo(output_dir, overrides or (), overwrite)


def main() -> None:
    """Entry point of the `hpd` script and of `python -m hpd`."""
    sys.exit(app())
