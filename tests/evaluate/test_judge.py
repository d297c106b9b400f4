"""Judged benchmarks against a real server: well-behaved, biased, babbling, limiting, slow, dying."""

from __future__ import annotations

import email.utils
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.judge_server import JudgeServer, likes_longer, likes_word, position_biased, rates_by_length
from tiny_models import tiny_model
from typer.testing import CliRunner

from hpd.cli import app
from hpd.evaluate.benchmarks.judge_client import Judge
from hpd.evaluate.benchmarks.judge_prompts import (
    FIVE_POINTS,
    PREFERENCE,
    load_prompt,
    read_label,
    read_rating,
)
from hpd.evaluate.benchmarks.judge_settings import JudgeSettings
from hpd.evaluate.benchmarks.judged import alpaca_eval, arena_hard, mt_bench
from hpd.evaluate.benchmarks.length_control import Copies, LengthControl
from hpd.evaluate.benchmarks.win_rates import (
    length_controlled_win_rate,
    position_bias,
    style_controlled_win_rate,
    style_differences,
    style_of,
)
from hpd.evaluate.task import Notice, Summary, Task
from hpd.generation.texts import Answer

QUESTION = [
    [{"role": "user", "content": f"<answer_a>\n{'x' * n}\n</answer_a><answer_b>\nyyy\n</answer_b>"}]
    for n in range(6)
]


