"""Math benchmarks: one task class, and what differs between their files and rules."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpd.evaluate.benchmarks.forms import answer_of, question_of, reference_of
from hpd.evaluate.benchmarks.grading import Rule, grade_texts, reference_answer
from hpd.evaluate.benchmarks.quantities import same_answer
from hpd.evaluate.benchmarks.rows import Data, Row, read_rows
from hpd.evaluate.task import Example, Verdict
from hpd.generation.texts import Answer, Prompt

__all__ = [
    "BOXED",
    "MathTask",
    "Rule",
    "aime24",
    "aime25",
    "amc",
    "gsm8k",
    "math500",
    "mawps",
    "minerva",
    "multiarith",
    "olympiadbench",
    "svamp",
]

BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
"""The system prompt of the reference evaluation (its data files hold it)."""


@dataclass(frozen=True, kw_only=True)
class MathProblem:
    """One problem of a task's file."""

    id: str
    question: Prompt
    answer: str
    solution: str
    row: Row
    rule: Rule | None = None
    """None: the task's."""


class MathTask:
    """Problems whose final answer is a number or an expression.

    The answer of a text is its last box, else what follows its last ``####``, else what it says "the answer
    is", else its last formula or number; `grade_texts` says when it is right.

    Args:
        name: the task's name.
        data: its file or Hub data set; or a file of the reference evaluation (columns prompt and
            reward_model), where every repetition of a problem is one sample of it.
        limit: first n problems only.
        problems: reads the rows; None knows the usual columns.
        rule: when an answer counts as the reference, where the rows do not say.
        max_new_tokens: default length of an answer.
    """

    metric = "accuracy"

    def __init__(
        self,
        name: str,
        data: Data,
        *,
        limit: int | None = None,
        problems: Callable[[Sequence[Row]], Iterator[MathProblem]] | None = None,
        rule: Rule = Rule(),  # noqa: B008 (a NamedTuple)
        max_new_tokens: int = 4096,
        **options: Any,
    ):
        rows = read_rows(data)
        self.name = name
        self.defaults: Mapping[str, Any] = {"max_new_tokens": max_new_tokens, "system_prompt": BOXED}
        if "reward_model" in rows[0] and isinstance(rows[0].get("prompt"), list):
            found, copies, system = _upstream(data, rows)
            self.defaults = {**self.defaults, "system_prompt": system, **_several(copies)}
        else:
            found = list((problems or _plain)(rows))
        if limit is not None and limit < 1:
            raise ValueError(
                f"limit is {limit}; give the number of problems to keep (1 or more), or None for all."
            )
        self._problems = [replace(problem, rule=problem.rule or rule) for problem in found[:limit]]
        empty = [
            problem.id
            for problem in self._problems
            if not str(problem.question).strip() or not problem.answer.strip()
        ]
        if empty:
            raise ValueError(
                f"{data}: {len(empty)} problems lack a question or an answer (the first is {empty[0]})."
            )
        self.options: Mapping[str, Any] = {"data": str(data), "limit": limit, **options}

    def examples(self) -> list[Example]:
        return [
            Example(
                id=problem.id,
                prompt=problem.question,
                answer=problem.answer,
                solution=problem.solution,
                metadata={**problem.row, "rule": problem.rule},
            )
            for problem in self._problems
        ]

    def same(self, first: str, second: str) -> bool:
        """Cheap, for votes: 1/2 and 0.5 are one answer, x + 1 and 1 + x are two."""
        return same_answer(first, second)

    def grade(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Verdict]:
        return grade_texts(
            [answer.text for answer in answers],
            [example.answer for example in examples],
            [example.metadata["rule"] for example in examples],
        )


def _plain(rows: Sequence[Row]) -> Iterator[MathProblem]:
    """A row with a question, an answer and perhaps a solution, in any form that `forms` knows."""
    for index, row in enumerate(rows):
        try:
            question, answer = question_of(row), answer_of(row)
        except ValueError as error:
            raise ValueError(f"row {index + 1}: {error}.") from None
        if question is None or answer is None:
            role = "question" if question is None else "answer"
            raise ValueError(
                f"row {index + 1} has no {role}; it has {', '.join(row)}. Known forms: problem, question, "
                "prompt or instruction (with input), with answer, solution, output or response; messages; "
                'one text with both ("Question: ... Answer: ...").'
            )
        several = isinstance(row.get("answer"), list) and len(row["answer"]) > 1
        rule = Rule(multiple=True) if several else None
        yield _problem(index, row, question, reference_of(*answer), rule, str(answer[0]))


