"""The table of methods: a name, its terms, where its prefixes come from; never a branch in the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from hpd.methods.any_teacher import ANY_TEACHER
from hpd.methods.method import Method, one_term
from hpd.methods.names import new_keys, new_name
from hpd.methods.position_methods import POSITION_METHODS
from hpd.methods.position_rules import PositionRule
from hpd.methods.prefixes import Prefixes, ReplayConfig, RolloutConfig
from hpd.methods.schedules import Schedule
from hpd.methods.strategy import StrategyConfig
from hpd.methods.terms import Term, TermConfig, nearest, parameters_of, with_parameters

__all__ = ["METHODS", "Method", "choose_terms", "method_terms", "name_terms"]


# DistiLLM-2: at most 0.1, smaller where teacher and student are near each other.
_SKEW = {"schedule": "skew", "start": 0.1, "end": 0.01}


METHODS: dict[str, Method] = {
    "hpd": Method(
        summary="Hybrid Policy Distillation: both KL directions per token, on the label and one student draw",
        weight=(
            "w(y) = (1 + 1[k_a < 0]) p(y) + k_y if k_y > 0, else k_y; w(a) = min(k_a, 0); k = q (log p - "
            "log q)"
        ),
        use=(
            "rows seen many times, from a teacher that gives the log-probabilities of the label and of one "
            "sampled token; where it gives whole distributions start with forward_kl"
        ),
        defaults=(
            "forward 1, reverse 1, mask and reinforce on, one draw at temperature 1 on every label position"
        ),
        reference="Zhu et al. 2026, arXiv 2604.20244, eq. 11-15",
        terms=one_term("hpd"),
    ),
    "hpd_expected": Method(
        summary="HPD's expectation over the draw, computed on the whole vocabulary instead of sampled",
        weight="w(y) with 1[k_a < 0] replaced by its probability; w(v) = q(v) min(k_v, 0) for v != y",
        use="HPD without sampling noise, where the teacher gives whole distributions anyway",
        defaults="as hpd",
        reference="this project; the expectation of arXiv 2604.20244, eq. 15",
        terms=one_term("hpd_expected"),
    ),
    "hpd_full": Method(
        summary="HPD's switch at every token of the vocabulary, no label, no draw",
        weight="p 1[k > 0] + k, k = q (log p - log q)",
        use=(
            "both directions over the whole vocabulary, on rows that the teacher wrote; check first that "
            "rows of other sources continue what the teacher likes"
        ),
        defaults="forward 1, reverse 1, mask on",
        reference="this project; reverse KL and a hinge on forward KL (docs/theory.md)",
        terms=one_term("hpd_full"),
    ),
    "sft": Method(
        summary="supervised fine-tuning: the label's negative log-likelihood",
        weight="1[v = y]",
        use="the baseline; on teacher-written data it is sequence-level distillation (SeqKD)",
        defaults="none",
        reference="Kim and Rush 2016, arXiv 1606.07947",
        terms=one_term("nll"),
    ),
    "masked_sft": Method(
        summary="fine-tuning that stops at the teacher: labels count while the student underestimates them",
        weight="w(y) = 1[q(y) < p(y)]",
        use="rows of any source, seen many times, from a teacher that gives the label's log-probability only",
        defaults="none",
        reference="this project; the mask of arXiv 2604.20244 with weight 1",
        terms=one_term("masked_sft"),
    ),
    "label_forward_kl": Method(
        summary="the label's log-likelihood, weighted by the teacher's probability of it",
        weight="w(y) = p(y)",
        use='to reproduce the HPD paper\'s "SeqKD"; it rests at p squared, not at p (docs/theory.md)',
        defaults="none; no draw",
        reference="Zhu et al. 2026, arXiv 2604.20244, Table 2",
        terms=one_term("label_forward_kl"),
    ),
    "label_reverse_kl": Method(
        summary="reverse KL at the label only",
        weight="w(y) = k(y) = q(y) (log p(y) - log q(y))",
        use='to reproduce the HPD paper\'s "RKLD"; slow where the student gives the label little',
        defaults="none; no draw",
        reference="Zhu et al. 2026, arXiv 2604.20244, Table 2, eq. 11",
        terms=one_term("label_reverse_kl"),
    ),
    "label_jsd": Method(
        summary="Jensen-Shannon divergence at the label only",
        weight="w(y) = (1 - beta) q(y) log(m(y) / q(y)), m = beta p + (1 - beta) q",
        use='to reproduce the HPD paper\'s "JSD"; slow where the student gives the label little',
        defaults="beta 0.5; no draw",
        reference="Zhu et al. 2026, arXiv 2604.20244, Table 2",
        terms=one_term("label_jsd"),
    ),
    "forward_kl": Method(
        summary="KL(teacher || student): the student covers every mode of the teacher",
        weight="p",
        use=(
            "whole distributions, and rows that show all that the teacher does: nearest to it, or level, in "
            "every such regime that was measured (docs/results.md)"
        ),
        defaults="temperature 1",
        reference="Hinton et al. 2015, arXiv 1503.02531",
        terms=one_term("forward_kl"),
    ),
    "reverse_kl": Method(
        summary="KL(student || teacher): the student seeks the teacher's modes",
        weight="q (log p - log q)",
        use="a student too small to cover everything, preferably on its own text; slow from a random start",
        defaults="temperature 1",
        reference="Gu et al. 2024, arXiv 2306.08543",
        terms=one_term("reverse_kl"),
    ),
    "symmetric_kl": Method(
        summary="a fixed mix of forward and reverse KL over the whole vocabulary",
        weight="(1 - lam) p + lam q (log p - log q)",
        use="both directions with a coefficient of your own; the plain rival of hpd_full",
        defaults="lam 0.5",
        reference="Jeffreys 1946; as in Ko et al. 2024, arXiv 2402.03898",
        terms=one_term("symmetric_kl"),
    ),
    "generalized_jsd": Method(
        summary="generalized Jensen-Shannon divergence; beta 0 is forward KL, 1 is reverse KL",
        weight="(1 - beta) q log(m / q) at beta in (0, 1), m = beta p + (1 - beta) q",
        use="bounded loss: robust to a teacher that is sure of the wrong thing",
        defaults="beta 0.5",
        reference="Agarwal et al. 2024 (GKD), arXiv 2306.13649",
        terms=one_term("generalized_jsd"),
    ),
    "skew_forward_kl": Method(
        summary="forward KL against a mixture that holds some of the teacher",
        weight="(1 - lam) p q / (lam p + (1 - lam) q)",
        use="forward KL with bounded gradients where the student has no mass",
        defaults="lam 0.1",
        reference="Ko et al. 2024 (DistiLLM), arXiv 2402.03898, eq. 5",
        terms=one_term("skew_forward_kl"),
    ),
    "skew_reverse_kl": Method(
        summary="reverse KL against a mixture that holds some of the student",
        weight="q (log(m / q) - 1 + lam q / m), m = (1 - lam) p + lam q",
        use="reverse KL that stays finite where the teacher has no mass; DistiLLM's choice on student text",
        defaults="lam 0.1",
        reference="Ko et al. 2024 (DistiLLM), arXiv 2402.03898",
        terms=one_term("skew_reverse_kl"),
    ),
    "js": Method(
        summary="Jensen-Shannon divergence as DistiLLM's code parametrizes it",
        weight="lam q log(m / q), m = (1 - lam) p + lam q",
        use="to reproduce DistiLLM's baseline; generalized_jsd otherwise",
        defaults="lam 0.1",
        reference="Ko et al. 2024, arXiv 2402.03898",
        terms=one_term("js", lam=0.1),
    ),
    "total_variation": Method(
        summary="half the L1 distance between the distributions",
        weight="q sign(p - q) / 2",
        use="a bounded metric of its own; its gradient ignores how far apart the distributions are",
        defaults="none",
        reference="Wen et al. 2023, arXiv 2307.15190",
        terms=one_term("total_variation"),
    ),
    "acceptance": Method(
        summary="minus the logarithm of the mass that both share: what speculative decoding keeps of a draft",
        weight="q 1[q < p] / alpha, alpha = sum min(p, q)",
        use="a student that will draft for its teacher; silent where q is above p, so start near the teacher",
        defaults="none",
        reference="Samarin et al. 2026, arXiv 2602.23881",
        terms=one_term("acceptance"),
    ),
    "abkd": Method(
        summary="alpha-beta divergence: two exponents weigh hardness and confidence",
        weight="q^beta (p^alpha - q^alpha) / alpha",
        use="a family between the KLs with two parameters, when there is budget to tune them",
        defaults="alpha 0.2, beta 0.7",
        reference="Wang et al. 2025, arXiv 2505.04560",
        terms=one_term("abkd", alpha=0.2, beta=0.7),
    ),
    "akl": Method(
        summary="adaptive KL: both directions, mixed by where the distributions differ",
        weight="c p + (1 - c) q (log p - log q), c = gap on the teacher's head / whole gap",
        use="when neither direction is clearly right; the sort makes it the slowest method in the table",
        defaults="mu 0.5",
        reference="Wu et al. 2025, arXiv 2404.02657",
        terms=one_term("akl"),
    ),
    "todi": Method(
        summary="a mix of both directions, chosen per token by the log-ratio",
        weight="c p + (1 - c) q (log p - log q - 1), c = sigmoid(beta (log p - log q))",
        use="a smooth relative of hpd_full over the whole vocabulary",
        defaults="beta 1",
        reference="Jung et al. 2025, arXiv 2505.16297",
        terms=one_term("todi"),
    ),
    "taid": Method(
        summary="forward KL to a target that travels from the student to the teacher",
        weight="softmax((1 - t) log q + t log p)",
        use="a large gap between teacher and student",
        defaults="t from 0.4 to 1.0, adaptive (step size 5e-4, momentum 0.99)",
        reference="Shing et al. 2025, arXiv 2501.16937",
        terms=one_term("taid", t={"schedule": "adaptive", "start": 0.4, "end": 1.0}),
    ),
    "seqkd": Method(
        summary="sequence-level distillation: supervised fine-tuning on text that the teacher wrote",
        weight="1[v = y]",
        use=(
            "data with the teacher's answers, written by any engine; one-hot and cheap, and the student "
            "inherits its style"
        ),
        defaults="none",
        reference="Kim and Rush 2016, arXiv 1606.07947",
        terms=one_term("nll"),
    ),
    "imitkd": Method(
        summary=(
            "imitation learning: the student's own text, labeled by the teacher's likeliest or drawn token"
        ),
        weight="1[v = a] / n, a drawn from the teacher",
        use="on-policy distillation from a teacher that gives tokens only",
        defaults="share of student text falling from the dataset's to all of it; one teacher draw",
        reference="Lin et al. 2020, arXiv 2009.07253",
        terms=(TermConfig(objective="forward_kl", support="sampled", draws_of="teacher"),),
        prefixes=Prefixes(student=Schedule(schedule="linear", start=0.0, end=1.0)),
    ),
    "gkd": Method(
        summary=(
            "generalized distillation: a mix of the dataset's and the student's own text under a "
            "generalized JSD"
        ),
        weight="that of generalized_jsd",
        use="the plain on-policy baseline; prefixes.student is its lambda",
        defaults="lambda 0.5, one coin per batch; beta 0.5",
        reference="Agarwal et al. 2024, arXiv 2306.13649",
        terms=one_term("generalized_jsd"),
        prefixes=Prefixes(student=0.5, mix="batch"),
    ),
    "distillm": Method(
        summary="skew KL on a share of student text that follows the validation loss, with replay",
        weight="that of skew_forward_kl",
        use="when generation is the bottleneck; needs data.validation and train.eval_strategy",
        defaults="skew 0.1; share from 0, up by 0.1 when the validation loss rises by 0.1; replay of 1,000",
        reference="Ko et al. 2024, arXiv 2402.03898",
        terms=one_term("skew_forward_kl"),
        prefixes=Prefixes(student=Schedule(schedule="adaptive", start=0.0, end=1.0)),
        rollouts=RolloutConfig(replay=ReplayConfig()),
    ),
    "distillm2": Method(
        summary="skew forward KL on the teacher's text, skew reverse KL on the student's",
        weight="skew_forward_kl on dataset rows, skew_reverse_kl on student rows",
        use=(
            "teacher-written data and rollouts side by side: raise what the teacher wrote, lower what the "
            "student should not"
        ),
        defaults=(
            "skew 0.1 at most on each side, smaller where teacher and student are near each other (adaptive)"
        ),
        reference="Ko et al. 2025, arXiv 2503.07067",
        terms=(
            TermConfig(objective="skew_forward_kl", on="dataset", kwargs={"lam": _SKEW}),
            TermConfig(objective="skew_reverse_kl", on="student", kwargs={"lam": _SKEW}),
        ),
        prefixes=Prefixes(student=0.5),
    ),
    "minillm": Method(
        summary=(
            "reverse KL of whole sequences as a policy gradient, split into an exact first step and "
            "normalized returns"
        ),
        weight="q (log p - log q) on the vocabulary, and the mean of later log-ratios at the written token",
        use="credit for where a token leads; the slowest of the on-policy methods",
        defaults="teacher's share of the sampling 0.2, clip 0.2, discount 1, length normalization",
        reference="Gu et al. 2024, arXiv 2306.08543, eq. 3-7",
        terms=(
            TermConfig(objective="reverse_kl", on="student"),
            TermConfig(objective="reverse_kl", on="student", support="rollout", kwargs={"baseline": 1.0}),
        ),
        prefixes=Prefixes(student=1.0),
        rollouts=RolloutConfig(teacher_share=0.2),
        strategy=StrategyConfig(
            type="policy_gradient", discount=1.0, later_only=True, normalize_returns=True
        ),
    ),
    "opd": Method(
        summary=(
            "on-policy distillation: the token that the student wrote, rewarded by the teacher's log-ratio"
        ),
        weight="log p - log q at the written token",
        use="the second stage after any offline method; the teacher reads one token per position",
        defaults="policy gradient with clip 0.2, discount 0",
        reference="Thinking Machines Lab 2025, On-policy distillation",
        terms=(
            TermConfig(objective="reverse_kl", on="student", support="rollout", kwargs={"baseline": 1.0}),
        ),
        prefixes=Prefixes(student=1.0),
        strategy=StrategyConfig(type="policy_gradient"),
    ),
    "psft": Method(
        summary="proximal fine-tuning: the label's likelihood ratio is clipped, several updates per batch",
        weight="1[v = y] as an advantage of a clipped ratio",
        use="fine-tuning that must not run away from the model it starts from",
        defaults="clip 0.2 below and 0.28 above, 4 updates",
        reference="Zhu et al. 2025, arXiv 2508.17784",
        terms=one_term("nll"),
        strategy=StrategyConfig(type="policy_gradient", clip_high=0.28, updates=4),
    ),
    "hpd_clipped": Method(
        summary=(
            "HPD with its weights as advantages of a clipped ratio, as in the reference's reinforcement-"
            "learning recipe"
        ),
        weight="that of hpd, frozen, times min(r, clip(r))",
        use="several updates on the same draws",
        defaults="clip 0.2",
        reference=(
            "Zhu et al. 2026, arXiv 2604.20244 (code: verl recipe, here with the draw of the right position)"
        ),
        terms=one_term("hpd"),
        strategy=StrategyConfig(type="policy_gradient"),
    ),
    **POSITION_METHODS,
    **ANY_TEACHER,
}


def method_terms(name: str, kwargs: Mapping[str, Any]) -> tuple[TermConfig, ...]:
    """The preset's terms with `kwargs` put in: parameters of the objective, or fields of `TermConfig`.

    Raises:
        ValueError: unknown method, or a key that no term of the method knows.
    """
    name, kwargs = new_name(name), new_keys(kwargs)
    if name not in METHODS:
        raise ValueError(f"Unknown method {name!r}. {nearest(name, list(METHODS))}")
    of_a_term = {f.name for f in fields(TermConfig)} - {"objective", "kwargs"}
    terms: list[TermConfig] = []
    used: set[str] = set()
    for term in METHODS[name].terms:
        parameters = set(parameters_of(term.objective))
        used |= (parameters | of_a_term) & set(kwargs)
        terms.append(with_parameters(term, kwargs))
        allowed = sorted(parameters | of_a_term)
    for key in kwargs:
        if key not in used:
            raise ValueError(f"Method {name!r} has no parameter {key!r}. {nearest(key, allowed)}")
    return tuple(terms)


def choose_terms(
    method: str | None, method_kwargs: Mapping[str, Any], terms: Sequence[TermConfig | Term]
) -> tuple[TermConfig | Term, ...]:
    """The terms of a method's name or of an explicit list (not both), checked.

    Raises:
        ValueError: nothing or both given, unknown names, or choices that do not fit together.
    """
    if method is not None and terms:
        raise ValueError("Give method or terms, not both: a method is a ready list of terms.")
    if method is None and not terms:
        raise ValueError(f"Nothing to learn: give method (one of {', '.join(METHODS)}) or terms.")
    if method_kwargs and method is None:
        raise ValueError(
            "method_kwargs are parameters of method; with terms, put them into each term's kwargs."
        )
    chosen = method_terms(method, method_kwargs) if method is not None else tuple(terms)
    for config in chosen:
        if isinstance(config, TermConfig) and isinstance(config.weight, PositionRule):
            config.weight.check_effect()
    name_terms(chosen)
    return chosen


def name_terms(terms: Sequence[TermConfig | Term]) -> tuple[Term, ...]:
    """The terms built and checked, each under a name of its own."""
    built: list[Term] = []
    for config in terms:
        term = config.check() if isinstance(config, Term) else config.build()
        taken = sum(other.name.split("#")[0] == term.name for other in built)
        built.append(term._replace(name=f"{term.name}#{taken + 1}") if taken else term)
    return tuple(built)
