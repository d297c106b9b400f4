"""ULD, GOLD and ALM between two tokenizers, beside references in float64 with autograd, token by token."""

import itertools

import pytest
import torch
from helpers.byte_setting import (
    COUNTS,
    DTYPE,
    EVENTS,
    SAME,
    TEACHER_COUNTS,
    batch_of,
    gradients,
    log_probs,
    scores,
    setting,
)

from hpd.losses import reweighted_nll
from hpd.losses.byte_chunks import byte_nll
from hpd.methods.table import method_terms, name_terms
from hpd.methods.terms import TermConfig
from hpd.objectives import alm

# Of tests/helpers/byte_setting.py, by their bytes: a, b, c, ab, and the end (the teacher has b twice).
SHARED, SHARED_TEACHER = [0, 1, 2, 3, 8], [3, 4, 1, 8, 0]


def merged(log_probs, labels, counts):
    """GOLD's "observed" merge: the first token's distribution times the probability of the later ones."""
    rows = []
    for begin, size in zip(itertools.accumulate([0, *counts]), counts, strict=False):
        row = log_probs[begin].exp()
        for place in range(begin + 1, begin + size):
            row = row * log_probs[place, labels[place]].exp()
        rows.append(row)
    return rows


def by_rank(p, q):
    p, q = (sorted(side, key=lambda x: -float(x)) for side in (p, q))
    zero = torch.zeros((), dtype=DTYPE)
    return sum(abs(a - b) for a, b in itertools.zip_longest(p, q, fillvalue=zero))


def jensen_shannon(p, q):
    m = (p + q) / 2
    return (p * (p / m).log() + q * (q / m).log()) / 2


def uld_reference(p, q):
    return 1.5 * by_rank(p, q)


def gold_reference(p, q):
    matched = sum(jensen_shannon(p[t], q[s]) for s, t in zip(SHARED, SHARED_TEACHER, strict=True))
    rest = (
        [v for v in range(len(p)) if v not in SHARED_TEACHER],
        [v for v in range(len(q)) if v not in SHARED],
    )
    return matched + by_rank(p[rest[0]], q[rest[1]])


REFERENCES = {"uld": uld_reference, "gold": gold_reference}


@pytest.mark.parametrize("chunk_bytes", [None, 1])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("method", REFERENCES)
def test_pairs_are_those_of_a_reference(method, softcap, chunk_bytes):
    student, teacher, batch = setting(softcap)
    terms = name_terms(method_terms(method, {}))
    output = byte_nll(student, teacher, batch, terms, EVENTS, scale=0.5, chunk_bytes=chunk_bytes)
    z = student.hidden @ student.head.weight.t()
    log_q = torch.log_softmax(z if softcap is None else softcap * torch.tanh(z / softcap), -1)
    q = merged(log_q, batch.labels, COUNTS)
    p = merged(log_probs(teacher), batch.teacher_labels, TEACHER_COUNTS)
    expected = sum(REFERENCES[method](a, b) for a, b in zip(p, q, strict=True))
    if method == "uld":
        expected = expected - log_q.gather(1, batch.labels[:, None]).sum()
    assert float(output.loss.detach()) == pytest.approx(0.5 * float(expected.detach()), rel=1e-10)
    for a, b in zip(gradients(student, output.loss), gradients(student, 0.5 * expected), strict=True):
        torch.testing.assert_close(a, b)


