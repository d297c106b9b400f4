"""Bugs of on-policy text: drawn tokens, their likelihoods, and what is learned from them."""

import torch
from accelerate import Accelerator
from helpers.absolute_model import absolute_positions
from helpers.museum import exhibit, swap
from tiny_models import tiny_tokenizer
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hpd.batch import TokenBatch
from hpd.data.collator import DistillCollator
from hpd.generation.rollouts import StudentRollouts
from hpd.generation.texts import Rollout
from hpd.losses import Head, Scores, operator, policy_gradient
from hpd.methods import sampling
from hpd.methods.prefixes import Prefixes, RolloutConfig
from hpd.methods.strategy import StrategyConfig
from hpd.methods.terms import TermConfig
from hpd.objectives import OBJECTIVES
from hpd.training.mixing import PrefixMixer

VOCAB = 6
# On-policy distillation: the written token is credited with the teacher's log-ratio.
WRITTEN = TermConfig(objective="reverse_kl", on="student", support="rollout", kwargs={"baseline": 1.0})


def tables(positions: int = 4) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, positions, VOCAB, dtype=torch.float64, generator=generator)
    return student.requires_grad_(), teacher


def scores(student: Tensor, teacher: Tensor) -> tuple[Scores, Scores]:
    return Scores(student, Head(None)), Scores(teacher, Head(None))


def batch_of(labels: Tensor, written_from: int) -> TokenBatch:
    """One row, the student's from a position on."""
    places = torch.arange(len(labels))
    return TokenBatch(
        places,
        labels,
        places,
        torch.tensor(0),
        torch.zeros_like(labels),
        torch.tensor([len(labels)]),
        places[:written_from],
        places[written_from:],
    )


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return kl_divergence(Categorical(logits=student), Categorical(logits=teacher)).sum()


def clipped(student: Tensor, teacher: Tensor, labels: Tensor, frozen=None):
    """Loss of the clipped policy gradient on the student's own text, and what further updates need."""
    return policy_gradient.policy_gradient_nll(
        *scores(student, teacher),
        batch_of(labels, 0),
        [WRITTEN.build()],
        StrategyConfig(type="policy_gradient"),
        frozen=frozen,
        uniforms=None,
        scale=1.0,
        row_scale=1.0,
    )


def directly(student: Tensor, teacher: Tensor, labels: Tensor):
    """Loss of the direct strategy on the same."""
    return operator.loss_by_source(*scores(student, teacher), batch_of(labels, 0), [WRITTEN.build()])


def expected_gradient(loss_at, student: Tensor) -> Tensor:
    """The gradient averaged over all tokens that can be written, with the student's probabilities."""
    q = student.detach().softmax(-1)
    total = torch.zeros_like(student)
    for token in range(VOCAB):
        (gradient,) = torch.autograd.grad(loss_at(torch.full((len(student),), token)), student)
        total += q[:, token, None] * gradient
    return total


def test_student_learns_its_own_draws_as_labels():
    student, teacher = tables()
    labels = torch.tensor([0, 1, 2, 3])
    terms = [TermConfig(objective="nll", on="dataset"), TermConfig(objective="reverse_kl", on="student")]

    def measure():
        batch = batch_of(labels, written_from=2)
        loss = operator.loss_by_source(
            *scores(student, teacher), batch, [term.build() for term in terms]
        ).loss
        own = torch.autograd.grad(loss, student)[0][2:]
        return own, torch.autograd.grad(reverse_kl(student[2:], teacher[2:]), student)[0][2:]

    def mutate(patch):
        def whoever_wrote_it(original):
            return lambda batch, terms: original(batch, [term._replace(on="both") for term in terms])

        swap(patch, "hpd.losses.by_source:parts_of", whoever_wrote_it)

    exhibit(measure, mutate)


def test_advantage_does_not_depend_on_the_token():
    student, teacher = tables()

    def measure():
        got = expected_gradient(lambda token: clipped(student, teacher, token)[0].loss, student)
        return got, torch.autograd.grad(reverse_kl(student, teacher), student)[0]

    def mutate(patch):
        def of_the_state(original):
            def weigh(term, log_p, log_q, q, *rest):
                columns, weights = original(term, log_p, log_q, q, *rest)
                divergence = (q * (log_q - log_p)).sum(-1, keepdim=True)
                return columns, -divergence.expand_as(weights)

            return weigh

        swap(patch, "hpd.losses.tile:weigh", of_the_state)

    exhibit(measure, mutate)


