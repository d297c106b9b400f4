"""What turns prompts into answers: `transformers` here, vLLM in `vllm_engine`.

Axes: B batch, T time (prompt and answer), V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, cast

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

from hpd.data.templates import taken_by_template
from hpd.generation.settings import GenerationSettings
from hpd.generation.texts import Answer, Prompt

__all__ = [
    "Engine",
    "Request",
    "TransformersEngine",
    "encode_prompt",
    "end_token_ids",
    "longest_first",
]


class Request(NamedTuple):
    """A prompt to answer."""

    token_ids: list[int]
    entropy: tuple[int, int, int, int]
    """(seed, problem, sample, turn): which draws, where answers are sampled."""


class Engine(Protocol):
    """A model that answers. Both methods are pure in what they are given, so that an interrupted evaluation
    can go on."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def name(self) -> str:
        """Part of an evaluation's identity: two engines round differently."""
        ...

    @property
    def context(self) -> int | None:
        """Most tokens of prompt and answer together; None: no limit is known."""
        ...

    def batches(self, lengths: Sequence[int], settings: GenerationSettings) -> list[list[int]]:
        """Prompts (by index, given their lengths in tokens) that `generate` should get together."""
        ...

    def generate(self, requests: Sequence[Request], settings: GenerationSettings, limit: int) -> list[Answer]:
        """Answers of at most `limit` tokens, in the order of the requests."""
        ...


class TransformersEngine:
    """`generate` of transformers, in batches, the longest prompts first.

    Args:
        model: a causal language model with `generate`: of transformers, or its peft wrapper.
        tokenizer: the model's; its padding side does not matter.
    """

    name = "transformers"

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase):
        self.model = model
        self.tokenizer = tokenizer

    @property
    def context(self) -> int | None:
        config = getattr(self.model, "config", None)
        return getattr(config and config.get_text_config(), "max_position_embeddings", None)

    def batches(self, lengths: Sequence[int], settings: GenerationSettings) -> list[list[int]]:
        return longest_first(lengths, settings.batch_size)

    def generate(self, requests: Sequence[Request], settings: GenerationSettings, limit: int) -> list[Answer]:
        end_ids = end_token_ids(self.model, self.tokenizer)
        answers = self.generate_tokens(requests, settings, limit)
        return [_finish(self.tokenizer, answer, end_ids, settings.stop) for answer in answers]

    def generate_tokens(
        self, requests: Sequence[Request], settings: GenerationSettings, limit: int
    ) -> list[list[int]]:
        """The token ids behind `generate`, end token included; what follows a stop string is not yet cut
        off."""
        end_ids = end_token_ids(self.model, self.tokenizer)
        pad_id = (
            self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (end_ids or [0])[0]
        )
        config = GenerationConfig(
            max_new_tokens=limit,
            do_sample=False,  # sampling happens in _SeededDraw, which leaves generate one token to choose
            use_cache=True,
            eos_token_id=end_ids or None,
            pad_token_id=pad_id,
            stop_strings=list(settings.stop) or None,
        )
        with _ready_to_generate(self.model), torch.inference_mode():
            answers = self._generate_batch(requests, config, settings)
        ends = [
            next((place + 1 for place, token in enumerate(answer) if token in end_ids), None)
            for answer in answers
        ]
        return [answer[:end] for answer, end in zip(answers, ends, strict=True)]

    def _generate_batch(
        self, requests: Sequence[Request], config: GenerationConfig, settings: GenerationSettings
    ) -> list[list[int]]:
        device = next(self.model.parameters()).device
        length = max(len(request.token_ids) for request in requests)
        pad_id = cast("int", config.pad_token_id)
        padded = [[pad_id] * (length - len(request.token_ids)) + request.token_ids for request in requests]
        masks = [
            [0] * (length - len(request.token_ids)) + [1] * len(request.token_ids) for request in requests
        ]
        processors = LogitsProcessorList()
        if settings.temperature > 0:
            processors.append(TemperatureLogitsWarper(float(settings.temperature)))
            if settings.top_k > 0:
                processors.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1:
                processors.append(TopPLogitsWarper(settings.top_p))
            draws = [
                np.random.default_rng(request.entropy).random(config.max_new_tokens) for request in requests
            ]
            dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
            processors.append(_SeededDraw(torch.tensor(np.stack(draws), dtype=dtype, device=device), length))
        output = cast("Any", self.model).generate(
            inputs=torch.tensor(padded, device=device),  # [B, T]
            attention_mask=torch.tensor(masks, device=device),  # [B, T]
            generation_config=config,
            logits_processor=processors,
            **({"tokenizer": self.tokenizer} if settings.stop else {}),
        )
        return cast("Tensor", output)[:, length:].tolist()


