"""The loss between two tokenizers: beside the operator where they are one, beside autograd where they are
not, and its events beside an enumerated language."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.byte_setting import (
    COUNTS,
    DTYPE,
    EVENTS,
    SAME,
    STUDENT,
    STUDENT_WORDS,
    TEACHER_COUNTS,
    TEACHER_WORDS,
    batch_of,
    gradients,
    log_probs,
    scores,
    setting,
    vocabulary,
)

from hpd.losses import Head, TopKScores, reweighted_nll
from hpd.losses.byte_chunks import byte_nll
from hpd.losses.byte_events import byte_events, cell_mass
from hpd.losses.byte_weights import compare_draws
from hpd.methods.table import method_terms
from hpd.methods.terms import TermConfig

LABEL_TERMS = {
    "sft": {"objective": "nll"},
    "masked_sft": {"objective": "masked_sft"},
    "label_forward_kl": {"objective": "label_forward_kl"},
    "label_reverse_kl": {"objective": "label_reverse_kl"},
    "hpd": {"objective": "hpd", "support": "label"},
}


def both(name, softcap, length):
    """The loss of 40 chunks of one token, and the operator's."""
    student, teacher = scores(40, 12, 0, torch.float32, True, softcap), scores(40, 12, 1, torch.float32)
    batch = batch_of([1] * 40, [1] * 40, teacher_vocab=12)
    batch = batch._replace(teacher_labels=batch.labels)
    terms = [TermConfig(**LABEL_TERMS[name], weight=0.7).build()]
    ours = byte_nll(student, teacher, batch, terms, SAME, scale=0.3, length=length)
    expected = reweighted_nll(student, teacher, batch.labels, terms, scale=0.3)
    return ours, expected, *(gradients(student, output.loss) for output in (ours, expected))


OF_DISTRIBUTIONS = {
    "forward_kl", "reverse_kl", "teacher_entropy", "student_entropy", "top1_agreement", "mean_token_accuracy",
    "acceptance",
}  # fmt: skip


@pytest.mark.parametrize("length", ["geometric", "product"])
@pytest.mark.parametrize("name", LABEL_TERMS)
def test_one_tokenizer_is_the_label_support_bit_for_bit(name, length):
    """Loss, gradients, and every metric of the term."""
    ours, expected, grad, expected_grad = both(name, None, length)
    assert torch.equal(ours.loss, expected.loss)
    assert all(map(torch.equal, grad, expected_grad))
    for key in expected.stats.keys() - OF_DISTRIBUTIONS:
        assert torch.equal(ours.stats[key], expected.stats[key]), key
    assert float(ours.stats["one_to_one"]) == 40


