"""The table of tasks, and where each finds its data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from hpd.evaluate.benchmarks.few_shot import FewShot, Subset
from hpd.evaluate.benchmarks.rows import Data, HubData
from hpd.evaluate.task import Task
from hpd.files import import_named
from hpd.generation.settings import GenerationSettings
from hpd.progress import Progress

if TYPE_CHECKING:
    from hpd.config.schema import EvalConfig  # the schema imports torch, which building a task does not need

__all__ = [
    "PRESETS",
    "TASKS",
    "TaskEntry",
    "build_task",
    "make_task",
    "settings_for",
    "share_options",
    "task_and_settings",
]


_JUDGE = "judge."


class TaskEntry(NamedTuple):
    """Recipe of a task."""

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
    "exact-match": TaskEntry("hpd.evaluate.benchmarks.exact_match:ExactMatch"),
    "gsm8k": TaskEntry(
        "hpd.evaluate.benchmarks.math:gsm8k",
        _in("gsm8k", files=("test*.jsonl*", "test*.parquet")),
        _hub("openai/gsm8k", "main"),
        _in("gsm8k", files=("train*",)),
        _hub("openai/gsm8k", "main", "train"),
    ),
    "math500": TaskEntry(
        "hpd.evaluate.benchmarks.math:math500", _in("math500"), _hub("HuggingFaceH4/MATH-500")
    ),
    "aime24": TaskEntry(
        "hpd.evaluate.benchmarks.math:aime24", _in("aime24"), _hub("HuggingFaceH4/aime_2024", split="train")
    ),
    "aime25": TaskEntry("hpd.evaluate.benchmarks.math:aime25", _in("aime25"), _hub("math-ai/aime25")),
    "amc": TaskEntry("hpd.evaluate.benchmarks.math:amc", _in("amc", "amc23"), _hub("math-ai/amc23")),
    "minerva": TaskEntry("hpd.evaluate.benchmarks.math:minerva", _in("minerva"), _hub("math-ai/minervamath")),
    "olympiadbench": TaskEntry(
        "hpd.evaluate.benchmarks.math:olympiadbench",
        _in("olympiadbench"),
        _hub("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
    ),
    "svamp": TaskEntry("hpd.evaluate.benchmarks.math:svamp", _in("svamp"), _hub("ChilleD/SVAMP")),
    "mawps": TaskEntry("hpd.evaluate.benchmarks.math:mawps", _in("mawps"), _hub("MU-NLPC/Calc-mawps")),
    "multiarith": TaskEntry(
        "hpd.evaluate.benchmarks.math:multiarith", _in("multiarith"), _hub("ChilleD/MultiArith")
    ),
    "gpqa": TaskEntry(
        "hpd.evaluate.benchmarks.gpqa:Gpqa",
        _in("gpqa", files=(*_FILES, "*.csv")),
        _hub("Idavidrein/gpqa", "gpqa_diamond", "train"),
    ),
    "humaneval": TaskEntry(
        "hpd.evaluate.benchmarks.code:human_eval", _in("humaneval"), _hub("openai/openai_humaneval")
    ),
    "humaneval+": TaskEntry("hpd.evaluate.benchmarks.code:human_eval_plus", _in("humanevalplus")),
    "mbpp": TaskEntry(
        "hpd.evaluate.benchmarks.code:mbpp",
        _in("mbpp", files=("test*.jsonl*", "sanitized*.jsonl*", "*.jsonl*")),
        _hub("google-research-datasets/mbpp", "full"),
    ),
    "mbpp+": TaskEntry("hpd.evaluate.benchmarks.code:mbpp_plus", _in("mbppplus")),
    "dolly": TaskEntry("hpd.evaluate.benchmarks.dialogue:dolly", _in("dolly")),
    "self_instruct": TaskEntry(
        "hpd.evaluate.benchmarks.dialogue:self_instruct", _in("self_instruct", files=("user_oriented*",))
    ),
    "vicuna": TaskEntry(
        "hpd.evaluate.benchmarks.dialogue:vicuna", _in("vicuna", files=("minillm_valid*", "*.jsonl*"))
    ),
    "sni": TaskEntry("hpd.evaluate.benchmarks.dialogue:sni", _in("sni")),
    "alpaca_eval": TaskEntry(
        "hpd.evaluate.benchmarks.judged:alpaca_eval", _in("alpaca_eval", files=("*.jsonl*", "*.json"))
    ),
    "mt_bench": TaskEntry(
        "hpd.evaluate.benchmarks.judged:mt_bench", _in("mt_bench", files=("question*.jsonl*",))
    ),
    "arena_hard": TaskEntry(
        "hpd.evaluate.benchmarks.judged:arena_hard", _in("arena_hard", files=("*question*.jsonl*",))
    ),
}
"""Name -> how the task is made. What a factory accepts beside data and limit are the options of its task."""


def make_task(name: str, data: str | Path | None = None, *, limit: int | None = None, **options: Any) -> Task:
    """A task of the table, or one of your own ("module:factory").

    Args:
        name: a key of `TASKS`, or "module:factory".
        data: its file; or a folder that holds files as the table names them (gsm8k/test*.jsonl, ...); None
            takes the Hub.
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
    if ":" not in target:
        close = get_close_matches(name, TASKS, n=1)
        hint = (
            f"Did you mean {close[0]!r}?"
            if close
            else f"Known: {', '.join(TASKS)}; or module:factory for your own."
        )
        raise ValueError(f"Unknown task {name!r}. {hint}")
    return import_named(target)


