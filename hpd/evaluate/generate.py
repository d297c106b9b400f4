"""Answers of a model to prompts, in batches.

Axes: B batch, T time (prompt and answer), V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hpd.evaluate.task import Prompt

_LOGGER = logging.getLogger(__name__)

FinishReason: TypeAlias = Literal["stop", "length"]
Progress: TypeAlias = Callable[[int, int], None]
"""Called with (answers so far, answers in total) after each batch."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How answers are written. What the checkpoint's own generation config says about decoding is ignored."""

    max_new_tokens: int = 512
    """Longest answer, in tokens; longer ones are cut. The model's context can be a lower limit (`generate_answers`)."""
    temperature: float = 0.0
    """0 is greedy; above 0, tokens are drawn from softmax(logits / temperature)."""
    top_p: float = 1.0
    """Sampling only: keep the smallest set of tokens with at least this mass; 1 keeps all."""
    top_k: int = 0
    """Sampling only: keep this many most likely tokens; 0 keeps all."""
    batch_size: int = 16
    """Prompts per forward pass: speed and memory only, answers do not depend on it (see `generate_answers`)."""
    seed: int = 0
    """Sampling only: which draws."""
    chat_template: Literal["auto", "never", "always"] = "auto"
    """Wrap prompts in the tokenizer's chat template; auto does so exactly if the tokenizer has one."""
    system_prompt: str | None = None
    """System turn before every prompt; needs a chat template. None adds none."""

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
            "seed": (self.seed >= 0, "0 or more"),
            "chat_template": (self.chat_template in ("auto", "never", "always"), "auto, never or always"),
        }
        for name, (valid, allowed) in checks.items():
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {allowed}.")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise ValueError(
                f"top_p={self.top_p} and top_k={self.top_k} have no effect at temperature 0 (greedy); "
                "set a temperature above 0, or leave both at their defaults."
            )
        if self.chat_template == "never" and self.system_prompt is not None:
            raise ValueError("system_prompt needs a chat template; set chat_template to auto or always.")


