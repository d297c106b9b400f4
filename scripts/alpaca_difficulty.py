"""Estimates what AlpacaEval 2's length control needs, from a clone of its repository, and measures the error.

    git clone https://github.com/tatsu-lab/alpaca_eval
    python scripts/alpaca_difficulty.py alpaca_eval --folds 5     # each fifth by difficulties of the others
    python scripts/alpaca_difficulty.py alpaca_eval --write hpd/evaluate/benchmarks/alpaca_eval_2.csv.gz

The published fit of a model has three coefficients: theta, phi (length), psi (difficulty). The difficulties
gamma [805] and two sums over the verdicts on the baseline's copies are chosen so that the published
coefficients are each model's best fit (three conditions of first order), and give its published rate and
standard error; the likelihood of the verdicts decides the rest. Models with a missing answer are left out:
upstream takes difficulties by position, so theirs were fitted with those of other instructions.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize

from hpd.evaluate.benchmarks.length_control import BASELINE, Copies, LengthControl, instruction_key
from hpd.evaluate.benchmarks.win_rates import length_controlled_win_rate

COPIES = (f"{BASELINE}_concise", f"{BASELINE}_verbose")
JUDGE = "weighted_alpaca_eval_gpt4_turbo"
PACKAGE = "src/alpaca_eval"
EXACT, SLACK = 1e4, 0.02
"""Weight of the published rates, and their rounding, in points."""


class Published(NamedTuple):
    """What a clone holds; L models with a rate, M of them with whole verdicts."""

    instructions: list[str]
    baseline: np.ndarray  # characters [805]
    coefficients: dict[str, np.ndarray]  # phi, psi, theta
    rates: dict[str, tuple[float, float]]  # length-controlled rate and standard error (NaN: not stated), in %
    wins: dict[str, np.ndarray]  # [805] in [0, 1]
    shifted: set[str]  # models with a missing verdict
    lengths: dict[str, np.ndarray]


def read_clone(root: Path) -> Published:
    base = json.loads((root / f"results/{BASELINE}/model_outputs.json").read_text())
    place = {row["instruction"]: number for number, row in enumerate(base)}
    tables = {
        "rates": f"leaderboards/data_AlpacaEval_2/{JUDGE}_leaderboard.csv",
        "weights": f"metrics/weights/{JUDGE}/length_controlled_v1/baseline_{BASELINE}.csv",
    }
    rows = {
        name: {row[""]: row for row in csv.DictReader((root / PACKAGE / path).open())}
        for name, path in tables.items()
    }
    names = [name for name in rows["weights"] if rows["rates"].get(name, {}).get("length_controlled_winrate")]
    coefficients = {
        name: np.array([float(rows["weights"][name][key]) for key in list(rows["weights"][name])[1:4]])
        for name in names
        if name != BASELINE
    }
    rates = {
        name: (
            float(rows["rates"][name]["length_controlled_winrate"]),
            float(rows["rates"][name]["lc_standard_error"] or "nan"),
        )
        for name in coefficients
    }
    wins, lengths, shifted = {}, {}, set()
    for name in coefficients:
        verdicts = _json(root / f"results/{name}/{JUDGE}/annotations.json")
        if not verdicts:
            continue
        if len(verdicts) < len(base) or any(row["preference"] is None for row in verdicts):
            shifted.add(name)
        else:
            order = [place[row["instruction"]] for row in verdicts]
            wins[name], lengths[name] = np.empty(len(base)), np.empty(len(base))
            wins[name][order] = [(float(row["preference"]) or 1.5) - 1 for row in verdicts]
            lengths[name][order] = [len(row["output_2"]) for row in verdicts]
    for name in COPIES:
        for row in _json(root / f"results/{name}/model_outputs.json"):
            lengths.setdefault(name, np.empty(len(base)))[place[row["instruction"]]] = len(row["output"])
    own = np.array([len(row["output"]) for row in base], dtype=float)
    return Published(list(place), own, coefficients, rates, wins, shifted, lengths)


def _json(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.is_file() else []


def _tanh(published: Published, name: str) -> np.ndarray:
    gap = published.lengths[name] - published.baseline
    return np.tanh(gap / gap.std(ddof=1))


def estimate(published: Published, left_out: frozenset[str] = frozenset()) -> np.ndarray:
    """Difficulties [805] and the sums of won * length and won * difficulty over the copies."""
    train = [name for name in published.wins if name not in left_out]
    rated = [name for name in published.rates if name not in left_out | published.shifted]
    # Upstream's length is the baseline's minus the model's.
    won = torch.tensor(np.stack([published.wins[name] for name in train]))
    length = torch.tensor(np.stack([-_tanh(published, name) for name in train]))
    fit = torch.tensor(np.stack([published.coefficients[name] for name in train]))
    copies = torch.tensor(np.stack([-_tanh(published, name) for name in COPIES]))
    read = torch.tensor(np.stack([published.coefficients[name] for name in rated]))
    rate, error = torch.tensor([published.rates[name] for name in rated], dtype=torch.float64).T

    def loss(x: torch.Tensor) -> torch.Tensor:
        gamma, sums = x[:-2], x[-2:]
        logits = fit[:, 2:] + fit[:, :1] * length + fit[:, 1:2] * gamma
        rest = won - torch.sigmoid(logits)
        on_copies = torch.sigmoid(fit[:, 0].view(-1, 1, 1) * copies + fit[:, 1].view(-1, 1, 1) * gamma)
        conditions = [
            rest.sum(1),
            (rest * length).sum(1) + 0.1 * (sums[0] - (on_copies * copies).sum((1, 2))),
            (rest * gamma).sum(1) + 0.1 * (sums[1] - (on_copies * gamma).sum((1, 2))),
        ]
        rates = torch.sigmoid(read[:, 2:] + read[:, 1:2] * gamma)
        known = ~torch.isnan(error)
        errors = (100 * rates.std(1) / len(gamma) ** 0.5 - error)[known]
        exact = _huber(100 * rates.mean(1) - rate, SLACK) + _huber(10 * errors, SLACK)
        likelihood = (torch.nn.functional.softplus(logits) - won * logits).sum()
        spread = 0.05 * ((gamma - gamma.mean()) ** 2).sum()
        return likelihood + EXACT * exact + sum(_huber(c, 0.5) for c in conditions) + spread

    def with_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.tensor(x, requires_grad=True)
        value = loss(point)
        (gradient,) = torch.autograd.grad(value, point)
        return value.item(), gradient.numpy()

    start = np.append(np.random.default_rng(0).normal(size=len(published.instructions)), [0.0, 0.0])
    options = {"maxiter": 4000, "maxfun": 6000, "maxcor": 30}
    return minimize(with_gradient, start, jac=True, method="L-BFGS-B", options=options).x


def _huber(x: torch.Tensor, edge: float) -> torch.Tensor:
    return torch.where(x.abs() < edge, x * x / 2, edge * (x.abs() - edge / 2)).sum()


def control_of(published: Published, found: np.ndarray) -> LengthControl:
    """With verdicts on the copies that are their published fits' and have the sums that were found."""
    gamma, sums = np.round(found[:-2], 3), found[-2:]
    lengths = np.stack([_tanh(published, name) for name in COPIES])
    fits = np.stack([published.coefficients[name] for name in COPIES])
    logits = fits[:, 2:] - fits[:, :1] * lengths + fits[:, 1:2] * gamma
    won = 1 / (1 + np.exp(-logits))
    columns = np.stack([-lengths.ravel(), np.tile(gamma, 2)], 1)
    won += (columns @ np.linalg.solve(columns.T @ columns, sums - columns.T @ won.ravel())).reshape(won.shape)
    return LengthControl(gamma, Copies(lengths.ravel(), np.tile(gamma, 2), won.ravel()))


