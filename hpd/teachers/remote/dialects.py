"""The log-probabilities of a prompt in the protocols of vLLM, SGLang and plain echo: requests, responses.

All three answer, for each token of a prompt, its own log-probability and those of the k likeliest tokens at
its place. A row of label positions becomes a prompt of token ids, so no text is tokenized twice.

Axes: N label positions, k tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpd.http import BadResponse, read_json, shown
from hpd.methods.supports import LOGPROB_FLOOR
from hpd.teachers.remote.wire import WireRow

__all__ = ["DIALECTS", "Dialect", "NoPromptLogprobs", "Place", "read_places", "top_k_tensors"]

# A server that works in bfloat16 may say 1e-4 above zero; a mass above one by more than this is nonsense.
_MASS_TOLERANCE = 1e-2


class NoPromptLogprobs(BadResponse):
    """The server completes prompts and says nothing about their own tokens."""


class Place(NamedTuple):
    """A server's answer about one token of a prompt."""

    logprobs: Mapping[int, float]
    """Of the token itself and of the likeliest, nats."""
    text: str | None
    """The token's text, where the server tells it."""


class Dialect(NamedTuple):
    """Requests and responses of one family of servers."""

    path: str
    request: Callable[[str | None, list[list[int]], int, bool], dict[str, Any]]
    """(model, prompts, k, with texts) -> the JSON body."""
    split: Callable[[Any, int], list[Any]]
    """(response, number of prompts) -> its part about each prompt."""
    places: Callable[[Any, list[int]], list[Place | None]]
    """(the part about a prompt, the prompt) -> about each of its tokens; None for the first, which nothing
    precedes."""


def _prompt_logprobs_request(
    model: str | None, prompts: list[list[int]], k: int, texts: bool
) -> dict[str, Any]:
    return {"model": model, "prompt": prompts, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}


def _echo_request(model: str | None, prompts: list[list[int]], k: int, texts: bool) -> dict[str, Any]:
    body = {
        "model": model,
        "prompt": prompts,
        "max_tokens": 1,
        "temperature": 0.0,
        "echo": True,
        "logprobs": k,
    }
    return body if texts else {**body, "return_tokens_as_token_ids": True}


def _sglang_request(model: str | None, prompts: list[list[int]], k: int, texts: bool) -> dict[str, Any]:
    body = {
        "input_ids": prompts,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
    }
    return {**body, "logprob_start_len": 0, "top_logprobs_num": k, "return_text_in_logprobs": texts}