@pytest.fixture(autouse=True)
def _no_key(monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def _judge(server: JudgeServer, folder: Path, **options: Any) -> Judge:
    given = {
        "model": "judge",
        "cache": folder / "cache.jsonl",
        "backoff_seconds": 0.01,
        "timeout_seconds": 5.0,
    } | options
    return Judge(JudgeSettings(url=server.url, **given))


def _rule(judge: Judge, questions: Any = QUESTION) -> list[Any]:
    return [ruling.verdict for ruling in judge.rule(questions, read_label, "Say it as [[A]].")]


EXPECTED = ["B", "B", "B", "C", "A", "A"]


# --- client ---------------------------------------------------------------------------------------


def test_verdicts_come_in_order_and_only_once(tmp_path: Path) -> None:
    with JudgeServer(likes_longer, delay_seconds=0.02) as server:
        judge = _judge(server, tmp_path, concurrency=3)
        assert _rule(judge) == EXPECTED
        assert (judge.usage.calls, len(server.requests)) == (6, 6)
        assert 1 < server.most_at_once <= 3
        assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
        again = _judge(server, tmp_path)
        assert _rule(again) == EXPECTED
        assert (again.usage.calls, again.usage.cached, len(server.requests)) == (0, 6, 6)
        other = _judge(server, tmp_path, temperature=0.5)  # another request, another verdict
        _rule(other)
        assert len(server.requests) == 12


@pytest.mark.parametrize("trouble", [429, 500, 503, "drop", "garbage"])
def test_trouble_is_retried(tmp_path: Path, trouble: int | str) -> None:
    with JudgeServer(likes_longer, status=lambda n: trouble if n % 3 == 1 else None) as server:
        judge = _judge(server, tmp_path, concurrency=1)
        assert _rule(judge) == EXPECTED
        assert judge.usage.retries == len(server.requests) - 6 > 0


def test_retry_after_is_honored(tmp_path: Path) -> None:
    headers = {"Retry-After": "1"}
    with JudgeServer(likes_longer, status=lambda n: 429 if n == 0 else None, headers=headers) as server:
        start = time.monotonic()
        assert _rule(_judge(server, tmp_path, concurrency=1), QUESTION[:1]) == ["B"]
        assert time.monotonic() - start >= 1.0


def test_retry_after_as_a_date(tmp_path: Path) -> None:
    headers = {"Retry-After": email.utils.formatdate(time.time() + 2, usegmt=True)}
    with JudgeServer(likes_longer, status=lambda n: 503 if n == 0 else None, headers=headers) as server:
        start = time.monotonic()
        _rule(_judge(server, tmp_path), QUESTION[:1])
        assert time.monotonic() - start >= 0.9


def test_a_slow_judge_is_given_up_and_asked_again(tmp_path: Path) -> None:
    with JudgeServer(likes_longer, delay_seconds=0.5) as server:
        judge = _judge(server, tmp_path, timeout_seconds=0.1, max_retries=1)
        with pytest.raises(ConnectionError, match="2 attempts .*ReadTimeout"):
            _rule(judge, QUESTION[:1])
        assert len(server.requests) == 2


def test_a_judge_that_dies_loses_nothing(tmp_path: Path) -> None:
    with JudgeServer(likes_longer, status=lambda n: None if n < 3 else "drop") as dying:
        judge = _judge(dying, tmp_path, concurrency=1, max_retries=1)
        with pytest.raises(ConnectionError, match=r"3 of 6 verdicts .*cache.jsonl; run it again"):
            _rule(judge)
    lines = (tmp_path / "cache.jsonl").read_text().splitlines()
    assert len(lines) == 3
    (tmp_path / "cache.jsonl").write_text(
        "\n".join([*lines[:2], lines[2][:20]])
    )  # the last line was cut by a kill
    with JudgeServer(likes_longer) as server:
        assert _judge(dying, tmp_path).num_cached == 2
        moved = _judge(server, tmp_path)  # another address is another judge
        assert _rule(moved) == EXPECTED
        assert len(server.requests) == 6
    assert _judge(server, tmp_path).num_cached == 8


def test_a_refusal_is_not_retried_and_the_key_is_not_shown(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-1")
    with JudgeServer(likes_longer, key="right") as server:
        judge = _judge(server, tmp_path, key_env="MY_KEY")
        with pytest.raises(ValueError, match="refuses the request: HTTP 401") as caught:
            _rule(judge, QUESTION[:1])
        assert len(server.requests) == 1
        assert server.authorizations == {"Bearer sk-secret-1": 1}
        with pytest.raises(ValueError, match="refuses the key .*MY_KEY"):
            judge.check()
        monkeypatch.setenv("MY_KEY", "right")
        fine = _judge(server, tmp_path, key_env="MY_KEY")
        fine.check()
        assert _rule(fine) == EXPECTED
    assert "sk-secret" not in str(caught.value)
    assert "right" not in (tmp_path / "cache.jsonl").read_text()
    assert "right" not in repr(fine.settings) + repr(vars(fine.usage))


def test_nobody_at_home(tmp_path: Path) -> None:
    with JudgeServer(likes_longer) as server:
        pass
    with pytest.raises(ConnectionError, match="does not answer"):
        _judge(server, tmp_path).check()


def test_babble_is_asked_again_then_counted(tmp_path: Path) -> None:
    def stubborn(conversation: str, _: int) -> str:
        return (
            "Hm."
            if "Say it as" not in conversation
            else "[[B]]"
            if conversation.count("Say it as") == 2
            else "[[A]] or [[B]]"
        )

    with JudgeServer(stubborn) as server:
        judge = _judge(server, tmp_path, max_asks=3)
        rulings = judge.rule(QUESTION[:1], read_label, "Say it as [[A]].")
        assert (rulings[0].verdict, rulings[0].asks, len(server.requests)) == ("B", 3, 3)
        roles = [message["role"] for message in server.requests[-1]["messages"]]
        assert roles == ["user", "assistant", "user", "assistant", "user"]
        assert _rule(_judge(server, tmp_path, max_asks=2), QUESTION[:1]) == [None]
        assert len(server.requests) == 3  # the same replies, from the cache


def test_costs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs both prices"):
        JudgeSettings(url="http://a", model="m", price_in=1.0)
    with pytest.raises(ValueError, match="max_cost has no effect without prices"):
        JudgeSettings(url="http://a", model="m", max_cost=1.0)
    with JudgeServer(likes_longer) as server:
        judge = _judge(server, tmp_path, price_in=1e6, price_out=2e6, max_cost=30.0, concurrency=1)
        with pytest.raises(ValueError, match="has cost .* above max_cost=30"):
            _rule(judge)
        assert 0 < len(server.requests) < 6
        spent = judge.usage.tokens_in + 2 * judge.usage.tokens_out
        assert judge.settings.cost(judge.usage.tokens_in, judge.usage.tokens_out) == pytest.approx(spent)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:80"}, "give an address"),
        ({"url": "http://a", "concurrency": 0}, "concurrency is 0"),
        ({"url": "http://a", "key_env": "HPD_NO_SUCH_KEY"}, "HPD_NO_SUCH_KEY, which is not set"),
    ],
)
def test_settings_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JudgeSettings(model="m", **options)


