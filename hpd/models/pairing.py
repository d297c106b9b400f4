"""Do student and teacher fit together? Vocabularies, end of sequence, chat templates: checked before
training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from hpd.losses.heads import POLICIES

__all__ = ["Verdict", "check_pair", "common_vocab", "first_difference"]


@dataclass(frozen=True)
class Verdict:
    """One finding of a check."""

    level: Literal["ok", "warning", "error"]
    topic: str
    text: str


def first_difference(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> int | None:
    """The first token id that means different things to the two tokenizers; None when one map continues the
    other."""
    ours, theirs = ({i: token for token, i in tok.get_vocab().items()} for tok in (student, teacher))
    # Ids that only one side defines are padding or added tokens; the size of the heads decides about those.
    return next((i for i in sorted(ours.keys() & theirs.keys()) if ours[i] != theirs[i]), None)


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
    ours, theirs = (
        m if isinstance(m, int) else getattr(m, "config", m).get_text_config().vocab_size
        for m in (student, teacher)
    )
    if ours != theirs and policy == "error":
        raise ValueError(
            f"The student's head has {ours} tokens and the teacher's {theirs}. If the tokenizers agree on "
            f"the first {min(ours, theirs)} (padded heads of one family, such as Qwen2.5 1.5B and 7B), set "
            "train.vocabulary: shared_prefix; labels beyond are then dropped and counted."
        )
    return min(ours, theirs)


def check_pair(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    student_config: Any,
    teacher_config: Any,
    *,
    policy: str,
    conversational: bool,
) -> list[Verdict]:
    """Everything that silently ruins a distillation when it is wrong."""
    verdicts = [_vocabulary(student, teacher, student_config, teacher_config, policy)]
    verdicts.append(_end_of_sequence(student, teacher, student_config))
    verdicts += _beyond_the_head(student, student_config)
    if conversational:
        verdicts.append(_chat_template(student, teacher))
    if student.pad_token_id is None:
        verdicts.append(
            Verdict("ok", "padding", "the tokenizer has no pad token; eos pads, and padding carries no label")
        )
    elif student.pad_token_id == student.eos_token_id:
        verdicts.append(
            Verdict(
                "ok",
                "padding",
                "pad and eos are the same token; labels are masked by position, so eos is still learnt",
            )
        )
    return verdicts


def _vocabulary(student: Any, teacher: Any, student_config: Any, teacher_config: Any, policy: str) -> Verdict:
    ours, theirs = (c.get_text_config().vocab_size for c in (student_config, teacher_config))
    difference = first_difference(student, teacher)
    if difference is not None:
        a, b = (tok.convert_ids_to_tokens(difference) for tok in (student, teacher))
        return Verdict(
            "error",
            "vocabulary",
            f"token {difference} is {a!r} for the student and {b!r} for the teacher: the two tokenizers are "
            "different, and a distribution over one says nothing about the other. Choose a teacher of the "
            "student's tokenizer family.",
        )
    try:
        shared = common_vocab(student_config, teacher_config, policy)
    except ValueError as error:
        return Verdict("error", "vocabulary", str(error))
    if ours == theirs:
        return Verdict("ok", "vocabulary", f"equal token maps, {ours} tokens")
    beyond = sorted(i for i in student.get_vocab().values() if i >= shared)
    text = f"heads of {ours} and {theirs} tokens, cut to the shared {shared}; the tokenizer has {len(beyond)} ids beyond"
    return Verdict("warning" if beyond else "ok", "vocabulary", text)


def _beyond_the_head(student: Any, student_config: Any) -> list[Verdict]:
    """Tokens of the tokenizer that the student has no row for: text with them fails in the middle of
    training."""
    head = student_config.get_text_config().vocab_size
    beyond = {token: i for token, i in student.get_vocab().items() if i >= head}
    if student.eos_token_id is not None and student.eos_token_id >= head:
        text = f"the eos_token {student.eos_token!r} is token {student.eos_token_id}, and the student's head has {head}: name "
        return [
            Verdict("error", "vocabulary", text + "one of its tokens as eos_token in tokenizer_config.json.")
        ]
    if set(beyond) - set(student.get_added_vocab()):
        text = f"the tokenizer has {max(beyond.values()) + 1} tokens and the student's head {head}: they are of different models."
        return [Verdict("error", "vocabulary", text)]
    if beyond:
        # As Gemma's token for images in its models that read text alone.
        text = f"{len(beyond)} added tokens ({', '.join(sorted(beyond)[:3])}) lie beyond the head of {head}: no row may have them"
        return [Verdict("warning", "vocabulary", text)]
    return []


def _end_of_sequence(student: Any, teacher: Any, student_config: Any) -> Verdict:
    if student.eos_token != teacher.eos_token:
        return Verdict(
            "warning",
            "end of sequence",
            f"the student ends with {student.eos_token!r}, the teacher with {teacher.eos_token!r}: the "
            "teacher gives the student's end token little mass, and distillation teaches the student not to "
            "stop. Set train.eos_token.",
        )
    configured = student_config.get_text_config().eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    if configured is not None and student.eos_token_id not in ids:
        return Verdict(
            "warning",
            "end of sequence",
            f"the tokenizer's eos is {student.eos_token_id} and the student's config says {configured}: "
            "generation may not stop where training ends.",
        )
    return Verdict("ok", "end of sequence", f"both end with {student.eos_token!r}")


def _chat_template(student: Any, teacher: Any) -> Verdict:
    if not student.chat_template:
        return Verdict(
            "error",
            "chat template",
            "the rows are conversations and the student's tokenizer has no chat template: set "
            "train.chat_template_path (the teacher's folder, or a .jinja file), or data.format: plain for "
            "text columns.",
        )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        ours = student.apply_chat_template(messages, tokenize=False)
    except (
        Exception
    ) as error:  # a template is a program of its author's: whatever it raises, it does not render this
        return Verdict(
            "error",
            "chat template",
            f"the student's chat template cannot render a plain conversation ({type(error).__name__}: "
            f"{error}): correct it, or set train.chat_template_path.",
        )
    try:
        theirs = teacher.apply_chat_template(messages, tokenize=False)
    except Exception:  # as above
        return Verdict(
            "warning", "chat template", "the teacher has no template that renders a plain conversation"
        )
    if ours != theirs:
        return Verdict(
            "warning",
            "chat template",
            f"the templates differ; training uses the student's ({ours!r}), which the teacher was not "
            "trained on.",
        )
    return Verdict("ok", "chat template", "both render a conversation alike")
