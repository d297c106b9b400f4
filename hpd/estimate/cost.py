"""The price of a token, in FLOPs.

FLOPs are counted, not timed. A product of a weight with a token is 2 FLOPs, so a forward pass of a token
costs 2 B for the B weights of the backbone (embedding rows are looked up, not multiplied), the backward pass
twice that, and the head's V D weights count at label positions only, which are the only ones that reach it:

    student   6 B_s x trained tokens + 6 V D_s x label tokens
    teacher   2 B_t x trained tokens + 2 V D_t x label tokens      (0 for sft, which needs none)
    rollouts  2 (B_s + V D_s) x tokens that the student reads or writes while generating

Attention's products of tokens with tokens, the optimizer and the element-wise part of the loss are left out;
all methods share them. A frozen backbone under LoRA saves a third of the student's part, which is counted as
if it did not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hpd.config.models import TeacherConfig
from hpd.config.schema import Recipe
from hpd.data.lengths import Lengths
from hpd.methods.table import name_terms
from hpd.methods.terms import reads_teacher
from hpd.models.buildable import without_weights
from hpd.models.load import load_config

__all__ = ["FlopsPerToken", "flops_per_token", "runs_teacher"]


class FlopsPerToken(NamedTuple):
    """FLOPs of a token in training."""

    backbone: float
    """Student and teacher, per trained token."""
    head: float
    """Student and teacher, per label token."""
    rollout: float
    """Student, per token read or written while generating."""
    teacher_backbone: float = 0.0
    """The teacher's part of `backbone`, for one that reads more tokens or fewer."""
    teacher_head: float = 0.0
    """The teacher's part of `head`."""

    def of_row(self, lengths: Lengths) -> float:
        """FLOPs of a mean row in training, the teacher's own tokens counted."""
        price = self.backbone * lengths.tokens + self.head * lengths.label_tokens
        if lengths.teacher is not None:
            price += self.teacher_backbone * (lengths.teacher.tokens - lengths.tokens)
            price += self.teacher_head * (lengths.teacher.label_tokens - lengths.label_tokens)
        return price


def flops_per_token(recipe: Recipe) -> FlopsPerToken:
    """The three prices of the module's formula, from the models' configurations."""
    student = _weights(load_config(recipe.student, "student"))
    student_backbone, student_head = student
    teacher_backbone, teacher_head = 0.0, 0.0  # sft needs none
    if reads_teacher(name_terms(recipe.choose_terms())):
        teacher_backbone, teacher_head = _teacher_weights(recipe.teacher, student)
    return FlopsPerToken(
        backbone=6.0 * student_backbone + 2.0 * teacher_backbone,
        head=6.0 * student_head + 2.0 * teacher_head,
        rollout=2.0 * (student_backbone + student_head),
        teacher_backbone=2.0 * teacher_backbone,
        teacher_head=2.0 * teacher_head,
    )


def runs_teacher(recipe: Recipe, args: Any) -> bool:
    """True if the recipe's training steps ask the teacher: for a term, or for metrics alone.

    Args:
        recipe: what is trained.
        args: its `DistillConfig`.
    """
    metrics = bool(args.metric_stride) or recipe.guards.overlap or args.vocabulary == "bytes"
    return recipe.choose_regime().runs_teacher(name_terms(recipe.choose_terms()), metrics)


def _teacher_weights(teacher: TeacherConfig, student: tuple[int, int]) -> tuple[float, float]:
    """Weights that a token meets: of all teachers of a mixture, of the mean one where rows are routed."""
    if teacher.type == "model":
        return _weights(load_config(teacher, "teacher"))
    if teacher.type == "self":
        return student
    if teacher.teachers:
        each = [_teacher_weights(one, student) for one in teacher.teachers.values()]
        count = 1 if teacher.type == "mixture" else len(each)
        return sum(backbone for backbone, _ in each) / count, sum(head for _, head in each) / count
    # A stored or remote teacher is no forward pass here; its head still meets the stored hidden states.
    return 0.0, student[1]


def _weights(config: Any) -> tuple[int, int]:
    """Weights of the backbone without embeddings, and of the head."""
    model: Any = without_weights(config)
    head = model.get_output_embeddings()
    embeddings = {
        id(p): p.numel() for module in (model.get_input_embeddings(), head) for p in module.parameters()
    }
    return sum(p.numel() for p in model.parameters()) - sum(embeddings.values()), head.weight.numel()