def check_options(name: str, options: dict[str, Any]) -> None:
    """Every option must be a parameter of the task's factory."""
    known = task_options(name)
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(
            f"the task {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}."
        )


def task_options(name: str) -> list[str]:
    """Names that a task's factory takes beside data and limit."""
    parameters = inspect.signature(load_factory(name)).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "limit"]


def find_data(name: str, data: str | Path | None, *, shots: bool = False) -> Data:
    """The file of a task (or of its few-shot examples), or its data set on the Hub."""
    entry = TASKS.get(name, TaskEntry(name))
    patterns, hub = (entry.shots, entry.hub_shots) if shots else (entry.files, entry.hub)
    if data is None:
        if hub is None:
            raise ValueError(
                f"the task {name!r} has no {'few-shot ' * shots}data of its own on the Hub; give it a file."
            )
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


def task_and_settings(
    config: EvalConfig,
    progress: Progress | None = None,
    *,
    top_k: int | None = None,
    chat_template: str | None = None,
) -> tuple[Task, GenerationSettings]:
    """The task of an `eval` section of a recipe, with its examples read, and how it is answered.

    Args:
        config: the section.
        progress: shows a judge's progress.
        top_k, chat_template: fields of `GenerationSettings` that only the command line has; None: not given.

    Raises:
        FileNotFoundError, ValueError: as `build_task` and `settings_for`.
    """
    task = build_task(
        config.task,
        config.data or None,
        limit=config.limit,
        limit_seed=config.limit_seed,
        few_shot=config.few_shot,
        few_shot_data=config.few_shot_data,
        options=config.options,
        progress=progress,
    )
    settings = settings_for(
        task,
        config.preset,
        num_samples=config.num_samples,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=top_k,
        seed=config.seed,
        chat_template=chat_template,
        system_prompt=config.system_prompt,
    )
    return task, settings