def test_extra_fields_and_a_whole_address(tmp_path: Path) -> None:
    with JudgeServer(likes_longer) as server:
        extra = {"max_tokens": None, "max_completion_tokens": 64}
        settings = JudgeSettings(
            url=f"{server.url}/chat/completions", model="m", cache=tmp_path / "c.jsonl", extra=extra
        )
        judge = Judge(settings)
        judge.check()
        _rule(judge, QUESTION[:1])
        (request,) = server.requests
        assert request["path"] == "/v1/chat/completions"
        assert "max_tokens" not in request
        assert request["max_completion_tokens"] == 64


# --- prompts and parsers --------------------------------------------------------------------------


def test_parsers() -> None:
    texts = ("x [[A>>B]]", "[[b]]", "[[ A = B ]]", "[[A]] [[A]]", "[[A]] [[B]]", "A", "[[D]]")
    assert [read_label(text) for text in texts] == [
        "A>>B",
        "B",
        "A=B",
        "A",
        None,
        None,
        None,
    ]
    assert [read_rating(text) for text in ("[[7.5]]", "Rating: [3]", "[[0]]", "[[5]] then [[6]]", "ten")] == [
        7.5,
        3.0,
        None,
        None,
        None,
    ]


def test_answers_cannot_reach_the_other_places() -> None:
    messages = PREFERENCE.messages(question="{answer_b}", answer_a="{question} {x}", answer_b="B")
    assert "<question>\n{answer_b}\n" in messages[-1]["content"]
    assert "<answer_a>\n{question} {x}\n" in messages[-1]["content"]


