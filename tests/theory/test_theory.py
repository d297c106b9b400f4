"""The statements of docs/theory.md, section by section, on tabular softmax students in float64.

Axes: B starts or chains, V vocabulary. p is the teacher's row, q the student's, d the distribution of the
labels. A flow follows expected weights, so nothing in it is drawn; only the noise section samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hpd.methods import METHODS, method_terms, name_terms
from hpd.methods.supports import Draws

TEACHER = torch.tensor([0.45, 0.25, 0.15, 0.1, 0.05], dtype=torch.float64)
FOREIGN = torch.tensor([0.05, 0.1, 0.3, 0.15, 0.4], dtype=torch.float64)
NUM_TOKENS = len(TEACHER)
FIRST_ONLY = torch.eye(NUM_TOKENS, dtype=torch.float64)[0]
LABELS = pytest.mark.parametrize("labels", [TEACHER, FOREIGN], ids=["teacher's labels", "foreign labels"])

Weights = Callable[[Tensor, Tensor, Tensor], Tensor]


# --- expected weights, in closed form
# ------------------------------------------------------------------------------------------------


def gap(p: Tensor, q: Tensor) -> Tensor:
    return q * (p / q).log()


def hpd_weights(mask: bool = True, reinforce: bool = True, draw: bool = True, reverse: float = 1) -> Weights:
    def weights(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
        under, over = (q < p).to(p.dtype), (q > p).to(p.dtype)
        reinforced = (q * over).sum(-1, keepdim=True) if draw and reinforce else 0.0
        forward = p * (under * (1 + reinforced) + (0.0 if mask else 1.0 - under))
        punished = (1 - d) * q * gap(p, q).clamp(max=0) if draw else 0.0
        return d * (forward + reverse * gap(p, q)) + reverse * punished

    return weights


EXPECTED: dict[str, tuple[str, dict[str, Any], Weights]] = {
    "hpd": ("hpd", {}, hpd_weights()),
    "hpd, no reinforcement": ("hpd", {"reinforce": False}, hpd_weights(reinforce=False)),
    "hpd, no mask": ("hpd", {"mask": False}, hpd_weights(mask=False)),
    "hpd, no draw": ("hpd", {"support": "label"}, hpd_weights(draw=False)),
    "hpd_expected": ("hpd_expected", {}, hpd_weights()),
    "hpd_full": ("hpd_full", {}, lambda p, q, d: p * (q < p) + gap(p, q)),
    "sft": ("sft", {}, lambda p, q, d: d + 0 * q),
    "forward_kl": ("forward_kl", {}, lambda p, q, d: p + 0 * q),
    "masked_sft": ("masked_sft", {}, lambda p, q, d: d * (q < p)),
    "label_forward_kl": ("label_forward_kl", {}, lambda p, q, d: d * p + 0 * q),
    "label_reverse_kl": ("label_reverse_kl", {}, lambda p, q, d: d * gap(p, q)),
    "label_jsd": ("label_jsd", {}, lambda p, q, d: d * q * ((p + q) / (2 * q)).log() / 2),
}
RIGHT_SIGNS = [
    *("hpd", "hpd, no reinforcement", "hpd, no draw", "hpd_expected", "hpd_full", "masked_sft"),
    *("label_reverse_kl", "label_jsd"),
]


def weights_of(name: str) -> Weights:
    return EXPECTED[name][2]


def enumerated(method: str, kwargs: dict[str, Any], p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """The same by the package's own objective and support, over every label and every draw."""
    (term,) = name_terms(method_terms(method, kwargs))
    pairs = torch.cartesian_prod(torch.arange(len(p)), torch.arange(len(p)))
    labels, drawn = pairs[:, 0], pairs[:, 1:]
    log_p, log_q = p.log().expand(len(pairs), -1), q.log().expand(len(pairs), -1)
    columns = term.support.columns(log_p, log_q, labels, Draws(drawn, log_q.gather(1, drawn)))
    weights = term.objective.weights(columns.teacher_logprobs, columns.student_logprobs)
    if columns.coefficients is not None:
        weights = weights * columns.coefficients
    if columns.tokens is not None:
        weights = torch.zeros_like(log_q).scatter_add(1, columns.tokens, weights)
    return ((d[labels] * q[drawn[:, 0]])[:, None] * weights).sum(0)


def students(count: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(count, NUM_TOKENS, generator=generator, dtype=torch.float64)).softmax(-1)


