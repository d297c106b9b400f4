"""Win rates of a candidate against a baseline, freed of what judges like for the wrong reasons: position,
length, style.

Axes: Q questions, G games (one question in one order), F covariates, S resamples.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from hpd.evaluate.benchmarks.length_control import LengthControl
from hpd.evaluate.statistics import resample

__all__ = [
    "LABELS",
    "STYLE_FEATURES",
    "PositionBias",
    "WinRate",
    "length_controlled_win_rate",
    "position_bias",
    "style_controlled_win_rate",
    "style_differences",
    "style_of",
]

Floats = NDArray[np.float64]

LABELS: dict[str, float] = {
    "A>>B": 1.0,
    "A>B": 1.0,
    "A=B": 0.5,
    "B>A": 0.0,
    "B>>A": 0.0,
    "A<B": 0.0,
    "A<<B": 0.0,
    "B<A": 1.0,
    "B<<A": 1.0,
    "B=A": 0.5,
    "A": 1.0,
    "B": 0.0,
    "C": 0.5,
    "TIE": 0.5,
}
"""Text that a judge writes between double brackets -> score of the answer that it saw first."""

STYLE_FEATURES = ("length", "headers", "lists", "bold")

# Keeps a candidate that wins (or loses) every game finite; beside hundreds of games it moves nothing
# (upstream: C = 100).
_RIDGE = 0.01

_COPY_WEIGHT = 0.1  # upstream: 0.2, halved for its two copies

_RESAMPLES = 200

_CODE_BLOCK = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)

_HEADER = re.compile(r"^#{1,6}\s", re.MULTILINE)

_LIST_ITEM = re.compile(r"^\s*(?:\d+\.|[-*+])\s", re.MULTILINE)

_BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")


class WinRate(NamedTuple):
    """A win rate, 0 to 1, with the standard error from having asked these questions and no others."""

    value: float
    standard_error: float
    coefficients: dict[str, float]
    """Log-odds that each covariate is worth."""


class PositionBias(NamedTuple):
    """Effect of the order alone on a judge."""

    first_position: float
    """Mean score of the answer shown first; 0.5 is unbiased."""
    agreement: float
    """Share of questions where both orders name the same winner, or both a tie."""


def position_bias(first: Sequence[float], second: Sequence[float]) -> PositionBias:
    """Bias of a judge that saw every pair in both orders.

    Args:
        first: score of the candidate where it was shown first, per question.
        second: the same where it was shown second.
    """
    shown_first = np.asarray(first, float)
    shown_second = np.asarray(second, float)
    return PositionBias(
        float((shown_first + 1 - shown_second).mean() / 2), float((shown_first == shown_second).mean())
    )


def length_controlled_win_rate(
    scores: Sequence[float],
    candidate_lengths: Sequence[int],
    baseline_lengths: Sequence[int],
    control: LengthControl,
    seed: int = 0,
) -> WinRate:
    r"""AlpacaEval 2's win rate at equal length: a logistic regression, read with its length term set to zero.

    .. math:: \mathrm{logit}\,P(\text{win}_x) = \theta + \phi \tanh\frac{\Delta_x}{\mathrm{std}(\Delta)} +
              \psi \gamma_x, \qquad \text{LC} = \frac{1}{Q} \sum_x \sigma(\theta + \psi \gamma_x)

    with Δ the difference of the lengths in characters and γ the instruction's difficulty. The verdicts on two
    copies of the baseline, one short and one long, are data too, without θ and with a tenth of the weight:
    they tell what length is worth where all of a candidate's answers are shorter, or longer.

    Args:
        scores: of the candidate per question, in [0, 1]; fractions are fitted as such.
        candidate_lengths, baseline_lengths: characters of the answers.
        control: difficulties and copies (`published_control`).
        seed: of the resamples behind the standard error.

    Reference:
        Dubois et al., Length-Controlled AlpacaEval, 2024, arXiv 2404.04475, eq. 2. Upstream has an L1 penalty
        that it picks by cross-validation; this fit has a ridge of 0.01.
    """
    outcome = np.asarray(scores, float)
    gap = np.asarray(candidate_lengths, float) - np.asarray(baseline_lengths, float)
    spread = gap.std(ddof=1) if len(gap) > 1 else 0.0
    length = np.tanh(gap / spread) if spread else np.zeros_like(gap)
    copies = control.copies
    own = np.stack([np.ones_like(outcome), length, control.difficulty], 1)  # [Q, F]
    design = np.concatenate([own, np.stack([np.zeros_like(copies.won), copies.length, copies.difficulty], 1)])
    outcomes = np.concatenate([outcome, copies.won])
    neutral = own.copy()
    neutral[:, 1] = 0.0

    def at_equal_length(weights: Floats) -> tuple[float, Floats]:
        beta = _fit_logistic(
            design, outcomes, np.concatenate([weights, np.full_like(copies.won, _COPY_WEIGHT)])
        )
        return float(weights @ _sigmoid(neutral @ beta) / weights.sum()), beta

    value, beta = at_equal_length(np.ones_like(outcome))
    error = _standard_error(lambda weights: at_equal_length(weights)[0], len(outcome), seed)
    return WinRate(value, error, dict(zip(("candidate", "length", "difficulty"), beta.tolist(), strict=True)))


def style_controlled_win_rate(
    games: Sequence[tuple[int, float, float]], differences: Floats, *, controlled: bool = True, seed: int = 0
) -> WinRate:
    r"""Arena-Hard's win rate: a Bradley-Terry model of candidate and baseline, at equal style where
    controlled.

    .. math:: \mathrm{logit}\,P(\text{win}_g) = \theta + \sum_f \beta_f \frac{z_{gf}}{\mathrm{std}(z_f)},
              \qquad \text{win rate} = \sigma(\theta)

    Args:
        games: (question, score of the candidate, weight) each; "much better" weighs three games.
        differences: covariates per question [Q, F], candidate against baseline (`style_differences`); zero is
            equal style.
        controlled: False leaves the covariates out.
        seed: of the resamples (over questions: both orders of one are no independent games).

    Reference:
        Li et al., From Crowdsourced Data to High-Quality Benchmarks (Arena-Hard), 2024; style control as in
        arena-hard-auto. Upstream centers the covariates over all models of its leaderboard; one candidate
        alone would lose its own mean style to that, so here zero stays where the styles are equal.
    """
    question, outcome, weight = (np.array(column) for column in zip(*games, strict=True))
    question = question.astype(int)
    columns = {"candidate": np.ones(len(differences))}
    for name, column in zip(STYLE_FEATURES, differences.T, strict=True):
        spread = column.std()
        if controlled and spread > 0:
            columns[name] = column / spread
    design = np.stack(list(columns.values()), 1)[question]  # [G, F]

    def at_equal_style(weights: Floats) -> tuple[float, Floats]:
        beta = _fit_logistic(design, outcome, weight * weights[question])
        return float(_sigmoid(beta[:1])[0]), beta

    value, beta = at_equal_style(np.ones(len(differences)))
    played = np.unique(question)

    def rate(weights: Floats) -> float:
        return at_equal_style(weights)[0] if weights[played].any() else np.nan  # no game was drawn

    error = _standard_error(rate, len(differences), seed)
    return WinRate(value, error, dict(zip(columns, beta.tolist(), strict=True)))


def style_of(text: str) -> tuple[int, int, int, int]:
    """Length (about tokens), and headers, list items and bold phrases outside code blocks."""
    prose = _CODE_BLOCK.sub("", text)
    headers, items, bold = (len(pattern.findall(prose)) for pattern in (_HEADER, _LIST_ITEM, _BOLD))
    return -(-len(text) // 4), headers, items, bold


def style_differences(candidates: Sequence[str], baselines: Sequence[str]) -> Floats:
    r"""Covariates per question [Q, 4]: the relative difference of the lengths, and of the markdown per token.

    .. math:: \frac{n_c - n_b}{n_c + n_b}, \qquad \frac{m_c / n_c - m_b / n_b}{m_c / n_c + m_b / n_b + 1}
    """
    candidate, baseline = (
        np.array([style_of(text) for text in texts], float) for texts in (candidates, baselines)
    )
    lengths = [np.maximum(side[:, :1], 1.0) for side in (candidate, baseline)]
    density = [side[:, 1:] / length for side, length in zip((candidate, baseline), lengths, strict=True)]
    total = np.maximum(candidate[:, :1] + baseline[:, :1], 1.0)
    length = (candidate[:, :1] - baseline[:, :1]) / total
    return np.concatenate([length, (density[0] - density[1]) / (density[0] + density[1] + 1)], 1)


def _fit_logistic(design: Floats, outcome: Floats, weights: Floats) -> Floats:
    """Coefficients of the weighted logistic regression with fractional outcomes, without intercept."""

    def loss(beta: Floats) -> tuple[float, Floats]:
        logits = design @ beta
        value = weights @ (np.logaddexp(0.0, logits) - outcome * logits) + _RIDGE / 2 * beta @ beta
        return float(value), design.T @ (weights * (_sigmoid(logits) - outcome)) + _RIDGE * beta

    found = minimize(
        loss, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 500, "ftol": 1e-12}
    )
    return found.x


def _sigmoid(x: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -x))


def _standard_error(rate: Callable[[Floats], float], num_questions: int, seed: int) -> float:
    """Spread of a win rate over resampled questions."""
    rates = resample(
        lambda drawn: np.array([rate(weights) for weights in drawn]),
        num_questions,
        count=_RESAMPLES,
        seed=seed,
    )
    return float(np.nanstd(rates, ddof=1))