GREEDY = GenerationSettings()


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One answer."""

    text: str
    """Without special tokens."""
    num_tokens: int
    """Tokens written, the end token included."""
    finish_reason: FinishReason
    """"stop": the model ended its answer; "length": it was cut."""


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: GenerationSettings = GREEDY,
    progress: Progress | None = None,
) -> list[Generation]:
    """The model's answers, in the order of the prompts.

    The longest prompts go first, so that a batch too large for the memory fails at once. Training flags and generation
    configs of the model and its parts are restored at the end.

    Answers are a function of (model, prompts, settings without batch_size), up to the rounding of the model's forward
    pass, which varies with the batch shape: each draw of a sampled answer uses one uniform number that depends only on
    (seed, index of the prompt, position in the answer), turned into a token by the inverse CDF. For the same reason one
    limit holds for all: max_new_tokens, or what the longest prompt leaves of the context (logged where it is less).

    Args:
        model: a causal language model with `generate`: of transformers, or its peft wrapper.
        tokenizer: the model's; its padding side does not matter.
        prompts: plain texts or chats; plain texts become a user turn where a chat template is used.
        settings: decoding, batch size and template.
        progress: called after each batch.

    Raises:
        ValueError: the tokenizer lacks the chat template that is asked for, a prompt has no tokens, or a prompt leaves
            no room for an answer in the model's context.
    """
    token_ids = [encode_prompt(tokenizer, prompt, settings) for prompt in prompts]
    longest_first = sorted(range(len(prompts)), key=lambda index: -len(token_ids[index]))
    end_ids = _end_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end_ids or [0])[0]
    config = GenerationConfig(
        max_new_tokens=_answer_limit(model, token_ids, settings.max_new_tokens),
        do_sample=False,  # sampling happens in _SeededDraw, which leaves generate one token to choose
        use_cache=True,
        eos_token_id=end_ids or None,
        pad_token_id=pad_id,
    )
    generations: dict[int, Generation] = {}
    with _ready_to_generate(model), torch.inference_mode():
        for start in range(0, len(prompts), settings.batch_size):
            indices = longest_first[start : start + settings.batch_size]
            answers = _generate_batch(model, [token_ids[index] for index in indices], indices, config, settings)
            for index, answer in zip(indices, answers, strict=True):
                generations[index] = _finish(tokenizer, answer, end_ids)
            if progress is not None:
                progress(len(generations), len(prompts))
    return [generations[index] for index in range(len(prompts))]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, settings: GenerationSettings) -> list[int]:
    """Token ids of a prompt as the model should see it, up to the first token of the answer.

    Raises:
        ValueError: a chat, a system prompt or chat_template="always" without a chat template; a prompt without tokens.
    """
    templated = settings.chat_template == "always" or (settings.chat_template == "auto" and tokenizer.chat_template)
    if templated and not tokenizer.chat_template:
        raise ValueError("chat_template is 'always', but the tokenizer has none; use auto, or another tokenizer.")
    if templated:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if settings.system_prompt is not None:
            if turns[0]["role"] == "system":
                raise ValueError("system_prompt is set, but a prompt has a system turn already; leave out one of them.")
            turns.insert(0, {"role": "system", "content": settings.system_prompt})
        text = cast("str", tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    elif isinstance(prompt, str) and settings.system_prompt is None:
        text = prompt
    else:
        given = "system_prompt is set" if isinstance(prompt, str) else "a prompt is a chat"
        raise ValueError(
            f"{given}, which needs a chat template, but chat_template is {settings.chat_template!r} and the tokenizer "
            f"has {'one' if tokenizer.chat_template else 'none'}; allow it, use another tokenizer, or plain prompts."
        )
    # A template writes its own special tokens; plain text gets those that the tokenizer adds (BOS of Llama).
    token_ids = tokenizer(text, add_special_tokens=not templated)["input_ids"]
    if not token_ids:
        raise ValueError(f"the prompt {prompt!r} has no tokens; every prompt needs at least one.")
    return cast("list[int]", token_ids)


class _SeededDraw(LogitsProcessor):
    """Draws each row's next token by inverse CDF and masks all others, so that argmax returns the draw.

    Row b at step t takes the first token whose cumulative probability exceeds `uniforms[b, t]`.
    """

    def __init__(self, uniforms: Float[Tensor, "B steps"], prompt_length: int) -> None:
        self.uniforms = uniforms
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        cumulative = scores.to(self.uniforms.dtype).softmax(-1).cumsum(-1)  # [B, V]
        step = input_ids.shape[1] - self.prompt_length
        # Scaled by the total, which rounding leaves next to 1: a uniform below 1 always falls inside.
        targets = self.uniforms[:, step, None] * cumulative[:, -1:]  # [B, 1]
        token = torch.searchsorted(cumulative, targets, right=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


def _generate_batch(
    model: nn.Module,
    token_ids: Sequence[Sequence[int]],
    indices: Sequence[int],
    config: GenerationConfig,
    settings: GenerationSettings,
) -> list[list[int]]:
    device = next(model.parameters()).device
    length = max(map(len, token_ids))
    pad_id = cast("int", config.pad_token_id)
    input_ids = torch.tensor([[pad_id] * (length - len(ids)) + list(ids) for ids in token_ids], device=device)  # [B, T]
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in token_ids], device=device)  # [B, T]
    processors = LogitsProcessorList()
    if settings.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_k > 0:
            processors.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            processors.append(TopPLogitsWarper(settings.top_p))
        draws = [np.random.default_rng((settings.seed, index)).random(settings.max_new_tokens) for index in indices]
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        processors.append(_SeededDraw(torch.tensor(np.stack(draws), dtype=dtype, device=device), length))
    output = cast("Any", model).generate(
        inputs=input_ids, attention_mask=mask, generation_config=config, logits_processor=processors
    )
    return cast("Tensor", output)[:, length:].tolist()


def _finish(tokenizer: PreTrainedTokenizerBase, answer: Sequence[int], end_ids: Sequence[int]) -> Generation:
    num_tokens = next((position + 1 for position, token in enumerate(answer) if token in end_ids), None)
    return Generation(
        text=cast("str", tokenizer.decode(list(answer[:num_tokens]), skip_special_tokens=True)),
        num_tokens=len(answer) if num_tokens is None else num_tokens,
        finish_reason="length" if num_tokens is None else "stop",
    )


def _end_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the checkpoint's, and the tokenizer's, which fine-tuned checkpoints often lack."""
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    of_model = [of_model] if isinstance(of_model, int) else list(of_model or [])
    return list(dict.fromkeys(token for token in [*of_model, tokenizer.eos_token_id] if token is not None))


def _answer_limit(model: nn.Module, token_ids: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Tokens that every answer may have: max_new_tokens, or what the longest prompt leaves of the model's context."""
    config = getattr(model, "config", None)
    context = getattr(config and config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, token_ids), default=0)
    if context is None or longest + max_new_tokens <= context:
        return max_new_tokens
    if longest >= context:
        raise ValueError(
            f"the longest prompt has {longest} tokens, which leaves no room for an answer in the model's context of "
            f"{context} tokens (max_position_embeddings); leave out the longest prompts, or use another model."
        )
    _LOGGER.warning(
        "Answers end after %d tokens, not after max_new_tokens=%d: the longest prompt has %d tokens, the context %d.",
        context - longest,
        max_new_tokens,
        longest,
        context,
    )
    return context - longest


@contextmanager
def _ready_to_generate(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and neutral generation configs inside, every module's own again outside.

    generate fills what a config leaves open from the model's, where checkpoints keep penalties and sampling flags.
    """
    training = {module: module.training for module in model.modules()}
    configs = {module: vars(module)["generation_config"] for module in training if "generation_config" in vars(module)}
    model.eval()
    for module in configs:
        vars(module)["generation_config"] = GenerationConfig()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for module, config in configs.items():
            vars(module)["generation_config"] = config
