"""Guards: signs that training goes wrong, read from the metrics that are logged anyway; they warn, or stop
and save."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor, nn

from hpd.batch import TokenBatch
from hpd.config.schema import GuardsConfig, Level
from hpd.files import write_json
from hpd.losses import Scores, TeacherScores
from hpd.losses.products import logits
from hpd.losses.teacher_side import teacher_logits
from hpd.models.forward import model_inputs
from hpd.teachers import RoutedScores

if TYPE_CHECKING:
    from hpd.training.trainer import DistillTrainer

__all__ = [
    "Finding",
    "NonFinite",
    "NonFiniteWatch",
    "all_finite",
    "check_metrics",
    "support_overlap",
    "teacher_is_finite",
]


class Finding(NamedTuple):
    """A metric beyond its threshold."""

    guard: str
    level: Level
    text: str


def check_metrics(
    config: GuardsConfig, logs: Mapping[str, float], history: Sequence[Mapping[str, Any]] = ()
) -> list[Finding]:
    """What the metrics of a logging step show.

    Args:
        config: thresholds.
        logs: metrics of the step, by the names under which they are logged.
        history: the earlier logs of the run; the first is what entropy is compared with.
    """
    findings = _non_finite(config, logs)
    first = next(
        (log["student_entropy"] for log in history if log.get("student_entropy")), logs.get("student_entropy")
    )
    kls = [logs[name] for name in ("forward_kl", "reverse_kl") if name in logs]
    above = {
        "length_ratio": (
            config.length_ratio,
            logs.get("rollouts/length_ratio"),
            "rollouts are {:.2f} x as long as the data",
        ),
        "truncated": (
            config.truncated,
            logs.get("rollouts/truncated"),
            "{:.0%} of the rollouts are cut at their limit",
        ),
        "repetition": (
            config.repetition,
            logs.get("rollouts/repetition"),
            "{:.0%} of the rollouts' 4-grams repeat themselves",
        ),
    }
    below = {
        "entropy": (
            config.entropy,
            _share(logs.get("student_entropy"), first),
            "entropy fell to {:.0%} of what it was",
        ),
        "support_overlap": (
            config.support_overlap,
            logs.get("support_overlap"),
            "{:.0%} of the student's likeliest tokens are the teacher's",
        ),
        "negative_divergence": (
            config.negative_divergence,
            min(kls, default=None),
            "a KL of {:.2e} nats is below zero",
        ),
    }
    for sign, table in ((1.0, above), (-1.0, below)):
        for guard, (thresholds, value, text) in table.items():
            if value is None or not math.isfinite(value):
                continue
            for level, bound in (("stop", thresholds.stop), ("warn", thresholds.warn)):
                if bound is not None and sign * value > sign * bound:
                    findings.append(Finding(guard, level, f"{text.format(value)} (threshold {bound:g})"))  # type: ignore[arg-type]
                    break
    return findings


def _non_finite(config: GuardsConfig, logs: Mapping[str, float]) -> list[Finding]:
    if config.non_finite == "off":
        return []
    names = [
        n for n in ("loss", "grad_norm", "forward_kl", "reverse_kl") if not math.isfinite(logs.get(n, 0.0))
    ]
    # Under skip, what is left is a figure that no step is made of.
    level: Level = "stop" if config.non_finite == "stop" else "warn"
    return [Finding("non_finite", level, f"{' and '.join(names)} not finite")] if names else []


def _share(value: float | None, first: float | None) -> float | None:
    return value / first if value is not None and first else None


@torch.no_grad()
def support_overlap(
    student: Scores, teacher: TeacherScores, labels: Tensor, top_k: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Sum over every `stride`-th position of the share of the student's `top_k` tokens among the teacher's,
    and a count."""
    rows = slice(None, None, max(stride, 1))
    vocab = min(student.vocab, teacher.vocab)
    sides = (
        logits(student.at(rows), vocab),
        teacher_logits(teacher.at(rows), labels[rows], vocab, student.hidden),
    )
    mine, theirs = (side.topk(min(top_k, vocab), -1).indices for side in sides)
    shared = (
        (mine[:, :, None] == theirs[:, None, :])
        .any(-1)
        .to(torch.float64 if mine.device.type != "mps" else torch.float32)
    )
    return shared.mean(-1).sum(), shared.new_tensor(float(len(shared)))


_LOGGER = logging.getLogger(__name__)


_NAMES_SHOWN = 5


class NonFinite(RuntimeError):
    """A loss or gradient was NaN or infinite, and the recipe says to stop. The weights are those before the
    step."""


class _Flags(NamedTuple):
    """What a step found, over all processes."""

    gradient: bool
    loss: bool
    teacher: bool


