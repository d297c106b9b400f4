"""Code tasks: extraction from answers, EvalPlus's comparison, the four formats on made-up rows and on the
shared data."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hpd.evaluate.benchmarks.code import CodeTask, human_eval, human_eval_plus, mbpp, mbpp_plus
from hpd.evaluate.benchmarks.code_oracle import matches
from hpd.evaluate.benchmarks.code_problems import complete, extract_program, restore_types
from hpd.evaluate.task import Notice, Task
from hpd.generation.texts import Answer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is made of mechanisms of Linux")

HEAD = (
    "from typing import List\n\n\ndef double(x: int) -> int:\n"
    '    """Twice x.\n    >>> double(2)\n    4\n    """\n'
)
ROWS: dict[str, dict[str, Any]] = {
    "humaneval": {
        "task_id": "HumanEval/900",
        "prompt": HEAD,
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(3) == 6\n    assert candidate(-1) == -2\n",
    },
    "humaneval+": {
        "task_id": "HumanEval/900",
        "prompt": HEAD,
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "base_input": [[1]],
        "plus_input": [[2**70], [0], [1.5]],
        "atol": 0,
        "contract": "",
    },
    "mbpp": {
        "task_id": 900,
        "text": "Write a function to double a number.",
        "code": "import math\r\ndef double(x):\r\n\treturn 2 * x",
        "test_setup_code": "",
        "test_list": ["assert double(2) == 4", "assert math.isclose(double(0.1), 0.2)"],
        "challenge_test_list": [],
    },
    "mbpp+": {
        "task_id": "Mbpp/902",
        "prompt": '"""\nDouble a number.\nassert double(2) == 4\n"""\n',
        "entry_point": "double",
        "canonical_solution": "def double(x):\n    return 2 * x\n",
        "base_input": [[1]],
        "plus_input": [[2**70]],
        "atol": 0,
    },
}
FACTORIES = {"humaneval": human_eval, "humaneval+": human_eval_plus, "mbpp": mbpp, "mbpp+": mbpp_plus}
FILES = {
    "humaneval": ("humaneval/HumanEval.jsonl.gz", 164),
    "humaneval+": ("humanevalplus/HumanEvalPlus-Mini.jsonl.gz", 164),
    "mbpp": ("mbpp/train.jsonl", 374),
    "mbpp-sanitized": ("mbpp/sanitized_non_test.jsonl", 170),
    "mbpp-validation": ("mbpp/validation.jsonl", 90),
    "mbpp+": ("mbppplus/MbppPlus_non_test.jsonl.gz", 154),
}


def made_up(tmp_path: Path, name: str, row: dict[str, Any] | None = None, **options: Any) -> CodeTask:
    path = tmp_path / f"{name}.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(ROWS[name] | (row or {})).encode()))
    return FACTORIES[name](path, **options)


def grade(task: CodeTask, *texts: str) -> list[Any]:
    examples = list(task.examples()) * len(texts)
    return task.grade(examples, [Answer(text=text) for text in texts])


# --- the formats ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_right_and_wrong_answers(name: str, tmp_path: Path) -> None:
    task = made_up(tmp_path, name)
    right = "```python\ndef double(x):\n    return x + x\n```"
    wrong = "```python\ndef double(x):\n    return x * x\n```"
    verdicts = grade(
        task, f"Here:\n{right}\nDone.", wrong, "I do not know.", "```python\nimport sys\nsys.exit(0)\n```"
    )
    assert [verdict.correct for verdict in verdicts] == [True, False, False, False]
    assert verdicts[0].extracted is not None
    assert "def double" in verdicts[0].extracted
    assert verdicts[1].detail.startswith("failed: AssertionError")
    assert verdicts[2].detail == "no code in the answer"
    assert verdicts[2].extracted is None


@pytest.mark.parametrize("name", ROWS)
def test_task_protocol(name: str, tmp_path: Path) -> None:
    task = made_up(tmp_path, name, style="completion")
    assert isinstance(task, Task)
    assert isinstance(task, Notice)
    assert task.name == name
    assert "sandbox, level" in task.notice(1)
    assert json.dumps(dict(task.options))
    assert {"stop", "chat_template", "max_new_tokens"} <= task.defaults.keys()
    prompt = task.examples()[0].prompt
    words = (
        "Write a function to double a number.\nassert double(2) == 4\nassert math.isclose(double(0.1), 0.2)"
    )
    assert prompt == ROWS[name].get("prompt", f'"""\n{words}\n"""').rstrip()
    instruct = made_up(tmp_path, name)
    assert "Markdown code block" in str(instruct.examples()[0].prompt)
    assert "stop" not in instruct.defaults


@pytest.mark.parametrize("name", ["humaneval", "humaneval+"])
def test_completions_continue_the_prompt(name: str, tmp_path: Path) -> None:
    task = made_up(tmp_path, name, style="completion")
    verdicts = grade(task, "\n    return 2 * x\n", "    return 3 * x", "    return 2 * x\n\n\ndef main(:", "")
    assert [verdict.correct for verdict in verdicts] == [True, False, True, False]


def test_prompt_helpers_are_there(tmp_path: Path) -> None:
    """As in HumanEval/32: the head defines a helper that both the solution and the tests use."""
    prompt = "def helper(x):\n    return x + 1\n\n\n" + HEAD
    row = {"prompt": prompt, "test": "def check(candidate):\n    assert candidate(3) == helper(5)\n"}
    task = made_up(tmp_path, "humaneval", row)
    verdicts = grade(
        task,
        "```python\ndef double(x):\n    return helper(x) + x - 1\n```",
        "```\nreturn helper(2 * x) - 1\n```",
    )
    assert [verdict.correct for verdict in verdicts] == [True, True]


def test_tests_cannot_be_redefined(tmp_path: Path) -> None:
    cheat = (
        "```python\nimport math\nmath.isclose = lambda *a: True\n"
        "class X(float):\n    def __eq__(self, other): return True\n"
        "def check(candidate): pass\n"
        "def double(x): return X(0)\n```"
    )
    for name in ROWS:
        assert not grade(made_up(tmp_path, name), cheat)[0].correct, name


def test_base_inputs_only(tmp_path: Path) -> None:
    answer = "```python\ndef double(x):\n    return 2 * x if x < 2**60 else 0\n```"
    assert not grade(made_up(tmp_path, "mbpp+"), answer)[0].correct
    assert grade(made_up(tmp_path, "mbpp+", plus=False), answer)[0].correct


def test_mistakes_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="style is 'chat'; it must be instruct or completion"):
        made_up(tmp_path, "mbpp", style="chat")
    with pytest.raises(ValueError, match="lacks {prompt}"):
        made_up(tmp_path, "mbpp", instruction="Solve it.")
    with pytest.raises(ValueError, match="no effect in the completion style"):
        made_up(tmp_path, "mbpp", style="completion", instruction="Solve {prompt}")
    with pytest.raises(ValueError, match="lacks the column 'base_input'.*release files"):
        human_eval_plus(_file(tmp_path, [ROWS["humaneval"]]))
    with pytest.raises(ValueError, match="task_id HumanEval/900 more than once"):
        human_eval(_file(tmp_path, [ROWS["humaneval"]] * 2))
    with pytest.raises(ValueError, match="not Python"):
        made_up(tmp_path, "mbpp", {"code": "def ("})
    with pytest.raises(ValueError, match="use nothing that its code defines"):
        made_up(tmp_path, "mbpp", {"test_list": ["assert 1 == 1"]})
    with pytest.raises(ValueError, match="reference solution of Mbpp/902 cannot be run"):
        grade(
            made_up(tmp_path, "mbpp+", {"canonical_solution": "def double(x): return 1 / 0"}),
            "```\ndef double(x): pass\n```",
        )


def _file(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- extraction -----------------------------------------------------------------------------------

FUNCTION = "def double(x):\n    return 2 * x"
OTHER = "def other(x):\n    return x"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (f"Sure!\n\n```python\n{FUNCTION}\n```\nIt doubles.", FUNCTION),
        (f"```py\n{FUNCTION}\n```", FUNCTION),
        (f"~~~\n{FUNCTION}\n~~~", FUNCTION),
        (f"```python\n{OTHER}\n```\n```python\n{FUNCTION}\n```\n```python\nprint(double(2))\n```", FUNCTION),
        (f"```python\ndef double(x): ...\n```\nBetter:\n```python\n{FUNCTION}\n```", FUNCTION),
        (f"```bash\npip install double\n```\n```python\n{FUNCTION}\n```", FUNCTION),
        ("1. Item\n   ```python\n   def double(x):\n       return 2 * x\n   ```", FUNCTION),
        (f"````markdown\n```\nnot code\n```\n````\n```python\n{FUNCTION}\n```", FUNCTION),
        (f"```python\n{FUNCTION}\n\ndef unfinished(y):\n    return (y +", FUNCTION),
        (f"<think>```python\n{OTHER}\n```</think>\n```python\n{FUNCTION}\n```", FUNCTION),
        (f"The function is\n\n{FUNCTION}\n\nand it is right.", FUNCTION),
        (f"{FUNCTION}\n\nassert double(2) == 4", f"{FUNCTION}\n\nassert double(2) == 4"),
        (f"```python\r\n{FUNCTION}\r\n```".replace("\n", "\r\n"), FUNCTION),
        ("double = lambda x: 2 * x".join(("```\n", "\n```")), "double = lambda x: 2 * x"),
        ("There is no code here.", None),
        ("", None),
        ("```python\n```", None),
    ],
)
def test_extraction(text: str, program: str | None) -> None:
    found = extract_program(text, "double")
    assert (found and found.strip()) == program


def test_extraction_completes_bodies() -> None:
    for body in ("    return 2 * x\n", "```python\n    return 2 * x\n```", "```python\nreturn 2 * x\n```"):
        program = extract_program(body, "double", HEAD)
        assert program is not None
        names: dict[str, Any] = {}
        exec(program, names)
        assert names["double"](4) == 8
    assert extract_program("```python\ndef double(x: List): return 2\n```", "double", HEAD) == (
        "from typing import List\n\n\ndef double(x: List): return 2\n"
    )
    assert complete(HEAD, "return 2 * x").endswith("    return 2 * x")
    assert complete(HEAD, "y = x\n    return 2 * y").endswith("    y = x\n    return 2 * y")


@pytest.mark.parametrize(
    "text", ["(" * 10**5, "-" * 10**5 + "1", "def f(:\n" * 2000, "x = [\n" * 5000, "```" * 10**4, "\0"]
)
def test_extraction_survives_nonsense(text: str) -> None:
    extract_program(f"```python\n{text}", "double", HEAD)
    extract_program(f"import re\n{text}", "double")


# --- EvalPlus -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "reference", "name", "arguments", "atol", "right"),
    [
        (2, 2, "f", [], 0, True),
        (2.0, 2, "f", [], 0, True),
        (0.1 + 0.2, 0.3, "f", [], 0, True),
        (0.31, 0.3, "f", [], 0, False),
        (0.31, 0.3, "f", [], 0.1, True),
        ([0.1 + 0.2, 1.0], [0.3, 1.0], "f", [], 0, True),
        ((0.3,), [0.3], "f", [], 0, False),
        ([0.3], [0.3, 0.3], "f", [], 0, False),
        ("0.3", 0.3, "f", [], 0, False),
        (float("nan"), 0.3, "f", [], 0, False),
        (float("inf"), float("inf"), "f", [], 0, True),
        ([2, 1, 1], [1, 2], "similar_elements", [], 0, True),
        ([1], [1, 2], "similar_elements", [], 0, False),
        ("match", True, "check_str", [], 0, True),
        (None, False, "check_str", [], 0, True),
        (False, True, "check_str", [], 0, False),
        (-0.5, 7.0, "find_zero", [[1, 2]], 1e-4, True),
        (0.5, -0.5, "find_zero", [[1, 2]], 1e-4, False),
        (0, 5, "sum_div", [], 0, True),
        (False, True, "are_equivalent", [], 0, True),
        (6, 9, "digit_distance_nums", [123, 256], 0, False),
        (7, 9, "digit_distance_nums", [123, 256], 0, True),
        (33, 0, "surface_Area", [3, 4], 0, False),
        (35, 0, "surface_Area", [3, 4], 0, True),
    ],
)
def test_comparison(
    output: Any, reference: Any, name: str, arguments: list[Any], atol: float, right: bool
) -> None:
    """By hand: digits |1-2| + |2-5| + |3-6| = 7; a pyramid of base 3 and height 4 has 9 + 6 * sqrt(1.5^2 +
    4^2) = 34.6."""
    assert matches(output, reference, name, arguments, atol) is right


def test_types_that_json_loses() -> None:
    assert restore_types("Mbpp/2", [[[1], [2]]]) == [[(1,), (2,)]]
    assert restore_types("Mbpp/124", [["1.5", "2j"]]) == [[1.5, 2j]]
    assert restore_types("Mbpp/115", [[[[1], []]]]) == [[[{1}, {}]]]
    assert restore_types("Mbpp/580", [[[1, [2]]]]) == [[(1, (2,))]]
    assert restore_types("Mbpp/3", [[[1]]]) == [[[1]]]


# --- long outputs ---------------------------------------------------------------------------------

LONG = {
    "prompt": "def count(n: int, start: int):\n",
    "entry_point": "count",
    "canonical_solution": "    return list(range(start, start + n))\n",
}
LONG_ANSWERS = {
    "the same": ("return list(range(start, start + n))", True),
    "equal numbers of another type": ("return [float(i) for i in range(start, start + n)]", True),
    "one wrong": (
        "found = list(range(start, start + n)); found[99:100] = [0] * (n > 99); return found",
        False,
    ),
    "too short": ("return list(range(start, start + n - 1))", False),
    "another type": ("return tuple(range(start, start + n))", False),
    "text of the right list": ("return str(list(range(start, start + n)))", False),
    "digests patched": (
        "import sys; sys.modules['wire'].digest = lambda value: 'x'; "
        "return [0] * n if n > 99 else list(range(start, start + n))",
        False,
    ),
    "nothing": ("return None", False),
}


def test_long_outputs_are_compared_without_leaving_the_sandboxes(tmp_path: Path) -> None:
    inputs = [[100_000, start] for start in range(3)]
    task = made_up(tmp_path, "humaneval+", LONG | {"base_input": [[3, 1]], "plus_input": inputs})
    verdicts = grade(
        task, *(f"```python\ndef count(n, start):\n    {body}\n```" for body, _ in LONG_ANSWERS.values())
    )
    assert [verdict.correct for verdict in verdicts] == [right for _, right in LONG_ANSWERS.values()]
    (reference,) = task._references.values()
    assert [kind for kind, _ in reference.result] == ["value", "digest", "digest", "digest"]
    assert verdicts[2].detail.startswith("failed: AssertionError: input 2 of 4:")


@pytest.mark.slow
def test_an_output_beyond_the_longest_message(tmp_path: Path) -> None:
    """As HumanEval/130 and Mbpp/255 have them: 90 MB as JSON."""
    task = made_up(tmp_path, "humaneval+", LONG | {"base_input": [[3, 1]], "plus_input": [[10**7, 10**6]]})
    bodies = [LONG_ANSWERS[name][0] for name in ("the same", "one wrong")]
    verdicts = grade(task, *(f"```python\ndef count(n, start):\n    {body}\n```" for body in bodies))
    assert [verdict.correct for verdict in verdicts] == [True, False]
    (reference,) = task._references.values()
    assert len(json.dumps(reference.result)) < 1000


# --- the benchmarks themselves --------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_reference_solutions_pass(name: str, shared: Path) -> None:
    """A few of each format; `test_all_reference_solutions_pass` runs the rest."""
    file, _ = FILES[name]
    task = FACTORIES[name.partition("-")[0]](shared / "data" / file, limit=10)
    check_references(task, task.examples()[::2])


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_all_reference_solutions_pass(name: str, shared: Path) -> None:
    file, count = FILES[name]
    task = FACTORIES[name.partition("-")[0]](shared / "data" / file)
    assert len(task.examples()) == count
    check_references(task, task.examples())


def check_references(task: CodeTask, examples: Any) -> None:
    verdicts = task.grade(
        examples, [Answer(text=f"```python\n{example.solution}\n```") for example in examples]
    )
    wrong = {
        example.id: verdict.detail
        for example, verdict in zip(examples, verdicts, strict=True)
        if not verdict.correct
    }
    assert wrong == {}


@pytest.mark.parametrize("name", ["humaneval", "humaneval+", "mbpp", "mbpp+"])
def test_stubs_fail(name: str, shared: Path) -> None:
    """Functions that return nothing, of real problems: the tests do test."""
    task = FACTORIES[name](shared / "data" / FILES[name][0], limit=6)
    examples = task.examples()
    names = [problem.entry_point for problem in task._problems.values()]
    verdicts = task.grade(
        examples, [Answer(text=f"```python\ndef {name}(*args, **kwargs): pass\n```") for name in names]
    )
    assert not any(verdict.correct for verdict in verdicts)
