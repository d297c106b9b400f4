"""Benchmarks that a judge grades: AlpacaEval 2, Arena-Hard (pairs, both orders) and MT-Bench (ratings, two
turns)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hpd.evaluate.benchmarks.judge_client import Judge
from hpd.evaluate.benchmarks.judge_prompts import FIVE_POINTS, PREFERENCE, load_fastchat_prompts, load_prompt
from hpd.evaluate.benchmarks.judged_tasks import Games, MTBench, PairwiseTask, SummaryFigures
from hpd.evaluate.benchmarks.length_control import (
    BASELINE,
    LengthControl,
    published_control,
    read_control,
)
from hpd.evaluate.benchmarks.rows import Data, Row, read_rows
from hpd.evaluate.benchmarks.win_rates import (
    length_controlled_win_rate,
    style_controlled_win_rate,
    style_differences,
)
from hpd.evaluate.task import Example
from hpd.generation.texts import Answer

__all__ = ["alpaca_eval", "arena_hard", "mt_bench"]

_STRONG_WEIGHT = 3.0  # arena-hard-auto: a "much better" counts as three games

_WITH_REFERENCE = ("math", "reasoning", "coding")


def alpaca_eval(
    data: Data,
    *,
    judge: Judge,
    limit: int | None = None,
    baseline_column: str | None = None,
    difficulty: str | Path | None = None,
    prompt: str | Path | None = None,
) -> PairwiseTask:
    """AlpacaEval 2: win rate against the baseline's answers, raw and at equal length.

    Args:
        data: rows with `instruction` and the baseline's answer.
        judge: who decides.
        limit: first n rows.
        baseline_column: column of the baseline's answer; None: `output_gpt4_1106_preview`, else `output`.
        difficulty: the authors' df_gamed.csv, or another file of difficulties, by the rows' `idx` (or
            `index`); None: estimates for AlpacaEval's own instructions and baseline (`length_control`). With
            other instructions or another baseline there is no length-controlled figure then, and `notice`
            says so.
        prompt: YAML file of a prompt of your own; None: `PREFERENCE`.

    Raises:
        ValueError: a column is missing, or a row has no difficulty.
    """
    rows = read_rows(data)[:limit]
    known = (baseline_column,) if baseline_column else ("output_gpt4_1106_preview", "output")
    column = next((name for name in known if name in rows[0]), None)
    if column is None or "instruction" not in rows[0]:
        raise ValueError(f"{data} needs instruction and {' or '.join(known)}; it has {', '.join(rows[0])}.")
    examples = [
        Example(
            id=str(row.get("idx", row.get("index", n))),
            prompt=row["instruction"],
            answer=row[column],
            metadata=row,
        )
        for n, row in enumerate(rows)
    ]
    control, missing = _length_control(difficulty, examples, column)

    options = {
        "data": str(data),
        "limit": limit,
        "baseline_column": column,
        "difficulty": "estimated" if difficulty is None and control else _named(difficulty),
    }
    asked = load_prompt(prompt, PREFERENCE)
    figures = _alpaca_figures(examples, control)
    defaults = {"max_new_tokens": 2048}
    return PairwiseTask("alpaca_eval", examples, judge, asked, figures, options, defaults, missing)


def _alpaca_figures(examples: Sequence[Example], control: LengthControl | None) -> SummaryFigures:
    def figures(
        kept: Sequence[Example], answers: Sequence[Answer], games: Sequence[Games]
    ) -> dict[str, float]:
        scores = [sum(pair.scores) / 2 for pair in games]
        lengths = [len(answer.text) for answer in answers], [len(example.answer) for example in kept]
        found = {
            "win_rate_standard_error": _standard_error(scores),
            "characters_per_answer": sum(lengths[0]) / len(kept),
            "baseline_characters_per_answer": sum(lengths[1]) / len(kept),
        }
        if control is None:
            return found
        places = {example.id: place for place, example in enumerate(examples)}
        asked = control.difficulty[[places[example.id] for example in kept]]
        controlled = length_controlled_win_rate(scores, *lengths, control._replace(difficulty=asked))
        return found | {
            "length_controlled_win_rate": controlled.value,
            "length_controlled_standard_error": controlled.standard_error,
        }

    return figures


def _length_control(
    difficulty: str | Path | None, examples: Sequence[Example], column: str
) -> tuple[LengthControl | None, str]:
    """What length control needs, or None and why there is none."""
    if difficulty is not None:
        return read_control(difficulty, [example.id for example in examples]), ""
    why = ""
    if not (column.endswith(BASELINE) or all(e.metadata.get("generator") == BASELINE for e in examples)):
        why = (
            f"nothing says that the baseline's answers are {BASELINE}'s (a column output_{BASELINE}, or "
            "generator in every row), and the published fit holds for no other"
        )
    else:
        try:
            return published_control([str(example.prompt) for example in examples]), ""
        except ValueError as error:
            why = str(error).rstrip(".")
    return None, f" No length-controlled win rate is given: {why}."


def arena_hard(
    data: Data,
    *,
    judge: Judge,
    limit: int | None = None,
    baseline: str | Path | None = None,
    prompt: str | Path | None = None,
) -> PairwiseTask:
    """Arena-Hard: win rate against the baseline's answers, a strong verdict counting as three games; also at
    equal style.

    Args:
        data: questions, with `uid` and `prompt` (or `turns`).
        judge: who decides.
        limit: first n questions.
        baseline: the baseline's answers; None: the file beside `data` whose name holds "answer".
        prompt: YAML file of a prompt of your own; None: `FIVE_POINTS`.

    Raises:
        FileNotFoundError: no answers of a baseline.
        ValueError: a question has none, or the files have other columns.
    """
    rows = read_rows(data)[:limit]
    path = _beside(data, "*answer*.jsonl*", baseline, "the baseline's answers")
    answers = {_question_id(row): _arena_answer(path, row) for row in read_rows(path)}
    examples = []
    for row in rows:
        question = row.get("prompt") or (row.get("turns") or [{}])[0].get("content")
        if question is None or _question_id(row) not in answers:
            missing = "prompt" if question is None else f"answer in {path}"
            raise ValueError(f"{data}: the question {_question_id(row)} has no {missing}.")
        examples.append(
            Example(id=_question_id(row), prompt=question, answer=answers[_question_id(row)], metadata=row)
        )

    def figures(kept: Sequence[Example], texts: Sequence[Answer], games: Sequence[Games]) -> dict[str, float]:
        played = [
            (number, score, _STRONG_WEIGHT if ">>" in label or "<<" in label else 1.0)
            for number, pair in enumerate(games)
            for label, score in zip(pair.labels, pair.scores, strict=True)
        ]
        styles = style_differences([answer.text for answer in texts], [example.answer for example in kept])
        plain, controlled = (style_controlled_win_rate(played, styles, controlled=on) for on in (False, True))
        return {
            "arena_score": plain.value,
            "arena_score_standard_error": plain.standard_error,
            "style_controlled_score": controlled.value,
            "style_controlled_standard_error": controlled.standard_error,
            **{
                f"style_{name}": value
                for name, value in controlled.coefficients.items()
                if name != "candidate"
            },
        }

    options = {"data": str(data), "limit": limit, "baseline": str(path)}
    asked = load_prompt(prompt, FIVE_POINTS)
    return PairwiseTask("arena_hard", examples, judge, asked, figures, options, {"max_new_tokens": 4096})


def mt_bench(
    data: Data,
    *,
    judge: Judge,
    limit: int | None = None,
    references: str | Path | None = None,
    prompts: str | Path | None = None,
) -> MTBench:
    """MT-Bench with single-answer grading.

    Args:
        data: question.jsonl of FastChat.
        judge: who rates.
        limit: first n questions.
        references: reference answers; None: the file beside `data` whose name holds "reference".
        prompts: FastChat's judge_prompts.jsonl; None: the one beside `data`. This package brings none.

    Raises:
        FileNotFoundError: one of these is missing.
        ValueError: other columns, a prompt is missing, or a question that needs a reference has none.
    """
    rows = read_rows(data)[:limit]
    reference_file = _beside(data, "*reference*.jsonl*", references, "the reference answers")
    prompt_file = _beside(
        data, "judge_prompts.jsonl*", prompts, "the judge's prompts (judge_prompts.jsonl of FastChat)"
    )
    found = load_fastchat_prompts(prompt_file)
    missing = {
        f"single{kind}-v1{turn}" for kind in ("", "-math") for turn in ("", "-multi-turn")
    } - found.keys()
    if missing:
        raise ValueError(f"{prompt_file} lacks the prompts {', '.join(sorted(missing))}.")
    known = {str(row["question_id"]): row["choices"][0]["turns"] for row in read_rows(reference_file)}
    examples = [_mt_example(data, row, known) for row in rows]
    options = {"data": str(data), "limit": limit, "references": str(reference_file)}
    return MTBench(examples, judge, found, options)


def _mt_example(data: Data, row: Row, references: Mapping[str, list[str]]) -> Example:
    if not {"question_id", "category", "turns"} <= row.keys() or len(row["turns"]) != 2:
        raise ValueError(
            f"{data} is not a question.jsonl of MT-Bench: every row needs question_id, category and two "
            "turns."
        )
    question_id = str(row["question_id"])
    first, second = row["turns"]
    reference = references.get(question_id) if row["category"] in _WITH_REFERENCE else None
    if row["category"] in _WITH_REFERENCE and not reference:
        raise ValueError(
            f"question {question_id} ({row['category']}) has no reference answer, which its judge's prompt "
            "needs."
        )
    answer = "\n\n".join(reference or ())
    return Example(
        id=question_id,
        prompt=first,
        answer=answer,
        follow_ups=(second,),
        metadata={**row, "references": reference},
    )


def _standard_error(scores: Sequence[float]) -> float:
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / max(1, len(scores) - 1)
    return (variance / len(scores)) ** 0.5


def _beside(data: Data, pattern: str, given: str | Path | None, what: str) -> Path:
    if given is not None:
        return Path(given).expanduser()
    folder = Path(str(data)).expanduser().parent
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no {pattern}: {what} must be next to {Path(str(data)).name}, or be named."
        )
    return found[0]


def _question_id(row: Row) -> str:
    return str(row.get("uid", row.get("question_id")))


def _arena_answer(path: Path, row: Row) -> str:
    try:
        if "messages" in row:
            content = row["messages"][-1]["content"]
            return content["answer"] if isinstance(content, dict) else content
        return row["choices"][0]["turns"][0]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: the answer to {_question_id(row)} has no text ({error!r}).") from None


def _named(path: str | Path | None) -> str | None:
    return None if path is None else str(path)