def all_finite(tensor: Tensor) -> Bool[Tensor, ""]:
    """Whether a tensor holds neither NaN nor infinity, without a copy of its size and without waiting for the
    device."""
    tensor = tensor.detach()
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    low, high = torch.aminmax(tensor)  # NaN spreads to both
    return torch.isfinite(low) & torch.isfinite(high)


def teacher_is_finite(teacher: TeacherScores | RoutedScores) -> Bool[Tensor, ""]:
    """Whether what a teacher says of the label positions can be used; its head, which does not change, is not
    read."""
    if isinstance(teacher, RoutedScores):
        return torch.stack([teacher_is_finite(scores) for _, scores in teacher.parts]).all()
    if isinstance(teacher, Scores):
        known = all_finite(teacher.hidden)
        return known if teacher.log_z is None else known & all_finite(teacher.log_z)
    # A log-probability of -inf is a token that the teacher rules out.
    return torch.stack(
        [(values.detach() < torch.inf).all() for values in (teacher.logprobs, teacher.label_logprobs)]
    ).all()


class NonFiniteWatch:
    """Looks at every optimiser step's losses, gradient norm and teacher.

    Flags are collected on the device; reading them before the optimiser's step is the one synchronisation,
    and only the policies `stop` and `skip` ask for it (several processes also reduce three numbers).

    Args:
        trainer: whose steps.
        policy: `guards.non_finite`.
        max_skipped: steps of the run that may be left out under `skip`.
    """

    def __init__(self, trainer: DistillTrainer, policy: str, max_skipped: int):
        self._trainer, self._policy, self._max_skipped = trainer, policy, max_skipped
        self._batches: Sequence[dict[str, Any]] = ()
        self._losses: list[Tensor] = []
        self._teacher_fine: list[Tensor] = []
        self._teacher_head_fine: Tensor | None = None
        self._window: dict[str, Any] = {}
        self._rows: Any = None

    @property
    def active(self) -> bool:
        """Whether a step may be stopped or left out."""
        return self._policy in ("stop", "skip")

    def begin(self, batches: Sequence[dict[str, Any]], rows_before: Any) -> None:
        """Note the micro-batches of the next step, and what to go back to."""
        if self.active and self._trainer.is_in_train:
            # The loss takes fields out of a batch; the tensors are shared.
            self._batches, self._rows = [dict(batch) for batch in batches], rows_before
            self._window = self._trainer.window.take()
            self._losses, self._teacher_fine = [], []

    def see(self, teacher: TeacherScores | RoutedScores, loss: Tensor) -> None:
        """Look at a micro-batch, on its device."""
        if not self.active:
            return
        if self._teacher_head_fine is None:
            parts = (
                [scores for _, scores in teacher.parts] if isinstance(teacher, RoutedScores) else [teacher]
            )
            weights = [s.head.weight for s in parts if isinstance(s, Scores) and s.head.weight is not None]
            fine = [all_finite(weight) for weight in weights] or [
                torch.ones((), dtype=torch.bool, device=loss.device)
            ]
            self._teacher_head_fine = torch.stack(fine).all()
        self._teacher_fine.append(teacher_is_finite(teacher) & self._teacher_head_fine)
        self._losses.append(loss.detach())

    def check(self, norm: Any) -> Any:
        """The gradient norm as it came, or None where the step is left out.

        Raises:
            NonFinite: the policy is `stop`, or `skip` has reached its limit; gradients and sums are as before
                the step.
        """
        if not self.active or not self._losses:
            return norm
        flags = self._read(norm)
        if not any(flags):
            return norm
        source, text = self._explain(flags)
        file = self._write(flags, source, text)
        step = self._trainer.state.global_step + 1
        text = f"Step {step}: {text} Its batch is in {file}."
        self._trainer.model.zero_grad(
            set_to_none=True
        )  # an optimiser passes over a parameter without gradient
        skipped = self._trainer.skipped_steps + 1
        self._trainer.window.put(self._window)
        if self._policy == "skip" and skipped <= self._max_skipped:
            _LOGGER.warning("%s The step is left out (%d of at most %d).", text, skipped, self._max_skipped)
            self._trainer.skipped_steps = skipped
            self._trainer._globalstep_last_logged += 1  # the next log averages the steps that were done
            return None
        self._trainer._step.restore(self._rows)
        spent = (
            f" {self._max_skipped} steps were left out before it (guards.max_skipped_steps)."
            if skipped > 1
            else ""
        )
        raise NonFinite(f"{text}{spent}")

    def _read(self, norm: Any) -> _Flags:
        trainer, device = self._trainer, self._losses[0].device
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
        # A gradient scaler (fp16) looks for overflow itself, and expects some.
        scaled = getattr(trainer.accelerator, "scaler", None) is not None
        fine = [
            torch.ones((), dtype=torch.bool, device=device) if scaled else all_finite(norm).to(device),
            all_finite(torch.stack(self._losses)),
            torch.stack(self._teacher_fine).all(),
        ]
        bad = (~torch.stack(fine)).float()
        if trainer.accelerator.num_processes > 1:
            bad = trainer.accelerator.reduce(bad, "sum")
        return _Flags(*(count > 0 for count in bad.tolist()))  # type: ignore[union-attr]

    def _explain(self, flags: _Flags) -> tuple[str, str]:
        """Whose the NaN is, as a word and as a sentence."""
        weights = _not_finite((name, p) for name, p in self._trainer.model.named_parameters())
        if flags.teacher:
            return (
                "teacher",
                "the teacher's scores are NaN or infinite, so the loss says nothing about the student.",
            )
        if weights:
            return "student", f"the student's own weights are NaN or infinite already ({_shown(weights)})."
        if flags.loss:
            return (
                "student",
                "the student's loss is NaN or infinite, its weights and the teacher's scores are not.",
            )
        return "gradient", "the gradient is NaN or infinite, the loss is not: it overflowed on the way back."

    def _write(self, flags: _Flags, source: str, text: str) -> Path:
        """The batch as tensors, and beside it what can be read."""
        trainer = self._trainer
        step, rank = trainer.state.global_step + 1, trainer.accelerator.process_index
        several = trainer.accelerator.num_processes > 1
        file = (
            Path(str(trainer.args.output_dir))
            / "nonfinite"
            / f"step-{step}{f'-rank{rank}' if several else ''}.json"
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        gradients = ((name, p.grad) for name, p in trainer.model.named_parameters() if p.grad is not None)
        report: dict[str, Any] = {
            "step": step,
            "source": source,
            "explanation": text,
            "policy": self._policy,
            **flags._asdict(),
            "parameters": _not_finite(trainer.model.named_parameters()),
            "gradients": _not_finite(gradients),
            "learning_rate": trainer._get_learning_rate(),
            "losses": [float(loss) for loss in self._losses],
            "teacher_finite": [bool(fine) for fine in self._teacher_fine],
        }
        # A sharded model can only run everywhere at once.
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        report["rows"] = (
            None
            if sharded
            else [row for number, batch in enumerate(self._batches) for row in self._rows_of(number, batch)]
        )
        write_json(file, report, indent=1)
        tensors = {
            f"{number}/{name}": value.contiguous().cpu()
            for number, batch in enumerate(self._batches)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }
        save_file(tensors, file.with_suffix(".safetensors"))
        return file

    @torch.no_grad()
    def _rows_of(self, number: int, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Each row with the negative log-likelihood of its labels under both models, in nats."""
        trainer = self._trainer
        inputs = trainer._prepare_inputs(dict(batch))
        positions = TokenBatch.pop(inputs)
        teacher = trainer.teacher.scores(inputs, positions)
        model = trainer.accelerator.unwrap_model(trainer.model)
        student = model(
            **model_inputs(inputs), label_index=positions.index, head_function=lambda scores: scores
        )
        assert positions.rows is not None
        found = []
        for row in positions.rows.unique().tolist():
            where = (positions.rows == row).nonzero().flatten()
            labels = positions.labels[where]
            theirs = (
                None if isinstance(teacher, RoutedScores) else _nll_of(teacher.at(where), labels, student)
            )
            line = int(positions.index[where[0]]) // inputs["input_ids"].shape[1]
            found.append(
                {
                    "micro_batch": number,
                    "row": row,
                    "labels": len(where),
                    "student_nll": float(_nll(logits(student.at(where)), labels)),
                    "teacher_nll": theirs,
                    "text": trainer._tokenizer.decode(inputs["input_ids"][line]),
                }
            )
        return found


def _nll_of(teacher: TeacherScores, labels: Tensor, student: Scores) -> float:
    vocab = min(student.vocab, teacher.vocab)
    return float(_nll(teacher_logits(teacher, labels, vocab, student.hidden), labels))


def _nll(scores: Float[Tensor, "N V"], labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores.float(), labels, reduction="sum")


def _not_finite(tensors: Any) -> list[str]:
    """Names of the tensors that hold NaN or infinity; on sharded ones, in this process's part."""
    return [
        name for name, t in tensors if not bool(all_finite(t.to_local() if hasattr(t, "to_local") else t))
    ]


def _shown(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
