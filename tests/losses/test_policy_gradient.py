"""The policy gradient: the direct strategy at ratio 1, PPO's clip beyond, and the exact expectation by
enumeration."""

import itertools

import pytest
import torch
from helpers.trainers import first_batch, make_trainer, rows, weights
from tiny_models import tiny_pair
from transformers import TrainerCallback

from hpd.batch import TokenBatch
from hpd.losses import Head, Scores
from hpd.losses.operator import loss_by_source
from hpd.losses.policy_gradient import clipped_surrogate, discounted_returns, policy_gradient_nll
from hpd.methods.prefixes import Prefixes, RolloutConfig
from hpd.methods.strategy import StrategyConfig
from hpd.methods.terms import TermConfig

PG = StrategyConfig(type="policy_gradient")
OPD = TermConfig(objective="reverse_kl", on="student", support="rollout", kwargs={"baseline": 1.0})


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


# A language small enough to write all of it down: tokens 0, 1 and the end token 2, at most three tokens.
VOCAB, END, LONGEST = 3, 2, 3


def sequences():
    """Every text that can be written: it ends with the end token, or is cut at the limit."""
    for length in range(1, LONGEST + 1):
        for head in itertools.product(range(VOCAB - 1), repeat=length - 1):
            yield from ([(*head, END)] if length < LONGEST else [(*head, last) for last in range(VOCAB)])


def prefixes_of(text):
    return [text[:i] for i in range(len(text))]


PREFIXES = list(dict.fromkeys(p for text in sequences() for p in prefixes_of(text)))


