"""Rows of the table of methods whose teacher reads rows of its own: another prompt, or another tokenizer."""

from __future__ import annotations

from hpd.methods.method import Method, one_term
from hpd.methods.prefixes import Prefixes
from hpd.methods.terms import TermConfig

__all__ = ["ANY_TEACHER"]

ANY_TEACHER: dict[str, Method] = {
    "opsd": Method(
        summary=(
            "on-policy self-distillation: the student writes; the model that it was reads the solution too"
        ),
        weight="p where p (log p - log q) <= cap, else 0",
        use=(
            "rows with solutions or hints and no stronger teacher; teacher: {type: self, prompt: ...} with "
            "the solution in it"
        ),
        defaults="forward KL, cap 0.05 a token, the teacher as it was before training",
        reference="Zhao et al. 2026, arXiv 2601.18734 (the cap: its code of March 2026)",
        terms=(TermConfig(objective="forward_kl", cap=0.05),),
        prefixes=Prefixes(student=1.0),
        own_prompt=True,
    ),
    "sdft": Method(
        summary="self-distillation from demonstrations: the student's moving average reads one in its prompt",
        weight="q (log p - log q)",
        use=(
            "learning a new skill from demonstrations without leaving the old ones; teacher: {type: self, "
            "ema: 0.02, prompt: ...} with the demonstration in it"
        ),
        defaults="reverse KL on the student's text; the teacher is a moving average of the student",
        reference="Shenfeld et al. 2026, arXiv 2601.19897",
        terms=one_term("reverse_kl"),
        prefixes=Prefixes(student=1.0),
        own_prompt=True,
    ),
    "alm": Method(
        summary="approximate likelihood matching: a chunk's probability as a coin's, for any two tokenizers",
        weight="w(y) = (a - b) / (tau (1 - b)), a = p(y)^(1/tau), b = q(y)^(1/tau)",
        use="to compare with hpd between two tokenizers (train.byte_length: product); needs labels only",
        defaults="tau 100; no debiasing of chunk ends",
        reference="Minixhofer, Vulić and Ponti 2025, arXiv 2503.20083",
        terms=one_term("alm"),
    ),
    "uld": Method(
        summary="universal logit distillation: likelihood, and the distance of probabilities sorted by size",
        weight="1[v = y] + 1.5 q sign(p - q), p and q of the same rank",
        use="to compare with hpd between two tokenizers; it never looks at what a token says",
        defaults="distance weighted 1.5, temperature 1",
        reference="Boizard et al. 2024, arXiv 2402.12030",
        terms=(
            TermConfig(objective="nll"),
            TermConfig(objective="total_variation", support="ranks", weight=3.0),
        ),
    ),
    "gold": Method(
        summary="tokens that both vocabularies have by a Jensen-Shannon divergence, the others by rank",
        weight="that of generalized_jsd on shared tokens, q sign(p - q) on the others by rank",
        use="to compare with hpd between two tokenizers, where they share many tokens",
        defaults="beta 0.5, both parts weighted 1 (TRL weighs them by the share of shared tokens)",
        reference="Patiño et al. 2025, GOLD (TRL's GOLDTrainer with its hybrid loss)",
        terms=(
            TermConfig(objective="generalized_jsd", support="shared"),
            TermConfig(objective="total_variation", support="unshared", weight=2.0),
        ),
    ),
}
