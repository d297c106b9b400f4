"""Rows of the table of methods whose term weighs the tokens of an answer by their position."""

from __future__ import annotations

from hpd.methods.method import Method
from hpd.methods.position_rules import PositionRule
from hpd.methods.prefixes import Prefixes
from hpd.methods.schedules import Schedule
from hpd.methods.strategy import StrategyConfig
from hpd.methods.terms import TermConfig

__all__ = ["POSITION_METHODS"]


def _written(weight: PositionRule) -> tuple[TermConfig, ...]:
    """The term of on-policy distillation (opd), weighted."""
    return (
        TermConfig(
            objective="reverse_kl", on="student", support="rollout", kwargs={"baseline": 1.0}, weight=weight
        ),
    )


POSITION_METHODS: dict[str, Method] = {
    "iw_opd": Method(
        summary="on-policy distillation that trusts the teacher less, the further an answer has drifted",
        weight="c_t (log p - log q), c_t = 1 + g (1 - sum_{u<t} |A_u| / sum_u |A_u|), A = log p - log q",
        use="long rollouts, whose late tokens the teacher would not have written",
        defaults="gain g 1 (of this project), policy gradient with clip 0.2, discount 0",
        reference="Xie et al. 2026, arXiv 2606.22600",
        terms=_written(PositionRule(rule="drift")),
        prefixes=Prefixes(student=1.0),
        strategy=StrategyConfig(type="policy_gradient"),
    ),
    "tip": Method(
        summary="on-policy distillation on the half of each answer's tokens where the student is least sure",
        weight="1[H(q_t) among the top half of the row] (log p - log q)",
        use="to spend the gradient where the student has something to decide",
        defaults="share 0.5 of each row's tokens, policy gradient with clip 0.2, discount 0",
        reference="Xu et al. 2026, arXiv 2604.14084 (its rule by entropy)",
        terms=_written(PositionRule(rule="entropy", share=0.5)),
        prefixes=Prefixes(student=1.0),
        strategy=StrategyConfig(type="policy_gradient"),
    ),
    "sod": Method(
        summary="reverse KL on recorded agents, each step weighed by how near it is to the teacher",
        weight="min((d_1 + e) / (d_k + e), 1.5) q (log p - log q), d_k the mean |log q - log p| of step k",
        use="conversations with tools, several turns of the assistant a row (data.labels: assistant)",
        defaults="e 0.001 (of this project), limit 1.5",
        reference="Zhong et al. 2026, arXiv 2605.07725",
        terms=(TermConfig(objective="reverse_kl", weight=PositionRule(rule="steps")),),
    ),
    "length_curriculum": Method(
        summary="forward KL on the first tokens of each answer, a share that grows to all of them",
        weight="1[t <= s T] p, s growing with training",
        use="long answers: what lies behind the share is not computed, so early steps are cheaper",
        defaults="share from 0.1 to 1 over the first half of training (of this project)",
        reference="this project; after the first 30% of arXiv 2606.22600",
        terms=(
            TermConfig(
                objective="forward_kl",
                weight=PositionRule(
                    rule="first", share=Schedule(schedule="linear", start=0.1, end=1.0, over=0.5)
                ),
            ),
        ),
    ),
}
