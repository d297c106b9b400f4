"""Rows of the code benchmarks as problems: prompt, function, reference and tests, whatever the format."""

import ast
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from hpd.evaluate.benchmarks.rows import Data, Row, read_rows
from hpd.evaluate.sandbox import Tests


@dataclass(frozen=True, kw_only=True)
class CodeProblem:
    """One row, whatever its format."""

    id: str
    prompt: str
    """As the benchmark words it, for the completion style."""
    python_prompt: str = ""
    """The prompt where a solution continues it, else empty."""
    entry_point: str
    solution: str
    """The reference, a whole program."""
    tests: Tests | None = None
    """None: `inputs` are compared with what the reference returns on them."""
    inputs: tuple[list[Any], ...] = ()
    atol: float = 0
    """Absolute tolerance of the comparison."""
    row: Row


def read_problems(data: Data, limit: int | None, make: Callable[[Row], CodeProblem]) -> list[CodeProblem]:
    """Problems of a file.

    Raises:
        ValueError: a column is missing, code is not Python, or an id is repeated.
    """
    if limit is not None and limit < 1:
        raise ValueError(
            f"limit is {limit}; give the number of problems to keep (1 or more), or None for all."
        )
    problems = []
    for number, row in enumerate(read_rows(data)[:limit], start=1):
        try:
            problems.append(make(row))
        except KeyError as error:
            raise ValueError(
                f"row {number} of {data} lacks the column {error}; it has {', '.join(row)}. HumanEval+ and "
                "MBPP+ take EvalPlus's release files (.jsonl.gz with base_input and plus_input)."
            ) from error
        except SyntaxError as error:
            raise ValueError(f"row {number} of {data} holds code that is not Python: {error}") from error
    ids = [problem.id for problem in problems]
    if len(set(ids)) < len(ids):
        repeated = next(id_ for id_ in ids if ids.count(id_) > 1)
        raise ValueError(
            f"{data} has the task_id {repeated} more than once; every problem needs one of its own."
        )
    return problems


def human_eval_problem(row: Row) -> CodeProblem:
    """A row of HumanEval."""
    solution = row["prompt"] + row["canonical_solution"]
    # The reference is part of the tests for the prompt's helpers, which some of them call.
    tests = Tests(source=f"{solution}\n{row['test']}\ncheck(program.{row['entry_point']})\n")
    return CodeProblem(
        id=row["task_id"],
        prompt=row["prompt"],
        python_prompt=row["prompt"],
        entry_point=row["entry_point"],
        solution=solution,
        tests=tests,
        row=row,
    )


def evalplus_problem(row: Row, plus: bool, continued: bool) -> CodeProblem:
    """A row of an EvalPlus release; `continued` where solutions continue the prompt."""
    inputs = [*row["base_input"], *(row["plus_input"] if plus else [])]
    return CodeProblem(
        id=row["task_id"],
        prompt=row["prompt"],
        python_prompt=row["prompt"] if continued else "",
        entry_point=row["entry_point"],
        solution=row["prompt"] + row["canonical_solution"],
        inputs=tuple(inputs if continued else restore_types(row["task_id"], inputs)),
        atol=row["atol"] or 0,
        row=row,
    )


def mbpp_problem(row: Row) -> CodeProblem:
    """A row of MBPP, full or sanitized."""
    code = row["code"].replace("\r\n", "\n")
    text = (row["text"] if "text" in row else row["prompt"]).strip()
    setup = [*row.get("test_imports", []), row.get("test_setup_code", "")]
    assertions = [line.replace("\r\n", "\n") for line in row["test_list"]]
    definitions, imports = _top_level(code)
    source = "\n".join([*imports, *(line.replace("\r\n", "\n") for line in setup), *assertions])
    used = {node.id for node in ast.walk(ast.parse("\n".join(assertions))) if isinstance(node, ast.Name)}
    entry_points = [name for name in definitions if name in used]
    if not entry_points:
        raise ValueError(
            f"the tests of task {row['task_id']} use nothing that its code defines: {assertions}"
        )
    return CodeProblem(
        id=str(row["task_id"]),
        prompt="\n".join(['"""', text, *assertions, '"""', ""]),
        entry_point=entry_points[-1],
        solution=code,
        tests=Tests(source=source, remote_names=tuple(definitions)),
        row=row,
    )


