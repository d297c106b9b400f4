"""Answers of a model to prompts and conversations, in batches that an interrupted evaluation can take up
again."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase

from hpd.evaluate.task import Example
from hpd.files import JsonLines
from hpd.generation.engine import Engine, Request, TransformersEngine, encode_prompt
from hpd.generation.settings import GREEDY, GenerationSettings
from hpd.generation.texts import Answer, Completion, Message, Prompt
from hpd.progress import Advance

__all__ = [
    "Generated",
    "Group",
    "PartialAnswers",
    "answer_examples",
    "draw_completions",
    "generate_answers",
    "unfinished",
]


_LOGGER = logging.getLogger(__name__)

_PARTIAL = "partial-{}.jsonl"


class PartialAnswers:
    """A JSON Lines file: what the evaluation is, then one line per finished batch.

    A file of another evaluation (another model, other weights, prompts or settings) is started again; a last
    line that a kill cut short is dropped.

    Args:
        folder: gets the file with the first batch.
        name: tells evaluations apart.
        identity: everything that decides the answers, as JSON values.
    """

    def __init__(self, folder: Path, name: str, identity: Any):
        self._lines = JsonLines(folder / _PARTIAL.format(name))
        self._identity = json.loads(json.dumps(identity))
        self._batches: dict[int, tuple[list[Answer], float]] = {}
        head, *batches = self._lines.read() or [None]
        self._begun = head == self._identity
        for batch in batches if self._begun else ():
            try:
                answers = [
                    Answer(**{**answer, "turns": tuple(answer["turns"])}) for answer in batch["answers"]
                ]
                self._batches[batch["batch"]] = answers, float(batch["seconds"])
            except (KeyError, TypeError, ValueError):
                continue  # a damaged line: its batch is written again

    def __len__(self) -> int:
        """Answers that need not be generated again."""
        return sum(len(answers) for answers, _ in self._batches.values())

    def batch(self, number: int) -> tuple[list[Answer], float] | None:
        """Answers and seconds of a finished batch; None where it is not finished."""
        return self._batches.get(number)

    def append(self, number: int, answers: Sequence[Answer], seconds: float) -> None:
        if not self._begun:
            self._lines.write([self._identity])
            self._begun = True
        written = [asdict(answer) for answer in answers]
        self._lines.append({"batch": number, "seconds": seconds, "answers": written})

    def remove(self) -> None:
        self._lines.path.unlink(missing_ok=True)


def unfinished(folder: Path) -> list[Path]:
    """Files of answers that an evaluation into this folder can go on from."""
    return sorted(folder.glob(_PARTIAL.format("*")))


class Group(NamedTuple):
    """The processes that share an evaluation."""

    rank: int
    size: int
    gather: Callable[[Any], list[Any]]
    """Every process's object, on every process."""


class Generated(NamedTuple):
    """All answers of an evaluation."""

    answers: list[Answer]
    """Sample by sample within each problem: the answers to problem i are [i * n, (i + 1) * n) for n
    samples."""
    seconds: float
    """Spent on generation, that before an interruption included."""


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: GenerationSettings = GREEDY,
    progress: Advance | None = None,
) -> list[Answer]:
    """The model's answers, in the order of the prompts (`num_samples` of each in a row).

    The longest prompts go first, so that a batch too large for the memory fails at once. Training flags and
    generation configs of the model and its parts are restored at the end.

    Answers are a function of (model, prompts, settings without batch_size), up to the rounding of the model's
    forward pass, which varies with the batch shape: each draw of a sampled answer uses one uniform number
    that depends only on (seed, index of the prompt, sample, position in the answer), turned into a token by
    the inverse CDF. For the same reason one limit holds for all: max_new_tokens, or what the longest prompt
    leaves of the context (logged where it is less).

    Args:
        model: a causal language model with `generate`: of transformers, or its peft wrapper.
        tokenizer: the model's; its padding side does not matter.
        prompts: plain texts or chats; plain texts become a user turn where a chat template is used.
        settings: decoding, batch size and template.
        progress: called with (answers so far, answers) after each batch.

    Raises:
        ValueError: the tokenizer lacks the chat template that is asked for, a prompt has no tokens, or a
            prompt leaves no room for an answer in the model's context.
    """
    examples = [Example(id=str(index), prompt=prompt) for index, prompt in enumerate(prompts)]
    return answer_examples(TransformersEngine(model, tokenizer), examples, settings, progress).answers


def draw_completions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    entropies: Sequence[tuple[int, int, int, int]] | None = None,
) -> list[Completion]:
    """The texts of `generate_answers`, with the tokens that were drawn and their log-probabilities.

    Args:
        model, tokenizer, prompts: as there.
        settings: one sample a prompt. Where they do not draw, there are no log-probabilities.
        entropies: which draws each prompt has, see `Request`; None: (seed, index of the prompt, 0, 0).
    """
    keys = entropies or [(settings.seed, index, 0, 0) for index in range(len(prompts))]
    engine = TransformersEngine(model, tokenizer)
    examples = [Example(id=str(index), prompt=prompt) for index, prompt in enumerate(prompts)]
    ids = [encode_prompt(tokenizer, prompt, settings) for prompt in prompts]
    limit = _answer_limit(engine, examples, ids, settings)
    out: dict[int, Completion] = {}
    for batch in engine.batches([len(row) for row in ids], settings):
        requests = [Request(ids[index], keys[index]) for index in batch]
        for index, rollout in zip(batch, engine.complete(requests, settings, limit), strict=True):
            tokens = rollout.tokens
            text: Any = tokenizer.decode(tokens, skip_special_tokens=True)
            reason = "stop" if rollout.ended else "length"
            out[index] = Completion(text, len(tokens), reason, ids[index], tokens, rollout.logprobs)
    return [out[index] for index in range(len(prompts))]