def errors_of(published: Published, names: list[str], control: LengthControl) -> np.ndarray:
    """Our rate minus the published one, in points."""
    found = []
    for name in names:
        given = published.wins[name].tolist(), published.lengths[name].tolist(), published.baseline.tolist()
        ours = 100 * length_controlled_win_rate(*given, control).value
        print(f"{name:40s} published {published.rates[name][0]:6.2f}  ours {ours:6.2f}")
        found.append(ours - published.rates[name][0])
    return np.array(found)


def write(published: Published, control: LengthControl, path: Path) -> None:
    length, won = (part.reshape(2, -1) for part in (control.copies.length, control.copies.won))
    rows = ["key,difficulty,concise_length,concise_won,verbose_length,verbose_won"]
    for n, text in enumerate(published.instructions):
        numbers = (control.difficulty[n], length[0, n], won[0, n], length[1, n], won[1, n])
        rows.append(",".join([instruction_key(text), *(f"{number:.3f}" for number in numbers)]))
    path.write_bytes(gzip.compress(("\n".join(rows) + "\n").encode(), mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clone", type=Path, help="of github.com/tatsu-lab/alpaca_eval")
    parser.add_argument(
        "--folds", type=int, default=0, help="measure on models that were left out, so many parts"
    )
    parser.add_argument("--write", type=Path, help="the file of estimates")
    given = parser.parse_args()
    published = read_clone(given.clone)
    names = list(published.wins)
    order = np.random.default_rng(1).permutation(len(names))
    parts = [[names[i] for i in order[k :: given.folds]] for k in range(given.folds)]
    errors = [
        errors_of(published, part, control_of(published, estimate(published, frozenset(part))))
        for part in parts
    ]
    if not given.folds or given.write:
        control = control_of(published, estimate(published))
        errors = errors or [errors_of(published, names, control)]
        if given.write:
            write(published, control, given.write)
    off = np.concatenate(errors)
    print(
        f"{len(off)} models: mean {off.mean():+.2f}, mean distance {abs(off).mean():.2f}, largest "
        f"{abs(off).max():.2f}, within one point {(abs(off) <= 1).sum()}"
    )


if __name__ == "__main__":
    main()
