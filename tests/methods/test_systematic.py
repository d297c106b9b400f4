"""Draws without replacement: the expectation of their weights is p, by enumeration over the uniform."""

from __future__ import annotations

import pytest
import torch

from hpd.methods.systematic import systematic_draws

GRID = 4_000
# Every stretch of uniforms with the same draws is counted to within one point of the grid at each end.
BOUND = 40 / GRID


def distributions():
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 1.0, 3.0, 12.0):
        yield f"scale {scale:g}", torch.randn(9, generator=generator, dtype=torch.float64) * scale
    yield "one token", torch.tensor([0.0, -1e5, -1e5, -1e5, -1e5, -1e5, -1e5, -1e5, -1e5]).double()
    yield "two tokens", torch.tensor([0.0, -1e5, 0.0, -1e5, -1e5, -1e5, -1e5, -1e5, -1e5]).double()


def estimates(logprobs, n):
    """The estimate of p for each uniform of a grid."""
    uniforms = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    drawn = systematic_draws(logprobs.expand(GRID, -1), uniforms, n)
    assert drawn.tokens.shape == (GRID, n)
    found = torch.zeros(GRID, len(logprobs), dtype=torch.float64)
    return found.scatter_(1, drawn.tokens, drawn.logprobs.exp()), drawn


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize(("name", "logits"), distributions())
def test_the_expectation_is_the_distribution_and_the_variance_the_formula(name, logits, n):
    logprobs = torch.log_softmax(logits, -1)
    p = logprobs.exp()
    found, drawn = estimates(logprobs, n)
    torch.testing.assert_close(found.mean(0), p, rtol=0, atol=BOUND)
    torch.testing.assert_close(found.sum(1), torch.ones(GRID).double(), rtol=0, atol=1e-12)
    if int((p > 0).sum()) > n:
        assert all(len(set(row)) == n for row in drawn.tokens[:: GRID // 50].tolist())
    # Inclusion: min(1, c p), c by bisection on the sum.
    low, high = 0.0, 1e12
    for _ in range(200):
        c = (low * high) ** 0.5 if low else high / 2
        low, high = (c, high) if (c * p).clamp_max(1.0).sum() < min(n, int((p > 0).sum())) else (low, c)
    share = (high * p).clamp_max(1.0)
    variance = torch.where(p > 0, p * p * (1 / share.clamp_min(1e-300) - 1), 0.0)
    torch.testing.assert_close(found.var(0, correction=0), variance, rtol=0, atol=BOUND)


def test_a_uniform_gives_the_same_draws_whatever_else_is_in_the_batch():
    logprobs = torch.log_softmax(torch.randn(7, 50, generator=torch.Generator().manual_seed(1)) * 2, -1)
    uniforms = torch.rand(7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    together = systematic_draws(logprobs, uniforms, 5)
    for i in range(7):
        alone = systematic_draws(logprobs[i : i + 1], uniforms[i : i + 1], 5)
        assert torch.equal(alone.tokens[0], together.tokens[i])
        assert torch.equal(alone.logprobs[0], together.logprobs[i])
