"""Programs in real answers: forms that were misread, texts that took minutes, the clock, odd characters."""

import json
import sys
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest

from hpd.evaluate.benchmarks.code_extraction import complete, extract_program, without_own_tests

FUNCTION = "def double(x):\n    return 2 * x"
HEAD = 'from typing import List\n\n\ndef double(x: int) -> int:\n    """Twice x."""\n'
WRONG = "def double(x):\n    return x"
DOCSTRING = '''def double(x):
    """Twice x.

    ```
    double(2)
    ```
    """
    return 2 * x'''


@pytest.mark.parametrize(
    "text",
    [
        f"```python\n{FUNCTION}```",
        f"```python\n{FUNCTION} ```\nDone.",
        f"Here it is: ```python\n{FUNCTION}\n```",
        "```python def double(x): return 2 * x\n```",
        f"```python\n\ufeff{FUNCTION}\n```",
        f"\ufeff```python\n{FUNCTION}\n```",
        "```python\ndef double(x):\n\u00a0\u00a0\u00a0\u00a0return 2 * x\n```",
        "```python\ndef double(x):\n\u3000\u3000return 2\u00a0*\u00a0x\n```",
        f"```python\nfrom __future__ import annotations\n\n{FUNCTION}\n```",
        f'```python\n"""Doubles."""\nfrom __future__ import annotations\n{FUNCTION}\n```',
        f"```python\nimport math\n```\nand\n```python\n{FUNCTION.replace('2 *', 'math.floor(2.5) *')}\n```",
        "```python\nTWO = 2\ndef helper(x):\n    return TWO * x\n```\n"
        "```python\ndef double(x):\n    return helper(x)\n```",
        "```python\nfrom math import prod as times\n```\n"
        "```python\ndef double(x):\n    return times([2, x])\n```",
        f"```python\n{WRONG}\n```\nThe fixed version avoids this bug:\n```python\n{FUNCTION}\n```",
        f"```python\n{FUNCTION}\n```\nA common mistake is this:\n```python\n{WRONG}\n```",
        f"```python\n{FUNCTION}\n```\nDo not write\n\n```python\n{WRONG}\n```\nsince it fails.",
        f"```python\n{FUNCTION}\n```\n\n```python\n# Wrong:\n{WRONG}\n```",
        f"The wrong way:\n```python\n{WRONG}\n```\nThe right way:\n```python\n{FUNCTION}\n```",
        f"```python\n{WRONG}\n```\nThat is a bug. Better:\n```python\n{FUNCTION}\n```",
        f"```python\n{FUNCTION}\n```\n```python\ndef double(x)\n    ...\n```",
        f"```python\n{DOCSTRING}\n```\nDone.",
        f"```markdown\nSee:\n```python\n{FUNCTION}\n```\n```",
        f"````\n```python\n{FUNCTION}\n```\n````",
        f"```text\nsome notes\n```python\n{FUNCTION}\n```",
        f"<think>\n```python\n{WRONG}\n```\n</think>\n\n```python\n{FUNCTION}\n```",
        f"```python\n{FUNCTION}\nassert double(2) == 5\n```",
        f"```python\nimport sys\n{FUNCTION}\nsys.exit(0)\n```",
        f"```python\n{FUNCTION}\n\nif __name__ == '__main__':\n    print(double(int(input())))\n```",
        f"```python\n{FUNCTION}\n\nn = int(input())\nprint(double(n))\n```",
        f"```python\n{FUNCTION}\n\nfor x in (1, 2):\n    assert double(x) == 0\n```",
        f"x = 3\n{FUNCTION}\nassert double(2) == 5",
        "```\nreturn 2 * x\n```",
        "```python\ny = x\n    return 2 * y\n```",
        "return 2 * x",
        "y = x\n    return 2 * y",
        "```python\ndef double(x):\n    \u201c\u201d\u201cDoubles.\u201d\u201d\u201d\n    return 2 * x\n```",
        "```python\ndef double\uff08x\uff09\uff1a\n    return 2 * x\n```",
        "> So:\n>\n> ```python\n> def double(x):\n>     return 2 * x\n> ```\n",
        "```python\nfor _ in range(1):\n    y = 2 * x\nreturn y\n```",
    ],
)
def test_forms_of_right_answers(text):
    program = extract_program(text, "double", HEAD)
    assert program is not None
    names: dict[str, Any] = {"__name__": "program"}
    exec(compile(without_own_tests(program, "double"), "<program>", "exec"), names)
    assert names["double"](21) == 42


def test_an_unclosed_thought_holds_no_program():
    assert extract_program(f"<think>\n```python\n{FUNCTION}\n```", "double") is None


def test_own_tests_are_left_out_and_what_a_program_needs_stays():
    program = (
        "import sys\nsys.setrecursionlimit(9999)\ncache = {}\n\n@staticmethod\ndef double(x):\n    assert x\n"
        "    return 2 * x\n\nassert double(1) == 3\nTWICE = double\n"
        "for n in range(3):\n    cache[n] = n\nexit()\n"
    )
    kept = without_own_tests(program, "double")
    assert "assert x" in kept
    assert "setrecursionlimit" in kept
    assert "TWICE" in kept
    assert "cache[n]" in kept
    assert "== 3" not in kept
    assert "exit" not in kept
    assert without_own_tests("def (", "double") == "def ("
    assert complete(HEAD, "from __future__ import annotations\n    return 2 * x").startswith(
        "from __future__"
    )


