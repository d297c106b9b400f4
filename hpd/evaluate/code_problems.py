"""Rows of the code benchmarks as problems: prompt, function, reference and tests, whatever the format."""

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpd.evaluate.evalplus_inputs import restore_types
from hpd.evaluate.rows import Data, Row, read_rows
from hpd.evaluate.sandbox import Tests


@dataclass(frozen=True, kw_only=True)
class Problem:
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


def read_problems(data: Data, limit: int | None, make: Callable[[Row], Problem]) -> list[Problem]:
    """Problems of a file.

    Raises:
        ValueError: a column is missing, code is not Python, or an id is repeated.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; give the number of problems to keep (1 or more), or None for all.")
    problems = []
    for number, row in enumerate(read_rows(data)[:limit], start=1):
        try:
            problems.append(make(row))
        except KeyError as error:
            raise ValueError(
                f"row {number} of {data} lacks the column {error}; it has {', '.join(row)}. "
                "HumanEval+ and MBPP+ take EvalPlus's release files (.jsonl.gz with base_input and plus_input)."
            ) from error
        except SyntaxError as error:
            raise ValueError(f"row {number} of {data} holds code that is not Python: {error}") from error
    ids = [problem.id for problem in problems]
    if len(set(ids)) < len(ids):
        repeated = next(id_ for id_ in ids if ids.count(id_) > 1)
        raise ValueError(f"{data} has the task_id {repeated} more than once; every problem needs one of its own.")
    return problems


def human_eval_problem(row: Row) -> Problem:
    """A row of HumanEval."""
    solution = row["prompt"] + row["canonical_solution"]
    # The reference is part of the tests for the prompt's helpers, which some of them call.
    tests = Tests(source=f"{solution}\n{row['test']}\ncheck(program.{row['entry_point']})\n")
    return Problem(
        id=row["task_id"],
        prompt=row["prompt"],
        python_prompt=row["prompt"],
        entry_point=row["entry_point"],
        solution=solution,
        tests=tests,
        row=row,
    )


def evalplus_problem(row: Row, plus: bool, continued: bool) -> Problem:
    """A row of an EvalPlus release; `continued` where solutions continue the prompt."""
    inputs = [*row["base_input"], *(row["plus_input"] if plus else [])]
    return Problem(
        id=row["task_id"],
        prompt=row["prompt"],
        python_prompt=row["prompt"] if continued else "",
        entry_point=row["entry_point"],
        solution=row["prompt"] + row["canonical_solution"],
        inputs=tuple(inputs if continued else restore_types(row["task_id"], inputs)),
        atol=row["atol"] or 0,
        row=row,
    )


def mbpp_problem(row: Row) -> Problem:
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
        raise ValueError(f"the tests of task {row['task_id']} use nothing that its code defines: {assertions}")
    return Problem(
        id=str(row["task_id"]),
        prompt="\n".join(['"""', text, *assertions, '"""', ""]),
        entry_point=entry_points[-1],
        solution=code,
        tests=Tests(source=source, remote_names=tuple(definitions)),
        row=row,
    )


def _top_level(code: str) -> tuple[list[str], list[str]]:
    """Names that a program defines, and its imports, which the tests may use."""
    names, imports = [], []
    for node in ast.parse(code).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(ast.unparse(node))
    return names, imports
