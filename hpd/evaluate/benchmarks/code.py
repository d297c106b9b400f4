"""HumanEval, MBPP, HumanEval+ and MBPP+: an answer is right if its program passes the benchmark's tests in
the sandbox."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from hpd.evaluate.benchmarks import code_oracle
from hpd.evaluate.benchmarks.code_problems import (
    CodeProblem,
    evalplus_problem,
    human_eval_problem,
    mbpp_problem,
    read_problems,
)
from hpd.evaluate.benchmarks.rows import Data
from hpd.evaluate.benchmarks.workers import Worker
from hpd.evaluate.sandbox import Limits, Outcome, Program, Tests, run_many, sandbox_report
from hpd.evaluate.task import CannotGrade, Example, Verdict
from hpd.generation.texts import Answer

__all__ = ["INSTRUCTION", "CodeTask", "EvalPlusTask", "human_eval", "human_eval_plus", "mbpp", "mbpp_plus"]

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
_TIMES_MEMORY = 2  # and hold this many times as much
_BY_CLOCK = "[clock]"
"""Mark of a verdict that the clock gave rather than processor time, tests or the program."""

# Limits of a reference: some of MBPP+ count to 10^8 on dozens of inputs, and Mbpp/255 returns a list of
# 1.3 GB. The memory is EvalPlus's.
_REFERENCE_LIMITS = Limits(cpu_seconds=120, wall_seconds=480, memory_mib=4096)

_EXTRACTOR = "hpd.evaluate.benchmarks.code_worker"
# An ordinary answer takes milliseconds; the budget of the extraction, on a busy machine, a few seconds.
_EXTRACTION_SECONDS = 30.0
_MAX_ANSWER_CHARS = 1_000_000

_ORACLE = Path(code_oracle.__file__)
# The tests of an EvalPlus problem, behind the oracle.
_KEEP = "result = kept_outputs(wire.by_digest(getattr(program, data[0])), *data, wire)\n"
_COMPARE = """
def _imports():  # the reference's, for a sandbox that must know what it will import
    pass
{imports}

compare_outputs(wire.by_digest(getattr(program, data[0])), *data, wire)
"""


@dataclass(eq=False)
class CodeTask:
    """Problems whose answers are programs.

    Raises:
        ValueError: an unknown style, an instruction without ``{prompt}`` or without effect, unreadable data,
            or a system that cannot isolate programs.
    """

    metric: ClassVar[str] = "accuracy"

    name: str
    """The task's."""
    read: Callable[..., CodeProblem]
    """From a row to its problem."""
    stop: tuple[str, ...]
    """Strings that end an answer in the completion style."""
    data: Data
    """The benchmark's file."""
    _: KW_ONLY
    limit: int | None = None
    """First n problems; None is all."""
    style: Literal["instruct", "completion"] = "instruct"
    """instruct asks for a script in a code block; completion gives the benchmark's prompt to continue."""
    instruction: str = INSTRUCTION
    """The prompt of the instruct style."""
    num_workers: int | None = None
    """Programs at a time; None is one per processor."""
    cpu_seconds: int = Limits.cpu_seconds
    wall_seconds: float = Limits.wall_seconds
    memory_mib: int = Limits.memory_mib

    def __post_init__(self) -> None:
        if self.style not in ("instruct", "completion"):
            raise ValueError(f"style is {self.style!r}; it must be instruct or completion.")
        if "{prompt}" not in self.instruction:
            raise ValueError(
                f"the instruction {self.instruction!r} lacks {{prompt}}, the place of the problem; put it in."
            )
        if self.style == "completion" and self.instruction != INSTRUCTION:
            raise ValueError(
                "instruction has no effect in the completion style; leave it out, or choose style instruct."
            )
        try:
            self._report = sandbox_report()
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        self._limits = Limits(
            cpu_seconds=self.cpu_seconds, wall_seconds=self.wall_seconds, memory_mib=self.memory_mib
        )
        self.options: Mapping[str, Any] = {
            "data": str(self.data),
            "limit": self.limit,
            "style": self.style,
            "instruction": self.instruction,
            "limits": repr(self._limits),
        }
        completion = {"max_new_tokens": 512, "chat_template": "never", "stop": self.stop}
        self.defaults: Mapping[str, Any] = (
            completion if self.style == "completion" else {"max_new_tokens": 1024}
        )
        self._problems = {problem.id: problem for problem in self._read_problems()}
        # Runs of the references by problem, as they are needed; their results are those of `kept_outputs`.
        self._references: dict[str, Outcome] = {}

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
            CannotGrade: the reference solution of an EvalPlus problem does not run.
        """
        problems = [self._problems[example.id] for example in examples]
        sources = self._sources(problems, [answer.text for answer in answers])
        found = [index for index, source in enumerate(sources) if source is not None]
        self._run_references([problems[index] for index in found])
        programs = [self._judged(problems[index], sources[index] or "") for index in found]
        outcomes = dict(zip(found, self._run(programs), strict=True))
        return [_verdict(source, outcomes.get(index)) for index, source in enumerate(sources)]

    def summary(
        self, examples: Sequence[Example], answers: Sequence[Answer], verdicts: Sequence[Verdict]
    ) -> Mapping[str, float]:
        """How many programs the clock ended, alone and with the limit that the machine's load allows."""
        stopped = sum(verdict.detail.startswith(_BY_CLOCK) for verdict in verdicts)
        return {"stopped_by_clock": stopped} if stopped else {}

    def notice(self, num_samples: int) -> str:
        """Isolation in effect."""
        lines = "\n".join(f"  {line}" for line in self._report.lines)
        return f"{self.name}: model-written code runs in a sandbox, level {self._report.level}\n{lines}"

    def _read_problems(self) -> list[CodeProblem]:
        return read_problems(self.data, self.limit, self.read)

    def _prompt(self, problem: CodeProblem) -> str:
        if self.style == "completion":
            # The line break is the model's: most tokenizers join it with what follows.
            return problem.prompt.rstrip()
        return self.instruction.replace("{prompt}", problem.prompt.strip())

    def _sources(self, problems: Sequence[CodeProblem], texts: Sequence[str]) -> list[str | None]:
        """The program in each answer; None where there is none, or where finding it took too long."""
        first = {"text": "", "entry_point": "f", "prompt": "", "style": self.style}
        worker = Worker(_EXTRACTOR, first)
        found: list[str | None] = []
        try:
            for problem, text in zip(problems, texts, strict=True):
                request = {
                    "text": text[-_MAX_ANSWER_CHARS:],
                    "entry_point": problem.entry_point,
                    "prompt": problem.python_prompt,
                    "style": self.style,
                }
                reply = worker.ask(request, _EXTRACTION_SECONDS)
                found.append(reply["program"] if reply else None)
        finally:
            worker.close()
        return found

    def _judged(self, problem: CodeProblem, source: str) -> Program:
        if problem.tests is not None:
            return Program(source=source, tests=problem.tests)
        reference = self._references[problem.id]
        data = [problem.entry_point, list(problem.inputs), reference.result, problem.atol, problem.solution]
        compare = _COMPARE.format(imports=problem.imports)
        tests = Tests(source=f"{_ORACLE.read_text('utf-8')}\n{compare}", data=data)
        allowed = math.ceil(_TIMES_REFERENCE * reference.cpu_seconds)
        factor = max(1, allowed / self._limits.cpu_seconds)
        limits = replace(
            self._limits,
            cpu_seconds=max(self._limits.cpu_seconds, allowed),
            memory_mib=max(self._limits.memory_mib, _TIMES_MEMORY * reference.peak_mib),
            wall_seconds=self._limits.wall_seconds * factor,
        )
        return Program(source=source, tests=tests, limits=limits)

    def _run_references(self, problems: Sequence[CodeProblem]) -> None:
        missing = {p.id: p for p in problems if p.tests is None and p.id not in self._references}
        source = f"{_ORACLE.read_text('utf-8')}\n{_KEEP}"
        limits = replace(
            _REFERENCE_LIMITS, memory_mib=max(_REFERENCE_LIMITS.memory_mib, self._limits.memory_mib)
        )
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
                raise CannotGrade(
                    f"the reference solution of {id_} cannot be run: {outcome.status}, {outcome.detail}. "
                    f"Its data are damaged, or the limits are too low for it: {limits}."
                )
            self._references[id_] = outcome

    def _run(self, programs: Sequence[Program]) -> list[Outcome]:
        return run_many(programs, num_workers=self.num_workers, limits=self._limits)