def test_alm_is_that_of_a_reference():
    """Its formula, chunk by chunk, through autograd."""
    student, teacher, batch = setting()
    (config,) = method_terms("alm", {"tau": 7.0})
    output = byte_nll(student, teacher, batch, [config.build()], EVENTS, length="product")
    log_q = log_probs(student).gather(1, batch.labels[:, None])[:, 0]
    log_p = log_probs(teacher).gather(1, batch.teacher_labels[:, None])[:, 0]
    expected = torch.zeros((), dtype=DTYPE)
    for j in range(len(COUNTS)):
        a = (log_p[batch.teacher_chunks == j].sum() / 7).exp()
        b = (log_q[batch.chunks == j].sum() / 7).exp()
        expected = expected + a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()
    assert float(output.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    for a, b in zip(gradients(student, output.loss), gradients(student, expected), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("temperature", [1.0, 100.0, 1e4])
def test_alm_stays_finite_and_rests_at_the_teacher(temperature):
    objective = alm(temperature)
    logs = torch.tensor([0.0, -1e-30, -1e-9, -1e-3, -1.0, -50.0, -1e5])
    p, q = (side.reshape(-1, 1) for side in torch.meshgrid(logs, logs, indexing="ij"))
    weights, value = objective.weights(p, q), objective.value(p, q)
    assert weights.isfinite().all()
    assert value.isfinite().all()
    assert (value >= -1e-6).all()
    assert (objective.weights(p, p) == 0).all()
    assert (weights.sign() * (p - q).sign() >= 0).all()
    # At a large temperature it is the ratio of the log-probabilities.
    if temperature == 1e4:
        one = objective.weights(torch.tensor([[-1.0]]), torch.tensor([[-4.0]])) * temperature
        assert float(one) == pytest.approx(1 - 1 / 4, rel=1e-3)


@pytest.mark.parametrize("method", ["uld", "gold"])
def test_one_tokenizer_with_itself_rests_at_the_teacher(method):
    """Where student and teacher are one model, both distances are zero, and so is their gradient."""
    student = scores(10, 12, 3, requires_grad=True)
    batch = batch_of([1] * 10, [1] * 10, teacher_vocab=12)
    batch = batch._replace(teacher_labels=batch.labels)
    terms = [term for term in name_terms(method_terms(method, {})) if term.name != "nll"]
    teacher = student._replace(hidden=student.hidden.detach())
    teacher = teacher._replace(head=student.head._replace(weight=student.head.weight.detach()))
    output = byte_nll(student, teacher, batch, terms, SAME)
    assert float(output.loss.detach()) == pytest.approx(0.0, abs=1e-12)
    assert all(float(part.norm()) < 1e-12 for part in gradients(student, output.loss))


def test_rank_sees_no_tokens():
    """A teacher whose vocabulary is shuffled is the same to ULD's distance, the fault that it is known for;
    GOLD's notices."""
    student, teacher, _ = setting()
    order = torch.tensor([*range(1, 13), 0])
    shuffled = teacher._replace(head=teacher.head._replace(weight=teacher.head.weight[order]))
    ranks = TermConfig(objective="total_variation", support="ranks").build()
    shared = TermConfig(objective="generalized_jsd", support="shared").build()
    ones = batch_of([1] * 11, [1] * 11)
    found = {
        name: [float(byte_nll(student.at(slice(11)), side.at(slice(11)), ones, [term], EVENTS).loss.detach())
               for side in (teacher, shuffled)]
        for name, term in {"ranks": ranks, "shared": shared}.items()
    }  # fmt: skip
    assert found["ranks"][0] == pytest.approx(found["ranks"][1], rel=1e-12)
    assert abs(found["shared"][0] - found["shared"][1]) > 1e-3


def test_pairs_by_bytes_and_the_rest():
    assert EVENTS.shared.tolist() == [SHARED, SHARED_TEACHER]
    assert EVENTS.student_rest.tolist() == [4, 5, 6, 7, 9, 10, 11]
    assert EVENTS.teacher_rest.tolist() == [2, 5, 6, 7, 9, 10, 11, 12]
    assert SAME.shared.tolist() == [[0, 1, 2, 3, 4, 5, 6, 8]] * 2


@pytest.mark.parametrize("given", [
    {"objective": "forward_kl", "support": "shared"},
    {"objective": "reverse_kl", "support": "unshared"},
    {"objective": "generalized_jsd", "support": "shared", "kwargs": {"beta": 0.0}},
])  # fmt: skip
def test_a_part_of_a_divergence_that_falls_below_zero_is_refused(given):
    with pytest.raises(ValueError, match="would be no divergence"):
        TermConfig(**given).build()


def test_pairs_of_two_vocabularies_need_two():
    term = TermConfig(objective="total_variation", support="ranks").build()
    student, teacher = scores(4, 12, 0), scores(4, 12, 1)
    with pytest.raises(ValueError, match="it needs two tokenizers"):
        reweighted_nll(student, teacher, torch.zeros(4, dtype=torch.int64), [term])