def _problem(
    index: int, row: Row, question: Any, answer: Any, rule: Rule | None = None, worked: str | None = None
) -> MathProblem:
    known = (row.get(name) for name in ("solution", "Solution"))
    solution = next((str(text) for text in known if text), worked or str(answer))
    return MathProblem(
        id=str(row.get("id", row.get("ID", row.get("unique_id", index)))),
        question=question if isinstance(question, list) else str(question).strip(),
        answer=reference_answer(answer),
        solution=re.sub(r"<<[^<>]*>>", "", solution),  # GSM8K's calculator marks
        row=row,
        rule=rule,
    )


def _upstream(data: Data, rows: Sequence[Row]) -> tuple[list[MathProblem], int, str | None]:
    """Problems of the reference evaluation's format, how often each is repeated, and their system prompt."""
    copies: dict[str, int] = {}
    problems: dict[str, MathProblem] = {}
    systems = set()
    for row in rows:
        turns = {turn["role"]: turn["content"] for turn in row["prompt"]}
        question = turns["user"]
        systems.add(turns.get("system"))
        copies[question] = copies.get(question, 0) + 1
        if question not in problems:
            problems[question] = _problem(len(problems), row, question, row["reward_model"]["ground_truth"])
    if len(systems) > 1 or len(set(copies.values())) > 1:
        raise ValueError(
            f"{data} repeats its problems {min(copies.values())} to {max(copies.values())} times with "
            f"{len(systems)} system prompts; every problem must come equally often, with one system prompt."
        )
    return list(problems.values()), next(iter(copies.values())), systems.pop()


def _several(copies: int) -> dict[str, Any]:
    return {"num_samples": copies, "temperature": 0.7, "top_p": 0.95} if copies > 1 else {}


def gsm8k(data: Data, *, limit: int | None = None) -> MathTask:
    """GSM8K (Cobbe et al. 2021): the number after ####."""
    return MathTask("gsm8k", data, limit=limit, max_new_tokens=1024)


def math500(data: Data, *, limit: int | None = None) -> MathTask:
    """MATH-500: 500 problems of MATH (Hendrycks et al. 2021) that PRM800K (Lightman et al. 2023) held out."""
    return MathTask("math500", data, limit=limit)


def aime24(data: Data, *, limit: int | None = None) -> MathTask:
    """AIME 2024, I and II: integers from 0 to 999."""
    return MathTask("aime24", data, limit=limit, max_new_tokens=8192)


def aime25(data: Data, *, limit: int | None = None) -> MathTask:
    """AIME 2025, I and II: integers from 0 to 999."""
    return MathTask("aime25", data, limit=limit, max_new_tokens=8192)


def amc(data: Data, *, limit: int | None = None) -> MathTask:
    """AMC 12 of 2023, asked without its options."""
    return MathTask("amc", data, limit=limit, max_new_tokens=8192)


def minerva(data: Data, *, limit: int | None = None, tolerance: float = 0.01) -> MathTask:
    """Minerva math (Lewkowycz et al. 2022, OCWCourses): numbers within a share `tolerance` of the reference,
    which many problems ask for to two digits."""
    return MathTask("minerva", data, limit=limit, rule=Rule(relative=tolerance), tolerance=tolerance)


def olympiadbench(data: Data, *, limit: int | None = None) -> MathTask:
    """OlympiadBench (He et al. 2024), open-ended English competition problems in text: its own tolerances
    (`error`), several answers in any order (`is_multiple_answer`)."""

    def problems(rows: Sequence[Row]) -> Iterator[MathProblem]:
        for index, row in enumerate(rows):
            question = "\n\n".join(filter(None, (row.get("context"), row["question"])))
            answers = row["final_answer"]
            answer = ", ".join(answers) if isinstance(answers, list) else str(answers)
            rule = Rule(
                absolute=float(row.get("error") or 1e-8), multiple=bool(row.get("is_multiple_answer"))
            )
            yield _problem(index, {**row, "solution": _joined(row.get("solution"))}, question, answer, rule)

    return MathTask("olympiadbench", data, limit=limit, problems=problems)


def _joined(solution: Any) -> str:
    return "\n\n".join(solution) if isinstance(solution, list) else str(solution or "")


def svamp(data: Data, *, limit: int | None = None) -> MathTask:
    """SVAMP (Patel et al. 2021): one-step word problems."""

    def problems(rows: Sequence[Row]) -> Iterator[MathProblem]:
        for index, row in enumerate(rows):
            body = str(row["Body"]).rstrip()
            question = f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {row['Question']}"
            yield _problem(index, row, question, row["Answer"])

    return MathTask("svamp", data, limit=limit, problems=problems, max_new_tokens=512)


def mawps(data: Data, *, limit: int | None = None) -> MathTask:
    """MAWPS (Koncel-Kedziorski et al. 2016)."""
    return MathTask("mawps", data, limit=limit, max_new_tokens=512)


def multiarith(data: Data, *, limit: int | None = None) -> MathTask:
    """MultiArith (Roy and Roth 2015): two-step word problems."""
    return MathTask("multiarith", data, limit=limit, max_new_tokens=512)
