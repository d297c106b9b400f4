"""`hpd generate`: completions for prompts, in the training format. Resumable, atomic, the same every time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from hpd.config.check import resolve
from hpd.config.models import ModelConfig, TeacherConfig
from hpd.config.schema import GenerateConfig, Recipe
from hpd.config.secrets import redact
from hpd.data.rows import PromptRow, load_prompts
from hpd.data.templates import check_prompts
from hpd.evaluate import GenerationSettings
from hpd.evaluate.benchmarks.grading import grade_texts, reference_answer
from hpd.evaluate.generate import draw_completions
from hpd.files import JsonLines, digest_json, digest_text, write_json
from hpd.generation.chunks import groups
from hpd.generation.engine import encode_prompt
from hpd.generation.texts import Completion
from hpd.generation.written import written_row
from hpd.http import BadResponse, Connection, read_json, read_key, shown
from hpd.locks import holding
from hpd.models.load import load_model, load_tokenizer
from hpd.progress import Progress
from hpd.teachers import TeacherUnavailable
from hpd.teachers.fingerprints import model_fingerprint

__all__ = ["CHUNK", "generate", "part_of"]

CHUNK = 32
"""Completions of a line on the disk. A constant, since the draws are keyed by it. As many chunks are written
together as fill a batch, and a resumed run repeats those."""

_REPLACES = {"replaces": True}
"""A line of the part: an output that is there is what --overwrite gave up, or what this part has become."""


class Slot(NamedTuple):
    """The row and the number of a completion to write."""

    row: int
    sample: int


class Writer(Protocol):
    """Something that completes prompts."""

    tokenizer: PreTrainedTokenizerBase
    fingerprint: str | None
    """Of its weights, where they are here."""
    at_once: int | None
    """Completions that it should get together; None: all, which it hands out in order as they come."""

    def write(self, slots: Sequence[Slot], prompts: Sequence[Any]) -> Iterable[Completion]:
        """Completions, the same whenever it is called again, whichever slots come together."""
        ...

    def close(self) -> None: ...


def generate(recipe: Recipe, *, overwrite: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Write completions for the prompts of a recipe's dataset to `generate.output`.

    What is done is kept in a file beside it (`.part`) that a later call goes on from; the output appears
    whole, at the end, and the part goes behind it.

    Args:
        recipe: `data`, `teacher` and `generate` are read.
        overwrite: replace existing output, and a part that other settings began.
        progress: gets a bar of the completions.

    Returns:
        The summary, also written beside the output (`.summary.json`): rows, dropped completions by reason,
        tokens.

    Raises:
        FileNotFoundError, ValueError: unreadable data, output that exists, or a part that other settings
            began, or that another process is writing.
        ValueError: a server that refuses requests, or never gave an answer that can be read; or no completion
            is kept: all are cut, empty or wrong.
        TeacherUnavailable: a server stayed away; what is done is kept.
    """
    config = recipe.generate or GenerateConfig()
    output = Path(config.output)
    with holding(output, is_folder=False):
        if output.exists() and not overwrite and _REPLACES not in part_of(output).read():
            raise ValueError(
                f"{output} exists: choose another generate.output, or replace it with --overwrite."
            )
        return _generate(recipe, config, output, overwrite, progress or Progress())