def tabular(seed):
    """A model as a table of logits, one row a prefix."""
    return torch.randn(
        len(PREFIXES), VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def logprob_of(table, text):
    log_q = table.log_softmax(-1)
    return sum(
        log_q[PREFIXES.index(prefix), token] for prefix, token in zip(prefixes_of(text), text, strict=True)
    )


def batch_for(text):
    count = len(text)
    positions = torch.arange(count)
    return TokenBatch(
        positions,
        torch.tensor(text),
        positions,
        torch.tensor(0),
        torch.zeros(count, dtype=torch.int64),
        torch.tensor([count]),
        torch.zeros(0, dtype=torch.int64),
        positions,
    )


def expected_gradient(terms, strategy):
    """Gradient of the loss of a rollout, averaged over all rollouts with the student's probabilities: no
    sampling."""
    student, teacher = tabular(0).requires_grad_(), tabular(1)
    total = torch.zeros_like(student)
    for text in sequences():
        where = torch.tensor([PREFIXES.index(p) for p in prefixes_of(text)])
        sides = Scores(student[where], Head(None)), Scores(teacher[where], Head(None))
        built = [term.build(f"term{i}") for i, term in enumerate(terms)]
        if strategy.type == "direct":
            loss = loss_by_source(*sides, batch_for(text), built, scale=1.0).loss
        else:
            loss = policy_gradient_nll(
                *sides,
                batch_for(text),
                built,
                strategy,
                frozen=None,
                uniforms=None,
                scale=1.0,
                row_scale=1.0,
                chunk_bytes=64,
            )[0].loss
        (gradient,) = torch.autograd.grad(loss, student)
        total += gradient * logprob_of(student, text).exp().detach()
    return total


def sequence_kl_gradient():
    """Autograd of KL(student || teacher) over whole texts."""
    student, teacher = tabular(0).requires_grad_(), tabular(1)
    pairs = [(logprob_of(student, text), logprob_of(teacher, text)) for text in sequences()]
    assert float(sum(q.exp() for q, _ in pairs).detach()) == pytest.approx(1.0, abs=1e-12)
    value = sum(q.exp() * (q - p) for q, p in pairs)
    return torch.autograd.grad(value, student)[0]


def token_kl_gradient():
    """Autograd of the sum over prefixes of (probability to get there, held constant) times the token-level
    KL."""
    student, teacher = tabular(0).requires_grad_(), tabular(1)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    visits = torch.zeros(len(PREFIXES), dtype=torch.float64)
    for text in sequences():
        for prefix in prefixes_of(text):
            visits[PREFIXES.index(prefix)] += logprob_of(student, text).exp().detach()
    return torch.autograd.grad((visits[:, None] * log_q.exp() * (log_q - log_p)).sum(), student)[0]


def exactly(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_returns_give_the_gradient_of_the_sequence_kl():
    exactly(
        expected_gradient([OPD], StrategyConfig(type="policy_gradient", discount=1.0)), sequence_kl_gradient()
    )


@pytest.mark.parametrize("baseline", [0.0, 1.0])
@pytest.mark.parametrize("strategy", [PG, StrategyConfig()])
def test_the_written_token_gives_the_token_kl_whatever_the_baseline(baseline, strategy):
    term = TermConfig(objective="reverse_kl", on="student", support="rollout", kwargs={"baseline": baseline})
    exactly(expected_gradient([term], strategy), token_kl_gradient())


def test_full_vocabulary_on_rollouts_is_the_same_expectation():
    exactly(
        expected_gradient([TermConfig(objective="reverse_kl", on="student")], StrategyConfig()),
        token_kl_gradient(),
    )


def test_minillms_split_is_the_sequence_kl():
    """An exact first step on the vocabulary plus the returns of later tokens."""
    strategy = StrategyConfig(type="policy_gradient", discount=1.0, later_only=True)
    exactly(
        expected_gradient([TermConfig(objective="reverse_kl", on="student"), OPD], strategy),
        sequence_kl_gradient(),
    )


def gradient_of_stored(writer, told):
    """Gradient of the loss of a rollout that another table wrote, averaged over all of its rollouts.

    Args:
        told: True if the loss is told how likely the writer found each token.
    """
    student, teacher = tabular(0).requires_grad_(), tabular(1)
    without_clip = StrategyConfig(type="policy_gradient", clip_low=1.0, clip_high=1e9)
    total = torch.zeros_like(student)
    for text in sequences():
        where = torch.tensor([PREFIXES.index(p) for p in prefixes_of(text)])
        batch = batch_for(text)
        if told:
            written = writer.log_softmax(-1)[where].gather(1, batch.labels[:, None])[:, 0]
            batch = batch._replace(behavior_logprobs=written)
        sides = Scores(student[where], Head(None)), Scores(teacher[where], Head(None))
        options = {"frozen": None, "uniforms": None, "scale": 1.0, "row_scale": 1.0, "chunk_bytes": 64}
        loss = policy_gradient_nll(*sides, batch, [OPD.build("opd")], without_clip, **options)[0].loss
        total += torch.autograd.grad(loss, student)[0] * logprob_of(writer, text).exp()
    return total


def test_stored_rollouts_have_the_on_policy_gradient_at_each_prefix_of_their_writer():
    """Averaged over the writer's draws, ratios make each prefix's gradient that of its token-level KL; where
    both get there surely, as to the first token, that is the on-policy gradient."""
    writer = tabular(2)
    student, teacher = tabular(0).requires_grad_(), tabular(1)
    visits = torch.zeros(len(PREFIXES), dtype=torch.float64)
    for text in sequences():
        for prefix in prefixes_of(text):
            visits[PREFIXES.index(prefix)] += logprob_of(writer, text).exp()
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    (expected,) = torch.autograd.grad((visits[:, None] * log_q.exp() * (log_q - log_p)).sum(), student)
    found = gradient_of_stored(writer, told=True)
    exactly(found, expected)
    exactly(found[PREFIXES.index(())], token_kl_gradient()[PREFIXES.index(())])
    # Untold, the student is taken for the writer, and the average is another.
    assert (gradient_of_stored(writer, told=False) - expected).abs().max() > 0.01


def test_clip_and_dual_clip_by_hand():
    strategy = StrategyConfig(type="policy_gradient", clip_low=0.2, clip_high=0.3, dual_clip=2.0)
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5, 3.0])
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    value, clipped = clipped_surrogate(ratio, advantages, strategy)
    torch.testing.assert_close(value, torch.tensor([2.0, 2.6, 1.0, -3.0, -1.6, -4.0]))
    assert clipped.tolist() == [False, True, False, False, True, True]


def test_returns_stop_at_the_end_of_a_row():
    values, segments = torch.arange(1.0, 8.0), torch.tensor([0, 0, 0, 1, 2, 2, 2])
    expected = [1 + 0.5 * (2 + 0.5 * 3), 2 + 0.5 * 3, 3, 4, 5 + 0.5 * (6 + 0.5 * 7), 6 + 0.5 * 7, 7]
    torch.testing.assert_close(discounted_returns(values, segments, 0.5), torch.tensor(expected))


@pytest.mark.parametrize("method", ["hpd", "sft"])
def test_first_update_has_the_direct_gradient(pair, tmp_path, method):
    gradients, losses = [], []
    for strategy in (None, PG):
        trainer = make_trainer(pair, tmp_path, method=method, strategy=strategy, chunk_bytes=2**14)
        trainer._step.begin([], step=0, progress=0.0)
        loss = trainer.compute_loss(trainer.model.train(), first_batch(trainer))
        loss.backward()
        losses.append(float(loss))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_draws_and_weights_stay_for_all_updates(pair, tmp_path):
    strategy = StrategyConfig(type="policy_gradient", updates=2, clip_low=1.0, clip_high=1e6)
    trainer = make_trainer(pair, tmp_path, strategy=strategy, max_steps=4, train=rows(16), learning_rate=0.1)
    frozen = []
    trainer.add_callback(_Watch(lambda: frozen.append([trainer._step._frozen[0][0][0]["tokens"].clone()])))
    trainer.train()
    assert torch.equal(frozen[0][0], frozen[1][0])
    assert not torch.equal(frozen[1][0], frozen[2][0]) or frozen[1][0].shape != frozen[2][0].shape
    logs = [log for log in trainer.state.log_history if "policy/kl_old" in log]
    assert logs[0]["policy/kl_old"] == pytest.approx(0.0, abs=1e-6)
    assert logs[1]["policy/kl_old"] > 1e-6


