"""KL estimators: unbiased where they claim it, by enumeration of every draw."""

import pytest
import torch

from hpd.objectives.estimators import ESTIMATORS, kl_estimate


def logprobs(vocab=50, rows=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, rows, vocab, generator=generator, dtype=torch.float64).mul(1.5).log_softmax(-1)


def expectation(estimator, teacher, student):
    """Mean and variance of the estimator over a ~ q, by enumeration."""
    vocab = student.shape[1]
    values = torch.stack(
        [kl_estimate(estimator, teacher, student, torch.full((len(student), 1), a)) for a in range(vocab)], 1
    )
    mean = (student.exp() * values).sum(-1)
    return mean, (student.exp() * (values - mean[:, None]) ** 2).sum(-1)


@pytest.mark.parametrize("estimator", ["k1", "k3", "rao_blackwell"])
def test_unbiased(estimator):
    teacher, student = logprobs()
    exact = kl_estimate("exact", teacher, student)
    torch.testing.assert_close(expectation(estimator, teacher, student)[0], exact, rtol=1e-12, atol=1e-12)


def test_variances_are_ordered_as_documented():
    teacher, student = logprobs()
    k1, k3, blackwell = (expectation(name, teacher, student)[1] for name in ("k1", "k3", "rao_blackwell"))
    assert (blackwell < k1).all()
    near = (student + 0.05 * teacher).log_softmax(-1)
    assert (expectation("k3", near, student)[1] < expectation("k1", near, student)[1]).all()
    assert (k3 >= 0).all()


def test_k3_is_never_negative_and_k2_is_a_square():
    teacher, student = logprobs()
    draws = torch.randint(50, (4, 20))
    assert (kl_estimate("k3", teacher, student, draws) >= 0).all()
    assert (kl_estimate("k2", teacher, student, draws) >= 0).all()


def test_equal_distributions_have_no_divergence():
    _, student = logprobs()
    for estimator in ESTIMATORS:
        torch.testing.assert_close(
            kl_estimate(estimator, student, student, torch.zeros(4, 2, dtype=torch.long)),
            torch.zeros(4).double(),
        )


def test_mistakes():
    teacher, student = logprobs()
    with pytest.raises(ValueError, match="must be one of"):
        kl_estimate("k4", teacher, student)
    with pytest.raises(ValueError, match="needs tokens drawn"):
        kl_estimate("k1", teacher, student)