def test_estimate_of_the_kl_is_differentiated_at_the_draw():
    student, teacher = tables()

    def measure():
        got = expected_gradient(lambda token: directly(student, teacher, token).loss, student)
        return got, torch.autograd.grad(reverse_kl(student, teacher), student)[0]

    def mutate(patch):
        # The derivative of log q - log p at a drawn token is one: its mean over the draws vanishes.
        original = OBJECTIVES["reverse_kl"]

        def k1(baseline=0.0):
            return original(baseline)._replace(weights=lambda log_p, log_q: -log_q.exp(), rule="")

        swap(patch, "hpd.objectives:OBJECTIVES", lambda table: {**table, "reverse_kl": k1})

    exhibit(measure, mutate)


def test_ratio_is_always_one():
    student, teacher = tables()
    labels = torch.tensor([0, 1, 2, 3])
    moved = (student.detach() * 2.5).requires_grad_()

    def measure():
        _, frozen = clipped(student, teacher, labels)
        loss = clipped(moved, teacher, labels, frozen)[0].loss
        old, new = (
            side.log_softmax(-1).gather(1, labels[:, None])[:, 0] for side in (student.detach(), moved)
        )
        advantage = teacher.log_softmax(-1).gather(1, labels[:, None])[:, 0] - old
        ratio = (new - old).exp()
        wanted = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
        return torch.autograd.grad(loss, moved)[0], torch.autograd.grad(wanted, moved)[0]

    def mutate(patch):
        def measured_again(original):
            return lambda *given, frozen, **named: original(*given, frozen=None, **named)

        swap(patch, "hpd.losses.policy_gradient:policy_gradient_nll", measured_again)

    exhibit(measure, mutate)


def test_sides_of_the_ratio_have_different_temperatures():
    student = absolute_positions(0)
    config = RolloutConfig(max_new_tokens=6, temperature=0.5)
    engine = StudentRollouts(lambda: student, Accelerator(cpu=True), tiny_tokenizer(), config)
    numbers = torch.rand(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prompt = [40, 41, 42]

    def measure():
        (rollout,) = engine.generate([prompt], [6], numbers, 0)
        ids = torch.tensor([prompt + rollout.tokens])
        with torch.no_grad():
            own = student(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        # What the trainer sets beside them, before the first update: the ratio is one.
        return torch.tensor(rollout.logprobs), own.gather(1, ids[0, len(prompt) :, None])[:, 0]

    def mutate(patch):
        def as_drawn(original):
            def draw(self, input_ids, scores):
                chosen = original(self, input_ids, scores)
                softened = self._warpers(input_ids, scores.float()).log_softmax(-1)
                self._logprobs[-1] = softened.gather(1, chosen.argmax(-1, keepdim=True))
                return chosen

            return draw

        swap(patch, "hpd.generation.drawing:Draw.__call__", as_drawn)

    exhibit(measure, mutate, tolerance=1e-4)


def test_rollouts_of_one_prompt_are_all_the_same():
    class Recorder:
        """An engine that keeps the numbers of its draws."""

        def generate(self, prompts, limits, uniforms, step):
            self.uniforms = uniforms
            return [Rollout([7], False, [-1.0]) for _ in prompts]

    collate = DistillCollator(DataCollatorForLanguageModeling(pad_token_id=0))
    row = {"input_ids": [10, 20, 30, 31], "labels": [-100, -100, 30, 31]}

    def measure():
        recorder = Recorder()
        mixer = PrefixMixer(
            Prefixes(student=1.0),
            RolloutConfig(max_new_tokens=4, num_rollouts=3),
            collate,
            lambda: recorder,
            seed=0,
            max_length=32,
        )
        mixer([collate([row] * 3)], 0, 0.0)
        return len({tuple(numbers.tolist()) for numbers in recorder.uniforms}), 3

    def mutate(patch):
        def one_seed(original):
            return lambda rows: original(rows[:1]).expand(len(rows))

        swap(patch, "hpd.training.mixing:_row_keys", one_seed)

    exhibit(measure, mutate)


def test_impossible_token_is_drawn():
    probs = torch.tensor([[0.0, 0.0, 0.4, 0.0, 0.6, 0.0]], dtype=torch.float32)
    numbers = torch.tensor([[0.0, 0.2, 0.4, 0.7, 1.0 - 2.0**-53]], dtype=torch.float64)

    def measure():
        tokens = sampling.inverse_cdf(probs, numbers)
        return (probs.gather(1, tokens) > 0).double(), torch.ones(5)

    def mutate(patch):
        def first_not_below(original):
            def search(masses, uniforms):
                cumulative = masses.cumsum(-1)
                index = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:])
                return index, original(masses, uniforms)[1]

            return search

        swap(patch, "hpd.methods.sampling:_search", first_not_below)

    exhibit(measure, mutate)
