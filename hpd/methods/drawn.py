"""Which terms a teacher serves that is known by draws and by the label's log-probability.

The draws' weights have the teacher's distribution as their expectation, so what is linear in it has the right
expectation: the gradient of the forward KL. Any function that bends does not.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpd.methods.terms import Term

__all__ = ["label_is_read", "why_not_drawn"]


def label_is_read(terms: Sequence[Term]) -> bool:
    """True if the terms read the teacher at the label; False if they read the whole vocabulary, or nothing.

    Raises:
        ValueError: some read one and some the other, of which a position has one estimate.
    """
    reads = [term for term in terms if _asks(term) and not term.support.whole]
    others = [term for term in terms if _asks(term) and term.support.whole]
    if reads and others:
        raise ValueError(
            f"A teacher known by draws serves terms on the label ({reads[0].name}) or on the vocabulary "
            f"({others[0].name}), and not both at once: choose one, or a cache of kind hidden."
        )
    return bool(reads)


def why_not_drawn(term: Term) -> str | None:
    """Why such a teacher cannot serve a term; None: it can."""
    support = term.support
    if support.label and not (support.whole or support.draws or support.top_k):
        return None
    if not support.whole or support.label:
        return f"reads the teacher on the support {support}"
    if term.objective.rule != "forward_kl":
        return "is not linear in them"
    if term.temperature != 1.0:
        return f"softens them by temperature {term.temperature:g}"
    return None


def _asks(term: Term) -> bool:
    """Plain likelihood of the label asks the teacher nothing."""
    return term.objective.rule != "nll"
