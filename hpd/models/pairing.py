"""Checks of student and teacher together, before training: vocabularies, end of sequence, chat templates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from hpd.losses.heads import POLICIES
from hpd.models.bounded import rendering

__all__ = ["CheckResult", "check_pair", "check_tokens", "common_vocab", "first_difference"]


@dataclass(frozen=True)
class CheckResult:
    """The result of one check of a run."""

    level: Literal["ok", "warning", "error"]
    topic: str
    text: str


def first_difference(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> int | None:
    """Return the first token id with two meanings; None where one map continues the other."""
    of_student, of_teacher = ({i: token for token, i in t.get_vocab().items()} for t in (student, teacher))
    # Ids that only one side defines are padding or added tokens; the size of the heads decides about those.
    shared = sorted(of_student.keys() & of_teacher.keys())
    return next((i for i in shared if of_student[i] != of_teacher[i]), None)


def check_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[CheckResult]:
    """Name the first token id with two meanings; nothing where there is none."""
    difference = first_difference(student, teacher)
    if difference is None:
        return []
    a, b = (tok.convert_ids_to_tokens(difference) for tok in (student, teacher))
    text = (
        f"token {difference} is {a!r} for the student and {b!r} for the teacher: the two tokenizers are "
        "different, and a distribution over one says nothing about the other. Choose a teacher of the "
        "student's tokenizer family, or train on bytes (train.vocabulary: bytes)."
    )
    return [CheckResult("error", "vocabulary", text)]


def common_vocab(student: Any, teacher: Any, policy: str) -> int:
    """Number of leading tokens that both heads have.

    Args:
        student: a model, its configuration, or the number of its tokens.
        teacher: the same.
        policy: `error` refuses unequal sizes; `shared_prefix` cuts both heads to the shorter one.

    Raises:
        ValueError: unequal sizes under `error`, or an unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"vocabulary must be one of {', '.join(POLICIES)}, got {policy!r}.")
    num_student, num_teacher = (
        m if isinstance(m, int) else getattr(m, "config", m).get_text_config().vocab_size
        for m in (student, teacher)
    )
    shared = min(num_student, num_teacher)
    if num_student != num_teacher and policy == "error":
        raise ValueError(
            f"The student's head has {num_student} tokens and the teacher's {num_teacher}. If the tokenizers "
            f"agree on the first {shared} (padded heads of one family, such as Qwen2.5 1.5B and 7B), set "
            "train.vocabulary: shared_prefix; labels beyond are then dropped and counted."
        )
    return shared


def check_pair(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    student_config: Any,
    teacher_config: Any,
    *,
    policy: str,
    conversational: bool,
) -> list[CheckResult]:
    """Check everything that silently ruins a distillation when it is wrong.

    With the policy `bytes` the two tokenizers are each one's own: ends and templates need not agree.
    """
    if policy == "bytes":
        verdicts = _two_tokenizers(student, teacher, student_config, teacher_config, conversational)
    else:
        verdicts = [_vocabulary(student, teacher, student_config, teacher_config, policy)]
        verdicts.append(_end_of_sequence(student, teacher, student_config))
        verdicts += _beyond_the_head(student, student_config)
        if conversational:
            verdicts.append(_chat_template(student, teacher))
    if student.pad_token_id is None:
        verdicts.append(
            CheckResult(
                "ok", "padding", "the tokenizer has no pad token; eos pads, and padding carries no label"
            )
        )
    elif student.pad_token_id == student.eos_token_id:
        verdicts.append(
            CheckResult(
                "ok",
                "padding",
                "pad and eos are the same token; labels are masked by position, so eos is still learned",
            )
        )
    return verdicts


def _two_tokenizers(
    student: Any, teacher: Any, student_config: Any, teacher_config: Any, conversational: bool
) -> list[CheckResult]:
    """What must hold where each model reads its own tokens."""
    text = (
        f"compared on bytes: {len(student)} tokens of the student, {len(teacher)} of the teacher; "
        f"{student.eos_token!r} and {teacher.eos_token!r} are one event"
    )
    verdicts = [
        CheckResult("ok", "vocabulary", text),
        *_beyond_the_head(student, student_config),
        *_beyond_the_head(teacher, teacher_config, "teacher"),
    ]
    if conversational:
        sides = {"student": student, "teacher": teacher}
        verdicts += [_own_template(tokenizer, role) for role, tokenizer in sides.items()]
    return verdicts