def test_a_capped_head_has_the_slope_of_its_cap():
    """The operator takes another way through a cap, with other rounding."""
    ours, expected, grad, expected_grad = both("hpd", 4.0, "geometric")
    torch.testing.assert_close(ours.loss, expected.loss)
    for a, b in zip(grad, expected_grad, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("length", ["geometric", "product"])
@pytest.mark.parametrize("name", LABEL_TERMS)
def test_chunks_are_those_of_a_reference(name, length):
    """Written chunk by chunk, with autograd."""
    student, teacher, batch = setting()
    term = TermConfig(**LABEL_TERMS[name]).build()
    output = byte_nll(student, teacher, batch, [term], EVENTS, length=length)
    log_q = log_probs(student).gather(1, batch.labels[:, None])[:, 0]
    log_p = log_probs(teacher).gather(1, batch.teacher_labels[:, None])[:, 0]
    value, likelihood = 0.0, 0.0
    for j, (size, teacher_size) in enumerate(zip(COUNTS, TEACHER_COUNTS, strict=True)):
        n = max(size, teacher_size) if length == "geometric" else 1
        of_q, of_p = log_q[batch.chunks == j].sum(), log_p[batch.teacher_chunks == j].sum()
        pair = (of_p / n)[None, None], (of_q.detach() / n)[None, None]
        likelihood = likelihood + term.objective.weights(*pair)[0, 0] * of_q
        value += n * float(term.objective.value(*pair)[0, 0])
    assert float(output.loss.detach()) == pytest.approx(value)
    for a, b in zip(gradients(student, output.loss), gradients(student, -likelihood), strict=True):
        torch.testing.assert_close(a, b)


WHOLE = ["forward_kl", "reverse_kl", "generalized_jsd", "hpd_full"]


def cells_by_hand(log_probs, keys):
    """Rows of 258 probabilities, token by token."""
    columns = [log_probs.new_zeros(len(log_probs))] * 258
    for token, key in enumerate(keys):
        cell = 257 if key is None else ord(key[0])
        columns[cell] = columns[cell] + log_probs[:, token].exp()
    return torch.stack(columns, 1)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("name", WHOLE)
def test_next_bytes_are_those_of_a_reference(name, softcap):
    student, teacher, batch = setting(softcap)
    (term,) = (config.build() for config in method_terms(name, {}))
    output = byte_nll(student, teacher, batch, [term], EVENTS, scale=0.5)
    z = student.hidden @ student.head.weight.t()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    first, teacher_first = ([0, *itertools.accumulate(c)][:-1] for c in (COUNTS, TEACHER_COUNTS))
    q = cells_by_hand(torch.log_softmax(z, -1)[first], STUDENT_WORDS.keys())
    p = cells_by_hand(log_probs(teacher)[teacher_first], TEACHER_WORDS.keys())
    used = ((p + q) > 0).any(0)
    assert used.sum() == 5  # a, b, c, the end, other special tokens
    log_p, log_q = p[:, used].log(), q[:, used].log()
    weights = term.objective.weights(log_p, log_q.detach())
    expected = gradients(student, -0.5 * (weights * log_q).sum())
    assert float(output.loss.detach()) == pytest.approx(
        0.5 * float(term.objective.value(log_p, log_q.detach()).sum())
    )
    for a, b in zip(gradients(student, output.loss), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_divergence_of_next_bytes_is_at_most_that_of_tokens():
    student, teacher = scores(50, 12, 0), scores(50, 12, 1)
    log_q, log_p = log_probs(student), log_probs(teacher)
    q, p = cell_mass(log_q.exp(), SAME.student_cells), cell_mass(log_p.exp(), SAME.student_cells)
    assert torch.allclose(q.sum(-1), torch.ones(50, dtype=DTYPE))
    tiny = 1e-300
    for a, b, log_a, log_b in ((p, q, log_p, log_q), (q, p, log_q, log_p)):
        of_bytes = (a * ((a + tiny).log() - (b + tiny).log())).sum(-1)
        of_tokens = (log_a.exp() * (log_a - log_b)).sum(-1)
        assert (of_bytes <= of_tokens + 1e-12).all()
        assert (of_bytes < 0.9 * of_tokens).any()


@pytest.mark.parametrize("method", ["hpd", "forward_kl", "masked_sft"])
def test_numbers_of_the_students_tokens_mean_nothing(method):
    """With its vocabulary in another order the student has the same loss, draws at events and all."""
    student, teacher, batch = setting()
    terms = [config.build() for config in method_terms(method, {})]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    place = order.argsort()
    texts = [STUDENT[old] if old < len(STUDENT) else b"" for old in order.tolist()]
    permuted = byte_events(
        vocabulary(texts, ends=[int(place[8])], special=[int(place[9])], size=12), TEACHER_WORDS
    )
    other = student._replace(head=Head(student.head.weight.detach()[order]))
    # A draw by the inverse of the distribution function depends on the order: this one takes the same token.
    uniforms = torch.zeros(sum(COUNTS), 1, dtype=DTYPE)
    if method == "hpd":
        drawn = log_probs(student).exp().argmax(-1)
        q, r = log_probs(student).exp(), log_probs(other).exp()
        at = torch.arange(len(drawn))
        uniforms = (q.cumsum(-1)[at, drawn] - 0.5 * q[at, drawn])[:, None].detach()
        others = (r.cumsum(-1)[at, place[drawn]] - 0.5 * r[at, place[drawn]])[:, None].detach()
    else:
        others = uniforms
    a = byte_nll(student, teacher, batch, terms, EVENTS, uniforms=uniforms)
    b = byte_nll(other, teacher, batch._replace(labels=place[batch.labels]), terms, permuted, uniforms=others)
    torch.testing.assert_close(a.loss, b.loss)
    assert a.stats.keys() == b.stats.keys()
    for key in a.stats:
        torch.testing.assert_close(a.stats[key], b.stats[key])


@pytest.mark.parametrize("method", ["hpd", "forward_kl", "masked_sft"])
def test_groups_of_chunks_change_nothing(method):
    student, teacher, batch = setting()
    terms = [config.build() for config in method_terms(method, {})]
    uniforms = torch.rand(sum(COUNTS), 1, dtype=DTYPE, generator=torch.Generator().manual_seed(3))
    whole, parts = (
        byte_nll(student, teacher, batch, terms, EVENTS, uniforms=uniforms, chunk_bytes=size, metric_stride=3)
        for size in (None, 4 * 12 * 8)
    )
    torch.testing.assert_close(whole.loss, parts.loss)
    for a, b in zip(gradients(student, whole.loss), gradients(student, parts.loss), strict=True):
        torch.testing.assert_close(a, b)
    for key in whole.stats:
        torch.testing.assert_close(whole.stats[key], parts.stats[key])
    assert float(whole.stats["metric_tokens"]) == 3


class Language:
    """A model of tokens whose next one depends on those so far: the chance of any text to come can be
    enumerated."""

    def __init__(self, words, seed):
        self.keys, self.size, self.seed = words.keys(), words.size, seed

    def next(self, before):
        generator = torch.Generator().manual_seed(hash((self.seed, before)) % 2**31)
        return torch.softmax(1.5 * torch.randn(self.size, generator=generator, dtype=DTYPE), -1)

    def chance(self, key, before=()):
        """That the next symbols begin with `key`, over all ways to write them."""
        total = 0.0
        for token, chance in enumerate(self.next(before).tolist()):
            own = self.keys[token]
            if own is None:
                continue
            if own.startswith(key):
                total += chance
            elif key.startswith(own):
                total += chance * self.chance(key[len(own) :], (*before, token))
        return total


def test_bounds_hold_in_an_enumerated_language():
    """Lower bounds are never above the exact chance, upper ones never below, and certain signs are right."""
    certain = 0
    for seed in range(30):
        models = Language(STUDENT_WORDS, seed), Language(TEACHER_WORDS, 1000 + seed)
        q, p = (model.next(())[None] for model in models)
        draws = torch.tensor([[token for token, key in enumerate(STUDENT_WORDS.keys()) if key is not None]])
        exact = [
            torch.tensor([model.chance(STUDENT_WORDS.keys()[token]) for token in draws[0].tolist()])
            for model in models
        ]
        for (low, up), chance in zip(
            (EVENTS.of_student.bounds(q, draws), EVENTS.of_teacher.bounds(p, draws)), exact, strict=True
        ):
            assert (low[0] <= chance + 1e-6).all()
            assert (chance <= up[0] + 1e-6).all()
        found = compare_draws(p, q, draws, EVENTS)
        ratio = (found.teacher_logprobs - found.student_logprobs)[0]
        decided = ~found.undecided[0]
        assert torch.equal(ratio[decided].sign(), (exact[1] - exact[0])[decided].sign().to(DTYPE))
        assert (ratio[~decided] == 0).all()
        # Of two bounds on either side the nearest ones: the true gap is larger.
        true = (exact[1].log() - exact[0].log()).abs()[decided]
        assert (ratio[decided].abs() <= true + 1e-5).all()
        certain += int(decided.sum())
    assert 60 < certain < 200, "some are certain, and some are not"


def test_a_role_is_no_event_of_the_other_model():
    q, p = torch.full((1, 12), 1 / 12, dtype=DTYPE), torch.full((1, 13), 1 / 13, dtype=DTYPE)
    found = compare_draws(p, q, torch.tensor([[9, 7, 11, 8]]), EVENTS)
    # A role, a token of no bytes, a row that pads the head; the end has one name on either side.
    assert found.undecided[0].tolist() == [True, True, True, False]


def test_the_draw_is_punished_where_its_sign_is_certain():
    """The paper's rule on label and draw, chunk by chunk, from the bounds above."""
    student, teacher, batch = setting()
    (term,) = (config.build() for config in method_terms("hpd", {}))
    uniforms = torch.rand(sum(COUNTS), 1, dtype=DTYPE, generator=torch.Generator().manual_seed(8))
    output = byte_nll(student, teacher, batch, [term], EVENTS, uniforms=uniforms)
    log_q, log_p = log_probs(student), log_probs(teacher)
    first, teacher_first = ([0, *itertools.accumulate(c)][:-1] for c in (COUNTS, TEACHER_COUNTS))
    likelihood, punished, undecided = 0.0, 0, 0
    for j, (size, teacher_size) in enumerate(zip(COUNTS, TEACHER_COUNTS, strict=True)):
        q, p = log_q[first[j]].detach().exp()[None], log_p[teacher_first[j]].exp()[None]
        draw = int(torch.searchsorted(q[0].cumsum(0), uniforms[first[j], 0]))
        n = max(size, teacher_size)
        of_chunk = log_q.gather(1, batch.labels[:, None])[batch.chunks == j, 0].sum()
        label_q = of_chunk.detach() / n
        label_p = log_p.gather(1, batch.teacher_labels[:, None])[batch.teacher_chunks == j, 0].sum() / n
        found = compare_draws(p, q, torch.tensor([[draw]]), EVENTS)
        gap = float(found.teacher_logprobs - found.student_logprobs)
        is_label = draw == int(batch.labels[first[j]])
        bad = gap < 0 and not is_label
        k = label_q.exp() * (label_p - label_q)
        w = (1 + bad) * label_p.exp() + k if label_p > label_q else k
        likelihood = likelihood + w * of_chunk
        if bad:
            likelihood = likelihood + found.student_logprobs.exp()[0, 0] * gap * log_q[first[j], draw]
        punished += bad * size
        undecided += bool(found.undecided) * size * (not is_label)
    for a, b in zip(gradients(student, output.loss), gradients(student, -likelihood), strict=True):
        torch.testing.assert_close(a, b)
    assert float(output.stats["sample_penalized"]) == pytest.approx(punished)
    assert float(output.stats["draws_undecided"]) == pytest.approx(undecided)
    assert punished
    assert undecided


def test_a_cached_teacher_of_likely_tokens_serves_labels():
    """And one with its normalizer needs no product with its head: the same loss."""
    student, teacher, batch = setting()
    term = TermConfig(objective="masked_sft").build()
    log_p = log_probs(teacher)
    top = log_p.topk(2)
    labels = log_p.gather(1, batch.teacher_labels[:, None])[:, 0]
    known = TopKScores(top.indices, top.values, labels, 13)
    log_z = torch.logsumexp(teacher.hidden @ teacher.head.weight.t(), -1)
    losses = [
        byte_nll(student, side, batch, [term], EVENTS, metric_stride=0).loss
        for side in (teacher, known, teacher._replace(log_z=log_z))
    ]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])