def answer_examples(
    engine: Engine,
    examples: Sequence[Example],
    settings: GenerationSettings,
    progress: Advance | None = None,
    partial: PartialAnswers | None = None,
    group: Group | None = None,
) -> Generated:
    """The engine's answers to examples, follow-ups included; see `generate_answers`.

    Args:
        partial: where batches are kept as they are finished, and taken from where they are there already.
            Batches are repeated or skipped as a whole, so the answers are those of an evaluation without an
            interruption.
        group: processes that each take every size-th batch; the batches, and so the answers, are those of one
            process.
    """
    first_turns = [encode_prompt(engine.tokenizer, example.prompt, settings) for example in examples]
    limit = _answer_limit(engine, examples, first_turns, settings)
    keys = [(problem, sample) for problem in range(len(examples)) for sample in range(settings.num_samples)]
    answers: dict[tuple[int, int], Answer] = {}
    seconds = 0.0
    rank, size = (group.rank, group.size) if group is not None else (0, 1)
    for number, batch in enumerate(
        engine.batches([len(first_turns[problem]) for problem, _ in keys], settings)
    ):
        if number % size != rank:
            continue
        chosen = [keys[index] for index in batch]
        done = partial.batch(number) if partial is not None else None
        if done is None:
            start = time.perf_counter()
            written = _converse(engine, examples, first_turns, chosen, settings, limit)
            done = written, time.perf_counter() - start
            if partial is not None:
                partial.append(number, *done)
        answers.update(zip(chosen, done[0], strict=True))
        seconds += done[1]
        if progress is not None:
            progress(min(len(answers) * size, len(keys)), len(keys))
    if group is not None:
        shares = group.gather((answers, seconds))
        answers = {key: answer for share, _ in shares for key, answer in share.items()}
        seconds = max(spent for _, spent in shares)
    return Generated([answers[key] for key in keys], seconds)


def _converse(
    engine: Engine,
    examples: Sequence[Example],
    first_turns: Sequence[list[int]],
    keys: Sequence[tuple[int, int]],
    settings: GenerationSettings,
    limit: int,
) -> list[Answer]:
    """Answers of one batch, turn by turn."""
    requests = [
        Request(first_turns[problem], (settings.seed, problem, sample, 0)) for problem, sample in keys
    ]
    answers = engine.generate(requests, settings, limit)
    for turn in range(1, 1 + max(len(examples[problem].follow_ups) for problem, _ in keys)):
        rows = [row for row, (problem, _) in enumerate(keys) if len(examples[problem].follow_ups) >= turn]
        requests = []
        for row in rows:
            problem, sample = keys[row]
            replies = answers[row].turns or (answers[row].text,)
            chat = _conversation(examples[problem], replies)
            token_ids = encode_prompt(engine.tokenizer, chat, settings)
            requests.append(Request(token_ids, (settings.seed, problem, sample, turn)))
        for row, reply in zip(rows, engine.generate(requests, settings, limit), strict=True):
            answers[row] = _extend(answers[row], reply)
    return answers


def _extend(answer: Answer, reply: Answer) -> Answer:
    return replace(
        reply,
        turns=(*(answer.turns or (answer.text,)), reply.text),
        num_tokens=answer.num_tokens + reply.num_tokens,
        finish_reason="length" if "length" in (answer.finish_reason, reply.finish_reason) else "stop",
    )


def _conversation(example: Example, replies: Sequence[str]) -> list[Message]:
    """The chat up to the follow-up that comes after the last reply."""
    prompt = example.prompt
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    for reply, question in zip(replies, example.follow_ups, strict=False):
        chat += [{"role": "assistant", "content": reply}, {"role": "user", "content": question}]
    return chat


def _answer_limit(
    engine: Engine,
    examples: Sequence[Example],
    first_turns: Sequence[list[int]],
    settings: GenerationSettings,
) -> int:
    """Tokens that every answer may have: max_new_tokens, or what the longest prompt leaves of the model's
    context.

    A conversation's room is shared by its replies.
    """
    context = engine.context
    if context is None or not examples:
        return settings.max_new_tokens
    rooms = []
    for example, token_ids in zip(examples, first_turns, strict=True):
        turns = 1 + len(example.follow_ups)
        if turns > 1:
            chat = _conversation(example, [""] * len(example.follow_ups))
            token_ids = encode_prompt(engine.tokenizer, chat, settings)
        rooms.append(((context - len(token_ids)) // turns, len(token_ids)))
    room, longest = min(rooms)
    if room >= settings.max_new_tokens:
        return settings.max_new_tokens
    if room < 1:
        raise ValueError(
            f"the longest prompt has {longest} tokens, which leaves no room for an answer in the model's "
            f"context of {context} tokens (max_position_embeddings); leave out the longest prompts, or use "
            "another model."
        )
    _LOGGER.warning(
        "Answers end after %d tokens, not after max_new_tokens=%d: the longest prompt has %d tokens, the "
        "context %d.",
        room,
        settings.max_new_tokens,
        longest,
        context,
    )
    return room
