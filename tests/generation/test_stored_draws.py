"""Answers and rollouts of stored runs: the engine goes on writing the same tokens for the same seeds.

The literals were written by the two engines that one replaced (rollouts; evaluation).
"""

import pytest
import torch
from accelerate import Accelerator
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd.batch import uniforms
from hpd.generation.engine import Request, TransformersEngine
from hpd.generation.rollouts import make_engine
from hpd.generation.settings import GenerationSettings
from hpd.methods.prefixes import RolloutConfig

TEXTS = ["say one:", "a", "what is the sum of the two numbers?"]
ROLLOUTS = {
    "plain": [
        [194, 36, 118, 24, 6, 185, 139, 266, 88, 288],
        [85, 97, 247, 130],
        [235, 35, 49, 277, 147, 41, 108, 64, 74, 80],
    ],
    "cuts": [
        [184, 9, 116, 9, 9, 194, 151, 216, 67, 277],
        [101, 101, 215, 131],
        [191, 38, 43, 270, 131, 38, 76, 63, 74, 74],
    ],
    "mixed": [
        [106, 77, 77, 50, 13, 76, 76, 239, 167, 277],
        [68, 68, 194, 194],
        [171, 66, 66, 256, 256, 78, 78, 78, 78, 78],
    ],
}
ANSWERS = {
    "greedy": [
        [200, 200, 200, 200, 200, 200, 200, 131, 131, 131],
        [61, 151, 151, 151, 151, 151, 151, 151, 151, 151],
        [151, 151, 151, 151, 151, 151, 151, 151, 151, 151],
    ],
    "sampled": [
        [145, 284, 42, 282, 94, 123, 241, 121, 154, 7],
        [101, 177, 145, 51, 242, 4, 23, 128, 287, 250],
        [131, 123, 124, 83, 243, 14, 27, 260, 195, 63],
    ],
    "cuts": [
        [128, 269, 43, 277, 89, 91, 200, 131, 131, 9],
        [116, 159, 128, 44, 202, 1, 1, 107, 279, 200],
        [131, 119, 119, 76, 204, 13, 32, 253, 219, 38],
    ],
}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student with random weights: unlike the trained teacher, it does not depend on the processor."""
    folder = tiny_model("llama", tmp_path_factory.mktemp("student"))
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("plain", {}),
        ("cuts", {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}),
        ("mixed", {"teacher_share": 0.5}),
    ],
)
def test_rollouts_are_those_of_stored_runs(student, name, config):
    model, tokenizer = student
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(model.config).eval()
    other.lm_head.weight.data.mul_(30.0)  # far from uniform, so that the mixture moves the draws
    engine = make_engine(
        RolloutConfig(**config), lambda: model, model, Accelerator(cpu=True), tokenizer, other
    )
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    numbers = uniforms(torch.arange(3) * 7919, seed=1, step=3, count=10)
    written = engine.generate(prompts, [10, 4, 10], numbers, 0)
    assert [rollout.tokens for rollout in written] == ROLLOUTS[name]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("greedy", {}),
        ("sampled", {"temperature": 1.0, "seed": 1}),
        ("cuts", {"temperature": 0.7, "top_p": 0.95, "top_k": 50, "seed": 1}),
    ],
)
def test_answers_are_those_of_stored_evaluations(student, name, settings):
    model, tokenizer = student
    requests = [
        Request(tokenizer(text)["input_ids"], (settings.get("seed", 0), row, 0, 0))
        for row, text in enumerate(TEXTS)
    ]
    engine = TransformersEngine(model, tokenizer)
    assert engine.generate_tokens(requests, GenerationSettings(**settings), 10) == ANSWERS[name]
