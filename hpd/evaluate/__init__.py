"""Evaluation: a task gives examples and grades texts, `evaluate` lets a model answer them and writes what it found.

The names below load on first use, so that reading a data file or grading a text never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpd.evaluate.answers import final_answer, same_answer, stated_answer
    from hpd.evaluate.generate import Generation, GenerationSettings, generate_answers
    from hpd.evaluate.run import EvalResult, Record, evaluate
    from hpd.evaluate.task import TASKS, ExactMatch, Example, Prompt, Task, Verdict

_MODULES = {
    "answers": ("final_answer", "same_answer", "stated_answer"),
    "generate": ("Generation", "GenerationSettings", "generate_answers"),
    "run": ("EvalResult", "Record", "evaluate"),
    "task": ("TASKS", "ExactMatch", "Example", "Prompt", "Task", "Verdict"),
}

__all__ = [
    "TASKS",
    "EvalResult",
    "ExactMatch",
    "Example",
    "Generation",
    "GenerationSettings",
    "Prompt",
    "Record",
    "Task",
    "Verdict",
    "evaluate",
    "final_answer",
    "generate_answers",
    "same_answer",
    "stated_answer",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
