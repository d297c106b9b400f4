"""The engine that turns prompts into answers or rollouts: `transformers` here, vLLM in `vllm_engine`.

Axes: B batch, T time (prompt and answer), V vocabulary.
"""

import logging
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from hpd.data.templates import taken_by_template
from hpd.generation.drawing import Draw, Sampling, warpers
from hpd.generation.settings import GenerationSettings
from hpd.generation.texts import Answer, Message, Prompt, Rollout
from hpd.models.dtypes import dtype_name

__all__ = [
    "Engine",
    "Request",
    "TransformersEngine",
    "encode_prompt",
    "end_token_ids",
    "longest_first",
    "turns_for_template",
]

_LOGGER = logging.getLogger(__name__)


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
    def dtype(self) -> str:
        """Of the weights, such as "float32"."""
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
    """`generate` of transformers: KV cache, padding on the left, one uniform number for each draw.

    A draw is the inverse CDF of its number, so what is written does not depend on the other prompts of a
    batch, on their order or on the batch size (up to the rounding of the model's forward pass).

    Args:
        model: a causal language model with `generate`: of transformers, or its peft wrapper.
        tokenizer: the model's; its padding side does not matter.
        device: where the model computes; None: where its weights are.
    """

    name = "transformers"

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, device: torch.device | None = None
    ):
        self.model = model
        self.tokenizer = tokenizer
        self._device = device

    @property
    def dtype(self) -> str:
        return dtype_name(next(p.dtype for p in self.model.parameters() if p.is_floating_point()))

    @property
    def context(self) -> int | None:
        config = getattr(self.model, "config", None)
        return getattr(config and config.get_text_config(), "max_position_embeddings", None)

    def batches(self, lengths: Sequence[int], settings: GenerationSettings) -> list[list[int]]:
        return longest_first(lengths, settings.batch_size)

    def generate(self, requests: Sequence[Request], settings: GenerationSettings, limit: int) -> list[Answer]:
        written = self.complete(requests, settings, limit)
        return [_to_answer(self.tokenizer, rollout, settings.stop) for rollout in written]

    def generate_tokens(
        self, requests: Sequence[Request], settings: GenerationSettings, limit: int
    ) -> list[list[int]]:
        """The token ids behind `generate`, end token included; what follows a stop string is not cut off."""
        return [rollout.tokens for rollout in self.complete(requests, settings, limit)]

    def complete(
        self, requests: Sequence[Request], settings: GenerationSettings, limit: int
    ) -> list[Rollout]:
        """The rollouts behind `generate`."""
        sampling = None
        if settings.temperature > 0:
            draws = np.stack([np.random.default_rng(request.entropy).random(limit) for request in requests])
            cuts = warpers(settings.temperature, settings.top_k, settings.top_p)
            sampling = Sampling(torch.from_numpy(draws), cuts)
        prompts = [request.token_ids for request in requests]
        return self.write(prompts, [limit] * len(prompts), sampling, settings.stop)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> list[Rollout]:
        """Continue prompts, all in one batch.

        Args:
            prompts: token ids, at least one each.
            limits: longest continuation of each, in tokens, >= 1.
            sampling: how tokens are drawn; None takes the likeliest.
            stop: strings that end a continuation; what follows one is not cut off.
        """
        end_ids = end_token_ids(self.model, self.tokenizer)
        pad_id = cast("int | None", self.tokenizer.pad_token_id)
        if pad_id is None:
            pad_id = end_ids[0] if end_ids else 0
        device = self._device or next(self.model.parameters()).device
        length = max(map(len, prompts))
        ids = torch.tensor([[pad_id] * (length - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
        draw = None if sampling is None else Draw(sampling, mask)
        config = GenerationConfig(
            max_new_tokens=max(limits),
            do_sample=False,  # Draw leaves generate one token to choose
            use_cache=True,
            eos_token_id=end_ids or None,
            pad_token_id=pad_id,
            stop_strings=list(stop) or None,
        )
        # FSDP2 moves weights about in its forward, which tensors of inference mode do not allow.
        with _ready_to_generate(self.model), torch.no_grad():
            output = cast("Any", self.model).generate(
                inputs=ids,  # [B, T]
                attention_mask=mask,  # [B, T]
                generation_config=config,
                logits_processor=LogitsProcessorList([] if draw is None else [draw]),
                synced_gpus=_is_sharded(self.model) or None,
                **({"tokenizer": self.tokenizer} if stop else {}),
            )
        written = output[:, length:].tolist()
        logprobs = [[] for _ in written] if draw is None else draw.logprobs()
        return [Rollout.cut(*row, end_ids) for row in zip(written, logprobs, limits, strict=True)]


def longest_first(lengths: Sequence[Any], batch_size: int) -> list[list[int]]:
    """Batches of similar lengths; a batch too large for the memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _is_sharded(model: nn.Module) -> bool:
    """FSDP2 gathers layer by layer, so all processes must take equally many steps; `generate` itself knows
    FSDP1 and ZeRO-3."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def _to_answer(tokenizer: PreTrainedTokenizerBase, rollout: Rollout, stop: Sequence[str]) -> Answer:
    stopped = _tokens_to_stop(tokenizer, rollout.tokens, stop)
    written = rollout.tokens[:stopped]
    text = cast("str", tokenizer.decode(written, skip_special_tokens=True))
    return Answer(
        text=cut_at(text, stop),
        num_tokens=len(written),
        finish_reason="stop" if rollout.ended or stopped is not None else "length",
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
    return 1 + bisect_left(range(1, len(written)), True, key=holds)


def end_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the checkpoint's, and the tokenizer's, which fine-tuned checkpoints often
    lack."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured = [configured] if isinstance(configured, int) else list(configured or [])
    return list(dict.fromkeys(token for token in [*configured, tokenizer.eos_token_id] if token is not None))


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
        turns = turns_for_template(tokenizer, turns)
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


def turns_for_template(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message]) -> list[Message]:
    """Turns as a tokenizer's template takes them: where it refuses system turns (Gemma) or leaves them out,
    the system's text goes before the first user turn's, and a warning says so.
    """
    if len(turns) < 2 or turns[0]["role"] != "system" or turns[1]["role"] != "user":
        return list(turns)
    if _takes_system(tokenizer):
        return list(turns)
    _warn_of_merging(str(tokenizer.chat_template))
    system, user, *rest = turns
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def _takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    probe = [{"role": "system", "content": "be-brief"}, {"role": "user", "content": "why"}]
    try:
        text = tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template raises anything
        try:
            tokenizer.apply_chat_template(probe[1:], tokenize=False, add_generation_prompt=True)
        except Exception:
            return True  # it refuses more than the system turn: its own message says what
        return False
    return "be-brief" in str(text)


@lru_cache(maxsize=16)
def _warn_of_merging(template: str) -> None:
    """Once for each template."""
    _LOGGER.warning(
        "The chat template has no system turn: system texts are put before the first user turn's. (It begins "
        "%r.)",
        template[:60],
    )
