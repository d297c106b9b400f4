"""The picture of a run: loss, both KLs, entropies and HPD's branches over training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpd.files import JsonLines

__all__ = ["plot_training"]

_PANELS = (
    ("loss", {"loss": "loss"}),
    ("KL, nats per token", {"forward_kl": "KL(teacher || student)", "reverse_kl": "KL(student || teacher)"}),
    ("entropy, nats per token", {"student_entropy": "student", "teacher_entropy": "teacher"}),
    (
        "share of label tokens",
        {
            "k1_positive": "student underestimates the label",
            "reinforced": "reinforced",
            "sample_penalized": "sample penalized",
            "sampled_label": "sample = label",
        },
    ),
)


def plot_training(folder: Path) -> Path | None:
    """Draw `metrics.jsonl` of a run folder to `training.png`, whose path is returned; no empty panels.

    None: the run ended before its first log.
    """
    from matplotlib.figure import Figure

    logs = [log for log in JsonLines(folder / "metrics.jsonl").read() if "loss" in log]
    panels = [
        (title, names) for title, names in _PANELS if any(name in log for log in logs for name in names)
    ]
    if not panels:
        return None
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(9.0, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, names) in zip(axes, panels, strict=False):
        for name, label in names.items():
            points = [(log["step"], log[name]) for log in logs if name in log]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, linewidth=1.5)
        _dress(axis, title, len(names) > 1)
    target = folder / "training.png"
    figure.savefig(target, dpi=130)
    return target


def _dress(axis: Any, title: str, legend: bool) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("step", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if title.startswith("KL"):
        axis.set_yscale("log")
    if legend:
        axis.legend(fontsize=8, frameon=False)
