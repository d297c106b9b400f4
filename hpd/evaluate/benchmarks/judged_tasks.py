"""Tasks that a judge grades: pairs in both orders, and ratings of two turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from hpd.evaluate.benchmarks.answers import drop_thinking, unclosed_thinking
from hpd.evaluate.benchmarks.judge_client import Judge, Usage, tokens_of
from hpd.evaluate.benchmarks.judge_prompts import JudgePrompt, read_label, read_rating
from hpd.evaluate.benchmarks.win_rates import LABELS, position_bias
from hpd.evaluate.task import Example, Verdict
from hpd.generation.texts import Answer, Message

__all__ = ["Games", "MTBench", "PairwiseTask", "SummaryFigures"]

# For the estimate before anything is written: what judges wrote in trials with the prompts of this package,
# rounded up.
_REPLY_TOKENS = 200

_ANSWER_TOKENS = 400

SummaryFigures = Callable[[Sequence[Example], Sequence[Answer], Sequence["Games"]], dict[str, float]]


class Games(NamedTuple):
    """Both orders of one pair: the judge's labels, as written, and the candidate's score in each."""

    labels: tuple[str, str]
    """Candidate shown first, candidate shown second."""
    scores: tuple[float, float]

    @classmethod
    def read(cls, labels: Sequence[str | None]) -> Games | None:
        """None where one of the two has no verdict."""
        first, second = labels
        if first is None or second is None:
            return None
        return cls((first, second), (LABELS[first], 1.0 - LABELS[second]))


class PairwiseTask:
    """A candidate's answers against a baseline's, each pair judged in both orders.

    Args:
        name: the task's key.
        examples: questions; `answer` is the baseline's.
        judge: who decides.
        prompt: how it is asked.
        figures: what is computed beside the mean score.
        options: what decides the examples, for the record.
        defaults: of the generation.
        missing: a sentence on figures that are not given, for the notice.
    """

    metric = "win_rate"

    def __init__(
        self,
        name: str,
        examples: Sequence[Example],
        judge: Judge,
        prompt: JudgePrompt,
        figures: SummaryFigures,
        options: Mapping[str, Any],
        defaults: Mapping[str, Any],
        missing: str = "",
    ) -> None:
        self.name = name
        self.defaults = defaults
        self.options: Mapping[str, Any] = {
            **options,
            **judge.settings.identity(),
            "judge_prompt": prompt.fingerprint(),
        }
        self._examples = tuple(examples)
        self._judge = judge
        self._prompt = prompt
        self._figures = figures
        self._missing = missing
        self._spent: dict[str, float] = {}

    def examples(self) -> Sequence[Example]:
        return self._examples

    def notice(self, num_samples: int) -> str:
        """Calls, tokens and cost to expect; the judge is asked whether it is there."""
        self._judge.check()
        tokens = sum(
            tokens_of(self._prompt.system + str(e.prompt)) + 2 * tokens_of(e.answer) for e in self._examples
        )
        return _notice(self, self._judge, 2 * num_samples * len(self._examples), 2 * num_samples * tokens) + (
            f" Answers are taken to be as long as the baseline's.{self._missing}"
        )

    def grade(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Verdict]:
        """The mean score of both orders, 0 to 1; no verdict where the judge gave none in one of them.
        Thoughts are not shown; where they never end the answer is empty."""
        answers = [_without_thoughts(answer) for answer in answers]
        questions: list[list[Message]] = []
        for example, answer in zip(examples, answers, strict=True):
            for a, b in ((answer.text, example.answer), (example.answer, answer.text)):
                questions.append(self._prompt.messages(question=_text_of(example), answer_a=a, answer_b=b))
        rulings, self._spent = _ask(self.name, self._judge, questions, read_label, self._prompt.reminder)
        verdicts = []
        for first, second in zip(rulings[::2], rulings[1::2], strict=True):
            labels = [first.verdict, second.verdict]
            games = Games.read(labels)
            verdicts.append(
                Verdict(
                    correct=None,
                    score=None if games is None else sum(games.scores) / 2,
                    extracted=None if games is None else " ".join(games.labels),
                    detail=json.dumps(
                        {"labels": labels, "judge": [first.text, second.text]}, ensure_ascii=False
                    ),
                )
            )
        return verdicts

    def summary(
        self, examples: Sequence[Example], answers: Sequence[Answer], verdicts: Sequence[Verdict]
    ) -> dict[str, float]:
        """Bias, controlled win rates, failures and what was spent."""
        games = [Games.read(json.loads(verdict.detail)["labels"]) for verdict in verdicts]
        kept = [number for number, pair in enumerate(games) if pair is not None]
        figures: dict[str, float] = {"parse_failures": float(len(games) - len(kept))}
        figures |= _unclosed(answers)
        answers = [_without_thoughts(answer) for answer in answers]
        if kept:
            graded = [pair for pair in games if pair is not None]
            bias = position_bias([pair.scores[0] for pair in graded], [pair.scores[1] for pair in graded])
            figures |= {"first_position_score": bias.first_position, "order_agreement": bias.agreement}
            figures |= self._figures([examples[n] for n in kept], [answers[n] for n in kept], graded)
        return figures | self._spent


class MTBench:
    """Two turns, each rated from 1 to 10 on its own; mathematics, reasoning and coding beside a reference.

    Args:
        examples: questions with `follow_ups`; metadata: category and references.
        judge: who rates.
        prompts: FastChat's single-answer prompts by name.
        options: what decides the examples, for the record.
    """

    name = "mt_bench"
    metric = "judge_score"
    defaults: Mapping[str, Any] = {"max_new_tokens": 1024}

    def __init__(
        self,
        examples: Sequence[Example],
        judge: Judge,
        prompts: Mapping[str, JudgePrompt],
        options: Mapping[str, Any],
    ) -> None:
        self._examples = tuple(examples)
        self._judge = judge
        self._prompts = prompts
        texts = "".join(prompts[name].fingerprint() for name in sorted(prompts))
        self.options: Mapping[str, Any] = {**options, **judge.settings.identity(), "judge_prompts": texts}
        self._spent: dict[str, float] = {}

    def examples(self) -> Sequence[Example]:
        return self._examples

    def notice(self, num_samples: int) -> str:
        """Calls, tokens and cost to expect; the judge is asked whether it is there."""
        self._judge.check()
        tokens = 0
        for example in self._examples:
            for turn, question in enumerate(self._questions(example, ["", ""])):
                tokens += (
                    sum(tokens_of(message["content"]) for message in question) + (turn + 1) * _ANSWER_TOKENS
                )
        return _notice(self, self._judge, 2 * num_samples * len(self._examples), num_samples * tokens) + (
            f" Answers are taken to have {_ANSWER_TOKENS} tokens a turn."
        )

    def grade(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Verdict]:
        """The mean rating of the turns; no verdict where the judge gave no rating for one of them.
        Thoughts are not shown; where they never end the answer is empty."""
        questions = [
            question
            for example, answer in zip(examples, answers, strict=True)
            for question in self._questions(example, _without_thoughts(answer).turns)
        ]
        reminder = self._prompts["single-v1"].reminder
        rulings, self._spent = _ask(self.name, self._judge, questions, read_rating, reminder)
        verdicts = []
        for first, second in zip(rulings[::2], rulings[1::2], strict=True):
            ratings = [first.verdict, second.verdict]
            rated = None not in ratings
            verdicts.append(
                Verdict(
                    correct=None,
                    score=sum(ratings) / 2 if rated else None,
                    extracted=" ".join(map(str, ratings)) if rated else None,
                    detail=json.dumps(
                        {"ratings": ratings, "judge": [first.text, second.text]}, ensure_ascii=False
                    ),
                )
            )
        return verdicts

    def summary(
        self, examples: Sequence[Example], answers: Sequence[Answer], verdicts: Sequence[Verdict]
    ) -> dict[str, float]:
        """Means of each turn and category over the ratings that there are, failures and what was spent."""
        groups: dict[str, list[float]] = {}
        missing = 0
        for example, verdict in zip(examples, verdicts, strict=True):
            ratings = json.loads(verdict.detail)["ratings"]
            missing += ratings.count(None)
            for turn, rating in enumerate(ratings, start=1):
                if rating is not None:
                    for group in (f"turn_{turn}", f"category_{example.metadata['category']}"):
                        groups.setdefault(group, []).append(rating)
        means = {group: sum(ratings) / len(ratings) for group, ratings in sorted(groups.items())}
        return {"parse_failures": float(missing), **_unclosed(answers), **means, **self._spent}

    def _questions(self, example: Example, turns: Sequence[str]) -> list[list[Message]]:
        """Questions to the judge about the first turn, and about the second."""
        if len(turns) != 2:
            raise ValueError(f"MT-Bench question {example.id} has {len(turns)} answers; both turns need one.")
        fields = {
            "question": _text_of(example),
            "question_1": _text_of(example),
            "question_2": example.follow_ups[0],
        }
        fields |= {"answer": turns[0], "answer_1": turns[0], "answer_2": turns[1]}
        references = example.metadata.get("references")
        fields |= {f"ref_answer_{number}": text for number, text in enumerate(references or (), start=1)}
        kind = "single-math-v1" if references else "single-v1"
        return [self._prompts[name].messages(**fields) for name in (kind, f"{kind}-multi-turn")]


def _without_thoughts(answer: Answer) -> Answer:
    turns = tuple(map(drop_thinking, answer.turns))
    return replace(answer, text=drop_thinking(answer.text), turns=turns)


def _unclosed(answers: Sequence[Answer]) -> dict[str, float]:
    """How many answers (or turns) are thoughts without an end, where there are any."""
    texts = [text for answer in answers for text in answer.turns or (answer.text,)]
    count = sum(unclosed_thinking(text) for text in texts)
    return {"unclosed_thinking": float(count)} if count else {}


def _ask(
    name: str, judge: Judge, questions: list[list[Message]], parse: Callable[[str], Any], reminder: str
) -> tuple[list[Any], dict[str, float]]:
    """Rulings, and what they took."""
    tokens = sum(tokens_of(message["content"]) for question in questions for message in question)
    _refuse_expensive(judge, tokens, len(questions) * _REPLY_TOKENS)
    before = Usage(**vars(judge.usage))
    rulings = judge.rule(questions, parse, reminder, name)
    used = {key: float(value - getattr(before, key)) for key, value in vars(judge.usage).items()}
    spent = {f"judge_{key}": value for key, value in used.items()}
    cost = judge.settings.cost(used["tokens_in"], used["tokens_out"])
    return rulings, spent | ({} if cost is None else {"judge_cost": cost})


def _notice(task: Any, judge: Judge, calls: int, tokens_in: int) -> str:
    tokens_out = calls * _REPLY_TOKENS
    cost = judge.settings.cost(tokens_in, tokens_out)
    _refuse_expensive(judge, tokens_in, tokens_out)
    price = (
        "cost unknown (give the judge's prices)"
        if cost is None
        else f"about {cost:.2f} in the currency of the prices"
    )
    return (
        f"{task.name}: {calls:,} verdicts of {judge.settings.model} at {judge.settings.url}, about "
        f"{tokens_in:,} prompt and {tokens_out:,} reply tokens: {price}. Verdicts are kept in "
        f"{judge.cache_file}, which holds {judge.num_cached:,}."
    )


def _refuse_expensive(judge: Judge, tokens_in: int, tokens_out: int) -> None:
    cost = judge.settings.cost(tokens_in, tokens_out)
    limit = judge.settings.max_cost
    if cost is not None and limit is not None and cost > limit:
        raise ValueError(
            f"the judge would cost about {cost:.2f}, above max_cost={limit:g}; raise it, or limit the "
            "questions."
        )


def _text_of(example: Example) -> str:
    prompt = example.prompt
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
