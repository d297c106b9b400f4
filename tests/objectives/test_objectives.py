"""One table, many properties: every member of OBJECTIVES passes the same suite.

Oracles are plain Python loops over one position, from the papers' formulas. An oracle takes the teacher's row
p, the student's row q, and `held`, the student's row that the objective treats as constant; weights are
checked against its numerical derivative. Axes: N label positions, K columns, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hpd.methods.supports import full, label
from hpd.objectives import OBJECTIVES, Objective
from hpd.objectives.fused import FUSED, Whole

FLOOR = -1e5  # nats, what the operator puts in the place of -inf
Row = Sequence[float]


def kl(p: Row, q: Row) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def mix(p: Row, q: Row, p_share: float) -> list[float]:
    return [p_share * a + (1 - p_share) * b for a, b in zip(p, q, strict=True)]


def jsd_oracle(beta: float) -> Callable[[Row, Row, Row], float]:
    return lambda p, q, held: beta * kl(p, mix(p, q, beta)) + (1 - beta) * kl(q, mix(p, q, beta))


def alpha_beta_oracle(alpha: float, beta: float) -> Callable[[Row, Row, Row], float]:
    """The five cases, each from its own formula, as Cichocki et al. state them, times the factor of ABKD's
    code."""

    def term(a: float, b: float) -> float:
        ratio = math.log(a / b)
        if alpha == beta == 0:
            return 0.5 * ratio**2
        if alpha == 0:
            return abs(beta) / beta**2 * (b**beta * math.log(b**beta / a**beta) - b**beta + a**beta)
        if beta == 0:
            return abs(alpha) / alpha**2 * (a**alpha * math.log(a**alpha / b**alpha) - a**alpha + b**alpha)
        if alpha == -beta:
            return abs(alpha) / alpha**2 * (math.log(b**alpha / a**alpha) + (b**alpha / a**alpha) ** -1 - 1)
        total = alpha + beta
        return -(a**alpha * b**beta - alpha / total * a**total - beta / total * b**total) / (alpha * beta)

    return lambda p, q, held: sum(term(a, b) for a, b in zip(p, q, strict=True))


def akl_oracle(mu: float) -> Callable[[Row, Row, Row], float]:
    def oracle(p: Row, q: Row, held: Row) -> float:
        mass, head = 0.0, set()
        for rank, v in enumerate(sorted(range(len(p)), key=lambda v: -p[v])):
            mass += p[v]
            if mass <= mu or rank == 0:
                head.add(v)
        gaps = [abs(a - b) for a, b in zip(p, held, strict=True)]
        share = sum(gaps[v] for v in head) / sum(gaps) if sum(gaps) else 0.5
        return share * kl(p, q) + (1 - share) * kl(q, p)

    return oracle


def todi_oracle(beta: float) -> Callable[[Row, Row, Row], float]:
    def oracle(p: Row, q: Row, held: Row) -> float:
        total = 0.0
        for a, b, h in zip(p, q, held, strict=True):
            share = 1 / (1 + (h / a) ** beta)
            total += share * a * math.log(a / b) + (1 - share) * b * math.log(b / a)
        return total

    return oracle


def taid_oracle(t: float) -> Callable[[Row, Row, Row], float]:
    def oracle(p: Row, q: Row, held: Row) -> float:
        powers = [h ** (1 - t) * a**t for a, h in zip(p, held, strict=True)]
        return kl([x / sum(powers) for x in powers], q)

    return oracle


def label_reverse_oracle(p: Row, q: Row, held: Row) -> float:
    """The integral of log(u / p) du from p to q: its derivative is the gap of the label, and zero where q =
    p."""
    return q[0] * math.log(q[0] / p[0]) + p[0] - q[0]


def label_jsd_oracle(beta: float) -> Callable[[Row, Row, Row], float]:
    def oracle(p: Row, q: Row, held: Row) -> float:
        middle = beta * p[0] + (1 - beta) * q[0]
        return beta * p[0] * math.log(p[0] / middle) - (1 - beta) * q[0] * math.log(middle / q[0])

    return oracle


def alm_oracle(tau: float) -> Callable[[Row, Row, Row], float]:
    """The divergence of two coins."""

    def oracle(p: Row, q: Row, held: Row) -> float:
        a, b = p[0] ** (1 / tau), q[0] ** (1 / tau)
        return kl([a, 1 - a], [b, 1 - b])

    return oracle


def chi_squared_oracle(p: Row, q: Row, held: Row) -> float:
    return sum((a - b) ** 2 / b for a, b in zip(p, q, strict=True))


CHI_SQUARED = {"f": lambda r: (r - 1) ** 2, "df": lambda r: 2 * (r - 1)}


class Case(NamedTuple):
    name: str
    params: dict[str, Any]
    oracle: Callable[[Row, Row, Row], float] | None = None
    """The divergence; None for the weight rules, which have oracles of their own below."""
    domain: str = "token"
    holds_constants: bool = False
    """Whether part of the value is constant for the gradient, so that it cannot be differentiated
    numerically."""

    def make(self) -> Objective:
        return OBJECTIVES[self.name](**self.params)

    def __str__(self) -> str:
        return self.name + "".join(f",{k}={v}" for k, v in self.params.items() if not callable(v))


ALPHA_BETA = [(0.2, 0.7), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.6), (0.4, 0.0), (0.0, 0.0)]
ALPHA_BETA += [(0.5, -0.5), (-0.5, 0.5), (-0.3, -0.4), (2.0, -0.5)]
CASES = [
    Case("nll", {}, domain="label", holds_constants=True),
    Case("masked_sft", {}, domain="label", holds_constants=True),
    Case("label_forward_kl", {}, domain="label", holds_constants=True),
    Case("label_reverse_kl", {}, label_reverse_oracle, "label"),
    *(Case("label_jsd", {"beta": beta}, label_jsd_oracle(beta), "label") for beta in (0.2, 0.5)),
    *(Case("alm", {"tau": tau}, alm_oracle(tau), "label") for tau in (1.0, 20.0)),
    Case("forward_kl", {}, lambda p, q, held: kl(p, q)),
    Case("reverse_kl", {}, lambda p, q, held: kl(q, p)),
    *(
        Case("symmetric_kl", {"lam": lam}, lambda p, q, held, lam=lam: (1 - lam) * kl(p, q) + lam * kl(q, p))
        for lam in (0.0, 0.2, 0.5, 1.0)
    ),
    Case("generalized_jsd", {"beta": 0.0}, lambda p, q, held: kl(p, q)),
    Case("generalized_jsd", {"beta": 1.0}, lambda p, q, held: kl(q, p)),
    *(Case("generalized_jsd", {"beta": beta}, jsd_oracle(beta)) for beta in (0.1, 0.5, 0.9)),
    Case("js", {"lam": 0.1}, jsd_oracle(0.9)),
    *(
        Case("skew_forward_kl", {"lam": lam}, lambda p, q, held, lam=lam: kl(p, mix(p, q, lam)))
        for lam in (0.0, 0.1, 0.7)
    ),
    *(
        Case("skew_reverse_kl", {"lam": lam}, lambda p, q, held, lam=lam: kl(q, mix(q, p, lam)))
        for lam in (0.0, 0.1, 0.7)
    ),
    Case("total_variation", {}, lambda p, q, held: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2),
    Case("acceptance", {}, lambda p, q, held: -math.log(sum(map(min, p, q))), "distribution"),
    Case("f_divergence", CHI_SQUARED, chi_squared_oracle),
    *(Case("abkd", {"alpha": a, "beta": b}, alpha_beta_oracle(a, b)) for a, b in ALPHA_BETA),
    *(Case("akl", {"mu": mu}, akl_oracle(mu), "distribution", True) for mu in (0.3, 0.5)),
    *(Case("todi", {"beta": beta}, todi_oracle(beta), "token", True) for beta in (0.0, 1.0, 3.0)),
    *(Case("taid", {"t": t}, taid_oracle(t), "distribution", True) for t in (0.4, 1.0)),
    Case("hpd", {}, domain="label", holds_constants=True),
    Case("hpd", {"forward": 0.5, "reverse": 2.0, "mask": False}, domain="label", holds_constants=True),
    Case("hpd_full", {}, holds_constants=True),
    Case("hpd_full", {"forward": 0.5, "reverse": 2.0, "mask": False}, holds_constants=True),
    Case("hpd_expected", {}, domain="label_and_vocabulary", holds_constants=True),
]
DIVERGENCES = [case for case in CASES if case.oracle]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_divergence = pytest.mark.parametrize("case", DIVERGENCES, ids=str)


def logits(rows: int = 5, columns: int = 7, seed: int = 0, scale: float = 1.5) -> tuple[Tensor, Tensor]:
    """Teacher and student logits in float64, the last two columns of the teacher tied."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = scale * torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)
    teacher[:, -1] = teacher[:, -2]
    return teacher, student