def _own_template(tokenizer: Any, role: str) -> CheckResult:
    if not tokenizer.chat_template:
        text = (
            f"the rows are conversations and the {role}'s tokenizer has no chat template (a base model?): "
            "give the rows as text, prompt and completion, with data.format: plain, or take a chat model."
        )
        return CheckResult("error", "chat template", text)
    return CheckResult("ok", "chat template", f"the {role} reads its own")


def _vocabulary(
    student: Any, teacher: Any, student_config: Any, teacher_config: Any, policy: str
) -> CheckResult:
    num_student, num_teacher = (c.get_text_config().vocab_size for c in (student_config, teacher_config))
    for different in check_tokens(student, teacher):
        return different
    try:
        shared = common_vocab(student_config, teacher_config, policy)
    except ValueError as error:
        return CheckResult("error", "vocabulary", str(error))
    if num_student == num_teacher:
        return CheckResult("ok", "vocabulary", f"equal token maps, {num_student} tokens")
    beyond = sorted(i for i in student.get_vocab().values() if i >= shared)
    text = (
        f"heads of {num_student} and {num_teacher} tokens, cut to the shared {shared}; the tokenizer has "
        f"{len(beyond)} ids beyond"
    )
    return CheckResult("warning" if beyond else "ok", "vocabulary", text)


def _beyond_the_head(student: Any, student_config: Any, role: str = "student") -> list[CheckResult]:
    """Tokens that a model's head has no row for: text with them fails in the middle of training."""
    head = student_config.get_text_config().vocab_size
    beyond = {token: i for token, i in student.get_vocab().items() if i >= head}
    level: Literal["warning", "error"] = "error"
    if student.eos_token_id is not None and student.eos_token_id >= head:
        text = (
            f"the eos_token {student.eos_token!r} is token {student.eos_token_id}, and the {role}'s head "
            f"has {head}: name one of its tokens as eos_token in tokenizer_config.json."
        )
    elif set(beyond) - set(student.get_added_vocab()):
        text = (
            f"the tokenizer has {max(beyond.values()) + 1} tokens and the {role}'s head {head}: they are of "
            "different models."
        )
    elif beyond:
        # As Gemma's token for images in its models that read text alone.
        level = "warning"
        text = (
            f"{len(beyond)} added tokens ({', '.join(sorted(beyond)[:3])}) lie beyond the head of {head}: no "
            "row may have them"
        )
    else:
        return []
    return [CheckResult(level, "vocabulary", text)]


def _end_of_sequence(student: Any, teacher: Any, student_config: Any) -> CheckResult:
    if student.eos_token != teacher.eos_token:
        return CheckResult(
            "warning",
            "end of sequence",
            f"the student ends with {student.eos_token!r}, the teacher with {teacher.eos_token!r}: the "
            "teacher gives the student's end token little mass, and distillation teaches the student not to "
            "stop. Set train.eos_token.",
        )
    configured = student_config.get_text_config().eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    if configured is not None and student.eos_token_id not in ids:
        return CheckResult(
            "warning",
            "end of sequence",
            f"the tokenizer's eos is {student.eos_token_id} and the student's config says {configured}: "
            "generation may not stop where training ends.",
        )
    return CheckResult("ok", "end of sequence", f"both end with {student.eos_token!r}")


def _chat_template(student: Any, teacher: Any) -> CheckResult:
    if not student.chat_template:
        return CheckResult(
            "error",
            "chat template",
            "the rows are conversations and the student's tokenizer has no chat template: set "
            "train.chat_template_path (the teacher's folder, or a .jinja file), or data.format: plain for "
            "text columns.",
        )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        with rendering():
            by_student = student.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program, and raises anything
        return CheckResult(
            "error",
            "chat template",
            f"the student's chat template cannot render a plain conversation ({type(error).__name__}: "
            f"{error}): correct it, or set train.chat_template_path.",
        )
    try:
        with rendering():
            by_teacher = teacher.apply_chat_template(messages, tokenize=False)
    except Exception:  # as above
        return CheckResult(
            "warning", "chat template", "the teacher has no template that renders a plain conversation"
        )
    if by_student != by_teacher:
        return CheckResult(
            "warning",
            "chat template",
            f"the templates differ; training uses the student's ({by_student!r}), which the teacher was not "
            "trained on.",
        )
    return CheckResult("ok", "chat template", "both render a conversation alike")