def force(weights: Weights, p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """The direction in which the logits move."""
    w = weights(p, q, d)
    return w - q * w.sum(-1, keepdim=True)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1)


def flow(weights: Weights, p: Tensor, q: Tensor, d: Tensor, steps: int, size: float = 0.5) -> Tensor:
    """Where gradient steps end, from rows of starts; steps shrink over the last nine tenths."""
    z = q.log()
    for step in range(steps):
        q = z.softmax(-1)
        z = z + size / (1 + 10 * step / steps) ** 2 * force(weights, p, q, d)
    return z.softmax(-1)


@LABELS
@pytest.mark.parametrize("name", EXPECTED)
def test_the_expected_weights_are_those_of_the_package(name: str, labels: Tensor) -> None:
    method, kwargs, weights = EXPECTED[name]
    for q in students(4):
        got = enumerated(method, kwargs, TEACHER, q, labels)
        # Over the whole vocabulary a multiple of q moves nothing, so fields are compared.
        want = force(weights, TEACHER, q, labels)
        torch.testing.assert_close(got - q * got.sum(), want, rtol=1e-10, atol=1e-12)


# --- 2. where the right signs rest
# ------------------------------------------------------------------------------------------------


@LABELS
@pytest.mark.parametrize("name", RIGHT_SIGNS)
def test_the_student_rests_at_the_teacher_whoever_wrote_the_labels(name: str, labels: Tensor) -> None:
    weights, q = weights_of(name), students(500)
    w = weights(TEACHER, q, labels)
    assert (w[q < TEACHER] > 0).all()
    assert (w[q > TEACHER] <= 0).all()
    assert (force(weights, TEACHER, TEACHER, labels).abs() < 1e-15).all()
    assert (force(weights, TEACHER, q, labels).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("name", ["hpd", "hpd, no reinforcement", "hpd_expected", "hpd_full"])
def test_through_the_draw_even_one_repeated_label_suffices(name: str) -> None:
    weights, q = weights_of(name), students(500)
    assert (force(weights, TEACHER, TEACHER, FIRST_ONLY).abs() < 1e-15).all()
    assert (force(weights, TEACHER, q, FIRST_ONLY).abs().amax(-1) > 1e-6).all()


@LABELS
@pytest.mark.parametrize("name", ["hpd", "hpd, no reinforcement", "hpd, no draw", "hpd_full", "masked_sft"])
def test_from_every_start_the_flow_ends_at_the_teacher(name: str, labels: Tensor) -> None:
    before = students(20)
    after = flow(weights_of(name), TEACHER, before, labels, steps=4000, size=6.0)
    assert kl(TEACHER, before).max() > 1.0
    assert kl(TEACHER, after).max() < 1e-4


@pytest.mark.parametrize("name", ["hpd", "hpd_full", "masked_sft"])
def test_the_field_jumps_at_the_teacher(name: str) -> None:
    """However near the student is, an underestimated token weighs what it weighed far away."""
    for distance in (1e-3, 1e-6, 1e-9):
        q = TEACHER + distance * torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
        w = weights_of(name)(TEACHER, q, TEACHER)
        assert w[0] > 0.9 * TEACHER[0] ** 2
        assert -1e-2 < w[1] <= 0
    smooth = [force(weights_of(n), TEACHER, q, TEACHER).abs().max() for n in ("forward_kl", "sft")]
    assert max(smooth) < 1e-8


# --- 3. a loss with a kink
# ------------------------------------------------------------------------------------------------


def hinge(p: Tensor, q: Tensor) -> Tensor:
    return torch.relu(p.log() - q.log())


def reverse_part(p: Tensor, q: Tensor) -> Tensor:
    return q * (q / p).log() - q + p


def draws_part(p: Tensor, q: Tensor) -> Tensor:
    """Integral of u log(u / p) from p to q, where q is above p."""
    return (q > p) * (q**2 / 2 * (q / p).log() - (q**2 - p**2) / 4)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "masked_sft": lambda p, q, d: (d * hinge(p, q)).sum(-1),
    "hpd_full": lambda p, q, d: (p * hinge(p, q) + reverse_part(p, q)).sum(-1),
    "hpd, no draw": lambda p, q, d: (d * (p * hinge(p, q) + reverse_part(p, q))).sum(-1),
    "hpd, no reinforcement": lambda p, q, d: (
        d * (p * hinge(p, q) + reverse_part(p, q)) + (1 - d) * draws_part(p, q)
    ).sum(-1),
    "label_reverse_kl": lambda p, q, d: (d * reverse_part(p, q)).sum(-1),
}


