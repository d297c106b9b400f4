"""HumanEval, MBPP, HumanEval+ and MBPP+: an answer is right if its program passes the benchmark's tests in
the sandbox."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from hpd.evaluate.benchmarks import code_oracle
from hpd.evaluate.benchmarks.code_problems import (
    Problem,
    complete,
    evalplus_problem,
    extract_program,
    human_eval_problem,
    mbpp_problem,
    read_problems,
)
from hpd.evaluate.benchmarks.rows import Data
from hpd.evaluate.sandbox import Limits, Outcome, Program, Tests, run_many, sandbox_report
from hpd.evaluate.task import Example, Verdict
from hpd.generation.texts import Answer

Style: TypeAlias = Literal["instruct", "completion"]


INSTRUCTION = (
    "Write a self-contained Python script that solves the problem below, using the standard library only. "
    "Answer with the script in one Markdown code block.\n\n```python\n{prompt}\n```"
)
"""The prompt of the instruct style; ``{prompt}`` is the benchmark's own."""


# A completion is over where something at the margin starts that is no part of the solution.
_STOP_IN_FUNCTION = (
    "\nclass ",
    "\ndef ",
    "\n#",
    "\n@",
    "\nif ",
    "\nprint(",
    "\nassert ",
    "\n```",
    '\n"""',
    "\n</",
)


_STOP_IN_SCRIPT = ("\nassert ", "\nprint(", "\nif __name__", "\n# Test", "\n```", '\n"""', "\n</")


# A program may take this many times as long as the reference (EvalPlus), where that is more than the limits.
_TIMES_REFERENCE = 4


# What a reference may take: some of MBPP+ count to 10^8 on dozens of inputs.
_REFERENCE_LIMITS = Limits(cpu_seconds=120, wall_seconds=480)


_ORACLE = Path(code_oracle.__file__)