def _top_level(code: str) -> tuple[list[str], list[str]]:
    """Names that a program defines, and its imports, which the tests may use."""
    names = []
    imports = []
    for node in ast.parse(code).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(ast.unparse(node))
    return names, imports


_FENCE = re.compile(r"^[ \t]*(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[\w+#.-]*)[^\n`]*$", re.MULTILINE)
_PYTHON = {"", "python", "python3", "py", "python2", "py3"}
_CODE_START = re.compile(r"^(?:import |from \w[\w.]* import |def |async def |class |@\w)")
_THINKING_END = "</think>"
_MAX_TRIMS = 100  # ends tried of a text that is not Python as a whole
_MAX_CODE_CHARS = 200_000  # longer than any solution; Python's parser is slow on what loops


class _Block(NamedTuple):
    code: str
    language: str


def extract_program(text: str, entry_point: str, prompt: str = "") -> str | None:
    """The program in an answer, ready to run; None where there is no code.

    Of several fenced blocks the last that defines `entry_point` counts, else the longest. Without fences, the
    code is what lies between the first line that starts like Python and the last line up to which all parses.
    What a prompt in Python brings (imports, helpers, the head of the function) is put before code that lacks
    it.

    Args:
        text: the answer; what precedes ``</think>`` is dropped.
        entry_point: the function that the tests call.
        prompt: the prompt where it is Python that ends in the head of the function (HumanEval), else empty.
    """
    text = text.rpartition(_THINKING_END)[2].replace("\r\n", "\n")
    code = _best_block(text, entry_point)
    if code is None:
        code = _code_in_prose(text) if not _continues(text, prompt) else text
    if code is None or not code.strip():
        return None
    if _defines(code, entry_point):
        return _preamble(prompt, entry_point) + code
    if prompt:
        return complete(prompt, code)
    return code


def complete(prompt: str, body: str) -> str:
    """A prompt in Python and its continuation; a body that lost its indentation, or that of its first line,
    gets it back."""
    for restored in (body, "    " + body.lstrip(), textwrap.indent(textwrap.dedent(body), "    ")):
        if _parses(prompt + restored):
            return prompt + restored
    return _longest_prefix(prompt + body, keep=len(prompt.split("\n"))) or prompt + body


def _best_block(text: str, entry_point: str) -> str | None:
    blocks = list(_blocks(text))
    candidates = [block.code for block in blocks if block.language in _PYTHON] or [
        block.code for block in blocks
    ]
    if not candidates:
        return None
    defining = [code for code in candidates if _defines(code, entry_point)]
    return defining[-1] if defining else max(candidates, key=len)


def _blocks(text: str) -> Iterator[_Block]:
    """Fenced blocks; one that is never closed reaches to the end, as far as it is Python."""
    position = 0
    while opening := _FENCE.search(text, position):
        mark = opening["mark"]
        closing = re.compile(rf"^[ \t]*{mark[0]}{{{len(mark)},}}[ \t]*$", re.MULTILINE).search(
            text, opening.end()
        )
        code = textwrap.dedent(text[opening.end() + 1 : closing.start() if closing else len(text)])
        yield _Block(code if closing else (_longest_prefix(code) or code), opening["language"].lower())
        position = closing.end() if closing else len(text)


def _code_in_prose(text: str) -> str | None:
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if _CODE_START.match(line):
            found = _longest_prefix("\n".join(lines[number:]))
            if found is not None:
                return found
    return None


