"""Checks of what Python code gives a `DistillTrainer`, before a model loads: those of the command line."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import is_conversational

from hpd.batch import TEACHER_PREFIXES
from hpd.config.models import ModelConfig
from hpd.data.teacher_prompts import TEACHER_PROMPT
from hpd.methods.fields import nearest
from hpd.methods.regime import Regime
from hpd.methods.table import METHODS
from hpd.models.load import load_config, load_tokenizer
from hpd.models.pairing import CheckResult, check_pair, check_tokens
from hpd.models.quantized import is_quantized
from hpd.teachers import CachedTeacher, Teacher
from hpd.teachers.cache import TEACHER
from hpd.teachers.fingerprints import tokenizer_hash
from hpd.teachers.mixture import MixtureTeacher, RoutedTeacher
from hpd.teachers.sources import knows_likeliest
from hpd.teachers.teacher import RemoteTeacher
from hpd.training.adapting import unfit_for_quantized
from hpd.training.arguments import DistillConfig
from hpd.training.engines import check_launch
from hpd.training.hub import Push, opened
from hpd.training.settings import check_special_tokens

__all__ = ["check_best_metric", "check_call", "check_teacher", "own_tokenizer"]

_LOGGER = logging.getLogger(__name__)


class _Described(NamedTuple):
    """A model without its weights."""

    name: str
    config: Any
    tokenizer: PreTrainedTokenizerBase | None


def check_call(
    model: Any,
    teacher: Any,
    teacher_tokenizer: Any,
    args: DistillConfig,
    options: Mapping[str, Any],
) -> None:
    """Refuse what would train something else than meant; warn of what cannot be looked at.

    Args:
        model, teacher, teacher_tokenizer, args: as `DistillTrainer` takes them.
        options: the other arguments of `SFTTrainer`.

    Raises:
        ValueError: as `check_launch`; an argument without effect, a quantized student without an adapter,
            tokenizers that differ, or a special token that the tokenizer lacks.
    """
    check_launch(args)
    _check_options(model, args, options)
    if args.push_to_hub and args.process_index == 0:
        name = args.hub_model_id or Path(str(args.output_dir)).name
        opened(Push(name, args.hub_private_repo), "push_to_hub", args.hub_token)
    _check_quantized(model, args, options)
    row = _first_row(options.get("train_dataset"))
    student = _student(model, args, options.get("processing_class"))
    if {"image", "images"} & row.keys() and student.config is not None and not _sees(student.config):
        raise ValueError(
            "The rows hold images, and the student reads text only: take a vision-language model, or remove "
            "the columns image and images."
        )
    if student.tokenizer is not None:
        check_special_tokens(args, student.tokenizer)
        if args.eos_token is not None:
            student.tokenizer.eos_token = args.eos_token
    for role, source in _sources(teacher):
        _compare(student, role, source, teacher_tokenizer, args, row)


def check_teacher(method: str | None, regime: Regime, teacher: Any, rows: Any) -> None:
    """Refuse a teacher that does not know the rows of the regime, or nothing that the method asks it for.

    Args:
        method: a name of METHODS; None: terms, of which nothing is known.
        regime: of the run.
        teacher: as `DistillTrainer` takes it.
        rows: to train on; no row, nothing to look at.

    Raises:
        ValueError: as `Regime.check_teachers`; a mixture of teachers that tell some tokens only; a method
            whose teacher reads more than the student, and the first row has no prompt for it.
    """
    parts = teacher.teachers.values() if isinstance(teacher, (MixtureTeacher, RoutedTeacher)) else ()
    types = {CachedTeacher: "cached", RoutedTeacher: "routed"}
    regime.check_teachers(
        name for one in (teacher, *parts) for kind, name in types.items() if isinstance(one, kind)
    )
    if isinstance(teacher, MixtureTeacher):
        for name, part in teacher.teachers.items():
            if part.drawn or knows_likeliest(part):
                raise ValueError(
                    f"A mixture needs whole distributions, and teacher {name!r} tells some of the tokens "
                    "only: use a live teacher or a hidden cache, or route rows instead."
                )
    row = _first_row(rows)
    if method and METHODS[method].own_prompt and row and not {TEACHER_PROMPT, TEACHER_PREFIXES} & row.keys():
        raise ValueError(
            f"method: {method} learns from a teacher that reads what the student does not, and the rows have "
            f"no {TEACHER_PROMPT}: add that column (in a recipe, set teacher.prompt or "
            "teacher.system_prompt)."
        )


def check_best_metric(args: DistillConfig, names: set[str]) -> None:
    """Refuse a metric for the best model that no evaluation has.

    Args:
        names: what evaluations log, without the prefix.

    Raises:
        ValueError: another name, and the nearest one.
    """
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in names:
        of_sets = "" if "loss" in names else " (of several validation sets each has NAME_loss, ...)"
        raise ValueError(
            f"train.metric_for_best_model is {metric!r}, which no evaluation has{of_sets}. "
            f"{nearest(metric.removeprefix('eval_'), sorted(names))}"
        )


def own_tokenizer(teacher: Any, given: Any, student: Any, args: DistillConfig) -> Any:
    """The tokenizer in which the teacher reads its rows; None: the student's.

    Args:
        teacher, given: as `DistillTrainer` takes teacher and teacher_tokenizer.
        student: the student's tokenizer, if it was given.
        args: settings.

    Raises:
        ValueError: with vocabulary "bytes" a teacher whose tokenizer is nowhere, or several that have not
            one and the same.
    """
    if args.vocabulary != "bytes":
        return None
    if isinstance(teacher, (MixtureTeacher, RoutedTeacher)):
        found = {
            f"teacher {name}": _tokenizer_of(part, None, student, args)
            for name, part in teacher.teachers.items()
        }
        named = _tokenizer_of(None, given, student, args)
        return only_tokenizer({role: one or named for role, one in found.items()})
    return only_tokenizer({"teacher": _tokenizer_of(teacher, given, student, args)})


def only_tokenizer(tokenizers: Mapping[str, Any]) -> Any:
    """The one tokenizer of all teachers, in which they read a row together.

    Args:
        tokenizers: of each teacher, by its role in messages; None: it is nowhere.

    Raises:
        ValueError: one has none, or two differ, their ends or their chat templates too.
    """
    if missing := [role for role, one in tokenizers.items() if one is None]:
        raise ValueError(
            f"vocabulary: bytes needs the tokenizer of the {missing[0]}, and it has none: give it as "
            "teacher_tokenizer (in a recipe, teacher.tokenizer)."
        )
    (first, one), *others = tokenizers.items()
    for role, other in others:
        if tokenizer_hash(other) != tokenizer_hash(one):
            raise ValueError(
                f"The {first} and the {role} have two tokenizers (or ends, or chat templates), and with "
                "vocabulary: bytes all teachers read a row together, in one that is not the student's: take "
                "teachers of one family, or train on one after the other (stages)."
            )
    return one


def _tokenizer_of(teacher: Any, given: Any, student: Any, args: DistillConfig) -> Any:
    """The tokenizer of one teacher; None where there is none."""
    if isinstance(teacher, CachedTeacher) and given is None:
        given = str(teacher.cache.path / TEACHER)
    if isinstance(given, str):
        given = load_tokenizer(ModelConfig(model=given, trust_remote_code=args.trust_remote_code), "teacher")
    if given is None and getattr(teacher, "reads_as_student", teacher == "self"):
        given = student
    if given is None and isinstance(teacher, RemoteTeacher):
        given = getattr(teacher, "tokenizer", None)
    for _, source in _sources(teacher):
        name, _ = _identify(source)
        given = given or _load_tokenizer(name, args, local=not isinstance(source, str))
    return given


def _check_options(model: Any, args: DistillConfig, options: Mapping[str, Any]) -> None:
    if options.get("compute_loss_func") is not None:
        raise ValueError(
            "compute_loss_func has no effect: the loss is that of method or terms. Write it as an objective "
            'and name it, terms=[TermConfig(objective="my_module:name")], or train with SFTTrainer.'
        )
    if isinstance(model, str):
        return
    loaded = {
        "quantization_config": options.get("quantization_config"),
        "args.model_init_kwargs": args.model_init_kwargs,
    }
    for name, value in loaded.items():
        if value:
            raise ValueError(
                f"{name} has no effect on a model that is loaded already: hand it to from_pretrained, or "
                "give the model as a path."
            )


def _check_quantized(model: Any, args: DistillConfig, options: Mapping[str, Any]) -> None:
    """Refuse what a quantized student cannot do, before one is loaded."""
    if isinstance(model, str):
        quantized = options.get("quantization_config") or dict(cast(Any, args.model_init_kwargs) or {}).get(
            "quantization_config"
        )
    else:
        quantized = is_quantized(model)
    if not quantized:
        return
    if options.get("peft_config") is None and not isinstance(model, PeftModel):
        raise ValueError(
            "The student is quantized, and its weights cannot be trained: give peft_config (LoraConfig()) to "
            "train an adapter on them, or load it whole."
        )
    if (problem := unfit_for_quantized(args)) is not None:
        raise ValueError(f"quantization: {problem}")


def _sees(config: Any) -> bool:
    """True for the configuration of a model that reads images."""
    return getattr(config, "vision_config", None) is not None


def _first_row(rows: Any) -> dict[str, Any]:
    return dict(next(iter(rows), {})) if isinstance(rows, (Dataset, IterableDataset)) else {}


def _student(model: Any, args: DistillConfig, processing_class: Any) -> _Described:
    name, config = _identify(model)
    if isinstance(model, str):
        revision = dict(cast(Any, args.model_init_kwargs) or {}).get("revision")
        try:
            config = AutoConfig.from_pretrained(
                model, revision=revision, trust_remote_code=args.trust_remote_code
            )
        except (OSError, ValueError):  # loading it says why
            config = None
    if isinstance(processing_class, ProcessorMixin):
        processing_class = getattr(processing_class, "tokenizer", None)
    tokenizer = processing_class or _load_tokenizer(name, args, local=not isinstance(model, str))
    return _Described(name, config, tokenizer)


def _identify(model: Any) -> tuple[str, Any]:
    """Name and configuration of a model, or of a path."""
    if isinstance(model, str):
        return model, None
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    config = getattr(model, "config", None)
    return str(getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", "") or ""), config


def _load_tokenizer(name: str, args: DistillConfig, *, local: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model; None where there is none."""
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(
            name, local_files_only=local, trust_remote_code=args.trust_remote_code
        )
    except Exception:  # tokenizers' parser raises a bare Exception, and a model's folder may be gone
        return None