class CodeTask:
    """Problems whose answers are programs.

    Args:
        name: the task's.
        problems: what to solve.
        options: what decides examples and grades; the factories fill it.
        style: "instruct" asks for a script in a code block; "completion" gives the benchmark's prompt to
            continue.
        instruction: the prompt of the instruct style.
        limits: what a program may use.
        num_workers: programs at a time; None is one per processor.
        stop: strings that end an answer in the completion style.

    Raises:
        ValueError: an unknown style, an instruction without ``{prompt}``, or a system that cannot isolate
            programs.
    """

    metric = "accuracy"

    def __init__(
        self,
        name: str,
        problems: Sequence[Problem],
        options: Mapping[str, Any],
        *,
        style: Style,
        instruction: str,
        limits: Limits,
        num_workers: int | None,
        stop: tuple[str, ...],
    ) -> None:
        if style not in ("instruct", "completion"):
            raise ValueError(f"style is {style!r}; it must be instruct or completion.")
        if "{prompt}" not in instruction:
            raise ValueError(
                f"the instruction {instruction!r} lacks {{prompt}}, the place of the problem; put it in."
            )
        if style == "completion" and instruction != INSTRUCTION:
            raise ValueError(
                "instruction has no effect in the completion style; leave it out, or choose style instruct."
            )
        try:
            self._report = sandbox_report()
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        self.name = name
        self.options = {**options, "style": style, "instruction": instruction, "limits": repr(limits)}
        completion = {"max_new_tokens": 512, "chat_template": "never", "stop": stop}
        self.defaults: Mapping[str, Any] = completion if style == "completion" else {"max_new_tokens": 1024}
        self._problems = {problem.id: problem for problem in problems}
        self._style = style
        self._instruction = instruction
        self._limits = limits
        self._num_workers = num_workers
        self._references: dict[
            str, tuple[list[Any], float]
        ] = {}  # outputs and seconds, by problem, as they are needed

    def examples(self) -> list[Example]:
        return [
            Example(
                id=problem.id,
                prompt=self._prompt(problem),
                answer=problem.solution,
                solution=problem.solution,
                metadata=problem.row,
            )
            for problem in self._problems.values()
        ]

    def grade(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Verdict]:
        """Extract a program from each answer and run the tests on all, in parallel.

        Raises:
            ValueError: the reference solution of an EvalPlus problem does not run.
        """
        problems = [self._problems[example.id] for example in examples]
        sources = [
            self._source(problem, answer.text) for problem, answer in zip(problems, answers, strict=True)
        ]
        found = [index for index, source in enumerate(sources) if source is not None]
        self._run_references([problems[index] for index in found])
        programs = [self._judged(problems[index], sources[index] or "") for index in found]
        outcomes = dict(zip(found, self._run(programs), strict=True))
        return [_verdict(source, outcomes.get(index)) for index, source in enumerate(sources)]

    def notice(self, num_samples: int) -> str:
        """Which isolation is in effect."""
        lines = "\n".join(f"  {line}" for line in self._report.lines)
        return f"{self.name}: model-written code runs in a sandbox, level {self._report.level}\n{lines}"

    def _prompt(self, problem: Problem) -> str:
        if self._style == "completion":
            return (
                problem.prompt.rstrip()
            )  # the line break is the model's: most tokenizers join it with what follows
        return self._instruction.replace("{prompt}", problem.prompt.strip())

    def _source(self, problem: Problem, text: str) -> str | None:
        if self._style == "completion" and "```" not in text:
            return complete(problem.python_prompt, text.replace("\r\n", "\n")) if text.strip() else None
        return extract_program(text, problem.entry_point, problem.python_prompt)

    def _judged(self, problem: Problem, source: str) -> Program:
        if problem.tests is not None:
            return Program(source=source, tests=problem.tests)
        outputs, cpu_seconds = self._references[problem.id]
        data = [problem.entry_point, list(problem.inputs), outputs, problem.atol]
        tests = Tests(
            source=f"{_ORACLE.read_text('utf-8')}\ncompare(getattr(program, data[0]), *data)\n", data=data
        )
        allowed = math.ceil(_TIMES_REFERENCE * cpu_seconds)
        factor = max(1, allowed / self._limits.cpu_seconds)
        limits = replace(
            self._limits,
            cpu_seconds=max(self._limits.cpu_seconds, allowed),
            wall_seconds=self._limits.wall_seconds * factor,
        )
        return Program(source=source, tests=tests, limits=limits)

    def _run_references(self, problems: Sequence[Problem]) -> None:
        missing = {p.id: p for p in problems if p.tests is None and p.id not in self._references}
        source = (
            f"{_ORACLE.read_text('utf-8')}\nresult = reference_outputs(getattr(program, data[0]), *data)\n"
        )
        limits = replace(_REFERENCE_LIMITS, memory_mib=self._limits.memory_mib)
        programs = [
            Program(
                source=p.solution,
                tests=Tests(source=source, data=[p.entry_point, list(p.inputs)]),
                limits=limits,
            )
            for p in missing.values()
        ]
        for id_, outcome in zip(missing, self._run(programs), strict=True):
            if outcome.status != "passed":
                raise ValueError(
                    f"the reference solution of {id_} cannot be run: {outcome.status}, {outcome.detail}. "
                    f"Its data are damaged, or the limits are too low for it: {limits}."
                )
            self._references[id_] = (outcome.result, outcome.cpu_seconds)

    def _run(self, programs: Sequence[Program]) -> list[Outcome]:
        return run_many(programs, num_workers=self._num_workers, limits=self._limits)


def human_eval(
    data: Data,
    *,
    limit: int | None = None,
    style: Style = "instruct",
    instruction: str = INSTRUCTION,
    num_workers: int | None = None,
    cpu_seconds: int = Limits.cpu_seconds,
    wall_seconds: float = Limits.wall_seconds,
    memory_mib: int = Limits.memory_mib,
) -> CodeTask:
    """HumanEval: the row's `check` on the function whose head and docstring are the prompt.

    Args:
        data: columns task_id, prompt, entry_point, canonical_solution, test.
        limit: the first n problems; None is all.
        style, instruction, num_workers: see `CodeTask`.
        cpu_seconds, wall_seconds, memory_mib: see `Limits`.

    Reference:
        Chen et al., Evaluating Large Language Models Trained on Code, 2021, arXiv 2107.03374.
    """
    limits = Limits(cpu_seconds=cpu_seconds, wall_seconds=wall_seconds, memory_mib=memory_mib)
    return CodeTask(
        "humaneval",
        read_problems(data, limit, human_eval_problem),
        {"data": str(data), "limit": limit},
        style=style,
        instruction=instruction,
        limits=limits,
        num_workers=num_workers,
        stop=_STOP_IN_FUNCTION,
    )


