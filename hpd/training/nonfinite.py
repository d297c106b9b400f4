"""NaN and infinity, looked for at every optimizer step: what was found, whose it is, and the batch kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor, nn

from hpd.batch import TokenBatch, as_teacher_reads
from hpd.files import write_json
from hpd.losses import Scores, TeacherScores
from hpd.losses.products import logits
from hpd.losses.teacher_side import teacher_logits
from hpd.models.forward import label_inputs
from hpd.teachers import RoutedScores, Teacher

__all__ = [
    "NonFinite",
    "NonFiniteFinding",
    "NonFiniteWatch",
    "StepRecord",
    "all_finite",
    "row_likelihoods",
    "teacher_is_finite",
    "write_report",
]

_NAMES_SHOWN = 5


class NonFinite(RuntimeError):
    """A loss or gradient was NaN or infinite, and the recipe says to stop. The weights are those before the
    step."""


class NonFiniteFinding(NamedTuple):
    """Where NaN or infinity was seen in a step, over all processes, and what follows."""

    gradient: bool
    loss: bool
    teacher: bool
    skip: bool
    """True if the step is left out; False if training stops."""
    skipped_steps: int
    """Steps of the run left out so far, this one included where it is."""


@dataclass
class StepRecord:
    """A step while it runs: what it was made of, and what to go back to."""

    batches: Sequence[dict[str, Any]]
    before: Mapping[str, Any]
    """The state before the step."""
    losses: list[Tensor] = field(default_factory=list)
    """Of each micro-batch, on the device."""
    teacher_finite: list[Tensor] = field(default_factory=list)


class NonFiniteWatch:
    """Decides about every optimizer step from its losses, gradient norm and teacher.

    Flags are collected on the device; reading them before the optimizer's step is the one synchronization,
    and only the policies `stop` and `skip` ask for it (several processes also reduce three numbers).

    Args:
        policy: `guards.non_finite`.
        max_skipped: steps of the run that may be left out under `skip`.
        accelerator: knows the processes, and whether gradients are scaled (fp16).

    Raises:
        ValueError: `skip` under DeepSpeed.
    """

    def __init__(self, policy: str, max_skipped: int, accelerator: Accelerator):
        if policy == "skip" and accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "guards.non_finite: skip: DeepSpeed applies a step before it can be left out: use stop or "
                "warn."
            )
        self.max_skipped = max_skipped
        self._policy, self._accelerator = policy, accelerator
        self.skipped_steps = 0
        self._head_finite: Tensor | None = None

    @property
    def active(self) -> bool:
        """True if a step may be stopped or left out."""
        return self._policy in ("stop", "skip")

    def check_teacher(self, teacher: TeacherScores | RoutedScores) -> Bool[Tensor, ""]:
        """True on the device if the teacher's scores can be used; its head is read at the first call only."""
        scores = teacher_is_finite(teacher)
        if self._head_finite is None:
            parts = [known for _, known in teacher.parts] if isinstance(teacher, RoutedScores) else [teacher]
            heads = [part.head.weight for part in parts if isinstance(part, Scores)]
            found = [all_finite(weight) for weight in heads if weight is not None]
            self._head_finite = torch.stack(found or [torch.ones_like(scores)]).all()
        return scores & self._head_finite

    def check(
        self, losses: Sequence[Tensor], norm: Any, teacher_finite: Sequence[Tensor]
    ) -> NonFiniteFinding | None:
        """Decide about a step before its optimizer's.

        Args:
            losses: of its micro-batches.
            norm: of its gradient.
            teacher_finite: `check_teacher` of its micro-batches.

        Returns:
            None: all numbers are finite, on all processes.
        """
        device = losses[0].device
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
        # A gradient scaler (fp16) looks for overflow itself, and expects some.
        scaled = getattr(self._accelerator, "scaler", None) is not None
        finite = [
            torch.ones((), dtype=torch.bool, device=device) if scaled else all_finite(norm).to(device),
            all_finite(torch.stack(list(losses))),
            torch.stack(list(teacher_finite)).all(),
        ]
        bad = (~torch.stack(finite)).float()
        if self._accelerator.num_processes > 1:
            bad = cast(Tensor, self._accelerator.reduce(bad, "sum"))
        flags = [count > 0 for count in bad.tolist()]
        if not any(flags):
            return None
        skip = self._policy == "skip" and self.skipped_steps < self.max_skipped
        return NonFiniteFinding(*flags, skip=skip, skipped_steps=self.skipped_steps + skip)

    def state_dict(self) -> dict[str, int]:
        """State that a checkpoint must hold; the same on all processes."""
        return {"skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self.skipped_steps = state["skipped_steps"]


def all_finite(tensor: Tensor) -> Bool[Tensor, ""]:
    """True on the device if a tensor holds neither NaN nor infinity; no copy of its size, no waiting."""
    tensor = tensor.detach()
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    low, high = torch.aminmax(tensor)  # NaN spreads to both
    return torch.isfinite(low) & torch.isfinite(high)


def teacher_is_finite(teacher: TeacherScores | RoutedScores) -> Bool[Tensor, ""]:
    """True on the device if a teacher's scores at the label positions can be used; its head is not read."""
    if isinstance(teacher, RoutedScores):
        return torch.stack([teacher_is_finite(scores) for _, scores in teacher.parts]).all()
    if isinstance(teacher, Scores):
        known = all_finite(teacher.hidden)
        return known if teacher.log_z is None else known & all_finite(teacher.log_z)
    # A log-probability of -inf is a token that the teacher rules out.
    return torch.stack(
        [(values.detach() < torch.inf).all() for values in (teacher.logprobs, teacher.label_logprobs)]
    ).all()


def write_report(
    folder: Path,
    finding: NonFiniteFinding,
    record: StepRecord,
    model: nn.Module,
    *,
    step: int,
    rank: int | None,
    notes: Mapping[str, Any],
) -> str:
    """Write the step's batches as tensors, and beside them a JSON file of what can be read.

    Args:
        folder: of all reports.
        model: with the gradients of the step.
        step: counted from 1.
        rank: of this process; None: it is the only one.
        notes: go into the JSON file.

    Returns:
        What happened and where it was written, in sentences.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (f"step-{step}.json" if rank is None else f"step-{step}-rank{rank}.json")
    parameters = _not_finite(model.named_parameters())
    gradients = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    source, text = _explain(finding, parameters)
    report = {
        "step": step,
        "source": source,
        "explanation": text,
        "gradient": finding.gradient,
        "loss": finding.loss,
        "teacher": finding.teacher,
        "parameters": parameters,
        "gradients": _not_finite(gradients),
        "losses": [float(loss) for loss in record.losses],
        "teacher_finite": [bool(finite) for finite in record.teacher_finite],
        **notes,
    }
    write_json(file, report, indent=1)
    tensors = {
        f"{number}/{name}": value.contiguous().cpu()
        for number, batch in enumerate(record.batches)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
    save_file(tensors, file.with_suffix(".safetensors"))
    text = f"Step {step}: {text} Its batch is in {file}."
    if finding.skip or not finding.skipped_steps:
        return text
    return f"{text} {finding.skipped_steps} steps were left out before it (guards.max_skipped_steps)."


def _explain(finding: NonFiniteFinding, parameters: Sequence[str]) -> tuple[str, str]:
    """Whose the NaN is, as a word and as a sentence; `parameters` are those that hold some."""
    if finding.teacher:
        return (
            "teacher",
            "the teacher's scores are NaN or infinite, so the loss says nothing about the student.",
        )
    if parameters:
        return "student", f"the student's own weights are NaN or infinite already ({_shown(parameters)})."
    if finding.loss:
        return (
            "student",
            "the student's loss is NaN or infinite, its weights and the teacher's scores are not.",
        )
    return "gradient", "the gradient is NaN or infinite, the loss is not: it overflowed on the way back."


@torch.no_grad()
def row_likelihoods(
    batches: Sequence[dict[str, Any]],
    model: nn.Module,
    teacher: Teacher,
    prepare: Callable[[dict[str, Any]], Any],
    decode: Callable[[Any], Any],
) -> list[dict[str, Any]]:
    """Each row with the negative log-likelihood of its labels under both models, in nats.

    Args:
        batches: collated.
        model: the student, unwrapped.
        prepare: moves a batch to the device.
        decode: token ids to text.
    """
    found = []
    for number, batch in enumerate(batches):
        inputs = prepare(dict(batch))
        positions = TokenBatch.pop(inputs)
        scores = teacher.scores(*as_teacher_reads(inputs, positions))
        student = model(**label_inputs(inputs, positions.index), head_function=lambda scores: scores)
        assert positions.rows is not None
        for row in positions.rows.unique().tolist():
            where = (positions.rows == row).nonzero().flatten()
            labels = positions.labels[where]
            of_teacher = (
                None if isinstance(scores, RoutedScores) else _nll_of(scores.at(where), labels, student)
            )
            line = int(positions.index[where[0]]) // inputs["input_ids"].shape[1]
            found.append(
                {
                    "micro_batch": number,
                    "row": row,
                    "labels": len(where),
                    "student_nll": float(_nll(logits(student.at(where)), labels)),
                    "teacher_nll": of_teacher,
                    "text": decode(inputs["input_ids"][line]),
                }
            )
    return found


def _nll_of(teacher: TeacherScores, labels: Tensor, student: Scores) -> float:
    vocab = min(student.vocab, teacher.vocab)
    return float(_nll(teacher_logits(teacher, labels, vocab, student.hidden), labels))


def _nll(scores: Float[Tensor, "N V"], labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores.float(), labels, reduction="sum")


def _not_finite(tensors: Iterable[tuple[str, Any]]) -> list[str]:
    """Names of the tensors that hold NaN or infinity; on sharded ones, in this process's part."""
    return [
        name for name, t in tensors if not bool(all_finite(t.to_local() if hasattr(t, "to_local") else t))
    ]


def _shown(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
