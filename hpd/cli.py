"""The command line: the options of every command, each of which is one call into `hpd.terminal`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from hpd import __version__
from hpd.terminal.errors import user_errors, wrap_warnings
from hpd.terminal.eval_options import EvalOptions, with_options
from hpd.terminal.import_options import ImportOptions
from hpd.terminal.prune_options import PruneOptions
from hpd.terminal.slips import RecipeCommand

_LEAST_COLUMNS = 60

app = typer.Typer(
    help="Distill language models: HPD and every other method as one row of one table.",
    no_args_is_help=True,
    # Panels cut the names of options where they are narrow; plain text wraps.
    rich_markup_mode="rich" if shutil.get_terminal_size().columns >= _LEAST_COLUMNS else None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(help="Recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[A.B=C]...", help="Values that replace the recipe's, such as train.max_steps=50."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[A.B=C]...",
        help="Values that replace the experiment's, such as set.train.max_steps=50 (of all its runs).",
    ),
]
Allow = Annotated[
    str, typer.Option(help="What may differ between runs: git_commit, platform, packages, ... (commas).")
]


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"hpd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


@app.command(
    epilog="Example: hpd init recipe.yaml --student Qwen/Qwen2.5-0.5B --teacher Qwen/Qwen2.5-1.5B --data a/b"
)
def init(
    recipe: Annotated[Path, typer.Argument(help="File to write.")] = Path("recipe.yaml"),
    student: Annotated[str | None, typer.Option(help="Model that learns: Hub id or folder.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Model that it learns from.")] = None,
    data: Annotated[str | None, typer.Option(help="File, folder or Hub id of the rows.")] = None,
    method: Annotated[str | None, typer.Option(help="A name that hpd methods lists.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="Run folder.")] = None,
    prompt_column: Annotated[
        str | None, typer.Option(help="Column of the prompts, if not recognized.")
    ] = None,
    completion_column: Annotated[str | None, typer.Option(help="Column of the completions.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Write a recipe, with comments. In a terminal it asks for what the options leave out."""
    with user_errors():
        from hpd.terminal.init import run_init

        given = {
            "student": student,
            "teacher": teacher,
            "data": data,
            "method": method,
            "output_dir": output_dir,
            "prompt_column": prompt_column,
            "completion_column": completion_column,
        }
        run_init(recipe, given, overwrite)


@app.command(cls=RecipeCommand, epilog="Example: hpd train recipe.yaml train.max_steps=50")
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the resolved recipe, load no weights.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete an existing run in output_dir first.")
    ] = False,
    changed_inputs: Annotated[
        bool,
        typer.Option(
            "--changed-inputs",
            help="Continue although data, teacher or tokenizer have changed since the run began.",
        ),
    ] = False,
) -> None:
    """Distill a student from a teacher. An unfinished run in output_dir is resumed from its last checkpoint,
    a finished one where the recipe has more steps or epochs."""
    with user_errors():
        from hpd.terminal.training import run_train

        run_train(recipe, overrides or (), dry_run, overwrite, changed_inputs)


@app.command(cls=RecipeCommand, epilog="Example: hpd doctor recipe.yaml --memory 24GiB")
def doctor(
    recipe: RecipeFile,
    overrides: Overrides = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory that a step may take, such as 24GiB: shows the largest batch and chunk."),
    ] = None,
    devices: Annotated[int, typer.Option(help="Processes of the run, one device each.", min=1)] = 1,
    tflops: Annotated[
        float | None,
        typer.Option(
            help="TFLOP/s that a device reaches in training (an H100 in bfloat16: about 400): hours."
        ),
    ] = None,
) -> None:
    """Show what a recipe will load, whether the pair fits, how long the rows are, and what a step needs and
    the run costs."""
    with user_errors():
        from hpd.terminal.doctor import run_doctor

        if not run_doctor(recipe, overrides or (), memory, devices, tflops):
            raise typer.Exit(1)


