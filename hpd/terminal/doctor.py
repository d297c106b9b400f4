"""`hpd doctor`: a look at what a recipe will do, before it does it."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Sequence, Sized
from pathlib import Path

import torch
from rich.table import Table

from hpd.config.load import load_recipe, stage_recipes
from hpd.config.schema import Recipe
from hpd.data.rows import validation_sets
from hpd.estimate.cost import flops_per_token, runs_teacher
from hpd.estimate.memory import Memory, StepMemory
from hpd.estimate.sizes import parse_bytes
from hpd.methods.table import name_terms
from hpd.methods.terms import reads_teacher
from hpd.terminal.console import console, show_figures, show_next
from hpd.terminal.rows import show_rows
from hpd.terminal.verdicts import show_verdicts
from hpd.training.plan import Plan, plan, steps_of
from hpd.training.precision import precision_hint

__all__ = ["diagnose", "run_doctor"]


_GIB = 2**30
"""Sizes below this are shown in MiB."""
_MIB = 2**20
_OWNERS = {
    "student": "weights of the student",
    "optimizer": "states of the optimizer",
    "teacher": "weights of the teacher",
    "buffers": "chunks of logits, kept between steps",
    "teacher_forward": "the teacher's forward pass",
    "activations": "activations of the student",
    "head": "loss operator: gradient of the head, scratch",
    "backward": "backward pass, gradients, optimizer's step",
}


def run_doctor(
    path: Path, overrides: Sequence[str], memory: str | None, devices: int, tflops: float | None
) -> bool:
    """`diagnose` of a recipe file."""
    fits = diagnose(load_recipe(path, overrides), memory, devices, tflops)
    if fits:
        show_next(shlex.join(["hpd", "train", str(path), *overrides]))
    return fits


def diagnose(
    recipe: Recipe, memory: str | None = None, devices: int = 1, tflops: float | None = None
) -> bool:
    """Print everything known about a run before its start; False when it would fail.

    Args:
        recipe: what to look at.
        memory: a budget such as 24GiB that a step must stay within.
        devices: processes of the run, one device each, >= 1.
        tflops: what a device reaches in training, in TFLOP/s, > 0: gives hours.

    Raises:
        ValueError: the budget is not a size; see also `hpd.training.plan.plan` and
            `hpd.estimate.memory.StepMemory`.
    """
    budget = parse_bytes(memory) if memory is not None else None
    if devices < 1 or (tflops is not None and tflops <= 0):
        raise ValueError(f"--devices must be >= 1 and --tflops > 0, got {devices} and {tflops}.")
    if not torch.accelerator.is_available() and not recipe.train.get("use_cpu"):
        # transformers refuses bf16 without a device for it; a recipe for another machine is looked at all the
        # same.
        recipe = dataclasses.replace(recipe, train={**recipe.train, "use_cpu": True})
    planned = plan(recipe)
    show_verdicts(planned.verdicts)
    show_rows(planned)
    rows = planned.rows
    count = f"{len(rows.train):,}" if isinstance(rows.train, Sized) else "a stream of"
    sets = {name: part for name, part in validation_sets(rows.validation).items() if isinstance(part, Sized)}
    held_out = "".join(f", {len(part):,} held out{f' ({name})' * bool(name)}" for name, part in sets.items())
    steps = steps_of(planned)
    args = planned.args
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    console.print(
        f"{count} rows{held_out}; {steps if steps is not None else 'unknown'} steps of {batch} rows",
        highlight=False,
    )
    for term in name_terms(recipe.choose_terms()):
        weight = f"{term.weight:g}" if term.positions is None else str(term.positions)
        console.print(f"term {term.name}: weight {weight} on {term.support}", highlight=False)
    _show_regime(recipe)
    _show_work(planned, steps, devices, tflops)
    if (hint := precision_hint(args)) is not None:
        console.print(hint, highlight=False)
    step = StepMemory(planned)
    needed = step.predict()
    show_figures(_table(needed, step))
    fits = budget is None or needed.total <= budget
    if budget is not None:
        _show_fit(step, needed, budget)
    return fits and not any(verdict.level == "error" for verdict in planned.verdicts)


def _show_regime(recipe: Recipe) -> None:
    """Show who writes the rows, where it is not the dataset alone, and the stages."""
    regime = recipe.choose_regime()
    if regime.prefixes.on_policy:
        first, last = regime.prefixes.student_share(0.0), regime.prefixes.student_share(1.0)
        span = f"{first:.0%}" if first == last else f"{first:.0%} to {last:.0%}"
        tokens = regime.prefixes.continue_tokens or regime.rollouts.max_new_tokens
        what = f"up to {tokens} tokens by {regime.rollouts.engine}"
        adaptive = ", then as the validation loss says" if regime.prefixes.adaptive else ""
        console.print(f"student writes {span} of the rows{adaptive}: {what}", highlight=False)
    if regime.strategy.type != "direct":
        console.print(
            f"strategy {regime.strategy.type}, {regime.strategy.updates} updates a batch", highlight=False
        )
    for stage in stage_recipes(recipe):
        method = stage.recipe.method or ("terms" if stage.recipe.terms else "hpd")
        kind = "dpo" if stage.dpo else method
        console.print(f"stage {stage.name}: {kind}, in {stage.recipe.output_dir}", highlight=False)


def _show_work(planned: Plan, steps: int | None, devices: int, tflops: float | None) -> None:
    """Show the run's floating-point operations, and hours at a given speed; generation comes on top."""
    price, lengths, args = flops_per_token(planned.recipe), planned.lengths, planned.args
    rows = devices * args.per_device_train_batch_size * args.gradient_accumulation_steps
    step = rows * price.of_row(lengths)
    labels = f"{lengths.label_tokens:,.0f} labels"
    if lengths.teacher is not None:
        labels += f"; the teacher reads {lengths.teacher.tokens:,.0f} tokens"
    text = f"arithmetic: {_flop(step)} in a step of {rows} rows of {lengths.tokens:,.0f} tokens ({labels})"
    if steps is not None:
        if args.max_steps <= 0:
            steps = math.ceil(steps / devices)
        text += f"; {_flop(step * steps)} in {steps:,} steps"
        if tflops is not None:
            hours = step * steps / (tflops * 1e12 * devices) / 3600
            machines = f"{devices} device{'s' * (devices != 1)}"
            text += f": {hours:,.3g} hours on {machines} that reach {tflops:g} TFLOP/s each"
    if planned.recipe.choose_regime().prefixes.on_policy:
        text += "; generation not counted"
    if runs_teacher(planned.recipe, args) and not reads_teacher(name_terms(planned.recipe.choose_terms())):
        text += "; the teacher's forward pass, which no term reads, not counted"
    console.print(text, highlight=False)