def _generate(
    recipe: Recipe, config: GenerateConfig, output: Path, overwrite: bool, progress: Progress
) -> dict[str, Any]:
    rows = load_prompts(recipe.data, config.reference)
    if config.filter == "correct" and all(row.reference is None for row in rows):
        raise ValueError(
            "generate.filter: correct needs right answers: name their column in generate.reference."
        )
    name, writer = _writer(recipe, config)
    check_prompts([row.prompt for row in rows], writer.tokenizer, "writer")
    slots = [Slot(row, sample) for row in range(len(rows)) for sample in range(config.samples)]
    part = part_of(output)
    bar = progress.bar("completions")
    try:
        done = _begin(part, _identity(recipe, config, rows, writer.fingerprint), overwrite)
        for group in groups(-(-len(slots) // CHUNK), writer.at_once and -(-writer.at_once // CHUNK), done):
            chosen = [slot for chunk in group for slot in slots[chunk * CHUNK : (chunk + 1) * CHUNK]]
            written = iter(writer.write(chosen, [rows[slot.row].prompt for slot in chosen]))
            for chunk in group:
                found = list(itertools.islice(written, len(slots[chunk * CHUNK : (chunk + 1) * CHUNK])))
                if chunk not in done:
                    part.append({"chunk": chunk, "completions": found}, durable=True)
                    done[chunk] = found
                bar(sum(map(len, done.values())), len(slots))
    finally:
        writer.close()
    completions = [completion for chunk in sorted(done) for completion in done[chunk]]
    made = [(slot, rows[slot.row], text) for slot, text in zip(slots, completions, strict=True)]
    dropped = _why_dropped(made, config)
    if all(dropped):
        raise ValueError(_nothing_left(dropped, config, part.path))
    # A kill before the part is gone leaves an output of which the next call must know that it may replace it.
    part.append(_REPLACES, durable=True)
    summary = _finish(output, made, dropped, config, name)
    part.path.unlink()
    return summary


def part_of(output: Path) -> JsonLines:
    """The file of what is done: a line for each chunk."""
    return JsonLines(output.with_name(output.name + ".part"))


def _begin(part: JsonLines, identity: Mapping[str, str], overwrite: bool) -> dict[int, list[Completion]]:
    """The chunks that an earlier call wrote, behind a line that says of what; begins a file without any."""
    head, *chunks = part.read() or [None]
    # Earlier versions did not note the weights.
    if not isinstance(head, dict) or {**identity, **head} != identity:
        if head is not None and not overwrite:
            raise ValueError(
                f"{part.path} holds completions of other settings, another model or other rows. Continue "
                "with those, delete it, or start again with --overwrite."
            )
        part.path.parent.mkdir(parents=True, exist_ok=True)
        part.write([identity, _REPLACES] if overwrite else [identity])
        return {}
    if overwrite:
        part.append(_REPLACES)
    # Earlier versions wrote chunks without their numbers, in order.
    numbered = [
        (chunk["chunk"], chunk["completions"]) if isinstance(chunk, dict) else (number, chunk)
        for number, chunk in enumerate(chunk for chunk in chunks if chunk != _REPLACES)
    ]
    return {number: [Completion(*values) for values in completions] for number, completions in numbered}


def _finish(
    output: Path,
    made: Sequence[tuple[Slot, PromptRow, Completion]],
    dropped: Sequence[str | None],
    config: GenerateConfig,
    name: str,
) -> dict[str, Any]:
    """Write the output, then its summary."""
    counts = {"completions": len(made), "rows": 0, "truncated": 0, "empty": 0, "wrong": 0, "tokens": 0}
    kept = []
    for (slot, row, completion), why in zip(made, dropped, strict=True):
        counts["tokens"] += completion.num_tokens or 0
        counts["truncated"] += completion.finish_reason == "length"
        if why in ("empty", "wrong"):
            counts[why] += 1
        if why is None:
            kept.append(written_row(slot.row, slot.sample, row.prompt, completion, config, name))
    counts["rows"] = len(kept)
    JsonLines(output).write(kept)
    summary = {**counts, "model": name, "settings": dataclasses.asdict(config)}
    write_json(output.with_name(output.name + ".summary.json"), summary)
    return summary


def _nothing_left(dropped: Sequence[str | None], config: GenerateConfig, part: Path) -> str:
    """The error where no completion is kept: which settings, and what to change."""
    reasons = {
        "truncated": f"cut at generate.max_new_tokens {config.max_new_tokens}: raise it, or keep cut "
        "completions with generate.truncated=keep",
        "empty": "empty: look at the prompts (hpd train --dry-run shows one) and the writer's chat template",
        "wrong": "wrong by generate.filter correct: look at generate.reference, or set the filter to none",
    }
    found = [f"{dropped.count(why):,} are {text}" for why, text in reasons.items() if why in dropped]
    return (
        f"None of {len(dropped):,} completions is kept, so nothing is written. {'. '.join(found)}. They are "
        f"in {part}; --overwrite begins again with other settings."
    )


def _why_dropped(
    made: Sequence[tuple[Slot, PromptRow, Completion]], config: GenerateConfig
) -> list[str | None]:
    """The reason why each completion is left out; None keeps it."""
    found = [_unusable(completion, config) for _, _, completion in made]
    if config.filter == "none":
        return found
    asked = [index for index, why in enumerate(found) if why is None]
    known = [index for index in asked if made[index][1].reference is not None]
    verdicts = grade_texts(
        [made[index][2].text for index in known],
        [reference_answer(made[index][1].reference) for index in known],
    )
    right = {index for index, verdict in zip(known, verdicts, strict=True) if verdict.correct}
    return ["wrong" if why is None and index not in right else why for index, why in enumerate(found)]


def _unusable(completion: Completion, config: GenerateConfig) -> str | None:
    if not completion.text.strip() and not config.logprobs:  # an end token alone was drawn like any other
        return "empty"
    return "truncated" if completion.finish_reason == "length" and config.truncated == "drop" else None


def _identity(
    recipe: Recipe, config: GenerateConfig, rows: Sequence[PromptRow], weights: str | None
) -> dict[str, str]:
    """Everything that completions depend on. Filters act at the end, so they may change between two calls."""
    tree = resolve(recipe)
    settings = {
        k: v
        for k, v in dataclasses.asdict(config).items()
        if k not in ("output", "truncated", "filter", "reference") and (k, v) != ("logprobs", False)
    }
    waits = ("concurrency", "timeout_seconds", "wait_seconds", "api_key_env")
    without_effect = (*waits, "prompt", "system_prompt")
    teacher = {k: v for k, v in tree["teacher"].items() if k not in without_effect}
    facts = {
        "settings": settings,
        "teacher": teacher,
        "student": tree["student"],
        "prompts": [row.prompt for row in rows],
    }
    identity = {"hpd generate": digest_json(facts, ensure_ascii=False)}
    return identity if weights is None else {**identity, "weights": weights}


def _writer(recipe: Recipe, config: GenerateConfig) -> tuple[str, Writer]:
    """The model or server that writes, and its name."""
    teacher = recipe.teacher
    if config.model is None and teacher.reads_own_rows:
        raise ValueError(
            "hpd generate has the teacher write behind the student's prompts, so teacher.prompt and "
            "teacher.system_prompt would have no effect: remove them, or name the writer in generate.model."
        )
    if config.model is None and teacher.type == "server":
        if config.logprobs:
            raise ValueError(
                "generate.logprobs needs the tokens that were drawn, all with their log-probabilities: name "
                "the student, a model on this machine, in generate.model."
            )
        if teacher.protocol not in (None, "openai", "echo"):
            raise ValueError(
                f"hpd generate asks servers through /v1/completions, which protocol {teacher.protocol} is "
                "not. Set teacher.protocol to openai, or name a model in generate.model."
            )
        # Prompts are sent as token ids: what the server's own template or BOS rule would add is under our
        # control.
        source = ModelConfig(
            model=recipe.student.model, tokenizer=teacher.tokenizer or recipe.student.tokenizer
        )
        return str(teacher.model), _ServerWriter(teacher, load_tokenizer(source, "teacher"), config)
    if config.model is None and teacher.type not in ("model", "self"):
        raise ValueError(
            f"A teacher of type {teacher.type} writes nothing: name the writer in generate.model."
        )
    source: ModelConfig | TeacherConfig = teacher if teacher.type == "model" else recipe.student
    if config.model is not None:
        source = ModelConfig(model=config.model, dtype="auto")
    return str(source.model), _ModelWriter(source, config)


def _settings(config: GenerateConfig, prompt: Any, seed: int) -> GenerationSettings:
    return GenerationSettings(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        batch_size=config.batch_size,
        seed=seed,
        chat_template="never" if isinstance(prompt, str) else "always",
    )


def _seed(*parts: int) -> int:
    """A seed of its own for every chunk or completion."""
    return int(digest_text(repr(parts))[:8], 16) >> 1


class _ModelWriter:
    def __init__(self, source: ModelConfig | TeacherConfig, config: GenerateConfig):
        self._config = config
        self.tokenizer = load_tokenizer(source, "writer")
        model: Any = load_model(source, "writer")
        self.fingerprint: str | None = model_fingerprint(model)
        if not getattr(model, "hf_device_map", None) and not getattr(model, "quantization_method", None):
            model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model
        self.at_once: int | None = config.batch_size

    def write(self, slots: Sequence[Slot], prompts: Sequence[Any]) -> list[Completion]:
        config = self._config
        numbers = [slot.row * config.samples + slot.sample for slot in slots]
        entropies = [(_seed(config.seed, number // CHUNK), number % CHUNK, 0, 0) for number in numbers]
        settings = _settings(config, prompts[0], config.seed)
        drawn = draw_completions(self._model, self.tokenizer, prompts, settings, entropies)
        if config.logprobs:
            return drawn
        return [Completion(one.text, one.num_tokens, one.finish_reason) for one in drawn]

    def close(self) -> None: ...


class _ServerWriter:
    def __init__(self, teacher: TeacherConfig, tokenizer: PreTrainedTokenizerBase, config: GenerateConfig):
        assert teacher.url is not None
        self._config = config
        self.tokenizer = tokenizer
        self.fingerprint: str | None = None
        self._model = teacher.model
        self._answered = False
        self._connection = Connection(
            teacher.url.rstrip("/").removesuffix("/v1"),
            name="The teacher",
            api_key=read_key(teacher.api_key_env, "teacher.api_key_env"),
            hide=redact,
            timeout_seconds=teacher.timeout_seconds,
            wait_seconds=teacher.wait_seconds,
            connections=teacher.concurrency,
            failure=TeacherUnavailable,
        )
        self._pool = ThreadPoolExecutor(teacher.concurrency)
        self.at_once: int | None = None

    def write(self, slots: Sequence[Slot], prompts: Sequence[Any]) -> Iterable[Completion]:
        return self._pool.map(self._complete, slots, prompts)

    def _complete(self, slot: Slot, prompt: Any) -> Completion:
        config = self._config
        seed = _seed(config.seed, slot.row, slot.sample)
        body = {
            "model": self._model,
            "prompt": encode_prompt(self.tokenizer, prompt, _settings(config, prompt, seed)),
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": seed,
        }
        if config.top_k:
            body["top_k"] = config.top_k

        def read(response: Any, content: bytes) -> Completion:
            found = read_json(content)
            try:
                choice = found["choices"][0]
                text = choice["text"]
                reason = choice["finish_reason"]
                tokens = (found.get("usage") or {}).get("completion_tokens")
            except (KeyError, IndexError, TypeError, AttributeError):
                raise BadResponse("no choices with text and finish_reason") from None
            if not isinstance(text, str) or reason not in ("stop", "length"):
                raise BadResponse(f"text of type {type(text).__name__}, finish_reason {shown(reason)!r}")
            return Completion(text, _told(tokens, config.max_new_tokens), reason)

        # A token is seldom longer than this, escaped; the rest is for the fields around the text.
        most = 2**20 + 256 * config.max_new_tokens
        try:
            done = self._connection.request("POST", "/v1/completions", read, json=body, max_bytes=most)
        except TeacherUnavailable as error:
            # The same command would fail in the same way.
            if error.final or (error.garbled and not self._answered):
                raise ValueError(str(error)) from None
            raise
        self._answered = True
        return done

    def close(self) -> None:
        self._connection.close()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _told(tokens: Any, most: int) -> int | None:
    """Tokens of a completion, where a server tells a number that they can have (the end token is one)."""
    whole = isinstance(tokens, int) and not isinstance(tokens, bool)
    return tokens if whole and 0 <= tokens <= most + 1 else None