def logprobs(rows: int = 5, columns: int = 7, seed: int = 0, scale: float = 1.5) -> tuple[Tensor, Tensor]:
    teacher, student = logits(rows, columns, seed, scale)
    return torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)


def floored_logprobs(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).clamp_min(FLOOR)


def logit_gradient(objective: Objective, teacher: Tensor, student: Tensor) -> Tensor:
    """`(sum w) q - w`, the gradient that the operator assembles."""
    weights = objective.weights(teacher, student)
    return weights.sum(-1, keepdim=True) * student.exp() - weights


# --- the whole table
# -------------------------------------------------------------------------------------------------


def test_the_table_is_covered() -> None:
    assert {case.name for case in CASES} == set(OBJECTIVES)


@every_case
def test_domain_and_shapes(case: Case) -> None:
    objective, (teacher, student) = case.make(), logprobs()
    assert objective.domain == case.domain
    before = teacher.clone(), student.clone()
    for output in (objective.weights(teacher, student), objective.value(teacher, student)):
        assert output.shape == teacher.shape
        assert output.dtype == teacher.dtype
    assert torch.equal(teacher, before[0]), "inputs must not be written to"
    assert torch.equal(student, before[1]), "inputs must not be written to"
    for name, metric in (objective.stats(teacher, student) if objective.stats else {}).items():
        assert metric.shape == teacher.shape[:1], name


