"""Bugs of divergences: another function than the one that was meant."""

import torch
from helpers.museum import exhibit, swap
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from hpd.losses import Head, Scores, operator
from hpd.losses.functional import distillation_loss
from hpd.methods.terms import TermConfig
from hpd.objectives import OBJECTIVES

VOCAB = 9


def sides(seed=0, spread=1.0) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher at five positions, of which four are labeled."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = spread * torch.randn(2, 1, 5, VOCAB, dtype=torch.float64, generator=generator)
    return student.requires_grad_(), teacher


def labels_of(student: Tensor) -> Tensor:
    return torch.zeros(student.shape[:2], dtype=torch.int64)


def ours(student: Tensor, teacher: Tensor, objective: str, **options) -> tuple[Tensor, Tensor]:
    """Value, and gradient with respect to the student's logits."""
    value = distillation_loss(student, teacher, labels_of(student), objective, **options).loss
    return value.detach(), torch.autograd.grad(value, student)[0]


def by_hand(student: Tensor, teacher: Tensor, divergence) -> tuple[Tensor, Tensor]:
    """The same of a function of two distributions, by torch's own divergences and autograd."""
    p, q = (Categorical(logits=side[:, :-1]) for side in (teacher, student))
    value = divergence(p, q).mean()
    return value.detach(), torch.autograd.grad(value, student)[0]


def joined(found: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in found])


def replaced(patch, name, factory) -> None:
    """Another objective under a name of the table, on all ways."""
    swap(patch, "hpd.objectives:OBJECTIVES", lambda table: {**table, name: factory})


def jensen_shannon(beta):
    def divergence(p, q):
        middle = Categorical(probs=beta * p.probs + (1 - beta) * q.probs)
        return beta * kl_divergence(p, middle) + (1 - beta) * kl_divergence(q, middle)

    return divergence


def test_beta_of_the_jsd_is_swapped():
    student, teacher = sides()

    def measure():
        found = ours(student, teacher, "generalized_jsd", beta=0.2)
        return joined(found), joined(by_hand(student, teacher, jensen_shannon(0.2)))

    def mutate(patch):
        original = OBJECTIVES["generalized_jsd"]
        replaced(patch, "generalized_jsd", lambda beta=0.5: original(1.0 - beta))

    exhibit(measure, mutate)


def test_directions_are_swapped():
    student, teacher = sides()

    def measure():
        found = [joined(ours(student, teacher, name)) for name in ("forward_kl", "reverse_kl")]
        forward = by_hand(student, teacher, kl_divergence)
        reverse = by_hand(student, teacher, lambda p, q: kl_divergence(q, p))
        return torch.cat(found), torch.cat([joined(forward), joined(reverse)])

    def mutate(patch):
        forward, reverse = OBJECTIVES["forward_kl"], OBJECTIVES["reverse_kl"]
        swap(
            patch,
            "hpd.objectives:OBJECTIVES",
            lambda table: {**table, "forward_kl": reverse, "reverse_kl": forward},
        )

    exhibit(measure, mutate)


def test_jsd_vanishes_at_the_ends_of_beta():
    student, teacher = sides()

    def measure():
        found = [ours(student, teacher, "generalized_jsd", beta=beta) for beta in (0.0, 1.0)]
        forward = by_hand(student, teacher, kl_divergence)
        reverse = by_hand(student, teacher, lambda p, q: kl_divergence(q, p))
        return torch.cat(list(map(joined, found))), torch.cat([joined(forward), joined(reverse)])

    def mutate(patch):
        original = OBJECTIVES["generalized_jsd"]
        replaced(patch, "generalized_jsd", lambda beta=0.5: original(min(max(beta, 1e-6), 1 - 1e-6)))

    exhibit(measure, mutate)


def test_mixture_is_made_of_logarithms():
    student, teacher = sides(spread=3.0)

    def measure():
        found = ours(student, teacher, "generalized_jsd", beta=0.5, support="top_k", top_k=VOCAB)
        return joined(found), joined(by_hand(student, teacher, jensen_shannon(0.5)))

    def mutate(patch):
        def geometric(original):
            return lambda log_p, log_q, share: share * log_p + (1 - share) * log_q

        swap(patch, "hpd.objectives.mixtures:_log_mixture", geometric)

    exhibit(measure, mutate)


def test_probabilities_are_given_for_log_probabilities():
    student, teacher = sides()

    def measure():
        found = ours(student, teacher, "forward_kl")[1]
        return found, by_hand(student, teacher, kl_divergence)[1]

    def mutate(patch):
        # kl_div(softmax(z), p) has the derivative -p with respect to q, where -p / q is meant.
        def softmax_in_the_place_of_its_logarithm(table):
            def forward_kl(whole):
                found = table["forward_kl"](whole)
                return found._replace(weights=found.weights * whole.student_probs)

            return {**table, "forward_kl": forward_kl}

        swap(patch, "hpd.objectives.fused:FUSED", softmax_in_the_place_of_its_logarithm)

    exhibit(measure, mutate)


