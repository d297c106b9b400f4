"""Evaluation: a task gives examples and grades texts, `evaluate` lets a model answer them and writes what it
found.

The names below load on first use, so that reading a data file or grading a text never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpd.evaluate.benchmarks.answers import final_answer, same_answer, stated_answer
    from hpd.evaluate.benchmarks.exact_match import ExactMatch
    from hpd.evaluate.generate import generate_answers
    from hpd.evaluate.run import EvalResult, Record, evaluate
    from hpd.evaluate.task import Example, Task, Verdict
    from hpd.evaluate.tasks import PRESETS, TASKS, make_task, settings_for
    from hpd.generation.settings import GenerationSettings
    from hpd.generation.texts import Answer, Prompt

# One table: a name and its home.
_HOMES = {
    name: home
    for home, names in {
        "hpd.evaluate.benchmarks.answers": ("final_answer", "same_answer", "stated_answer"),
        "hpd.evaluate.benchmarks.exact_match": ("ExactMatch",),
        "hpd.evaluate.generate": ("generate_answers",),
        "hpd.evaluate.run": ("EvalResult", "Record", "evaluate"),
        "hpd.evaluate.task": ("Example", "Task", "Verdict"),
        "hpd.evaluate.tasks": ("PRESETS", "TASKS", "make_task", "settings_for"),
        "hpd.generation.texts": ("Answer", "Prompt"),
        "hpd.generation.settings": ("GenerationSettings",),
    }.items()
    for name in names
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
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