def build_task(
    name: str,
    data: str | Path | None = None,
    *,
    limit: int | None = None,
    limit_seed: int | None = None,
    few_shot: int = 0,
    few_shot_data: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Task:
    """A task with everything that can be put around it.

    Args:
        name, data, limit: as for `make_task`.
        limit_seed: draw the `limit` problems with this seed; None takes the first.
        few_shot: worked examples per prompt; 0 is none.
        few_shot_data: their file or folder; None: the training file of the benchmark, in the folder `data` or
            on the Hub.
        options: of the task; `judge.NAME` is a field of `JudgeSettings`.
        progress: shows a judge's progress.

    Raises:
        FileNotFoundError, ValueError: as `make_task`; options without effect.
    """
    if limit_seed is not None and limit is None:
        raise ValueError("limit_seed has no effect without limit: give the number of problems to draw.")
    if few_shot_data is not None and few_shot < 1:
        raise ValueError("few_shot_data has no effect without few_shot: give the number of worked examples.")
    given = dict(options or {})
    judge = {key.removeprefix(_JUDGE): given.pop(key) for key in list(given) if key.startswith(_JUDGE)}
    check_options(name, given)
    if "judge" in task_options(name):
        given["judge"] = _judge(name, judge, progress)
    elif judge:
        raise ValueError(
            f"the task {name!r} has no judge: leave out {', '.join(_JUDGE + key for key in judge)}."
        )
    task = make_task(name, data, limit=limit if limit_seed is None else None, **given)
    if limit is not None and limit_seed is not None:
        task = Subset(task, limit, limit_seed)
    if few_shot < 0:
        raise ValueError(f"few_shot must be 0 (none) or more, got {few_shot}.")
    if few_shot:
        folder = data if data is None or Path(data).is_dir() else None
        source = find_data(name, few_shot_data if few_shot_data is not None else folder, shots=True)
        task = FewShot(task, load_factory(name)(source), few_shot)
    return task


def _judge(name: str, fields: Mapping[str, Any], progress: Progress | None) -> Any:
    from hpd.evaluate.benchmarks.judge_client import Judge
    from hpd.evaluate.benchmarks.judge_settings import JudgeSettings

    known = inspect.signature(JudgeSettings).parameters
    unknown = [key for key in fields if key not in known]
    if unknown:
        raise ValueError(f"a judge has no setting {unknown[0]!r}; it has {', '.join(known)}.")
    if not {"url", "model"} <= fields.keys():
        raise ValueError(
            f"the task {name!r} needs a judge: give its address and name (--judge-url, --judge-model)."
        )
    cache = fields.get("cache")
    return Judge(JudgeSettings(**{**fields, "cache": Path(cache) if cache is not None else None}), progress)


def share_options(names: Sequence[str], options: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each task's options.

    Args:
        names: tasks.
        options: ``name=value`` for every task that has this option, or ``task.name=value`` for one.

    Raises:
        ValueError: an option that no task has.
    """
    shares: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in options:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise ValueError(f"an option is written name=value or task.name=value, got {text!r}.")
        owner = next((name for name in names if key.startswith(f"{name}.")), None)
        option = key.removeprefix(f"{owner}.") if owner else key
        wanted = "judge" if option.startswith(_JUDGE) else option
        takers = [owner] if owner else [name for name in names if wanted in task_options(name)]
        if not takers:
            known = "; ".join(f"{name}: {', '.join(task_options(name)) or 'none'}" for name in names)
            raise ValueError(f"no task has an option {option!r}. They have: {known}.")
        for name in takers:
            shares[name][option] = yaml.safe_load(value)
    return shares


_PAPER = {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 10_240, "num_samples": 8}
PRESETS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "num_samples": 1},
    "paper": _PAPER,
}
"""Name -> fields of `GenerationSettings`. paper: Hybrid Policy Distillation, arXiv 2604.20244; what it does
differently for some tasks is in `settings_for`."""

_ASSISTANT = {"system_prompt": "You are a helpful assistant."}
_COMPETITION = {"num_samples": 32}
_CODE = PRESETS["greedy"] | _ASSISTANT
_DIALOGUE = {"max_new_tokens": 4_096, "num_samples": 1} | _ASSISTANT
_PAPER_BY_TASK: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("aime24", "aime25", "amc"), _COMPETITION),
    **dict.fromkeys(("humaneval", "humaneval+", "mbpp", "mbpp+"), _CODE),
    **dict.fromkeys(("alpaca_eval", "mt_bench", "arena_hard"), _DIALOGUE),
}
"""What the paper does differently for a task: more samples, greedy code, shorter dialogue. How many answers a
judge sees it does not say: one."""


def _preset_fields(preset: str | None, task: Task) -> dict[str, Any]:
    if preset is None:
        return {}
    found = PRESETS[preset] | (_PAPER_BY_TASK.get(task.name, {}) if preset == "paper" else {})
    if task.defaults.get("chat_template") == "never":
        # A base model continues a text, which a system prompt would stand in front of.
        found.pop("system_prompt", None)
    return found


def settings_for(task: Task, preset: str | None = None, **given: Any) -> GenerationSettings:
    """The settings of an evaluation: what is given, before the preset, before the task's `defaults`, before
    the class's.

    Args:
        task: what is evaluated.
        preset: a name of `PRESETS`. paper: T 0.7, top-p 0.95, 10,240 tokens, 32 samples for AIME and AMC and
            8 elsewhere; code greedy; dialogue 4,096 tokens and one sample; the last two with a system prompt.
        given: fields; None means not given. `temperature=0` alone asks for the greedy preset.

    Raises:
        ValueError: unknown preset, or values that do not go together.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset must be {' or '.join(PRESETS)}, got {preset!r}.")
    chosen = {key: value for key, value in given.items() if value is not None}
    if preset is None and chosen.get("temperature") == 0:
        preset = "greedy"
    fields = {**task.defaults, **_preset_fields(preset, task)}
    return GenerationSettings(**{**fields, **chosen})
