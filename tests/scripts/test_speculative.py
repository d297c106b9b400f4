"""What acceptance predicts of speculative decoding, beside what transformers' assisted generation does."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPT = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "speculative.py"))
expected_tokens, speed_up = SCRIPT["expected_tokens"], SCRIPT["speed_up"]


def test_the_expected_tokens_are_the_sum_over_how_far_a_draft_is_kept():
    for alpha in (0.0, 0.3, 0.9):
        for drafted in (1, 4):
            kept = [alpha**k * (1 - alpha) for k in range(drafted)] + [alpha**drafted]
            assert expected_tokens(alpha, drafted) == pytest.approx(
                sum((k + 1) * x for k, x in enumerate(kept))
            )
    assert expected_tokens(1.0, 3) == 4.0
    assert speed_up(0.0, 4, 0.25) == pytest.approx(0.5)


def test_acceptance_leaves_out_the_ends_that_no_answer_may_have():
    config = LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=[3, 5], bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    teacher, student = (LlamaForCausalLM(config).eval() for _ in range(2))
    with torch.no_grad():
        for model in (teacher, student):
            model.lm_head.weight.mul_(60)
    text = torch.randint(12, (9,))
    found = SCRIPT["acceptance_of"](teacher, student, SCRIPT["Written"]([text], [4], 1))
    shared = []
    for place in range(3, 8):
        p, q = (
            [float(x) for x in m(text[None]).logits[0, place].detach().softmax(-1)]
            for m in (teacher, student)
        )
        left = [1 - side[3] - side[5] for side in (p, q)]
        shared.append(sum(min(p[v] / left[0], q[v] / left[1]) for v in range(12) if v not in (3, 5)))
    assert found == pytest.approx(sum(shared) / 5, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "drafted"), [(0.1, 3), (0.3, 1)])
def test_transformers_keeps_as_many_drafts_as_acceptance_says(noise, drafted):
    """A teacher and the same weights with noise: 720 tokens, so the mean is good to about 4 %."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(config).eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for model in (teacher, student):
            model.lm_head.weight.mul_(15)
        for weight in student.parameters():
            weight.add_(noise * weight.std() * torch.randn_like(weight))
    written = SCRIPT["write"](teacher, student, [torch.randint(64, (8,)) for _ in range(6)], drafted, 120)
    alpha = SCRIPT["acceptance_of"](teacher, student, written)
    assert 0.5 < alpha < 0.95
    assert written.tokens_per_call == pytest.approx(expected_tokens(alpha, drafted), rel=0.1)