@LABELS
@pytest.mark.parametrize("name", LOSSES)
def test_these_rules_descend_a_loss_that_is_zero_at_the_teacher_only(name: str, labels: Tensor) -> None:
    z = students(200).log().requires_grad_()
    value = LOSSES[name](TEACHER, z.softmax(-1), labels)
    value.sum().backward()
    q = z.detach().softmax(-1)
    torch.testing.assert_close(-z.grad, force(weights_of(name), TEACHER, q, labels), rtol=1e-9, atol=1e-12)
    assert (value > 1e-4).all()
    assert LOSSES[name](TEACHER, TEACHER, labels).abs() < 1e-15


def test_reinforcement_alone_is_the_gradient_of_nothing() -> None:
    """A gradient's Jacobian is symmetric; the share of overestimated mass couples the tokens."""
    z = students(1)[0].log()
    for name, symmetric in (("hpd, no reinforcement", True), ("hpd", False)):

        def at(z: Tensor, name: str = name) -> Tensor:
            return force(weights_of(name), TEACHER, z.softmax(-1), FOREIGN)

        jacobian = torch.autograd.functional.jacobian(at, z)
        difference = (jacobian - jacobian.T).abs().max().item()
        assert difference < 1e-12 if symmetric else difference > 1e-3


def test_only_the_hinge_is_steep_where_the_student_has_no_mass() -> None:
    q = torch.tensor([1e-9, 0.25, 0.25, 0.25, 0.25], dtype=torch.float64)
    q = q / q.sum()
    assert LOSSES["masked_sft"](TEACHER, q, FIRST_ONLY) > 15
    assert LOSSES["label_reverse_kl"](TEACHER, q, FIRST_ONLY) < TEACHER[0]
    steep = {n: weights_of(n)(TEACHER, q, FIRST_ONLY)[0] for n in ("hpd", "masked_sft", "label_forward_kl")}
    assert min(steep.values()) > 0.4
    flat = [weights_of(n)(TEACHER, q, FIRST_ONLY)[0] for n in ("label_reverse_kl", "label_jsd")]
    assert max(flat) < 1e-7


def test_masked_sft_is_convex_in_the_logits() -> None:
    a, b = students(200).log(), students(200, seed=1).log()
    loss = LOSSES["masked_sft"]
    ends = (loss(TEACHER, a.softmax(-1), FOREIGN) + loss(TEACHER, b.softmax(-1), FOREIGN)) / 2
    assert (loss(TEACHER, ((a + b) / 2).softmax(-1), FOREIGN) <= ends + 1e-12).all()


# --- 4. without the mask
# ------------------------------------------------------------------------------------------------


@LABELS
def test_the_teachers_probability_as_a_weight_rests_at_the_product(labels: Tensor) -> None:
    """p squared, normalized, where the labels are the teacher's."""
    product = labels * TEACHER / (labels * TEACHER).sum()
    weights = weights_of("label_forward_kl")
    assert force(weights, TEACHER, product, labels).abs().max() < 1e-15
    assert kl(product, flow(weights, TEACHER, students(10), labels, steps=2000, size=8.0)).max() < 1e-3
    masked = hpd_weights(draw=False, reverse=0.0)
    assert kl(TEACHER, flow(masked, TEACHER, students(10), labels, steps=2000, size=4.0)).max() < 1e-3


def test_a_square_is_sharper_than_the_teacher() -> None:
    square = TEACHER**2 / (TEACHER**2).sum()
    entropy = [-(x * x.log()).sum() for x in (square, TEACHER)]
    assert entropy[0] < entropy[1]
    unmasked = flow(weights_of("hpd, no mask"), TEACHER, students(10), TEACHER, steps=2000)
    assert (kl(TEACHER, unmasked) > 1e-2).all()
    assert (kl(TEACHER, unmasked) < kl(TEACHER, square)).all()


# --- 5. speed
# ------------------------------------------------------------------------------------------------