@pytest.mark.parametrize(
    "text",
    [
        "@a\n" * 250,
        "@a\n" * 20_000,
        "```python\n" + "\n" * 32_000,
        "\\(" * 64_000,
        "import a\nx = (\n" * 5_000,
        "def double(x):\n" * 5_000,
        "```python\n" * 20_000,
        "```\n" * 20_000,
        "x = [" * 20_000,
        "`" * 100_000,
        "a" * 300_000,
        "x = 1 +\n" * 20_000,
        '"""' * 30_000,
        "```python\n" + "if x:\n" * 10_000,
        "-" * 200_000,
    ],
)
def test_looping_answers_are_read_in_seconds(text):
    start = time.perf_counter()
    extract_program(text, "double", HEAD)
    extract_program(text, "double")
    complete(HEAD, text)
    assert time.perf_counter() - start < 30


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is made of mechanisms of Linux")
def test_what_the_clock_ends_is_run_again_alone_and_said():
    from hpd.evaluate.sandbox import Limits, Program, Tests, host, run_many

    limits = Limits(wall_seconds=0.5, cpu_seconds=1)
    tests = Tests(source="assert program.x == 1")
    sleeps = Program(source="import time; time.sleep(30); x = 1", tests=tests)
    spins = Program(source="while True: pass", tests=tests, limits=Limits(wall_seconds=60, cpu_seconds=1))
    runs = []
    original = host.run_program

    def counted(source, **options):
        runs.append(source)
        return original(source, **options)

    host.run_program = counted
    try:
        outcomes = run_many([sleeps, spins, Program(source="x = 1", tests=tests)], limits=limits)
    finally:
        host.run_program = original
    assert runs.count(sleeps.source) == 2
    assert [outcome.by_clock for outcome in outcomes] == [True, False, False]
    assert "by the clock" in outcomes[0].detail
    assert "processor time" in outcomes[1].detail


def test_the_clock_follows_the_load(monkeypatch):
    from pathlib import Path

    from hpd.evaluate.sandbox import Limits, host

    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: {0, 1})
    for loads, factor in (
        ("0.10 0 0 1/99 7", 1),
        ("8.00 0 0 1/99 7", 4),
        ("0 0 0 6/99 7", 3),
        ("9999 0 0 1/9 7", 20),
    ):
        monkeypatch.setattr(Path, "read_text", lambda self, *_, loads=loads: loads)
        assert host._under_load(Limits(wall_seconds=10)).wall_seconds == 10 * factor


def test_any_text_is_written_and_read_back(tmp_path):
    from hpd.files import JsonLines, digest_json, write_json

    odd = {"text": "a\ud800b", "nul": "\0", "plain": "ä"}
    lines = JsonLines(tmp_path / "records.jsonl")
    lines.append(odd)
    lines.write([odd, {"text": "ä"}])
    assert lines.read() == [odd, {"text": "ä"}]
    lines.path.read_text("utf-8")
    assert "ä" in lines.path.read_text("utf-8")
    write_json(tmp_path / "evals.json", [odd])
    assert json.loads((tmp_path / "evals.json").read_text("utf-8")) == [odd]
    assert digest_json(odd, ensure_ascii=False) != digest_json({**odd, "text": "ab"}, ensure_ascii=False)


def test_a_crash_of_the_grader_is_the_verdict_of_that_answer(tmp_path):
    from hpd.evaluate.generate import Generated
    from hpd.evaluate.run import grade_answers, identify, write_result
    from hpd.evaluate.task import CannotGrade, Example, Verdict
    from hpd.generation.settings import GREEDY
    from hpd.generation.texts import Answer

    class Fragile:
        name = "fragile"
        metric = "accuracy"
        options: Mapping[str, Any] = MappingProxyType({})
        defaults: Mapping[str, Any] = MappingProxyType({})

        def examples(self):
            return [Example(id=str(index), prompt="?") for index in range(3)]

        def grade(self, examples, answers):
            for answer in answers:
                if answer.text == "stop":
                    raise CannotGrade("no judge")
            return [Verdict(correct=answer.text.encode().decode() == "x") for answer in answers]

    task = Fragile()
    texts = ["x", "\ud800", "y"]
    answers = [Answer(text=text) for text in texts]
    result = grade_answers(task, task.examples(), Generated(answers, 1.0), 1)
    assert [record.correct for record in result.records] == [True, False, False]
    assert result.records[1].detail.startswith("the grader failed: UnicodeEncodeError")
    write_result(tmp_path, identify("m", task, GREEDY, "e"), result)
    with pytest.raises(CannotGrade):
        grade_answers(task, task.examples(), Generated([*answers[:2], Answer(text="stop")], 1.0), 1)
    with pytest.raises(UnicodeEncodeError):
        grade_answers(task, task.examples(), Generated([Answer(text="\ud800")] * 3, 1.0), 1)