def human_eval_plus(
    data: Data,
    *,
    limit: int | None = None,
    plus: bool = True,
    style: Style = "instruct",
    instruction: str = INSTRUCTION,
    num_workers: int | None = None,
    cpu_seconds: int = Limits.cpu_seconds,
    wall_seconds: float = Limits.wall_seconds,
    memory_mib: int = Limits.memory_mib,
) -> CodeTask:
    """HumanEval+: outputs on many more inputs, compared with the reference's as EvalPlus does.

    Args:
        data: EvalPlus's release file: columns task_id, prompt, entry_point, canonical_solution, base_input,
            plus_input, atol.
        limit: the first n problems; None is all.
        plus: False compares on the inputs of HumanEval itself only.
        style, instruction, num_workers: see `CodeTask`.
        cpu_seconds, wall_seconds, memory_mib: see `Limits`.

    Reference:
        Liu et al., Is Your Code Generated by ChatGPT Really Correct?, 2023, arXiv 2305.01210.
    """
    limits = Limits(cpu_seconds=cpu_seconds, wall_seconds=wall_seconds, memory_mib=memory_mib)
    return CodeTask(
        "humaneval+",
        read_problems(data, limit, lambda row: evalplus_problem(row, plus, continued=True)),
        {"data": str(data), "limit": limit, "plus": plus},
        style=style,
        instruction=instruction,
        limits=limits,
        num_workers=num_workers,
        stop=_STOP_IN_FUNCTION,
    )


def mbpp(
    data: Data,
    *,
    limit: int | None = None,
    style: Style = "instruct",
    instruction: str = INSTRUCTION,
    num_workers: int | None = None,
    cpu_seconds: int = Limits.cpu_seconds,
    wall_seconds: float = Limits.wall_seconds,
    memory_mib: int = Limits.memory_mib,
) -> CodeTask:
    """MBPP, full or sanitized: the row's assertions, which are part of the prompt.

    Args:
        data: columns task_id, text (sanitized: prompt), code, test_list; test_setup_code and test_imports
            where needed.
        limit: the first n problems; None is all.
        style, instruction, num_workers: see `CodeTask`.
        cpu_seconds, wall_seconds, memory_mib: see `Limits`.

    Reference:
        Austin et al., Program Synthesis with Large Language Models, 2021, arXiv 2108.07732.
    """
    limits = Limits(cpu_seconds=cpu_seconds, wall_seconds=wall_seconds, memory_mib=memory_mib)
    return CodeTask(
        "mbpp",
        read_problems(data, limit, mbpp_problem),
        {"data": str(data), "limit": limit},
        style=style,
        instruction=instruction,
        limits=limits,
        num_workers=num_workers,
        stop=_STOP_IN_SCRIPT,
    )


def mbpp_plus(
    data: Data,
    *,
    limit: int | None = None,
    plus: bool = True,
    style: Style = "instruct",
    instruction: str = INSTRUCTION,
    num_workers: int | None = None,
    cpu_seconds: int = Limits.cpu_seconds,
    wall_seconds: float = Limits.wall_seconds,
    memory_mib: int = Limits.memory_mib,
) -> CodeTask:
    """MBPP+: outputs on many more inputs, compared with the reference's as EvalPlus does.

    Args:
        data: EvalPlus's release file, columns as for `human_eval_plus`.
        limit: the first n problems; None is all.
        plus: False compares on the inputs of MBPP itself only.
        style, instruction, num_workers: see `CodeTask`.
        cpu_seconds, wall_seconds, memory_mib: see `Limits`.

    Reference:
        Liu et al., Is Your Code Generated by ChatGPT Really Correct?, 2023, arXiv 2305.01210.
    """
    limits = Limits(cpu_seconds=cpu_seconds, wall_seconds=wall_seconds, memory_mib=memory_mib)
    return CodeTask(
        "mbpp+",
        read_problems(data, limit, lambda row: evalplus_problem(row, plus, continued=False)),
        {"data": str(data), "limit": limit, "plus": plus},
        style=style,
        instruction=instruction,
        limits=limits,
        num_workers=num_workers,
        stop=_STOP_IN_SCRIPT,
    )


def _verdict(source: str | None, outcome: Outcome | None) -> Verdict:
    if source is None or outcome is None:
        return Verdict(correct=False, detail="no code in the answer")
    if outcome.status == "passed":
        return Verdict(correct=True, extracted=source)
    return Verdict(correct=False, extracted=source, detail=f"{outcome.status}: {outcome.detail}")