@every_case
def test_gradient_of_the_value_is_assembled_from_the_weights(case: Case) -> None:
    objective, (teacher, student_logits) = case.make(), logits()
    teacher = torch.log_softmax(teacher, -1)
    student_logits.requires_grad_()
    student = torch.log_softmax(student_logits, -1)
    student.retain_grad()
    objective.value(teacher, student).sum().backward()
    student = student.detach()
    torch.testing.assert_close(
        student_logits.grad, logit_gradient(objective, teacher, student), rtol=1e-12, atol=1e-12
    )


@every_case
def test_weights_are_exact_and_not_up_to_a_multiple_of_the_student(case: Case) -> None:
    objective, (teacher, student) = case.make(), logprobs()
    student.requires_grad_()
    objective.value(teacher, student).sum().backward()
    torch.testing.assert_close(
        objective.weights(teacher, student.detach()), -student.grad, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("case", [case for case in DIVERGENCES if not case.holds_constants], ids=str)
def test_gradcheck(case: Case) -> None:
    objective, (teacher, student) = case.make(), logits(rows=2, columns=4)
    teacher = torch.log_softmax(teacher, -1)
    assert torch.autograd.gradcheck(
        lambda z: objective.value(teacher, torch.log_softmax(z, -1)), student.requires_grad_(), fast_mode=True
    )


@every_divergence
def test_value_equals_the_oracle(case: Case) -> None:
    teacher, student = logprobs()
    got = case.make().value(teacher, student).sum(-1)
    rows = zip(teacher.exp().tolist(), student.exp().tolist(), strict=True)
    want = torch.tensor([case.oracle(p, q, q) for p, q in rows], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@every_divergence
def test_weights_equal_the_oracles_derivative(case: Case) -> None:
    teacher, student = logprobs(rows=3)
    got = case.make().weights(teacher, student)
    for row, (p, q) in enumerate(zip(teacher.exp().tolist(), student.exp().tolist(), strict=True)):
        for v in range(len(q)):
            step = 1e-5 * q[v]
            up, down = list(q), list(q)
            up[v] += step
            down[v] -= step
            derivative = (case.oracle(p, up, q) - case.oracle(p, down, q)) / (2 * step)
            assert got[row, v].item() == pytest.approx(-q[v] * derivative, rel=1e-6, abs=1e-8)


@every_divergence
def test_non_negative_and_zero_only_where_equal(case: Case) -> None:
    objective, (teacher, student) = case.make(), logprobs(rows=50)
    for distance in (1.0, 0.1, 1e-3):
        near = torch.log_softmax(torch.lerp(teacher, student, distance), -1)
        assert (objective.value(teacher, near).sum(-1) > 0).all(), distance
    equal = objective.value(teacher, teacher.clone())
    assert equal.abs().max() < 1e-13
    assert logit_gradient(objective, teacher, teacher.clone()).abs().max() < 1e-13


@every_case
def test_logit_shift_changes_nothing(case: Case) -> None:
    objective, (teacher, student) = case.make(), logits()
    plain = [torch.log_softmax(z, -1) for z in (teacher, student)]
    shifted = [torch.log_softmax(z, -1) for z in (teacher + 30.0, student - 70.0)]
    torch.testing.assert_close(objective.value(*shifted), objective.value(*plain), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(objective.weights(*shifted), objective.weights(*plain), rtol=1e-10, atol=1e-12)


@every_case
def test_the_order_of_the_columns_does_not_matter(case: Case) -> None:
    objective, (teacher, student) = case.make(), logprobs()
    fixed = [0] if case.domain.startswith("label") else []
    order = torch.tensor(fixed + [v for v in (3, 6, 0, 5, 1, 4, 2) if v not in fixed])
    for f in (objective.weights, objective.value):
        permuted = f(teacher[:, order], student[:, order])
        torch.testing.assert_close(permuted, f(teacher, student)[:, order], rtol=1e-12, atol=1e-14)


@every_case
def test_masked_rows_are_removed_rows(case: Case) -> None:
    objective, (teacher, student) = case.make(), logprobs()
    keep = torch.tensor([True, False, True, True, False])
    teacher_other, student_other = logprobs(seed=1)
    changed = [
        torch.where(keep[:, None], a, b) for a, b in ((teacher, teacher_other), (student, student_other))
    ]
    for f in (objective.weights, objective.value):
        torch.testing.assert_close(f(*changed)[keep], f(teacher[keep], student[keep]), rtol=1e-13, atol=1e-15)


WITH_SECOND_FORM = [c for c in CASES if c.make().rule in FUSED and not c.domain.startswith("label")]


@pytest.mark.parametrize("case", WITH_SECOND_FORM, ids=str)
def test_fused_is_weights_and_summed_value(case: Case) -> None:
    objective, (teacher, student) = case.make(), logprobs()
    labels = torch.zeros(len(student), dtype=torch.long)
    whole = Whole(teacher.clone(), student.clone(), student.exp(), labels)
    weights, value, factor, mass, _ = FUSED[objective.rule](whole, *objective.arguments)
    expected = objective.weights(teacher, student)
    torch.testing.assert_close(weights * factor, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(value, objective.value(teacher, student).sum(-1), rtol=1e-9, atol=1e-10)
    if mass is not None:
        torch.testing.assert_close(mass, expected.sum(-1), rtol=1e-9, atol=1e-10)


def test_an_objective_says_which_factory_made_it() -> None:
    assert set(FUSED) < set(OBJECTIVES)
    assert {case.make().rule for case in CASES} >= set(FUSED)
    for case in CASES:
        aliases = {"js": "generalized_jsd"}
        limits = ("forward_kl", "reverse_kl", "")
        assert case.make().rule in (aliases.get(case.name, case.name), *limits)


@pytest.mark.parametrize("case", [case for case in CASES if not case.domain.startswith("label")], ids=str)
def test_columns_without_mass_on_either_side_are_removed_columns(case: Case) -> None:
    objective, (teacher, student) = case.make(), logits()
    dead = torch.tensor([False, True, False, False, True, False, False])
    padded = [floored_logprobs(z.masked_fill(dead, -torch.inf)) for z in (teacher, student)]
    removed = [torch.log_softmax(z[:, ~dead], -1) for z in (teacher, student)]
    for f in (objective.weights, objective.value):
        assert (f(*padded)[:, dead] == 0).all()
        torch.testing.assert_close(f(*padded)[:, ~dead], f(*removed), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", [case for case in CASES if case.domain == "token"], ids=str)
def test_token_objectives_look_at_their_own_column_only(case: Case) -> None:
    objective, (teacher, student) = case.make(), logprobs()
    columns = torch.tensor([4, 1, 5])
    for f in (objective.weights, objective.value):
        torch.testing.assert_close(
            f(teacher[:, columns], student[:, columns]),
            f(teacher, student)[:, columns],
            rtol=1e-13,
            atol=1e-15,
        )


@pytest.mark.parametrize("case", [case for case in CASES if case.domain == "distribution"], ids=str)
def test_distribution_objectives_look_at_other_columns(case: Case) -> None:
    objective, (teacher, student) = case.make(), logprobs()
    part = objective.weights(teacher[:, :3], student[:, :3])
    assert not torch.allclose(part, objective.weights(teacher, student)[:, :3], rtol=1e-3)


@every_case
def test_drop_safe_means_weights_without_the_student(case: Case) -> None:
    objective, (teacher, student), (_, other) = case.make(), logprobs(rows=20), logprobs(rows=20, seed=1)
    same = torch.equal(objective.weights(teacher, student), objective.weights(teacher, other))
    # t = 1 needs no student either, but normalizes over its columns.
    assert objective.drop_safe == (same and case.domain != "distribution")


@every_case
@pytest.mark.skipif(
    hasattr(OBJECTIVES["nll"], "__wrapped__"), reason="the type-checking import hook cannot be traced"
)
def test_runs_as_one_graph(case: Case) -> None:
    objective, (teacher, student) = case.make(), logprobs()
    torch.compiler.reset()
    for f in (objective.weights, objective.value):
        compiled = torch.compile(f, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(teacher, student), f(teacher, student), rtol=0, atol=0)


# --- numerics
# --------------------------------------------------------------------------------------------------------

EXTREMES = [FLOOR, -1e4, -200.0, -104.0, -88.0, -50.0, -5.0, -1.0, -1e-3, -1e-7, 0.0]


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_finite_for_every_input_in_range(case: Case, dtype: torch.dtype) -> None:
    objective, points = case.make(), torch.tensor(EXTREMES, dtype=dtype)
    pairs = torch.cartesian_prod(points, points)
    as_columns, as_rows = pairs.T[:, None, :], pairs.T[:, :, None]  # [2, 1, K] and [2, N, 1]
    for teacher, student in (as_columns, as_rows, as_rows.expand(-1, -1, 3)):
        outputs = [objective.weights(teacher, student), objective.value(teacher, student)]
        outputs += objective.stats(teacher, student).values() if objective.stats else []
        assert all(output.isfinite().all() for output in outputs)
        assert outputs[0].sum(-1).square().isfinite().all(), (
            "a sum of weights must survive being squared, in a norm"
        )


@every_case
def test_no_mass_on_one_side_is_finite_and_weighs_nothing_there(case: Case) -> None:
    objective, (teacher, student) = case.make(), logits()
    teacher[:, 2] = student[:, 4] = -torch.inf
    teacher, student = floored_logprobs(teacher).float(), floored_logprobs(student).float()
    weights, value = objective.weights(teacher, student), objective.value(teacher, student)
    assert weights.isfinite().all()
    assert value.isfinite().all()
    assert logit_gradient(objective, teacher, student).isfinite().all()


@pytest.mark.parametrize("name", ["forward_kl", "skew_forward_kl", "taid", "hpd_full"])
def test_a_token_the_teacher_excludes_is_never_reinforced(name: str) -> None:
    params = {"t": 0.5} if name == "taid" else {}
    teacher, student = logits()
    teacher[:, 2] = -torch.inf
    weights = OBJECTIVES[name](**params).weights(floored_logprobs(teacher), floored_logprobs(student))
    assert (weights[:, 2] <= 0).all()
    assert (weights[:, 2] == 0).all() or name == "hpd_full"


def has_zero_limit(case: Case) -> bool:
    """Whether value and weight vanish with p and q, whichever is smaller; negative powers do not."""
    alpha, beta = case.params.get("alpha", 1), case.params.get("beta", 1)
    return case.domain == "token" and (case.name != "abkd" or (min(alpha, beta) >= 0 and alpha + beta > 0))


@pytest.mark.parametrize("case", [case for case in DIVERGENCES if has_zero_limit(case)], ids=str)
def test_a_token_without_mass_costs_nothing_whatever_the_log_ratio(case: Case) -> None:
    objective = case.make()
    tiny, none = torch.tensor([[-1000.0]], dtype=torch.float64), torch.tensor([[FLOOR]], dtype=torch.float64)
    for teacher, student in ((tiny, none), (none, tiny), (none, none)):
        assert objective.value(teacher, student).abs().item() < 1e-80
        assert objective.weights(teacher, student).abs().item() < 1e-80


@every_case
def test_huge_logits_stay_finite_in_float32(case: Case) -> None:
    objective, (teacher, student) = case.make(), logits()
    teacher, student = (floored_logprobs((z.sign() * 1e4).float()) for z in (teacher, student))
    assert objective.weights(teacher, student).isfinite().all()
    assert objective.value(teacher, student).isfinite().all()
    assert logit_gradient(objective, teacher, student).isfinite().all()


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_logits_are_no_worse_than_naive(case: Case, dtype: torch.dtype) -> None:
    objective = case.make()
    teacher, student = (z.to(dtype) for z in logits(rows=16, columns=64))

    def run(precision: torch.dtype) -> tuple[Tensor, Tensor]:
        arguments = [torch.log_softmax(z.to(precision), -1) for z in (teacher, student)]
        return objective.value(*arguments).double(), logit_gradient(objective, *arguments).double()

    for truth, ours, naive in zip(run(torch.float64), run(torch.float32), run(dtype), strict=True):
        naive_error = (truth - naive).abs().nan_to_num(torch.inf).max()
        assert (truth - ours).abs().max() <= naive_error + 1e-6
        assert (truth - ours).norm() <= 1e-5 * truth.norm() + 1e-6


# --- directions and relations: the bugs that other systems shipped
# ---------------------------------------------------

# The teacher has two modes, the student one of them: forward KL is large, reverse KL is small.
TWO_MODES = torch.tensor([[0.49, 0.49, 0.02]], dtype=torch.float64).log()
ONE_MODE = torch.tensor([[0.97, 0.01, 0.02]], dtype=torch.float64).log()


def total(name: str, **params: Any) -> float:
    return OBJECTIVES[name](**params).value(TWO_MODES, ONE_MODE).sum().item()


def test_directions_of_the_interpolating_parameters() -> None:
    forward, reverse = total("forward_kl"), total("reverse_kl")
    assert forward == pytest.approx(0.49 * math.log(0.49 / 0.97) + 0.49 * math.log(0.49 / 0.01))
    assert reverse == pytest.approx(0.97 * math.log(0.97 / 0.49) + 0.01 * math.log(0.01 / 0.49))
    assert forward > 2 * reverse
    assert total("generalized_jsd", beta=0.0) == total("symmetric_kl", lam=0.0) == forward
    assert total("generalized_jsd", beta=1.0) == total("symmetric_kl", lam=1.0) == reverse
    assert total("skew_forward_kl", lam=0.0) == forward
    assert total("skew_reverse_kl", lam=0.0) == reverse
    assert total("abkd", alpha=1.0, beta=0.0) == pytest.approx(forward)
    assert total("abkd", alpha=0.0, beta=1.0) == pytest.approx(reverse)
    assert total("taid", t=1.0) == pytest.approx(forward)
    assert total("taid", t=0.0) == pytest.approx(0.0, abs=1e-15)
    assert total("todi", beta=1.0) == pytest.approx(forward + reverse)
    assert total("js", lam=0.2) == total("generalized_jsd", beta=0.8)


def test_the_jsd_tends_to_either_kl_at_its_ends() -> None:
    assert total("generalized_jsd", beta=1e-6) / 1e-6 == pytest.approx(total("forward_kl"), rel=1e-4)
    assert total("generalized_jsd", beta=1 - 1e-6) / 1e-6 == pytest.approx(total("reverse_kl"), rel=1e-4)


def test_skew_bounds_the_divergence_by_the_share_of_the_first_argument() -> None:
    teacher, student = torch.tensor([[0.0, FLOOR]]), torch.tensor([[FLOOR, 0.0]])
    assert OBJECTIVES["skew_forward_kl"](lam=0.1).value(teacher, student).sum().item() == pytest.approx(
        math.log(10)
    )
    assert OBJECTIVES["skew_reverse_kl"](lam=0.1).value(teacher, student).sum().item() == pytest.approx(
        math.log(10)
    )
    assert OBJECTIVES["total_variation"]().value(teacher, student).sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("lam", [0.1, 0.5])
def test_the_sharpest_todi_is_forward_where_underestimated_and_reverse_where_overestimated(
    lam: float,
) -> None:
    teacher, student = logprobs()
    got = OBJECTIVES["todi"](beta=1e6).weights(teacher, student)
    want = torch.where(
        teacher > student,
        OBJECTIVES["forward_kl"]().weights(teacher, student),
        OBJECTIVES["reverse_kl"]().weights(teacher, student),
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("name", "f", "df"),
    [
        ("forward_kl", lambda r: r * r.log(), lambda r: r.log() + 1),
        ("reverse_kl", lambda r: -r.log(), lambda r: -1 / r),
        ("total_variation", lambda r: 0.5 * (r - 1).abs(), lambda r: 0.5 * (r - 1).sign()),
    ],
)
def test_f_divergences_contain_the_named_ones(name: str, f: Callable, df: Callable) -> None:
    general, named, arguments = OBJECTIVES["f_divergence"](f=f, df=df), OBJECTIVES[name](), logprobs()
    torch.testing.assert_close(general.weights(*arguments), named.weights(*arguments), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(general.value(*arguments), named.value(*arguments), rtol=1e-12, atol=1e-14)


def test_a_saturated_f_divergence_keeps_the_weight_of_forward_kl() -> None:
    forward = OBJECTIVES["f_divergence"](f=lambda r: r * r.log(), df=lambda r: r.log() + 1)
    weight = forward.weights(torch.tensor([[math.log(0.5)]]), torch.tensor([[FLOOR]]))
    assert weight.item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("near", "limit", "factor"),
    [
        ((1e-3, 0.7), (0.0, 0.7), 0.7),
        ((0.7, 1e-3), (0.7, 0.0), 0.7),
        ((0.5, -0.499), (0.5, -0.5), 0.5),
        ((1e-3, 2e-3), (0.0, 0.0), 1.0),
    ],
)
def test_abkd_jumps_at_its_limits_by_the_stated_factor(near: tuple, limit: tuple, factor: float) -> None:
    arguments = logprobs(scale=1.0)
    for f in ("weights", "value"):
        approaching, at_limit = (
            getattr(OBJECTIVES["abkd"](alpha=a, beta=b), f)(*arguments) for a, b in (near, limit)
        )
        torch.testing.assert_close(approaching * factor, at_limit, rtol=0.05, atol=1e-3)


def test_abkd_is_accurate_for_small_exponents_in_float32() -> None:
    objective, (teacher, student) = OBJECTIVES["abkd"](alpha=1e-3, beta=0.7), logprobs()
    truth, ours = objective.weights(teacher, student), objective.weights(teacher.float(), student.float())
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-7)


def test_akl_follows_the_part_of_the_teacher_that_the_student_misses() -> None:
    teacher = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 2, dtype=torch.float64).log()
    misses_head = [0.1, 0.6, 0.2, 0.1]
    misses_tail = [0.4, 0.3, 0.05, 0.25]
    student = torch.tensor([misses_head, misses_tail], dtype=torch.float64).log()
    got = OBJECTIVES["akl"](mu=0.7 + 1e-9).weights(teacher, student)
    torch.testing.assert_close(got[:1], OBJECTIVES["forward_kl"]().weights(teacher, student)[:1])
    torch.testing.assert_close(got[1:], OBJECTIVES["reverse_kl"]().weights(teacher, student)[1:])


# --- the hybrid rules
# ------------------------------------------------------------------------------------------------


def hybrid_oracle(
    p: Row, q: Row, label: int, draws: Sequence[int], forward=1.0, reverse=1.0, mask=True, reinforce=True
) -> dict[str, Any]:
    """Section by section: one rule for every draw, then the mean over draws; weights per token of the
    vocabulary."""
    weights, stats = (
        [0.0] * len(p),
        dict.fromkeys(("k1_positive", "reinforced", "label_penalized", "sample_penalized"), 0.0),
    )
    k1 = q[label] * (math.log(p[label]) - math.log(q[label]))
    for a in draws or [None]:
        k1_draw = 0.0 if a is None else q[a] * (math.log(p[a]) - math.log(q[a]))
        count = 1 / max(len(draws), 1)
        if k1 > 0 and k1_draw < 0 and reinforce:
            label_weight = 2 * forward * p[label] + reverse * k1
            stats["reinforced"] += count
        elif k1 <= 0 and mask:
            label_weight = reverse * k1
        else:
            label_weight = forward * p[label] + reverse * k1
        weights[label] += count * label_weight
        if a is not None and a != label and k1_draw < 0:
            weights[a] += count * reverse * k1_draw
            stats["sample_penalized"] += count
    stats["k1_positive"] = float(k1 > 0)
    stats["label_penalized"] = float(k1 <= 0 and mask)
    return {"weights": weights, "stats": stats}


def to_vocabulary(objective: Objective, teacher: Tensor, student: Tensor, tokens: Tensor) -> Tensor:
    """Weights of the columns [label, candidates...] on the vocabulary; a candidate equal to the label counts
    zero."""
    counts = torch.ones_like(tokens, dtype=teacher.dtype)
    counts[:, 1:] = (tokens[:, 1:] != tokens[:, :1]).to(teacher.dtype)
    weights = objective.weights(teacher.gather(1, tokens), student.gather(1, tokens))
    return torch.zeros_like(teacher).scatter_add(1, tokens, weights * counts)


SWITCHES = [
    {},
    {"mask": False},
    {"reinforce": False},
    {"mask": False, "reinforce": False},
    {"forward": 0.3, "reverse": 1.7},
    {"forward": 0.0},
    {"reverse": 0.0},
]
every_switch = pytest.mark.parametrize("switches", SWITCHES, ids=str)


@every_switch
@pytest.mark.parametrize("num_samples", [0, 1, 3])
def test_hpd_follows_the_branches_of_the_paper(switches: dict[str, Any], num_samples: int) -> None:
    objective, (teacher, student) = OBJECTIVES["hpd"](**switches), logprobs(rows=60)
    tokens = torch.randint(7, (60, 1 + num_samples), generator=torch.Generator().manual_seed(2))
    rows = zip(teacher.exp().tolist(), student.exp().tolist(), tokens.tolist(), strict=True)
    want = [hybrid_oracle(p, q, label, draws, **switches) for p, q, (label, *draws) in rows]
    got = to_vocabulary(objective, teacher, student, tokens)
    torch.testing.assert_close(got, torch.tensor([w["weights"] for w in want], dtype=torch.float64))

    stats = objective.stats(teacher.gather(1, tokens), student.gather(1, tokens))
    for name in want[0]["stats"]:
        expected = torch.tensor([w["stats"][name] for w in want], dtype=torch.float64)
        torch.testing.assert_close(stats[name], expected, msg=name)
        can_happen = switches.get({"label_penalized": "mask", "reinforced": "reinforce"}.get(name), True)
        needs_draw = name in ("reinforced", "sample_penalized")
        assert expected.any() == (can_happen and (num_samples > 0 or not needs_draw)), (
            f"{name} is not exercised"
        )
    # No weight of a draw is positive, so that draws of one token cannot cancel in the sum over the
    # vocabulary.
    torch.testing.assert_close(stats["total_weight"], got.abs().sum(1))


def test_hpd_value_is_the_reweighted_likelihood() -> None:
    objective, (teacher, student) = OBJECTIVES["hpd"](), logprobs(columns=3)
    want = -objective.weights(teacher, student) * student
    assert torch.equal(objective.value(teacher, student), want)


@every_switch
def test_hpd_expected_is_the_expectation_over_the_draw(switches: dict[str, Any]) -> None:
    single, exact = OBJECTIVES["hpd"](**switches), OBJECTIVES["hpd_expected"](**switches)
    teacher, student = logprobs(rows=20)
    labels = torch.arange(20)[:, None] % 7
    expected, expected_stats = torch.zeros_like(teacher), dict.fromkeys(single.stats(teacher, student), 0.0)
    for a in range(7):
        tokens = torch.cat([labels, torch.full_like(labels, a)], 1)
        chance = student[:, a].exp()
        expected += chance[:, None] * to_vocabulary(single, teacher, student, tokens)
        for name, metric in single.stats(teacher.gather(1, tokens), student.gather(1, tokens)).items():
            expected_stats[name] = expected_stats[name] + chance * metric
    tokens = torch.cat([labels, torch.arange(7).expand(20, 7)], 1)
    torch.testing.assert_close(to_vocabulary(exact, teacher, student, tokens), expected)
    columns = (label() + full()).columns(teacher, student, labels[:, 0])
    for name, metric in exact.stats(columns.teacher_logprobs, columns.student_logprobs).items():
        torch.testing.assert_close(metric, expected_stats[name], msg=name)


@pytest.mark.parametrize("switches", [s for s in SWITCHES if "reinforce" not in s], ids=str)
def test_hpd_full_is_the_rule_at_every_token(switches: dict[str, Any]) -> None:
    teacher, student = logprobs()
    got = OBJECTIVES["hpd_full"](**switches).weights(teacher, student)
    for row, (p, q) in enumerate(zip(teacher.exp().tolist(), student.exp().tolist(), strict=True)):
        for v in range(len(p)):
            alone = hybrid_oracle(p, q, v, [], **switches)["weights"][v]
            assert got[row, v].item() == pytest.approx(alone, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "columns"), [("hpd", [0, 1]), ("hpd_expected", [0, 0, 1]), ("hpd_full", [0, 1])]
)
def test_a_label_below_the_smallest_float_is_still_underestimated(name: str, columns: list[int]) -> None:
    teacher = torch.tensor([[0.5, 0.5]]).log()
    student = torch.tensor([[-200.0, 0.0]])  # exp(-200) is 0 in float32
    label_weight = OBJECTIVES[name]().weights(teacher[:, columns], student[:, columns])[0, 0].item()
    assert label_weight == pytest.approx(0.5 if name == "hpd_full" else 1.0)


# --- rules of the label alone
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weight", "value"),
    [
        ("nll", lambda p, q: 1.0, lambda p, q: -math.log(q)),
        ("masked_sft", lambda p, q: float(q < p), lambda p, q: max(0.0, math.log(p / q))),
        ("label_forward_kl", lambda p, q: p, lambda p, q: p * math.log(1 / q)),
        ("label_reverse_kl", lambda p, q: q * math.log(p / q), lambda p, q: q * math.log(q / p) - q + p),
        ("label_jsd", lambda p, q: q / 2 * math.log((p + q) / 2 / q), None),
    ],
)
def test_rules_of_the_label_weigh_the_label_and_nothing_else(
    name: str, weight: Callable, value: Callable | None
) -> None:
    objective, (teacher, student) = OBJECTIVES[name](), logprobs(rows=20)
    assert objective.support == "label"
    got = objective.weights(teacher, student)
    rows = list(zip(teacher[:, 0].exp().tolist(), student[:, 0].exp().tolist(), strict=True))
    assert {q < p for p, q in rows} == {True, False}
    want = torch.zeros_like(teacher)
    want[:, 0] = torch.tensor([weight(p, q) for p, q in rows])
    torch.testing.assert_close(got, want)
    if value is not None:
        want[:, 0] = torch.tensor([value(p, q) for p, q in rows])
        torch.testing.assert_close(objective.value(teacher, student), want)


@pytest.mark.parametrize(
    ("name", "switches"), [("label_forward_kl", {"reverse": 0.0}), ("label_reverse_kl", {"forward": 0.0})]
)
def test_the_papers_baselines_are_hpd_without_mask_reinforcement_and_draw(
    name: str, switches: dict[str, Any]
) -> None:
    teacher, student = (side[:, :1] for side in logprobs(rows=20))
    plain = OBJECTIVES["hpd"](**switches, mask=False, reinforce=False)
    got = OBJECTIVES[name]().weights(teacher, student)
    torch.testing.assert_close(got, plain.weights(teacher, student))


def test_masked_sft_says_how_many_labels_still_count() -> None:
    teacher = torch.tensor([[0.5], [0.5], [0.5]]).log()
    student = torch.tensor([[0.4], [0.5], [0.6]]).log()
    objective = OBJECTIVES["masked_sft"]()
    assert objective.weights(teacher, student)[:, 0].tolist() == [1.0, 0.0, 0.0]
    assert objective.stats(teacher, student)["k1_positive"].tolist() == [1.0, 0.0, 0.0]


# --- parameters
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "allowed"),
    [
        ("symmetric_kl", {"lam": -0.1}, r"lam = -0.1 .*\[0, 1\]"),
        ("symmetric_kl", {"lam": math.nan}, r"lam = nan .*\[0, 1\]"),
        ("generalized_jsd", {"beta": 1.5}, r"beta = 1.5 .*\[0, 1\]"),
        ("label_jsd", {"beta": 0.0}, r"beta = 0.0 .*\(0, 1\)"),
        ("label_jsd", {"beta": 1.0}, r"beta = 1.0 .*\(0, 1\)"),
        ("js", {"lam": 0.0}, r"lam = 0.0 .*\(0, 1\)"),
        ("js", {"lam": 1.0}, r"lam = 1.0 .*\(0, 1\)"),
        ("skew_forward_kl", {"lam": 1.0}, r"lam = 1.0 .*\[0, 1\)"),
        ("skew_reverse_kl", {"lam": 1.0}, r"lam = 1.0 .*\[0, 1\)"),
        ("abkd", {"alpha": math.inf, "beta": 1.0}, r"alpha = inf .*\[-10, 10\]"),
        ("abkd", {"alpha": 1.0, "beta": 1e-5}, "beta = 1e-05 .*0.001"),
        ("akl", {"mu": 0.0}, r"mu = 0.0 .*\(0, 1\)"),
        ("akl", {"mu": 1.0}, r"mu = 1.0 .*\(0, 1\)"),
        ("todi", {"beta": -1.0}, r"beta = -1.0 .*\[0, inf\)"),
        ("taid", {"t": 1.1}, r"t = 1.1 .*\[0, 1\]"),
        ("hpd", {"forward": -1.0}, r"forward = -1.0 .*\[0, inf\)"),
        ("hpd", {"reverse": math.inf}, r"reverse = inf .*\[0, inf\)"),
        ("hpd_expected", {"forward": 0.0, "reverse": 0.0}, ".*both 0"),
        ("hpd_full", {"reverse": -2.0}, r"reverse = -2.0 .*\[0, inf\)"),
    ],
)
def test_parameters_out_of_range_are_refused(name: str, params: dict[str, Any], allowed: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {allowed}"):
        OBJECTIVES[name](**params)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("f_divergence", {"f": None, "df": torch.log}),
        ("hpd_full", {"mask": "yes"}),
        ("hpd_expected", {"reinforce": 1}),
        ("taid", {"t": "0.5"}),
        ("todi", {"beta": True}),
    ],
)
def test_parameters_of_another_type_are_refused(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(
        (ValueError, TypeError), match=name
    ):  # TypeError from the type-checking import hook, where it is on
        OBJECTIVES[name](**params)
