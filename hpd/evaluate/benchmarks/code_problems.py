"""Rows of the code benchmarks as problems: prompt, function, reference and tests, whatever the format."""

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpd.evaluate.benchmarks.code_extraction import complete, extract_program
from hpd.evaluate.benchmarks.rows import Data, Row, read_rows
from hpd.evaluate.sandbox import Tests

__all__ = [
    "CodeProblem",
    "complete",
    "evalplus_problem",
    "extract_program",
    "human_eval_problem",
    "mbpp_problem",
    "read_problems",
    "restore_types",
]


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

    @property
    def imports(self) -> str:
        """The reference's imports, indented."""
        return "".join(f"    {line}\n" for line in _top_level(self.solution)[1])


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