@dataclass(eq=False, kw_only=True)
class EvalPlusTask(CodeTask):
    """Problems whose programs are compared with the reference on many more inputs, as EvalPlus does.

    Reference:
        Liu et al., Is Your Code Generated by ChatGPT Really Correct?, 2023, arXiv 2305.01210.
    """

    plus: bool = True
    """False compares on the inputs of the original benchmark only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.options = {**self.options, "plus": self.plus}

    def _read_problems(self) -> list[CodeProblem]:
        return read_problems(self.data, self.limit, partial(self.read, plus=self.plus))


human_eval = partial(CodeTask, "humaneval", human_eval_problem, _STOP_IN_FUNCTION)
"""HumanEval: the row's `check` on the function whose head and docstring are the prompt.

Columns task_id, prompt, entry_point, canonical_solution, test. Chen et al., Evaluating Large Language Models
Trained on Code, 2021, arXiv 2107.03374.
"""

human_eval_plus = partial(
    EvalPlusTask, "humaneval+", partial(evalplus_problem, continued=True), _STOP_IN_FUNCTION
)
"""HumanEval+: EvalPlus's release file, columns task_id, prompt, entry_point, canonical_solution, base_input,
plus_input, atol."""

mbpp = partial(CodeTask, "mbpp", mbpp_problem, _STOP_IN_SCRIPT)
"""MBPP, full or sanitized: the row's assertions, which are part of the prompt.

Columns task_id, text (sanitized: prompt), code, test_list; test_setup_code and test_imports where needed.
Austin et al., Program Synthesis with Large Language Models, 2021, arXiv 2108.07732.
"""

mbpp_plus = partial(EvalPlusTask, "mbpp+", partial(evalplus_problem, continued=False), _STOP_IN_SCRIPT)
"""MBPP+: EvalPlus's release file, columns as for `human_eval_plus`."""


def _verdict(source: str | None, outcome: Outcome | None) -> Verdict:
    if source is None or outcome is None:
        return Verdict(correct=False, detail="no code in the answer")
    if outcome.status == "passed":
        return Verdict(correct=True, extracted=source)
    detail = f"{outcome.status}: {outcome.detail}"
    return Verdict(
        correct=False, extracted=source, detail=f"{_BY_CLOCK} {detail}" if outcome.by_clock else detail
    )