def _continues(text: str, prompt: str) -> bool:
    """True if the answer is the rest of the prompt's function: it starts indented and parses behind it."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    return (
        bool(prompt)
        and first[:1] in (" ", "\t")
        and (_longest_prefix(prompt + text, len(prompt.split("\n"))) is not None)
    )


def _longest_prefix(code: str, keep: int = 1) -> str | None:
    """The longest prefix, in whole lines and of at least `keep`, that is Python."""
    lines = code.split("\n")
    end = len(lines)
    for _ in range(_MAX_TRIMS):
        if end < keep:
            break
        candidate = "\n".join(lines[:end])
        error_line = _error_line(candidate)
        if error_line is None:
            return candidate if candidate.strip() else None
        end = min(end, error_line) - 1  # what ends at the error or behind it has the error too
    return None


def _defines(code: str, name: str) -> bool:
    return (
        re.search(
            rf"^\s*(?:async\s+)?(?:def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*=",
            code,
            re.MULTILINE,
        )
        is not None
    )


def _preamble(prompt: str, entry_point: str) -> str:
    """The imports and helpers above the function's head."""
    match = re.search(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\b", prompt, re.MULTILINE)
    return prompt[: match.start()] if match else ""


def _parses(code: str) -> bool:
    return _error_line(code) is None


def _error_line(code: str) -> int | None:
    """None where the code is Python, else the line that is not, from 1."""
    last = code.count("\n") + 1
    if len(code) > _MAX_CODE_CHARS:
        return last
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes
            # More than parsing: a return needs its function.
            compile(code, "<answer>", "exec", dont_inherit=True)
    except SyntaxError as error:
        return error.lineno or last
    except (ValueError, RecursionError, MemoryError):
        return last
    return None


Arguments = list[Any]


def restore_types(task_id: str, inputs: list[Arguments]) -> list[Arguments]:
    """The inputs of an MBPP+ problem as its reference expects them.

    >>> restore_types("Mbpp/2", [[[3, 4], [4, 5]]])
    [[(3, 4), (4, 5)]]
    """
    number = task_id.rpartition("/")[2]
    restore = next((function for function, numbers in _RESTORED.items() if number in numbers.split()), list)
    return [list(restore(arguments)) for arguments in inputs]


def _tuples(arguments: Arguments) -> Arguments:
    return [tuple(argument) for argument in arguments]


def _lists_of_tuples(arguments: Arguments) -> Arguments:
    return [[tuple(item) for item in argument] for argument in arguments]


def _tuples_of_tuples(arguments: Arguments) -> Arguments:
    return [tuple(tuple(item) for item in argument) for argument in arguments]


def _tuples_of_some_tuples(arguments: Arguments) -> Arguments:
    return [
        tuple(tuple(item) if isinstance(item, list) else item for item in argument) for argument in arguments
    ]


def _first_a_list_of_tuples(arguments: Arguments) -> Arguments:
    return [[tuple(item) for item in arguments[0]], *arguments[1:]]


def _first_a_tuple(arguments: Arguments) -> Arguments:
    return [tuple(arguments[0]), *arguments[1:]]


def _second_a_tuple(arguments: Arguments) -> Arguments:
    return [arguments[0], tuple(arguments[1]), *arguments[2:]]


def _list_of_sets(arguments: Arguments) -> Arguments:
    # The text of the problem calls them dictionaries, and an empty one is.
    return [[set(item) if isinstance(item, list) and item else {} for item in arguments[0]]]


def _real_and_complex(arguments: Arguments) -> Arguments:
    return [float(arguments[0]), complex(arguments[1])]


def _complex(arguments: Arguments) -> Arguments:
    return [complex(arguments[0])]


def _dict_of_tuples(arguments: Arguments) -> Arguments:
    return [{key: tuple(value) for key, value in arguments[0].items()}, *arguments[1:]]


def _all_tuples(arguments: Any) -> Any:
    return tuple(_all_tuples(item) for item in arguments) if isinstance(arguments, list) else arguments


# Numbers of MBPP+ problems whose inputs JSON changed.
_RESTORED: dict[Callable[[Arguments], Any], str] = {
    _tuples: "2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809",
    _lists_of_tuples: "63 64 70 94 120 237 272 299 400 409 417 438 473 614 780",
    _tuples_of_tuples: "259 401 445",
    _tuples_of_some_tuples: "278",
    _first_a_list_of_tuples: "75 413 444 753",
    _first_a_tuple: "250 307 405 446 617 720 763 808",
    _second_a_tuple: "106 750",
    _list_of_sets: "115",
    _real_and_complex: "124",
    _complex: "252",
    _dict_of_tuples: "722",
    _all_tuples: "580 615 791",
}
