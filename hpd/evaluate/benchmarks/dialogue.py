"""Instruction following against references: Dolly, Self-Instruct, Vicuna and S-NI, by ROUGE-L as in MiniLLM
and DistiLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from hpd.evaluate.benchmarks.answers import drop_thinking, unclosed_thinking
from hpd.evaluate.benchmarks.rows import Data, Row, read_rows
from hpd.evaluate.task import Example, Verdict
from hpd.generation.texts import Answer

__all__ = ["RougeTask", "alpaca_prompt", "dolly", "rouge_l", "self_instruct", "sni", "vicuna"]

Template = Literal["alpaca", "chat"]

# The two forms of the Alpaca prompt (Taori et al. 2023), on which the students of this protocol are trained.
_TASK = "Below is an instruction that describes a task"

_WITH_INPUT = ", paired with an input that provides further context"

_REQUEST = ". Write a response that appropriately completes the request."


_UNCLOSED = "thoughts that never end: the answer is empty"


class RougeTask:
    """Instructions with references; the score of an answer is its best ROUGE-L.

    Args:
        name: the task's key.
        data: a file of rows with `instruction`, `input` (may be empty) and `output` (a text, or a list of
            them), or of Self-Instruct's form, where `instances[0]` holds input and output.
        limit: first n rows; None is all.
        template: alpaca: the plain prompt of the protocol, never in a chat template; chat: instruction and
            input as a user turn, for chat models.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row lacks an instruction or a reference, or the template is unknown.

    Reference:
        Gu et al., MiniLLM, 2024, section 3.1: five seeds at temperature 1, answers of at most 256 tokens,
        mean over the seeds; here five samples of one seed.
    """

    metric = "rouge_l"

    def __init__(
        self, name: str, data: Data, *, limit: int | None = None, template: Template = "alpaca"
    ) -> None:
        if template not in ("alpaca", "chat"):
            raise ValueError(f"template is {template!r}; it must be alpaca or chat.")
        self.name = name
        self.options: Mapping[str, Any] = {"data": str(data), "limit": limit, "template": template}
        self.defaults: Mapping[str, Any] = {
            "temperature": 1.0,
            "num_samples": 5,
            "max_new_tokens": 256,
            "chat_template": "never" if template == "alpaca" else "auto",
        }
        rows = read_rows(data)[:limit]
        self._examples = tuple(_example(data, number, row, template) for number, row in enumerate(rows))

    def examples(self) -> Sequence[Example]:
        return self._examples

    def grade(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Verdict]:
        """ROUGE-L of every answer, without thoughts and the spaces around it, against the best of its
        references."""
        scores = rouge_l(
            [drop_thinking(answer.text).strip() for answer in answers],
            [example.metadata["references"] for example in examples],
        )
        return [
            Verdict(correct=None, score=score, detail=_UNCLOSED if unclosed_thinking(answer.text) else "")
            for answer, score in zip(answers, scores, strict=True)
        ]


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """F1 of the longest common subsequence of words, Porter stems, best reference of each text; 0 to 1.

    The tokenizer of rouge-score knows the letters a to z and digits: a text in another script scores 0.

    >>> rouge_l(["The cats sat."], [["cat sits", "the cat sat down"]])
    [0.8571428571428571]

    Reference:
        Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004, section 3.
    """
    from rouge_score.rouge_scorer import RougeScorer  # nltk behind it takes a second

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        max(scorer.score(target=reference, prediction=text)["rougeL"].fmeasure for reference in given)
        for text, given in zip(texts, references, strict=True)
    ]


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """The protocol's prompt; the answer follows it directly."""
    given = f"### Input:\n{context}\n\n" if context else ""
    head = f"{_TASK}{_WITH_INPUT if context else ''}{_REQUEST}"
    return f"{head}\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n"


def dolly(data: Data, *, limit: int | None = None, template: Template = "alpaca") -> RougeTask:
    """Dolly-15k, the 500 held-out rows of MiniLLM."""
    return RougeTask("dolly", data, limit=limit, template=template)


def self_instruct(data: Data, *, limit: int | None = None, template: Template = "alpaca") -> RougeTask:
    """Self-Instruct's 252 user-oriented instructions."""
    return RougeTask("self_instruct", data, limit=limit, template=template)


def vicuna(data: Data, *, limit: int | None = None, template: Template = "alpaca") -> RougeTask:
    """Vicuna's 80 questions, with the reference answers of MiniLLM's copy."""
    return RougeTask("vicuna", data, limit=limit, template=template)


def sni(data: Data, *, limit: int | None = None, template: Template = "alpaca") -> RougeTask:
    """The test tasks of Super-NaturalInstructions with responses of 11 words or more; several references a
    row."""
    return RougeTask("sni", data, limit=limit, template=template)


def _example(data: Data, number: int, row: Row, template: Template) -> Example:
    instances = row.get("instances") or [row]
    instruction = row.get("instruction")
    context = instances[0].get("input") or ""
    output = instances[0].get("output")
    given = output if isinstance(output, list) else [output]
    references = [text for text in given if isinstance(text, str) and text.strip()]
    if not instruction or not references:
        missing = "output" if instruction else "instruction"
        raise ValueError(
            f"{data}: row {number + 1} has no {missing}; ROUGE-L needs rows with instruction, input and "
            "output."
        )
    prompt = (
        alpaca_prompt(instruction, context)
        if template == "alpaca"
        else "\n\n".join(filter(None, (instruction, context)))
    )
    return Example(
        id=str(row.get("id", number)),
        prompt=prompt,
        answer=references[0],
        metadata={**row, "references": references},
    )