def longest_first(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of similar lengths; a batch too large for the memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


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


def _finish(
    tokenizer: PreTrainedTokenizerBase, answer: Sequence[int], end_ids: Sequence[int], stop: Sequence[str]
) -> Answer:
    num_tokens = next((position + 1 for position, token in enumerate(answer) if token in end_ids), None)
    written = list(answer[:num_tokens])
    stopped = _tokens_to_stop(tokenizer, written, stop)
    if stopped is not None:
        written = written[:stopped]
    text = cast("str", tokenizer.decode(written, skip_special_tokens=True))
    return Answer(
        text=cut_at(text, stop),
        num_tokens=len(written),
        finish_reason="length" if num_tokens is None and stopped is None else "stop",
    )


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min((text.index(string) for string in stop if string in text), default=len(text))]


def _tokens_to_stop(
    tokenizer: PreTrainedTokenizerBase, written: list[int], stop: Sequence[str]
) -> int | None:
    """Fewest tokens whose text holds a stop string; what follows them is padding."""

    def holds(count: int) -> bool:
        text = cast("str", tokenizer.decode(written[:count]))
        return any(string in text for string in stop)

    if not stop or not holds(len(written)):
        return None
    return _first(holds, len(written))


def _first(holds: Callable[[int], bool], last: int) -> int:
    """Least count in [1, last] for which a monotone condition holds; it holds for the last."""
    low, high = 1, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def end_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the checkpoint's, and the tokenizer's, which fine-tuned checkpoints often
    lack."""
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    of_model = [of_model] if isinstance(of_model, int) else list(of_model or [])
    return list(dict.fromkeys(token for token in [*of_model, tokenizer.eos_token_id] if token is not None))


@contextmanager
def _ready_to_generate(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and neutral generation configs inside, every module's own again outside.

    generate fills what a config leaves open from the model's, where checkpoints keep penalties and sampling
    flags.
    """
    training = {module: module.training for module in model.modules()}
    configs = {
        module: vars(module)["generation_config"]
        for module in training
        if "generation_config" in vars(module)
    }
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


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, settings: GenerationSettings
) -> list[int]:
    """Token ids of a prompt as the model should see it, up to the first token of the answer.

    Raises:
        ValueError: a chat or chat_template="always" without a chat template, or with one that refuses it; two
            system turns; a prompt without tokens.
    """
    templated = settings.chat_template == "always" or (
        settings.chat_template == "auto" and tokenizer.chat_template
    )
    if templated and not tokenizer.chat_template:
        raise ValueError(
            "chat_template is 'always', but the tokenizer has none; use auto, or another tokenizer."
        )
    if templated:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if settings.system_prompt:
            if turns[0]["role"] == "system":
                raise ValueError(
                    "system_prompt is set, but a prompt has a system turn already; leave out one of them."
                )
            turns.insert(0, {"role": "system", "content": settings.system_prompt})
        with taken_by_template("a prompt", turns, "model"):
            text = cast(
                "str", tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            )
    elif isinstance(prompt, str):
        text = f"{settings.system_prompt}\n\n{prompt}" if settings.system_prompt else prompt
    else:
        raise ValueError(
            "a prompt is a chat, which needs a chat template, but chat_template is "
            f"{settings.chat_template!r} and the tokenizer has "
            f"{'one' if tokenizer.chat_template else 'none'}; allow it, use another tokenizer, or plain "
            "prompts."
        )
    # A template writes its own special tokens; plain text gets those that the tokenizer adds (BOS of Llama).
    token_ids = tokenizer(text, add_special_tokens=not templated)["input_ids"]
    if not token_ids:
        raise ValueError(f"the prompt {prompt!r} has no tokens; every prompt needs at least one.")
    return cast("list[int]", token_ids)
