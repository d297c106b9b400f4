"""Predictions, and the tables of scripts/gpu_evidence.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from evidence.settings import METHODS, Settings

Figures = Mapping[tuple[str, str], Mapping[str, float]]
"""Figures of one initialization, by method and regime; those of the teacher under ("teacher", "")."""


class Prediction(NamedTuple):
    """A statement that a number decides, for each initialization by itself."""

    text: str
    margin: Callable[[Figures], float]
    """Above 0 where it holds."""


def _tail_gap(of: Figures, third: str) -> float:
    return of["hpd", "single"][f"forward_kl_{third}"] - of["forward_kl", "single"][f"forward_kl_{third}"]


def _kl(of: Figures, method: str, regime: str) -> float:
    return of[method, regime]["forward_kl"]


PREDICTIONS = (
    Prediction(
        "Where rows repeat, SFT's entropy falls below the teacher's.",
        lambda of: of["teacher", ""]["student_entropy"] - of["sft", "repeated"]["student_entropy"],
    ),
    Prediction(
        "Where rows repeat, HPD is nearer to the teacher (forward KL) than SFT.",
        lambda of: _kl(of, "sft", "repeated") - _kl(of, "hpd", "repeated"),
    ),
    Prediction(
        "Where rows repeat, masked SFT is nearer to the teacher than SFT.",
        lambda of: _kl(of, "sft", "repeated") - _kl(of, "masked_sft", "repeated"),
    ),
    Prediction(
        "Where rows repeat, forward KL over the vocabulary is nearer to the teacher than HPD.",
        lambda of: _kl(of, "hpd", "repeated") - _kl(of, "forward_kl", "repeated"),
    ),
    Prediction(
        "Seeing each row once, forward KL over the vocabulary is nearer to the teacher than HPD.",
        lambda of: _kl(of, "hpd", "single") - _kl(of, "forward_kl", "single"),
    ),
    Prediction(
        "Seeing each row once, HPD's distance to forward KL is larger in the upper third of the teacher's "
        "entropy than in the lower.",
        lambda of: _tail_gap(of, "high") - _tail_gap(of, "low"),
    ),
    Prediction(
        "Repeating rows costs HPD less forward KL than it costs SFT.",
        lambda of: (
            (_kl(of, "sft", "repeated") - _kl(of, "sft", "single"))
            - (_kl(of, "hpd", "repeated") - _kl(of, "hpd", "single"))
        ),
    ),
)
COLUMNS = {
    "forward_kl": "KL(p, q)",
    "reverse_kl": "KL(q, p)",
    "student_entropy": "entropy",
    "forward_kl_low": "low",
    "forward_kl_middle": "middle",
    "forward_kl_high": "high",
    "accuracy_greedy": "greedy",
    "accuracy_paper": "T 0.7, top-p 0.95",
    "accuracy_t1": "T 1",
}


def chosen_rates(lines: list[dict[str, Any]], settings: Settings) -> dict[str, dict[str, Any]]:
    """The rate of each method and regime: the lowest forward KL on validation rows; a tie (1 %) goes to the
    smaller rate.

    Args:
        lines: finished tuning runs. Methods and regimes whose rates are not all there are left out.
    """
    chosen = {}
    for method in METHODS:
        for regime in settings.regimes:
            tried = {line["rate"]: line["forward_kl"] for line in _runs(lines, "tune", method, regime.name)}
            if len(tried) < len(settings.rates):
                continue
            best = min(tried.values())
            near = [rate for rate in sorted(tried) if tried[rate] <= 1.01 * best]
            edge = near[0] in (min(tried), max(tried))
            chosen[f"{method} {regime.name}"] = {"rate": near[0], "tie": len(near) > 1, "at_edge": edge}
    return chosen


def _runs(lines: list[dict[str, Any]], *wanted: str) -> list[dict[str, Any]]:
    """Finished runs of a role, a method and a regime."""
    return [line for line in lines if tuple(map(line.get, ("role", "method", "regime"))) == wanted]


def verdicts(lines: list[dict[str, Any]], teacher: Mapping[str, float]) -> list[dict[str, Any]]:
    """Each prediction with its margin for every initialization whose runs are all there."""
    by_initialization: dict[int, dict[tuple[str, str], Mapping[str, float]]] = {}
    for line in lines:
        if line["role"] == "main":
            of = by_initialization.setdefault(line["initialization"], {("teacher", ""): teacher})
            of[line["method"], line["regime"]] = line
    found = []
    for prediction in PREDICTIONS:
        margins = []
        for of in by_initialization.values():
            try:
                margins.append(round(prediction.margin(of), 5))
            except KeyError:
                continue
        found.append({"prediction": prediction.text, "margins": margins, "verdict": _verdict(margins)})
    return found


def _verdict(margins: list[float]) -> str:
    """Few initializations: only what all of them say is said."""
    if not margins:
        return "not run"
    if all(margin > 0 for margin in margins):
        return "holds in each initialization"
    return "fails in each initialization" if all(margin <= 0 for margin in margins) else "undecided"


def table(lines: list[dict[str, Any]], teacher: Mapping[str, float], settings: Settings) -> str:
    """Mean and range over initializations of every method and regime, the teacher's line first."""
    rates = chosen_rates(lines, settings)
    rows = [["teacher", "", *(_number(teacher[key]) if key in teacher else "" for key in COLUMNS)]]
    for regime in settings.regimes:
        for method in METHODS:
            runs = _runs(lines, "main", method, regime.name)
            if runs:
                rate = rates[f"{method} {regime.name}"]
                mark = "*" * rate["at_edge"] + "=" * rate["tie"]
                cells = [_spread([run[key] for run in runs]) for key in COLUMNS]
                rows.append([f"{method}, {regime.rows} x {regime.epochs}", f"{rate['rate']:g}{mark}", *cells])
    head = ["", "rate", *COLUMNS.values()]
    lines_of_text = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines_of_text)


def _spread(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{_number(statistics.mean(values))} ({_number(low)} to {_number(high)})"


def _number(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 or value == 0 else f"{value:.2g}"