@app.command(cls=RecipeCommand, epilog="Example: hpd cache recipe.yaml cache.path=teacher-cache")
def cache(
    recipe: RecipeFile,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete another cache in cache.path first.")
    ] = False,
) -> None:
    """Ask the teacher about every label position of a recipe's rows once and write its answers to
    cache.path."""
    with user_errors():
        from hpd.terminal.training import run_cache

        run_cache(recipe, overrides or (), overwrite)


@app.command(name="eval", epilog="Example: hpd eval runs/mine --data test.jsonl --limit 100")
@with_options(EvalOptions)
def evaluate(options: EvalOptions) -> None:
    """Let models answer benchmarks or a file of problems, and grade the answers."""
    with user_errors():
        mode = options.mode()  # before the seconds that the import takes
        from hpd.terminal.evaluation import run_eval

        run_eval(mode)


@app.command(epilog="Example: hpd chat runs/mine --temperature 0.7")
def chat(
    model: Annotated[str, typer.Argument(help="Run folder, folder or Hub id.", show_default=False)],
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens with this mass.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 512,
    system_prompt: Annotated[str | None, typer.Option(help="System message of the conversation.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampled answers.", min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Talk to a model: it answers each line of standard input."""
    with user_errors():
        from hpd.generation.settings import GenerationSettings
        from hpd.terminal.chat import run_chat

        settings = GenerationSettings(
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            system_prompt=system_prompt,
            seed=seed,
        )
        run_chat(model, settings, dtype)


@app.command(name="serve-teacher", epilog="Example: hpd serve-teacher Qwen/Qwen2.5-7B-Instruct --port 8765")
def serve_teacher(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the teacher.", show_default=False)],
    port: Annotated[int, typer.Option(help="TCP port.", min=1, max=65535)] = 8765,
    host: Annotated[
        str, typer.Option(help="Address to bind; beyond loopback a token is required.")
    ] = "127.0.0.1",
    token_env: Annotated[
        str, typer.Option(help="Environment variable with the token that clients must show.")
    ] = "HPD_SERVE_TOKEN",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="4bit or 8bit (extra quantization).")] = None,
    max_waiting: Annotated[
        int, typer.Option(help="Requests that may wait; one more is told to try again (503).", min=1)
    ] = 64,
    max_batch_tokens: Annotated[
        int, typer.Option(help="Tokens of one forward, padding included.", min=1)
    ] = 16384,
    max_request_tokens: Annotated[int, typer.Option(help="Tokens of one request.", min=1)] = 65536,
) -> None:
    """Serve a teacher to students on this or other machines (teacher: {type: server, protocol: hpd}); extra
    `serve`."""
    with user_errors():
        from hpd.terminal.serve import run_serve

        run_serve(
            model,
            dtype,
            quantization,
            token_env,
            max_batch_tokens,
            host=host,
            port=port,
            max_waiting=max_waiting,
            max_request_tokens=max_request_tokens,
        )


@app.command(
    cls=RecipeCommand,
    epilog="Example: hpd generate recipe.yaml generate.output=written.jsonl generate.samples=4",
)
def generate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")] = False,
) -> None:
    """Let the teacher (or generate.model) write completions for the recipe's prompts. Resumes where it was
    interrupted."""
    with user_errors():
        from hpd.terminal.training import run_generate

        run_generate(recipe, overrides or (), overwrite)


@app.command(
    name="import",
    cls=RecipeCommand,
    epilog="Example: hpd import recipe.yaml rows.parquet --format distillkit cache.path=teacher-cache",
)
@with_options(ImportOptions)
def import_(options: ImportOptions) -> None:
    """Write a cache for a recipe's rows from teacher data of other programs: no teacher is loaded."""
    with user_errors():
        options.check()
        from hpd.terminal.teacher_data import run_import

        run_import(options)


@app.command(cls=RecipeCommand, epilog="Example: hpd export runs/mine --merge --output models/mine")
def export(
    model: Annotated[str, typer.Argument(help="Run folder; with --format, a recipe.", show_default=False)],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="New folder for what is written.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge a run's adapter into its base.")] = False,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; auto: as the base was saved.")
    ] = "auto",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Push the student, with its card, to the Hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A repository made for it is private.")] = False,
    form: Annotated[
        str | None,
        typer.Option("--format", help="Of a recipe with a cached teacher: distillkit, axolotl or vllm."),
    ] = None,
) -> None:
    """Write a run's adapter as a whole model, for whatever reads no adapters, or push a run's student to the
    Hub, or both; or, with --format, write a recipe's rows and their cached teacher for another trainer."""
    with user_errors():
        if form is not None or overrides:
            from hpd.terminal.export import run_cache_export

            of_models = {
                "--merge": merge,
                "--dtype": dtype != "auto",
                "--push-to-hub": push_to_hub is not None,
                "--private": private,
            }
            run_cache_export(model, output, form, overrides or (), [n for n, on in of_models.items() if on])
            return
        from hpd.terminal.export import run_export

        run_export(model, merge, output, dtype, push_to_hub, private)