def test_softened_gradient_misses_a_power_of_the_temperature():
    student, teacher = sides()
    temperature = 1000.0

    def measure():
        # Hinton's limit: times T^2, the gradient becomes that of half the squared distance of the centered
        # logits, whatever T is.
        found = ours(student, teacher, "forward_kl", temperature=temperature)[1] * temperature**2
        gap = (student - teacher).detach()
        limit = (gap - gap.mean(-1, keepdim=True)) / VOCAB / 4
        limit[:, -1] = 0.0
        return found, limit

    def mutate(patch):
        def without_the_chain_rule(original):
            return lambda term, *rest: original(term, *rest) * term.temperature

        swap(patch, "hpd.losses.tile:_softened_gradient", without_the_chain_rule)

    exhibit(measure, mutate, tolerance=5e-3)


def test_truncated_reverse_kl_rewards_leaving_the_support():
    def measure():
        # Two of four tokens. The student's mass on them is the teacher's at first, and has then left them,
        # which is worse.
        teacher = torch.tensor([0.5, 0.4, 0.05, 0.05], dtype=torch.float64).log().expand(1, 2, 4)
        away = torch.tensor([0.05, 0.04, 0.455, 0.455], dtype=torch.float64).log().expand(1, 2, 4)
        options = {"support": "top_k", "top_k": 2}
        values = [
            distillation_loss(student, teacher, labels_of(student), "reverse_kl", **options).loss
            for student in (teacher.clone(), away.clone())
        ]
        return torch.stack(values).clamp_max(0.0), torch.zeros(2)

    def mutate(patch):
        def columns(original):
            def only_the_tokens(self, *given):
                found = original(self, *given)
                return found._replace(
                    teacher_logprobs=found.teacher_logprobs[:, :-1],
                    student_logprobs=found.student_logprobs[:, :-1],
                    tail="drop",
                )

            return only_the_tokens

        swap(patch, "hpd.methods.supports:Support._top_columns", columns)

    exhibit(measure, mutate)


def test_clamp_at_zero_takes_the_gradient_away():
    student, teacher = sides(seed=4)
    with torch.no_grad():
        student[:, 1] = 3.0 * teacher[:, 1]  # surer than the teacher of its likeliest token

    def measure():
        # At every labeled position the distributions differ, so every one has a gradient.
        found = ours(student, teacher, "forward_kl", support="top_k", top_k=1)[1][0, :-1]
        return (found.abs().amax(-1) > 1e-6).double(), torch.ones(4)

    def mutate(patch):
        def clamped(original):
            def columns(self, *given):
                found = original(self, *given)
                p, q = found.teacher_logprobs[:, :-1], found.student_logprobs[:, :-1]
                lost = (p.exp() * (p - q)).sum(-1, keepdim=True) < 0
                return found._replace(teacher_logprobs=found.teacher_logprobs.masked_fill(lost, -1e5))

            return columns

        swap(patch, "hpd.methods.supports:Support._top_columns", clamped)

    exhibit(measure, mutate)


def test_shorter_vocabulary_is_filled_with_zeros():
    student, teacher = sides()
    # Rows of padding, which the teacher's head has beyond the student's.
    longer = torch.cat([teacher, torch.full((1, 5, 3), -50.0, dtype=torch.float64)], -1)
    term = TermConfig(objective="forward_kl").build()

    def measure():
        heads = (Scores(side[0, :-1], Head(None)) for side in (student, longer))
        labels = torch.zeros(4, dtype=torch.int64)
        value = operator.reweighted_nll(*heads, labels, [term], scale=0.25).loss
        found = value.detach(), torch.autograd.grad(value, student)[0]
        return joined(found), joined(by_hand(student, teacher, kl_divergence))

    def mutate(patch):
        # A logit of zero is a probability: the student pays for tokens that it does not have.
        def padded(original):
            def reweighted_nll(student, teacher, *rest, **named):
                filled = torch.nn.functional.pad(student.hidden, (0, teacher.vocab - student.vocab))
                return original(student._replace(hidden=filled), teacher, *rest, **named)

            return reweighted_nll

        swap(patch, "hpd.losses.operator:reweighted_nll", padded)

    exhibit(measure, mutate)


def test_loss_is_reported_and_not_differentiated():
    student, teacher = sides()

    def measure():
        value = distillation_loss(student, teacher, labels_of(student), "reverse_kl").loss
        step = torch.autograd.grad(value, student, allow_unused=True)[0] if value.requires_grad else None
        step = torch.zeros_like(student) if step is None else step
        # To the first order, a small step down the gradient lowers the value by the gradient's square.
        size = 1e-4
        after = distillation_loss(
            student.detach() - size * step, teacher, labels_of(student), "reverse_kl"
        ).loss
        wanted = by_hand(student, teacher, lambda p, q: kl_divergence(q, p))[1].square().sum()
        return (value - after).detach() / size, wanted

    def mutate(patch):
        def without_gradient(original):
            def loss(*given):
                with torch.no_grad():
                    return original(*given)

            return loss

        swap(patch, "hpd.losses.functional:_loss", without_gradient)

    exhibit(measure, mutate, tolerance=1e-3)