def test_clipping_holds_a_student_that_runs_away(pair, tmp_path):
    """PSFT: with many updates on one batch the clipped student stays nearer to where it started."""
    moved = []
    for clip in (0.05, 1e6):
        strategy = StrategyConfig(type="policy_gradient", updates=8, clip_low=1.0, clip_high=clip)
        trainer = make_trainer(
            pair, tmp_path, method="psft", strategy=strategy, max_steps=8, learning_rate=0.3
        )
        start = weights(trainer)
        trainer.train()
        moved.append(float((weights(trainer) - start).norm()))
    assert moved[0] < 0.5 * moved[1]


def test_sequence_mean_weighs_rows_equally(pair, tmp_path):
    strategy = StrategyConfig(type="policy_gradient", mean="sequence")
    trainer = make_trainer(pair, tmp_path / "a", method="sft", strategy=strategy)
    trainer.state.max_steps = 1
    (batch,), count = trainer.get_batch_samples(
        iter([next(iter(trainer.get_train_dataloader()))]), 1, torch.device("cpu")
    )
    loss = trainer.compute_loss(trainer.model.train(), dict(batch), num_items_in_batch=count)
    loss.backward()
    ours = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    other = make_trainer(pair, tmp_path / "b", method="sft")
    output = other.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits.log_softmax(-1)
    labels = batch["labels"][:, 1:]
    picked = output[:, :-1].gather(2, labels.clamp_min(0)[..., None])[..., 0] * (labels != -100)
    (-(picked.sum(1) / (labels != -100).sum(1)).mean()).backward()
    theirs = torch.cat([p.grad.flatten() for p in other.model.parameters()])
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "forward_kl", "strategy": PG}, "every term sums"),
        (
            {"method": "hpd", "strategy": StrategyConfig(type="policy_gradient", discount=1.0)},
            "support: rollout",
        ),
        ({"method": "opd", "prefixes": Prefixes(dataset=1.0)}, "there is none"),
        ({"method": "hpd", "rollouts": RolloutConfig()}, "has no effect"),
        ({"method": "gkd", "rollouts": RolloutConfig(teacher_share=0.2)}, "policy_gradient corrects"),
        (
            {"method": "distillm2", "prefixes": Prefixes(dataset=1.0)},
            "skew_reverse_kl learns from the student's own",
        ),
        ({"method": "distillm"}, "follows the validation loss"),
    ],
)
def test_choices_that_do_not_fit_are_refused(pair, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(pair, tmp_path, **options)


def test_a_direct_strategy_has_nothing_to_clip():
    with pytest.raises(ValueError, match="no ratio to clip"):
        StrategyConfig(clip_low=0.1)
    with pytest.raises(ValueError, match="set on: student"):
        TermConfig(objective="reverse_kl", support="rollout").build()


class _Watch(TrainerCallback):
    def __init__(self, look):
        self.look = look

    def on_step_end(self, args, state, control, **kwargs):
        self.look()


def test_state_of_an_older_checkpoint_is_read():
    student, teacher = tabular(0).requires_grad_(), tabular(1)
    terms = [OPD.build(), TermConfig(objective="forward_kl", on="student").build()]
    text = (0, 1, END)
    where = torch.tensor([PREFIXES.index(p) for p in prefixes_of(text)])

    def update(frozen, sharpness):
        sides = Scores(student[where] * sharpness, Head(None)), Scores(teacher[where], Head(None))
        output, kept = policy_gradient_nll(
            *sides, batch_for(text), terms, PG, frozen=frozen, uniforms=None, scale=1.0, row_scale=1.0
        )
        return *torch.autograd.grad(output.loss, student), kept

    _, kept = update(None, 1.0)
    older = [[{n.removesuffix("_logprobs"): v for n, v in state.items()} for state in part] for part in kept]
    assert "old" in older[0][0]
    assert torch.equal(update(older, 1.1)[0], update(kept, 1.1)[0])
    assert not torch.equal(update(older, 1.1)[0], update(None, 1.1)[0])
