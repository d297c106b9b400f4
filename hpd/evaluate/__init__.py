"""Evaluation: a task gives examples and grades texts, `evaluate` lets a model answer them and writes what it found.

The names below load on first use, so that reading a data file or grading a text never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpd.evaluate.answers import final_answer, same_answer, stated_answer
    from hpd.evaluate.exact_match import ExactMatch
    from hpd.evaluate.generate import generate_answers
    from hpd.evaluate.run import EvalResult, Record, evaluate
    from hpd.evaluate.settings import PRESETS, GenerationSettings, settings_for
    from hpd.evaluate.task import Answer, Example, Prompt, Task, Verdict
    from hpd.evaluate.tasks import TASKS, make_task

_MODULES = {
    "answers": ("final_answer", "same_answer", "stated_answer"),
    "exact_match": ("ExactMatch",),
    "generate": ("generate_answers",),
    "run": ("EvalResult", "Record", "evaluate"),
    "settings": ("PRESETS", "GenerationSettings", "settings_for"),
    "task": ("Answer", "Example", "Prompt", "Task", "Verdict"),
    "tasks": ("TASKS", "make_task"),
}

__all__ = [
    "PRESETS",
    "TASKS",
    "Answer",
    "EvalResult",
    "ExactMatch",
    "Example",
    "GenerationSettings",
    "Prompt",
    "Record",
    "Task",
    "Verdict",
    "evaluate",
    "final_answer",
    "generate_answers",
    "make_task",
    "same_answer",
    "settings_for",
    "stated_answer",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