def _split_choices(response: Any, count: int) -> list[Any]:
    choices = sorted(response["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(count)):
        raise BadResponse(f"{len(choices)} choices for {count} prompts")
    return choices


def _split_list(response: Any, count: int) -> list[Any]:
    answers = response if isinstance(response, list) else [response]
    if len(answers) != count:
        raise BadResponse(f"{len(answers)} answers for {count} prompts")
    return [one["meta_info"] for one in answers]


def _read_prompt_logprobs(choice: Any, prompt: list[int]) -> list[Place | None]:
    told = choice.get("prompt_logprobs")
    if told is None:
        raise NoPromptLogprobs("no prompt_logprobs: the server ignores the field")
    places: list[Place | None] = [None]
    for token, entry in zip(prompt[1:], told[1:], strict=True):
        logprobs = {int(i): _number(e["logprob"]) for i, e in entry.items()}
        places.append(Place(logprobs, _text(entry[str(token)].get("decoded_token"))))
    return places


def _read_echo(choice: Any, prompt: list[int]) -> list[Place | None]:
    told = choice["logprobs"]
    if not told or "tokens" not in told or len(told["tokens"]) < len(prompt):
        raise NoPromptLogprobs("logprobs of the completion at most: the server ignores echo")
    tokens, logprobs, top = (
        told[name][: len(prompt)] for name in ("tokens", "token_logprobs", "top_logprobs")
    )
    places: list[Place | None] = [None]
    for i in range(1, len(prompt)):
        named = tokens[i].startswith("token_id:")
        if named and _token_id(tokens[i]) != prompt[i]:
            raise BadResponse(f"token {i} of the prompt came back as {tokens[i]}")
        likeliest = {_token_id(t): _number(v) for t, v in (top[i] or {}).items()} if named else {}
        places.append(Place({**likeliest, prompt[i]: _number(logprobs[i])}, None if named else tokens[i]))
    return places


def _read_sglang(meta: Any, prompt: list[int]) -> list[Place | None]:
    told = meta.get("input_token_logprobs")
    if told is None:
        raise NoPromptLogprobs("no input_token_logprobs: the server ignores return_logprob")
    top = meta.get("input_top_logprobs") or [None] * len(prompt)
    places: list[Place | None] = [None]
    for i in range(1, len(prompt)):
        logprob, token, text = told[i]
        if token != prompt[i]:
            raise BadResponse(f"token {i} of the prompt came back as {token}")
        likeliest = {int(t): _number(v) for v, t, _ in top[i] or []}
        places.append(Place({**likeliest, token: _number(logprob)}, _text(text)))
    return places


def _token_id(name: str) -> int:
    prefix, _, number = name.partition(":")
    if prefix != "token_id":
        raise BadResponse(
            "the server does not know return_tokens_as_token_ids, without which tokens are ambiguous"
        )
    return int(number)


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise BadResponse(f"a token's text is {value!r}")
    return value


def _number(value: Any) -> float:
    # JSON has no -inf: servers write null, a large negative number, or Python's -Infinity.
    if value is None:
        return LOGPROB_FLOOR
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or math.isnan(value)
        or value > _MASS_TOLERANCE
    ):
        raise BadResponse(f"a log-probability of {value!r}")
    return min(max(float(value), LOGPROB_FLOOR), 0.0)


DIALECTS: dict[str, Dialect] = {
    "openai": Dialect("/v1/completions", _prompt_logprobs_request, _split_choices, _read_prompt_logprobs),
    "echo": Dialect("/v1/completions", _echo_request, _split_choices, _read_echo),
    "sglang": Dialect("/generate", _sglang_request, _split_list, _read_sglang),
}


def read_places(dialect: Dialect, body: bytes, prompts: Sequence[list[int]]) -> list[list[Place | None]]:
    """The answer about each token of each prompt in a response's body.

    Raises:
        BadResponse: anything about it is not as the server's documentation has it.
    """
    response = read_json(body)
    try:
        told = dialect.split(response, len(prompts))
        return [dialect.places(part, prompt) for part, prompt in zip(told, prompts, strict=True)]
    except BadResponse:
        raise
    except KeyError as error:
        raise BadResponse(f"no field {shown(error.args[0])!r}") from None
    except (TypeError, IndexError, AttributeError, ValueError, OverflowError) as error:
        # Foreign JSON of any shape: what is wrong is that it does not fit.
        raise BadResponse(f"not the expected fields ({shown(error)})") from None


def top_k_tensors(
    rows: Sequence[WireRow],
    places: Sequence[Sequence[Place | None]],
    k: int,
    vocab: int,
    owner: str = "student",
) -> dict[str, Tensor]:
    """The label positions of rows as tensors: `tokens`, `logprobs` (both `[N, k]`, likeliest first),
    `label_logprobs` `[N]`.

    Args:
        rows: what was asked about.
        places: the answers.
        k: tokens a position.
        vocab: tokens that there are.
        owner: whose vocabulary that is, for errors.

    Raises:
        BadResponse: tokens beyond the vocabulary, fewer than k, or more mass than one.
    """
    tokens: list[list[int]] = []
    logprobs: list[list[float]] = []
    labels: list[float] = []
    for row, told in zip(rows, places, strict=True):
        for position, label in zip(row.positions, row.labels, strict=True):
            place = told[position + 1]
            assert place is not None  # only the first token has none, and a label is never the first
            ranked = sorted(place.logprobs.items(), key=lambda item: (-item[1], item[0]))
            if len(ranked) < k:
                raise BadResponse(f"{len(ranked)} of the {k} likeliest tokens")
            tokens.append([token for token, _ in ranked[:k]])
            logprobs.append([logprob for _, logprob in ranked[:k]])
            labels.append(place.logprobs[label])
            if not all(0 <= token < vocab for token, _ in ranked):
                raise BadResponse(f"a token beyond the {owner}'s {vocab}: the server's vocabulary is another")
    found = {
        "tokens": torch.tensor(tokens).view(-1, k),
        "logprobs": torch.tensor(logprobs).view(-1, k),
        "label_logprobs": torch.tensor(labels),
    }
    mass = found["logprobs"].exp().sum(-1)
    if len(mass) and float(mass.max()) > 1.0 + _MASS_TOLERANCE:
        raise BadResponse(f"the likeliest tokens have a mass of {float(mass.max()):.3f}")
    return found