@app.command(name="prune", epilog="Example: hpd prune teacher --layers 15 --data rows.jsonl -o student")
@with_options(PruneOptions)
def prune(options: PruneOptions) -> None:
    """Cut a student from its teacher: without the layers, and the MLP columns, that do least on some rows."""
    with user_errors():
        from hpd.terminal.prune import run_prune

        run_prune(options)


@app.command(cls=RecipeCommand, epilog="Example: hpd compare experiment.yaml --dry-run")
def compare(
    experiment: Annotated[Path, typer.Argument(help="Experiment, a YAML file.", show_default=False)],
    overrides: Settings = None,
    jobs: Annotated[int, typer.Option(help="Runs at once; the cores are split among them.", min=1)] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the grid and its predicted cost, run nothing of it.")
    ] = False,
    probe: Annotated[
        bool, typer.Option(help="With --dry-run: time a few steps of each variant that has no finished run.")
    ] = True,
    allow: Allow = "",
) -> None:
    """Run a grid of recipes under one budget and test who wins. Finished runs are kept; what is missing is
    run."""
    with user_errors():
        from hpd.terminal.compare import run_compare

        if not run_compare(experiment, overrides or (), jobs, _names(allow), dry_run, probe):
            raise typer.Exit(1)


@app.command(epilog="Example: hpd report runs/one runs/two --output report")
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="Experiments or run folders.", show_default=False),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder for the report; default: report/ in the experiment.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Variant to test against, as the report names it.")
    ] = None,
    allow: Allow = "",
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve the page on this machine and renew it while runs continue.")
    ] = False,
    port: Annotated[int, typer.Option(help="Port of --watch; 0 takes a free one.", min=0, max=65535)] = 8642,
) -> None:
    """Write what runs found: one HTML page, and the same as Markdown, PNG and CSV."""
    with user_errors():
        from hpd.terminal.report import run_report

        run_report(folders, output, baseline, _names(allow), port if watch else None)


@app.command(epilog="Example: hpd methods akl")
def methods(
    name: Annotated[str | None, typer.Argument(help="A method, for everything about it.")] = None,
) -> None:
    """Print the table of methods, or one of them with its parameters."""
    with user_errors():
        from hpd.terminal.methods import show_method, show_methods

        if name is None:
            show_methods()
        else:
            show_method(name)


@app.command(cls=RecipeCommand, epilog="Example: hpd demo method=forward_kl train.max_steps=300")
def demo(
    output_dir: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete an existing demo run first.")
    ] = False,
) -> None:
    """Distill a tiny model on this machine, without any download, and show what changed."""
    with user_errors():
        from hpd.terminal.demo import run_demo

        run_demo(output_dir, overrides or (), overwrite)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main() -> None:
    """Entry point of the `hpd` script and of `python -m hpd`."""
    wrap_warnings()
    sys.exit(app())
