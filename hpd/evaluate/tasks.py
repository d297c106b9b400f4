"""The table of tasks, and where each finds its data."""

import inspect
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from hpd.evaluate.rows import Data, HubData
from hpd.evaluate.task import Task


class TaskEntry(NamedTuple):
    """How a task is made."""

    factory: str
    """"module:function"; the function takes (data, *, limit=None, ...) and returns a `Task`."""
    files: tuple[str, ...] = ()
    """Patterns of its file under the folder of `--data`; the first that matches is taken."""
    hub: HubData | None = None
    """Its data on the Hub, taken where no data are given."""
    shots: tuple[str, ...] = ()
    """Patterns of the file whose solutions `--few-shot` shows."""
    hub_shots: HubData | None = None


def _hub(path: str, name: str | None = None, split: str = "test") -> HubData:
    return HubData(path=path, name=name, split=split)


_FILES = ("test*.jsonl*", "*.jsonl*", "*.parquet")


def _in(*folders: str, files: Sequence[str] = _FILES) -> tuple[str, ...]:
    return tuple(f"{folder}/{file}" for file in files for folder in folders)


TASKS: dict[str, TaskEntry] = {
    "exact-match": TaskEntry("hpd.evaluate.exact_match:ExactMatch"),
    "gsm8k": TaskEntry(
        "hpd.evaluate.math:gsm8k", _in("gsm8k", files=("test*.jsonl*", "test*.parquet")), _hub("openai/gsm8k", "main"),
        _in("gsm8k", files=("train*",)), _hub("openai/gsm8k", "main", "train"),
    ),
    "math500": TaskEntry("hpd.evaluate.math:math500", _in("math500"), _hub("HuggingFaceH4/MATH-500")),
    "aime24": TaskEntry("hpd.evaluate.math:aime24", _in("aime24"), _hub("HuggingFaceH4/aime_2024", split="train")),
    "aime25": TaskEntry("hpd.evaluate.math:aime25", _in("aime25"), _hub("math-ai/aime25")),
    "amc": TaskEntry("hpd.evaluate.math:amc", _in("amc", "amc23"), _hub("math-ai/amc23")),
    "minerva": TaskEntry("hpd.evaluate.math:minerva", _in("minerva"), _hub("math-ai/minervamath")),
    "olympiadbench": TaskEntry(
        "hpd.evaluate.math:olympiadbench", _in("olympiadbench"), _hub("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train")
    ),
    "svamp": TaskEntry("hpd.evaluate.math:svamp", _in("svamp"), _hub("ChilleD/SVAMP")),
    "mawps": TaskEntry("hpd.evaluate.math:mawps", _in("mawps"), _hub("MU-NLPC/Calc-mawps")),
    "multiarith": TaskEntry("hpd.evaluate.math:multiarith", _in("multiarith"), _hub("ChilleD/MultiArith")),
    "gpqa": TaskEntry(
        "hpd.evaluate.gpqa:Gpqa", _in("gpqa", files=(*_FILES, "*.csv")), _hub("Idavidrein/gpqa", "gpqa_diamond", "train")
    ),
    "humaneval": TaskEntry("hpd.evaluate.code:human_eval", _in("humaneval"), _hub("openai/openai_humaneval")),
    "humaneval+": TaskEntry("hpd.evaluate.code:human_eval_plus", _in("humanevalplus")),
    "mbpp": TaskEntry(
        "hpd.evaluate.code:mbpp", _in("mbpp", files=("test*.jsonl*", "sanitized*.jsonl*", "*.jsonl*")),
        _hub("google-research-datasets/mbpp", "full"),
    ),
    "mbpp+": TaskEntry("hpd.evaluate.code:mbpp_plus", _in("mbppplus")),
    "dolly": TaskEntry("hpd.evaluate.dialogue:dolly", _in("dolly")),
    "self_instruct": TaskEntry("hpd.evaluate.dialogue:self_instruct", _in("self_instruct", files=("user_oriented*",))),
    "vicuna": TaskEntry("hpd.evaluate.dialogue:vicuna", _in("vicuna", files=("minillm_valid*", "*.jsonl*"))),
    "sni": TaskEntry("hpd.evaluate.dialogue:sni", _in("sni")),
    "alpaca_eval": TaskEntry("hpd.evaluate.judge:alpaca_eval", _in("alpaca_eval", files=("*.jsonl*", "*.json"))),
    "mt_bench": TaskEntry("hpd.evaluate.judge:mt_bench", _in("mt_bench", files=("question*.jsonl*",))),
    "arena_hard": TaskEntry("hpd.evaluate.judge:arena_hard", _in("arena_hard", files=("*question*.jsonl*",))),
}  # fmt: skip
"""Name -> how the task is made. What a factory accepts beside data and limit are the options of its task."""


def make_task(name: str, data: str | Path | None = None, *, limit: int | None = None, **options: Any) -> Task:
    """A task of the table, or one of your own ("module:factory").

    Args:
        name: a key of `TASKS`, or "module:factory".
        data: its file; or a folder that holds files as the table names them (gsm8k/test*.jsonl, ...); None takes the Hub.
        limit: first n problems only; None is all.
        options: what the factory takes beside these.

    Raises:
        FileNotFoundError: no such file, or none in the folder that the table names.
        ValueError: an unknown task or option, or a task that has no data on the Hub and was given none.
    """
    factory = load_factory(name)
    check_options(name, options)
    return factory(find_data(name, data), limit=limit, **options)


def load_factory(name: str) -> Callable[..., Task]:
    """The function that makes a task."""
    target = TASKS[name].factory if name in TASKS else name
    module, colon, attribute = target.partition(":")
    if not colon:
        close = get_close_matches(name, TASKS, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(TASKS)}; or module:factory for your own."
        raise ValueError(f"Unknown task {name!r}. {hint}")
    return getattr(import_module(module), attribute)


def check_options(name: str, options: dict[str, Any]) -> None:
    """Every option must be a parameter of the task's factory."""
    known = task_options(name)
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"the task {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}.")


def task_options(name: str) -> list[str]:
    """What a task's factory takes beside data and limit."""
    parameters = inspect.signature(load_factory(name)).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "limit"]


def find_data(name: str, data: str | Path | None, *, shots: bool = False) -> Data:
    """The file of a task (or of its few-shot examples), or its data set on the Hub."""
    entry = TASKS.get(name, TaskEntry(name))
    patterns, hub = (entry.shots, entry.hub_shots) if shots else (entry.files, entry.hub)
    if data is None:
        if hub is None:
            raise ValueError(f"the task {name!r} has no {'few-shot ' * shots}data of its own on the Hub; give it a file.")
        return hub
    path = Path(data).expanduser()
    if not path.is_dir():
        return path  # missing files are reported where they are read
    for pattern in patterns:
        found = sorted(path.glob(pattern))
        if found:
            return found[0]
    wanted = " or ".join(patterns) or "a file of your own (this task has no conventional place)"
    raise FileNotFoundError(
        f"{path} holds no {'few-shot ' * shots}data for {name!r}: expected {wanted}; or name the file itself."
    )
