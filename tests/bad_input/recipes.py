"""Malformed recipes."""

# ruff: noqa: E501 (a case is a line)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .case import Case, recipe_with

__all__ = ["RECIPES"]

GOOD = b"student: a\nteacher: b\ndata: {path: rows.jsonl}\n"


def text(content: bytes) -> Callable[[Path], list[str]]:
    """A recipe file with this content."""

    def build(folder: Path) -> list[str]:
        (folder / "bad.yaml").write_bytes(content)
        return ["train", str(folder / "bad.yaml")]

    return build


_BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (new, new, b", ".join([b"*%c" % old] * 9))
    for old, new in zip(b"abcdefgh", b"bcdefghi", strict=True)
)

# fmt: off
RECIPES: dict[str, Case] = {
    "no file": Case(lambda folder: ["train", str(folder / "none.yaml")], "No recipe at"),
    "a folder": Case(lambda folder: ["train", str(folder)], "is a folder.*give the YAML file"),
    "empty file": Case(text(b""), "holds no mapping"),
    "a list": Case(text(b"- student\n- teacher\n"), "holds no mapping"),
    "a sentence": Case(text(b"distill this please\n"), "holds no mapping"),
    "broken yaml": Case(text(b"student: [a,\n"), "is not valid YAML.*line 2"),
    "tabs": Case(text(b"student:\n\tmodel: a\n"), "is not valid YAML.*line 2"),
    "control characters": Case(text(GOOD + b"method: \x00hpd\n"), "is not valid YAML"),
    "not utf-8": Case(text(GOOD + b"method: h\xe4d\n"), "is not UTF-8"),
    "binary": Case(text(bytes(range(256))), "is not UTF-8"),
    "key given twice": Case(text(GOOD + b"method: hpd\nmethod: akl\n"), "'method' is given twice.*line 5"),
    "python object": Case(text(GOOD + b"method: !!python/object/apply:os.getcwd []\n"), "not valid YAML.*python/object"),
    "unhashable key": Case(text(GOOD + b"? [a, b]\n: c\n"), "not valid YAML.*unhashable"),
    "numbers as keys": Case(text(GOOD + b"1: 2\n"), "'1': keys should be strings"),
    "null as a key": Case(text(GOOD + b"? null\n: 2\n"), "'None': keys should be strings"),
    "alias bomb": Case(text(GOOD + _BOMB), "more than .* values"),
    "alias of itself": Case(text(GOOD + b"method_kwargs: &a {mu: *a}\n"), "more than .* values"),
    "ten thousand brackets": Case(text(GOOD + b"method: " + b"[" * 10_000), "nested too deeply"),
    "missing student": Case(text(b"teacher: a\ndata: {path: b}\n"), "'student' is missing"),
    "missing data": Case(text(b"student: a\nteacher: a\n"), "'data' is missing"),
    "null student": Case(recipe_with("student=null"), "'student'.*got None"),
    "number as student": Case(recipe_with("student=5"), "'student'.*got 5"),
    "empty student": Case(recipe_with("student=''"), "student.model is empty"),
    "empty teacher": Case(recipe_with("teacher=''"), "teacher.model is missing"),
    "empty data path": Case(recipe_with("data.path=''"), "data.path is empty"),
    "unknown top key": Case(recipe_with("techer=a"), "unknown key 'techer'; did you mean 'teacher'"),
    "unknown inner key": Case(recipe_with("data.colums={}"), "unknown key 'data.colums'; did you mean 'columns'"),
    "unknown train key": Case(recipe_with("train.learningrate=1"), "did you mean 'learning_rate'"),
    "unknown method": Case(recipe_with("method=hdp"), "Unknown method 'hdp'. Did you mean 'hpd'"),
    "unknown parameter": Case(recipe_with("method=hpd", "method_kwargs.renforce=1"), "no parameter 'renforce'"),
    "method is a list": Case(recipe_with("method=[hpd]"), "'method'.*got"),
    "method and terms": Case(recipe_with("method=hpd", "terms=[{objective: nll}]"), "method or terms, not both"),
    "unknown objective": Case(recipe_with("terms=[{objective: nul}]"), "Unknown objective 'nul'. Did you mean 'nll'"),
    "module that is not there": Case(recipe_with("terms=[{objective: 'no_such:thing'}]"), "cannot be imported"),
    "module name empty": Case(recipe_with("terms=[{objective: ':x'}]"), "cannot be imported"),
    "module is no objective": Case(recipe_with("terms=[{objective: 'os:sep'}]"), "is a str: give an Objective"),
    "kwargs of a wrong type": Case(recipe_with("method=akl", "method_kwargs.mu=high"), "mu.*'high'"),
    "weight is text": Case(recipe_with("terms=[{objective: nll, weight: much}]"), "terms.0.weight"),
    "weight is nan": Case(recipe_with("terms=[{objective: nll, weight: .nan}]"), "weight.*finite.*nan"),
    "learning rate is text": Case(recipe_with("train.learning_rate=high"), "train.learning_rate: .*got 'high'"),
    "learning rate is nan": Case(recipe_with("train.learning_rate=.nan"), "train.learning_rate.*finite.*nan"),
    "learning rate is negative": Case(recipe_with("train.learning_rate=-1"), "train.learning_rate.*>= 0"),
    "batch size zero": Case(recipe_with("train.per_device_train_batch_size=0"), "per_device_train_batch_size.*>= 1"),
    "negative accumulation": Case(recipe_with("train.gradient_accumulation_steps=-2"), "gradient_accumulation_steps.*>= 1"),
    "no steps": Case(recipe_with("train.max_steps=-1", "train.num_train_epochs=0"), "num_train_epochs.*> 0"),
    "max_length zero": Case(recipe_with("train.max_length=0"), "train.max_length.*>= 2"),
    "unknown optimizer": Case(recipe_with("train.optim=adamm"), "train.optim|adamm"),
    "unknown schedule": Case(recipe_with("train.lr_scheduler_type=cosinus"), "lr_scheduler_type|cosinus"),
    "unknown logger": Case(recipe_with("train.report_to=wandbb"), "wandbb"),
    "logger that is not installed": Case(recipe_with("train.report_to=comet_ml"), "comet"),
    "train is a list": Case(recipe_with("train=[1]"), "'train'.*got"),
    "dtype": Case(recipe_with("student.dtype=float33"), "student.dtype.*bfloat16.*got 'float33'"),
    "share of the rows": Case(recipe_with("data.validation=1.5"), "must be in"),
    "limit": Case(recipe_with("data.limit=-4"), "data.limit must be >= 1"),
    "lora rank": Case(recipe_with("lora.r=0"), "lora.r must be >= 1"),
    "lora target": Case(recipe_with("lora.target_modules=[no_such_layer]"), "no_such_layer"),
    "unknown task": Case(recipe_with("eval.task=gsm9k"), "gsm9k.*gsm8k"),
    "eval without data": Case(recipe_with("eval={task: exact-match}"), "eval.data is missing"),
    "unknown split": Case(recipe_with("data.split=tarin"), "tarin"),
    "slice that is not one": Case(recipe_with("data.split='train[:x%]'"), "train\\[:x%\\]"),
    "output is a file": Case(lambda f: [(f / "o").write_text(""), "train", "{recipe}", f"output_dir={f / 'o'}"][1:], "is a file"),
    "output is empty": Case(recipe_with("output_dir=''"), "output_dir is empty"),
    "override without a value": Case(recipe_with("method"), "An override is written a.b=c"),
    "override into a list": Case(recipe_with("terms=[{objective: nll}]", "terms.0.weight=2"), "terms is a list"),
    "server without address": Case(recipe_with("teacher={type: server, model: a}"), "teacher.url must be"),
    "streaming without steps": Case(recipe_with("data.streaming=true", "train.max_steps=-1"), "needs train.max_steps"),
    "schedule unknown": Case(recipe_with("method=akl", "method_kwargs.mu={schedule: wavy}"), "wavy"),
    "rollouts without use": Case(recipe_with("method=forward_kl", "rollouts={max_new_tokens: 4}"), "rollouts"),
}
# fmt: on