def test_prompts_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "prompt.yaml"
    path.write_text("prompt: 'Q {question} 1 {answer_a} 2 {answer_b}: [[A]] [[B]] [[C]]'\n")
    prompt = load_prompt(path, FIVE_POINTS)
    assert prompt.messages(question="q", answer_a="a", answer_b="b") == [
        {"role": "user", "content": "Q q 1 a 2 b: [[A]] [[B]] [[C]]"}
    ]
    assert prompt.fingerprint() != FIVE_POINTS.fingerprint()
    for text, message in [
        ("prompt: 'Q {question}'", "places question; it needs"),
        ("promt: x", "must hold prompt"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_prompt(path, FIVE_POINTS)


# --- tasks ----------------------------------------------------------------------------------------


def _lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _alpaca_rows(folder: Path, count: int = 8) -> Path:
    rows = [
        {"idx": n, "instruction": f"q{n}", "output_gpt4_1106_preview": "b" * (4 + n)} for n in range(count)
    ]
    return _lines(folder / "alpaca.jsonl", rows)


def test_alpaca_eval(tmp_path: Path) -> None:
    with JudgeServer(likes_word("good")) as server:
        task = alpaca_eval(
            _alpaca_rows(tmp_path), judge=_judge(server, tmp_path, price_in=1.0, price_out=4.0)
        )
        assert isinstance(task, Task)
        assert isinstance(task, Summary)
        assert isinstance(task, Notice)
        assert "16 verdicts of judge" in task.notice(1)
        json.dumps(dict(task.options))
        examples = task.examples()
        answers = [Answer(text="good" if n < 6 else "bad") for n in range(8)]
        verdicts = task.grade(examples, answers)
        assert [verdict.value for verdict in verdicts] == [1.0] * 6 + [0.5] * 2
        assert verdicts[0].extracted == "A>>B B>A"
        figures = task.summary(examples, answers, verdicts)
        assert figures["first_position_score"] == 0.5
        assert figures["order_agreement"] == 1.0
        assert figures["judge_calls"] == 16
        assert figures["parse_failures"] == 0
        assert figures["judge_cost"] > 0
        assert "length_controlled_win_rate" not in figures  # nobody knows how hard q0 is
        assert (
            "No length-controlled win rate is given: 8 of 8 instructions are not AlpacaEval's"
            in task.notice(1)
        )
        task.grade(examples, answers)
        assert task.summary(examples, answers, verdicts)["judge_cached"] == 16
        assert len(server.requests) == 16


def test_a_position_biased_judge_is_found_out(tmp_path: Path) -> None:
    with JudgeServer(position_biased) as server:
        task = alpaca_eval(_alpaca_rows(tmp_path), judge=_judge(server, tmp_path))
        answers = [Answer(text="x")] * 8
        verdicts = task.grade(task.examples(), answers)
        assert {verdict.value for verdict in verdicts} == {0.5}
        figures = task.summary(task.examples(), answers, verdicts)
        assert (figures["first_position_score"], figures["order_agreement"]) == (1.0, 0.0)


def test_parse_failures_are_never_scored(tmp_path: Path) -> None:
    def sometimes(conversation: str, n: int) -> str:
        return "I cannot say." if "q3" in conversation and "<answer_a>\nmine" in conversation else "[[C]]"

    with JudgeServer(sometimes) as server:
        task = alpaca_eval(_alpaca_rows(tmp_path), judge=_judge(server, tmp_path, max_asks=2))
        answers = [Answer(text="mine")] * 8
        verdicts = task.grade(task.examples(), answers)
        assert [verdict.value for verdict in verdicts] == [0.5] * 3 + [None] + [0.5] * 4
        assert "I cannot say." in verdicts[3].detail
        assert task.summary(task.examples(), answers, verdicts)["parse_failures"] == 1
        assert len(server.requests) == 17


def test_too_expensive_is_refused_before_the_first_verdict(tmp_path: Path) -> None:
    with JudgeServer(likes_longer) as server:
        task = alpaca_eval(
            _alpaca_rows(tmp_path),
            judge=_judge(server, tmp_path, price_in=1000.0, price_out=1000.0, max_cost=0.5),
        )
        for step in (lambda: task.notice(1), lambda: task.grade(task.examples(), [Answer(text="x")] * 8)):
            with pytest.raises(ValueError, match="would cost about .* above max_cost=0.5"):
                step()
        assert not server.requests


def test_instruction_difficulty(tmp_path: Path) -> None:
    data = _alpaca_rows(tmp_path, 4)
    table = tmp_path / "difficulty.csv"
    table.write_text(",instruction_difficulty\n" + "".join(f"{n},{n / 2 - 1}\n" for n in range(4)))
    with JudgeServer(likes_longer) as server:
        task = alpaca_eval(data, judge=_judge(server, tmp_path), difficulty=table)
        answers = [Answer(text="x" * (3 * n + 2)) for n in range(4)]
        figures = task.summary(task.examples(), answers, task.grade(task.examples(), answers))
        assert 0 < figures["length_controlled_win_rate"] < 1
        assert "No length-controlled" not in task.notice(1)
        table.write_text("index,instruction_difficulty\n0,1\n")
        with pytest.raises(ValueError, match="no difficulty for 3 instructions"):
            alpaca_eval(data, judge=_judge(server, tmp_path), difficulty=table)


def _arena(folder: Path, count: int = 6) -> Path:
    answers = [
        {
            "uid": f"u{n}",
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": {"answer": f"base {n}"}},
            ],
        }
        for n in range(count)
    ]
    _lines(folder / "answer_base.jsonl", answers)
    return _lines(folder / "question.jsonl", [{"uid": f"u{n}", "prompt": f"q{n}"} for n in range(count)])


def test_arena_hard(tmp_path: Path) -> None:
    with JudgeServer(likes_word("good")) as server:
        task = arena_hard(_arena(tmp_path), judge=_judge(server, tmp_path))
        assert task.examples()[2].answer == "base 2"
        answers = [Answer(text="# A\n- **good**" if n < 2 else f"plain {n}") for n in range(6)]
        verdicts = task.grade(task.examples(), answers)
        figures = task.summary(task.examples(), answers, verdicts)
        # Twice A>>B (three games) and B<A (one): 8 won games beside 8 ties.
        assert figures["arena_score"] == pytest.approx((2 * 4 + 8 * 0.5) / 16, abs=2e-3)
        assert figures["style_controlled_score"] < figures["arena_score"]
        (tmp_path / "answer_base.jsonl").write_text('{"uid": "u0", "messages": [{"content": "x"}]}\n')
        with pytest.raises(ValueError, match="question u1 has no answer in"):
            arena_hard(tmp_path / "question.jsonl", judge=_judge(server, tmp_path))
        (tmp_path / "answer_base.jsonl").unlink()
        with pytest.raises(FileNotFoundError, match="the baseline's answers must be next to"):
            arena_hard(tmp_path / "question.jsonl", judge=_judge(server, tmp_path))


def _mt_bench(folder: Path) -> Path:
    names = [f"single{kind}-v1{turn}" for kind in ("", "-math") for turn in ("", "-multi-turn")]
    two_turns = "{question_1} ANSWER<{answer_1}> {question_2} ANSWER<{answer_2}>"
    prompts = [
        {
            "name": name,
            "type": "single",
            "system_prompt": name,
            "prompt_template": "REF<{ref_answer_1}> " * ("math" in name)
            + (two_turns if "multi" in name else "{question} ANSWER<{answer}>"),
        }
        for name in names
    ]
    _lines(folder / "judge_prompts.jsonl", [*prompts, {"name": "pair-v2", "type": "pairwise"}])
    _lines(folder / "reference_answer.jsonl", [{"question_id": 2, "choices": [{"turns": ["r1", "r2"]}]}])
    rows = [
        {"question_id": 1, "category": "writing", "turns": ["w1", "w2"]},
        {"question_id": 2, "category": "math", "turns": ["m1", "m2"]},
    ]
    return _lines(folder / "question.jsonl", rows)


def test_mt_bench(tmp_path: Path) -> None:
    data = _mt_bench(tmp_path)
    with JudgeServer(rates_by_length) as server:
        task = mt_bench(data, judge=_judge(server, tmp_path, concurrency=1))
        assert isinstance(task, Task)
        examples = task.examples()
        assert [(example.prompt, example.follow_ups) for example in examples] == [
            ("w1", ("w2",)),
            ("m1", ("m2",)),
        ]
        answers = [Answer(text="bbb", turns=("a", "bbb")), Answer(text="d", turns=("ccccc", "d"))]
        assert "4 verdicts" in task.notice(1)
        verdicts = task.grade(examples, answers)
        assert [verdict.value for verdict in verdicts] == [3.0, 4.0]
        figures = task.summary(examples, answers, verdicts)
        assert (figures["turn_1"], figures["turn_2"]) == (4.0, 3.0)
        assert (figures["category_math"], figures["category_writing"], figures["parse_failures"]) == (
            4.0,
            3.0,
            0,
        )
        systems = sorted(request["messages"][0]["content"] for request in server.requests)
        assert systems == ["single-math-v1", "single-math-v1-multi-turn", "single-v1", "single-v1-multi-turn"]
        math = [r["messages"][1]["content"] for r in server.requests if "math" in r["messages"][0]["content"]]
        assert all(text.startswith("REF<r1>") for text in math)
        with pytest.raises(ValueError, match="question 1 has 0 answers"):
            task.grade(examples[:1], [Answer(text="x")])


def test_mt_bench_needs_its_files(tmp_path: Path) -> None:
    with JudgeServer(rates_by_length) as server:
        data, judge = _mt_bench(tmp_path), _judge(server, tmp_path)
        _lines(tmp_path / "reference_answer.jsonl", [{"question_id": 9, "choices": [{"turns": ["r"]}]}])
        with pytest.raises(ValueError, match="question 2 .math. has no reference answer"):
            mt_bench(data, judge=judge)
        assert len(mt_bench(data, judge=judge, limit=1).examples()) == 1
        _lines(
            tmp_path / "judge_prompts.jsonl",
            [{"name": "single-v1", "type": "single", "system_prompt": "", "prompt_template": ""}],
        )
        with pytest.raises(
            ValueError,
            match="lacks the prompts single-math-v1, single-math-v1-multi-turn, single-v1-multi-turn",
        ):
            mt_bench(data, judge=judge)
        (tmp_path / "judge_prompts.jsonl").unlink()
        with pytest.raises(FileNotFoundError, match="judge_prompts.jsonl of FastChat"):
            mt_bench(data, judge=judge)


def test_the_public_files_load(shared: Path, tmp_path: Path) -> None:
    data = shared / "data"
    with JudgeServer(position_biased) as server:
        judge = _judge(server, tmp_path)
        bench = mt_bench(data / "mt_bench" / "question.jsonl", judge=judge)
        assert (len(bench.examples()), sum(bool(e.metadata["references"]) for e in bench.examples())) == (
            80,
            30,
        )
        asked = bench._questions(bench.examples()[30], ["first {answer_2}", "second"])  # 111: mathematics
        assert all(
            "{" not in m["content"].replace("{answer_2}", "") or "ref_answer" not in m["content"]
            for q in asked
            for m in q
        )
        assert (
            len(
                alpaca_eval(
                    data / "alpaca_eval" / "alpaca_eval_minus_holdout.jsonl.gz", judge=judge
                ).examples()
            )
            == 679
        )
        arena = arena_hard(data / "arena_hard" / "v0.1_question.jsonl", judge=judge)
        assert len(arena.examples()) == 500
        assert all(example.answer for example in arena.examples())


def test_command(tmp_path: Path) -> None:
    """Two turns of a tiny model, rated over HTTP, into evals.json; the second time from the cache."""
    model = tiny_model("llama", tmp_path / "model")
    data = _mt_bench(tmp_path)
    with JudgeServer(rates_by_length) as server:
        asked = [
            "eval",
            model,
            "--tasks",
            f"mt_bench={data}",
            "--max-new-tokens",
            "4",
            "--judge-url",
            server.url,
            "--judge-model",
            "judge",
            "-o",
            f"judge.cache={tmp_path / 'cache.jsonl'}",
            "-o",
            "judge.price_in=1",
            "-o",
            "judge.price_out=2",
            "--output",
            tmp_path / "out",
        ]
        outputs = []
        for _ in range(2):
            result = CliRunner().invoke(app, list(map(str, asked)))
            assert result.exit_code == 0, result.output
            outputs.append(" ".join(result.output.split()))
            (entry,) = json.loads((tmp_path / "out" / "evals.json").read_text())
            assert 1 <= entry["judge_score"] <= 10
        assert len(server.requests) == 4
    assert "4 verdicts of judge" in outputs[0]
    assert "parse failures 0" in outputs[1]
    refused = CliRunner().invoke(app, ["eval", str(model), "--tasks", f"mt_bench={data}"])
    assert (refused.exit_code, "--judge-url" in refused.output) == (2, True)


# --- win rates ------------------------------------------------------------------------------------


def test_position_bias_figures() -> None:
    assert position_bias([1.0, 0.5], [0.0, 0.5]) == (0.75, 0.5)
    assert position_bias([1.0, 0.0], [1.0, 0.0]) == (0.5, 1.0)


def _alone(difficulty: np.ndarray) -> LengthControl:
    """Without copies of the baseline."""
    return LengthControl(difficulty, Copies(*np.zeros((3, 0))))


def test_length_control_removes_a_preference_for_length() -> None:
    """Simulated judges whose log-odds are 0.4 plus 2 tanh(gap / std): the fit gives sigma(0.4) back, the raw
    rate does not."""
    generator = np.random.default_rng(0)
    ours, theirs = (generator.integers(100, 2000, size=4000) + shift for shift in (900, 0))
    gap = ours - theirs
    chance = 1 / (1 + np.exp(-(0.4 + 2 * np.tanh(gap / gap.std(ddof=1)))))
    wins = (generator.random(4000) < chance).astype(float)
    found = length_controlled_win_rate(wins, ours, theirs, _alone(np.zeros(4000)))
    truth = 1 / (1 + np.exp(-0.4))
    assert wins.mean() > truth + 0.1
    assert abs(found.value - truth) < 3 * found.standard_error
    assert found.coefficients["length"] == pytest.approx(2.0, abs=0.25)


def test_length_control_with_difficulty_and_without_spread() -> None:
    generator = np.random.default_rng(1)
    gamma = generator.normal(size=3000)
    wins = (generator.random(3000) < 1 / (1 + np.exp(-(0.2 + 1.5 * gamma)))).astype(float)
    found = length_controlled_win_rate(wins, [10] * 3000, [10] * 3000, _alone(gamma))
    assert found.coefficients["difficulty"] == pytest.approx(1.5, abs=0.2)
    assert found.coefficients["length"] == 0.0
    assert found.value == pytest.approx(wins.mean(), abs=1e-3)  # nothing to control for
    won = length_controlled_win_rate([1.0] * 50, range(50), [9] * 50, _alone(np.zeros(50)))
    assert won.value > 0.97  # separable data stay finite


def test_replies_in_other_brackets_and_with_thoughts() -> None:
    ratings = {"[[8.]]": 8, "Rating: [[8/10]]": 8, "**[[7.5]]**": 7.5, "[[7,5]]": 7.5, "[[ Rating: 9 ]]": 9}
    assert {text: read_rating(text) for text in ratings} == ratings
    assert read_rating("<think>[[3]] or [[4]]?</think>[[5]]") == 5
    assert [read_rating(text) for text in ("[[0]]", "[[11]]", "[[8]] or [[9]]", "8", "<think>[[8]]")] == [
        None
    ] * 5
    labels = {
        "[A>B]": "A>B",
        "[[A > B]].": "A>B",
        "[[A≫B]]": "A>>B",
        "[[A&gt;B]]": "A>B",
        "[[Answer B]]": "B",
    }
    labels |= {"So:\n[B]\n": "B", "[[tie]]": "TIE", "[[\\text{A}]]": "A", "<think>[[A]]</think>[[B]]": "B"}
    assert {text: read_label(text) for text in labels} == labels
    unclear = ("[A] is short, [B] is long", "[A>B] or [B>A]", "[[A]] [[B]]", "[[A is better]]", "A>B")
    assert [read_label(text) for text in unclear] == [None] * 5


def test_thoughts_are_not_judged_and_have_no_length(tmp_path: Path) -> None:
    with JudgeServer(likes_longer) as server:
        task = alpaca_eval(_alpaca_rows(tmp_path, 4), judge=_judge(server, tmp_path))
        texts = [f"<think>{'x' * 5000}</think>ok", "<think>never ends", "ok", "ok"]
        answers = [Answer(text=text) for text in texts]
        verdicts = task.grade(task.examples(), answers)
        asked = json.dumps(server.requests)
        assert "xxx" not in asked
        assert "never ends" not in asked
        assert [verdict.value for verdict in verdicts] == [0.0] * 4  # the baseline's answers are longer
        figures = task.summary(task.examples(), answers, verdicts)
        assert figures["unclosed_thinking"] == 1
        assert figures["characters_per_answer"] == pytest.approx(6 / 4)


def test_halves_of_characters_in_answers_and_replies(tmp_path: Path) -> None:
    """No server takes them, nor may they lose an evaluation; a reply is kept as it came."""
    with JudgeServer(lambda _, n: "\ud800?" if n % 2 == 0 else "\ud800 [[A]]") as server:
        task = alpaca_eval(_alpaca_rows(tmp_path, 1), judge=_judge(server, tmp_path, concurrency=1))
        (verdict,) = task.grade(task.examples(), [Answer(text="a\ud801b \0")])
        assert verdict.value == 0.5
        assert json.loads(verdict.detail)["judge"] == ["\ufffd [[A]]"] * 2  # as the client reads replies
        assert len(server.requests) == 4


def test_style_control() -> None:
    generator = np.random.default_rng(2)
    styles = generator.normal(0.5, 1.0, size=(1000, 4))
    chance = 1 / (1 + np.exp(-(-0.3 + 1.2 * styles[:, 0])))
    games = [(n, float(generator.random() < chance[n]), 1.0) for n in range(1000) for _ in range(2)]
    controlled = style_controlled_win_rate(games, styles)
    assert abs(controlled.value - 1 / (1 + np.exp(0.3))) < 3 * controlled.standard_error
    assert controlled.coefficients["length"] == pytest.approx(1.2 * styles[:, 0].std(), abs=0.25)
    plain = style_controlled_win_rate(games, styles, controlled=False)
    assert plain.value == pytest.approx(np.mean([score for _, score, _ in games]), abs=1e-3)
    weighted = style_controlled_win_rate(
        [(0, 1.0, 3.0), (0, 0.0, 1.0), (1, 1.0, 3.0), (1, 0.0, 1.0)], np.zeros((2, 4))
    )
    assert weighted.value == pytest.approx(0.75, abs=5e-3)


def test_style_counts() -> None:
    text = "# Head\n## Two\n- one\n1. two\n* **bold** and __too__\n```\n# not a header\n- nor a list\n```\n"
    assert style_of(text)[1:] == (2, 3, 2)
    gap = style_differences(["aaaa" * 3, text], ["aaaa", text])
    assert gap[0].tolist() == [0.5, 0, 0, 0]
    assert gap[1].tolist() == [0, 0, 0, 0]