def _sources(teacher: Any, role: str = "teacher") -> Iterator[tuple[str, Any]]:
    """Each live teacher, by role: a path or a model.

    Others look for themselves: a cache by the rows' tokens, a server by its tokenizer.
    """
    if isinstance(teacher, (MixtureTeacher, RoutedTeacher)):
        for name, part in teacher.teachers.items():
            yield from _sources(part, f"teacher {name}")
    elif isinstance(teacher, str) or (isinstance(teacher, nn.Module) and not isinstance(teacher, Teacher)):
        if not (isinstance(teacher, str) and teacher == "self"):
            yield role, teacher
    elif isinstance(getattr(teacher, "model", None), nn.Module):
        yield role, teacher.model


def _compare(
    student: _Described, role: str, source: Any, teacher_tokenizer: Any, args: DistillConfig, row: Any
) -> None:
    """Compare the tokenizers of student and teacher, and as far as they are known their heads."""
    name, config = _identify(source)
    asked = ModelConfig(model=name or "?", trust_remote_code=args.trust_remote_code)
    if isinstance(source, str):
        config = load_config(asked, role)
    if isinstance(teacher_tokenizer, str):
        named = ModelConfig(model=teacher_tokenizer, trust_remote_code=args.trust_remote_code)
        teacher_tokenizer = load_tokenizer(named, role)
    tokenizer = teacher_tokenizer or _load_tokenizer(name, args, local=not isinstance(source, str))
    if tokenizer is not None and tokenizer is student.tokenizer and args.vocabulary != "bytes":
        return
    if tokenizer is None or student.tokenizer is None:
        whose, argument = (
            (role, "teacher_tokenizer") if tokenizer is None else ("student", "processing_class")
        )
        found = [_not_compared(whose, argument)]
    elif config is None or student.config is None:
        found = [] if args.vocabulary == "bytes" else check_tokens(student.tokenizer, tokenizer)
    else:
        found = check_pair(
            student.tokenizer,
            tokenizer,
            student.config,
            config,
            policy=args.vocabulary,
            conversational=_renders(row, args),
        )
    _report(found, is_first=args.process_index == 0)


def _not_compared(role: str, argument: str) -> CheckResult:
    text = (
        f"the tokenizers of student and teacher were not compared, since there is none beside the {role}: "
        f"give it as {argument}. If the same ids mean other tokens, training teaches nothing."
    )
    return CheckResult("warning", "vocabulary", text)


def _renders(row: Mapping[str, Any], args: DistillConfig) -> bool:
    """True if the student's own chat template will render the rows."""
    turns = [row[name] for name in ("messages", "prompt") if isinstance(row.get(name), list) and row[name]]
    return (
        bool(turns) and "input_ids" not in row and not args.chat_template_path and is_conversational({**row})
    )


def _report(found: list[CheckResult], is_first: bool) -> None:
    errors = [f"{check.topic}: {check.text}" for check in found if check.level == "error"]
    if errors:
        raise ValueError(" ".join(errors))
    for check in found:
        if check.level == "warning" and is_first:
            _LOGGER.warning("%s: %s", check.topic, check.text)