def _flop(count: float) -> str:
    for power, unit in ((21, "ZFLOP"), (18, "EFLOP"), (15, "PFLOP"), (12, "TFLOP")):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {unit}"
    return f"{count / 1e9:.3g} GFLOP"


def _table(memory: Memory, step: StepMemory) -> Table:
    """Memory that is held all the time, memory that comes and goes, and the peak."""
    table = Table(
        title=f"memory of a step on {step.batch} rows of {step.tokens} tokens, per process",
        title_justify="left",
        show_footer=True,
    )
    table.add_column("", footer="total at the peak")
    table.add_column("always", justify="right")
    moments = {
        "teacher": ("teacher_forward",),
        "operator": ("activations", "head"),
        "backward": ("backward",),
    }
    peak = max(moments, key=lambda name: sum(getattr(memory, owner) for owner in moments[name]))
    for name in moments:
        table.add_column(name, justify="right", footer=_size(memory.total) if name == peak else "")
    for owner, text in _OWNERS.items():
        cells = [_size(getattr(memory, owner)) if owner in owners else "" for owners in moments.values()]
        always = "" if any(cells) else _size(getattr(memory, owner))
        table.add_row(text, always, *cells)
    return table


def _show_fit(step: StepMemory, needed: Memory, budget: int) -> None:
    fit = step.fit(budget)
    room = budget - needed.total
    left = f"leaves {_size(room)}" if room >= 0 else f"needs {_size(-room)} more"
    chunk = "none"
    if fit.chunk_bytes:
        whole = fit.chunk_bytes >= step.label_positions(step.batch) * step.row_bytes
        chunk = f"{fit.chunk_bytes} ({_size(fit.chunk_bytes)}{', all label positions at once' * whole})"
    console.print(
        f"{_size(budget)}: this recipe's step {left}. Largest "
        f"train.per_device_train_batch_size {fit.rows or 'none, not even 1'} (rows of {step.tokens} tokens, "
        f"chunks of {_size(step.chunk_bytes)}); largest train.chunk_bytes on {step.batch} rows {chunk}",
        highlight=False,
    )


def _size(size: int) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB else f"{size / _MIB:.1f} MiB"
