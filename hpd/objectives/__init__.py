"""Objectives: what a token of the support is worth. The table of docs/methods.md is `OBJECTIVES`."""

from __future__ import annotations

from collections.abc import Callable

from hpd.objectives.adaptive import akl, taid, todi
from hpd.objectives.alpha_beta import abkd
from hpd.objectives.capped import capped
from hpd.objectives.f_divergences import acceptance, f_divergence, total_variation
from hpd.objectives.hybrid import hpd, hpd_expected, hpd_full
from hpd.objectives.kl import forward_kl, nll, reverse_kl, symmetric_kl
from hpd.objectives.label import alm, label_forward_kl, label_jsd, label_reverse_kl, masked_sft
from hpd.objectives.mixtures import generalized_jsd, js, skew_forward_kl, skew_reverse_kl
from hpd.objectives.objective import Objective

__all__ = [
    "OBJECTIVES",
    "Objective",
    "abkd",
    "acceptance",
    "akl",
    "alm",
    "capped",
    "f_divergence",
    "forward_kl",
    "generalized_jsd",
    "hpd",
    "hpd_expected",
    "hpd_full",
    "js",
    "label_forward_kl",
    "label_jsd",
    "label_reverse_kl",
    "masked_sft",
    "nll",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "symmetric_kl",
    "taid",
    "todi",
    "total_variation",
]

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "nll": nll,
    "masked_sft": masked_sft,
    "label_forward_kl": label_forward_kl,
    "label_reverse_kl": label_reverse_kl,
    "label_jsd": label_jsd,
    "alm": alm,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "symmetric_kl": symmetric_kl,
    "generalized_jsd": generalized_jsd,
    "js": js,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "acceptance": acceptance,
    "f_divergence": f_divergence,
    "abkd": abkd,
    "akl": akl,
    "todi": todi,
    "taid": taid,
    "hpd": hpd,
    "hpd_full": hpd_full,
    "hpd_expected": hpd_expected,
}