def test_an_underestimating_student_gets_the_collision_probability() -> None:
    """All mass on a token that the teacher does not use: P is nearly 1, all other labels count."""
    p = torch.cat([TEACHER * (1 - 1e-12), torch.tensor([1e-12], dtype=torch.float64)])
    q = torch.cat([torch.full((NUM_TOKENS,), 1e-9, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
    collision = (TEACHER**2).sum().item()

    def taught(name: str) -> float:
        return weights_of(name)(p, q / q.sum(), p)[:-1].sum().item()

    assert taught("sft") == pytest.approx(1.0)
    assert taught("forward_kl") == pytest.approx(1.0)
    assert taught("label_forward_kl") == pytest.approx(collision)
    assert taught("hpd, no reinforcement") == pytest.approx(collision, rel=1e-6)
    assert taught("hpd") == pytest.approx(2 * collision, rel=1e-6)


def time_to_learn(name: str, num_choices: int, size: float = 0.4) -> float:
    """Steps times size until a teacher of equal choices has nine tenths of a student that starts flat."""
    p = torch.full((200,), 1e-6, dtype=torch.float64)
    p[:num_choices] = 1.0
    p, z, steps = p / p.sum(), torch.zeros(200, dtype=torch.float64), 0
    while (q := z.softmax(-1))[:num_choices].sum() < 0.9:
        z, steps = z + size * force(weights_of(name), p, q, p), steps + 1
    return steps * size


def test_the_time_grows_with_the_number_of_choices() -> None:
    ratios = {m: time_to_learn("hpd", m) / time_to_learn("forward_kl", m) for m in (1, 4, 16)}
    for choices, ratio in ratios.items():
        # Between reinforced throughout (P = 1, with k on top) and not at all.
        assert 0.4 * choices < ratio < choices, ratios
    assert list(ratios.values()) == pytest.approx([0.6, 2.5, 9.8], abs=0.1)


def test_the_entropy_above_the_teachers_is_a_tail_that_still_falls() -> None:
    p, start = TEACHER, torch.full((NUM_TOKENS,), 1 / NUM_TOKENS, dtype=torch.float64)
    entropies, z = [], start.log()
    for step in range(1501):
        if step in (20, 60, 200, 1500):
            entropies.append(-(z.softmax(-1) * z.log_softmax(-1)).sum().item())
        z = z + 0.05 * force(weights_of("hpd"), p, z.softmax(-1), p)
    teacher = -(p * p.log()).sum().item()
    assert entropies[0] > entropies[1] > entropies[2] > teacher - 0.01
    assert entropies[3] == pytest.approx(teacher, abs=0.01)


# --- 6. noise
# ------------------------------------------------------------------------------------------------


def squared_noise(method: str, p: Tensor, q: Tensor) -> float:
    """Mean squared gradient over the teacher's labels and, where there are draws, the student's."""
    (term,) = name_terms(method_terms(method, {}))
    total = 0.0
    for y in range(len(p)):
        for a in range(len(p)):
            label, drawn = torch.tensor([y]), torch.tensor([[a]])
            sides = p.log()[None], q.log()[None]
            columns = term.support.columns(*sides, label, Draws(drawn, sides[1].gather(1, drawn)))
            w = term.objective.weights(columns.teacher_logprobs, columns.student_logprobs)
            if columns.coefficients is not None:
                w = w * columns.coefficients
            if columns.tokens is not None:
                w = torch.zeros_like(sides[1]).scatter_add(1, columns.tokens, w)
            gradient = w - q * w.sum()
            total += (p[y] * q[a] * gradient.square().sum()).item()
    return total


def test_at_the_teacher_fine_tuning_is_noisy_and_hpd_is_silent() -> None:
    collision = (TEACHER**2).sum().item()
    assert squared_noise("sft", TEACHER, TEACHER) == pytest.approx(1 - collision)
    assert squared_noise("label_forward_kl", TEACHER, TEACHER) > 0.05
    for method in ("hpd", "hpd_full", "masked_sft", "label_reverse_kl", "label_jsd", "forward_kl"):
        assert squared_noise(method, TEACHER, TEACHER) < 1e-25, method


def plateau(rule: str, size: float, chains: int = 400, steps: int = 1200) -> float:
    """Mean KL(teacher || student) over the last third of stochastic steps of one label each."""
    generator = torch.Generator().manual_seed(0)
    p, total, counted = TEACHER, 0.0, steps // 3
    labels = torch.multinomial(p, chains * steps, replacement=True, generator=generator).view(steps, chains)
    z = p.log() + 0.1 * torch.randn(chains, len(p), generator=generator, dtype=p.dtype)
    for step, y in enumerate(labels[..., None]):
        log_q = z.log_softmax(-1)
        q, label = log_q.exp(), log_q.gather(1, y).exp()
        weight = torch.ones_like(label) if rule == "sft" else (label < p[y]).to(p.dtype)
        z = (z - size * q * weight).scatter_add_(1, y, size * weight)
        total += kl(p, log_q.exp()).mean().item() if step >= steps - counted else 0.0
    return total / counted


def test_fine_tuning_ends_at_a_plateau_and_masked_fine_tuning_far_below() -> None:
    collision = (TEACHER**2).sum().item()
    plain = {size: plateau("sft", size) for size in (0.1, 0.2)}
    masked = {size: plateau("masked_sft", size) for size in (0.1, 0.2)}
    for size in plain:
        assert plain[size] == pytest.approx(size * (1 - collision) / 4, rel=0.15)
        assert masked[size] < plain[size] / 8
    assert plain[0.2] / plain[0.1] == pytest.approx(2, rel=0.15)
    assert masked[0.2] / masked[0.1] == pytest.approx(4, rel=0.2)


# --- 7. labels that are not the teacher's
# ------------------------------------------------------------------------------------------------


def test_one_repeated_label() -> None:
    """A teacher of 0.6 and 0.4, fourteen tokens, and rows that hold the first one only."""
    p = torch.full((14,), 1e-5, dtype=torch.float64)
    p[0], p[1] = 0.6, 0.4
    p, label = p / p.sum(), torch.eye(14, dtype=torch.float64)[0]
    early, late = {}, {}
    stopping = ("hpd, no draw", "masked_sft", "label_reverse_kl", "label_jsd")
    for name in ("sft", "label_forward_kl", "hpd, no mask", *stopping, "hpd"):
        z = torch.zeros(14, dtype=torch.float64)
        for step in range(3000):
            z = z + 0.4 * force(weights_of(name), p, z.softmax(-1), label)
            if step == 499:
                early[name] = kl(p, z.softmax(-1)).item()
        late[name] = kl(p, z.softmax(-1)).item()
    written = {"sft": 3.22, "label_forward_kl": 3.01, "hpd, no mask": 2.34, "hpd": 0.05}
    assert {name: round(late[name], 2) for name in written} == written
    for name in ("sft", "label_forward_kl", "hpd, no mask"):
        assert late[name] > early[name] + 0.4, name
        assert late[name] > 1.5, name
    # The label stops at the teacher's share, and the rest stays where the student had it: evenly.
    stalled = 0.4 * math.log(0.4 / (0.4 / 13))
    for name in stopping:
        assert late[name] == pytest.approx(stalled, abs=0.02)
        assert early[name] == pytest.approx(late[name], abs=0.01)
    assert late["hpd"] < 0.5 * early["hpd"]
    assert late["hpd"] < 0.2


# --- 8. rows with gaps
# ------------------------------------------------------------------------------------------------


def time_to_enter(name: str, start: float, size: float = 0.1) -> float:
    """Until a student enters, with probability 1/4, a branch of the teacher's that no row takes."""
    p, label = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    z, steps = torch.tensor([1 - start, start], dtype=torch.float64).log(), 0
    while (q := z.softmax(-1))[1] < 0.25:
        z, steps = z + size * force(weights_of(name), p, q, label), steps + 1
    return steps * size


def test_every_rule_that_rests_at_the_teacher_enters_the_branch_and_hpd_late() -> None:
    starts = (1e-1, 1e-2, 1e-3)
    whole, one_token = ([time_to_enter(name, x) for x in starts] for name in ("forward_kl", "hpd"))
    # Logarithm of the start, against its reciprocal.
    assert whole[1] - whole[0] == pytest.approx(whole[2] - whole[1], rel=0.4)
    assert whole == pytest.approx([1.7, 4.3, 6.6], abs=0.2)
    assert one_token == pytest.approx([8, 80, 735], rel=0.05)
    assert one_token[2] / one_token[1] == pytest.approx(10, rel=0.3)


def test_fine_tuning_masked_or_not_keeps_to_the_rows() -> None:
    p, label = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    q = torch.tensor([0.9, 0.1], dtype=torch.float64)
    assert flow(weights_of("sft"), p, q, label, steps=1000)[1] < 0.02
    assert torch.equal(force(weights_of("masked_sft"), p, q, label), torch.zeros_like(q))
    assert force(weights_of("hpd"), p, q, label)[1] > 0


def test_the_names_here_are_rows_of_the_table() -> None:
    assert {method for method, _, _ in EXPECTED.values()} <= set(METHODS)
