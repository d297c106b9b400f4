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
}
