"""The data regime at work: who writes the rows of a step, what its updates share, how both are resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Sampler

from hpd.batch import TokenBatch
from hpd.data.samplers import RepeatedRows
from hpd.data.written_rows import AnswerReader
from hpd.generation.rollouts import RolloutEngine
from hpd.losses import LossOutput, Scores, TeacherScores
from hpd.losses.policy_gradient import policy_gradient_nll
from hpd.methods.regime import Regime
from hpd.methods.schedules import ValidationRamp
from hpd.methods.terms import Term
from hpd.training.arguments import DistillConfig
from hpd.training.metrics import reduce_sums
from hpd.training.mixing import PrefixMixer, rollout_metrics

__all__ = ["StepState"]

_SUMS = (
    "rows",
    "student_rows",
    "rollouts",
    "tokens",
    "dataset_tokens",
    "truncated",
    "repetition",
    "seconds",
    "replayed",
    "age",
    "expired",
    "unread",
)


class StepState:
    """The state of an optimizer step beside the model: rollouts, and the frozen part of repeated updates.

    Args:
        regime: prefixes, rollouts and strategy.
        args: of the trainer.
        accelerator: knows the processes and their device.
        collate: makes a batch of rows.
        make_engine: called once, at the first rollout, when the model is in its final wrapping.
        on_dataset: True if any term learns from the dataset's tokens.
        validates: True if there is a validation loss during training.
        reader: of what the student writes, for a teacher with another tokenizer.

    Raises:
        ValueError: an adaptive share without evaluation, or repeated rows that the data or the batch size do
            not allow.
    """

    def __init__(
        self,
        regime: Regime,
        args: DistillConfig,
        accelerator: Accelerator,
        collate: Callable[[list[Any]], dict[str, Any]],
        make_engine: Callable[[], RolloutEngine],
        *,
        on_dataset: bool,
        validates: bool,
        reader: AnswerReader | None = None,
    ):
        _check(regime, args, validates)
        self._regime, self._args, self._accelerator = regime, args, accelerator
        self._frozen: list[Any] = []
        self._micro_batch = 0
        self._num_rows: Tensor | float = 1.0
        self.mixer: PrefixMixer | None = None
        if regime.prefixes.on_policy:
            replay = regime.rollouts.replay
            self.mixer = PrefixMixer(
                regime.prefixes,
                regime.rollouts,
                collate,
                make_engine,
                seed=args.seed,
                max_length=args.max_length,
                on_dataset=on_dataset,
                num_updates=regime.strategy.updates,
                collective=accelerator.num_processes > 1,
                with_behavior_logprobs=bool(replay and replay.importance),
                reader=reader,
            )

    @property
    def must_be_saved(self) -> bool:
        """True if a process cannot go on without the state that it had itself."""
        return self._regime.rollouts.replay is not None or self._regime.strategy.updates > 1

    def sampler(self, default: Sampler | None, rows: Any, batch_size: int) -> Sampler | None:
        """The sampler of training rows: the Trainer's, unless rows come several times.

        Args:
            default: the Trainer's.
            batch_size: completions of a process and micro-batch.
        """
        regime, args = self._regime, self._args
        if not regime.repeats:
            return default
        if default is None:
            raise ValueError(
                "rollouts.num_rollouts and strategy.updates above 1 repeat rows, which a stream cannot."
            )
        completions = batch_size * args.gradient_accumulation_steps * args.world_size
        num_rollouts = regime.rollouts.num_rollouts
        seed = None if args.train_sampling_strategy == "sequential" else args.seed
        return RepeatedRows(rows, completions // num_rollouts, num_rollouts, regime.strategy.updates, seed)

    def begin(self, batches: Sequence[dict[str, Any]], step: int, progress: float) -> list[dict[str, Any]]:
        """The micro-batches of an optimizer step, before their labels are counted.

        Args:
            batches: of the dataset, collated.
            step: counted from 0.
            progress: share of the training steps that lie behind.
        """
        strategy, out = self._regime.strategy, list(batches)
        if self.mixer is not None:
            out = self.mixer(out, step, progress)
        self._micro_batch = 0
        if step % strategy.updates == 0:
            self._frozen = []
        if strategy.type == "policy_gradient" and strategy.mean == "sequence":
            count = torch.tensor(float(sum(len(batch["label_row_lengths"]) for batch in out)))
            total = self._accelerator.reduce(count.to(self._accelerator.device), "sum")
            self._num_rows = cast(Tensor, total).clamp_min(1.0)
        return out

    def policy_gradient(
        self,
        student: Scores,
        teacher: TeacherScores,
        batch: TokenBatch,
        terms: Sequence[Term],
        *,
        uniforms: Tensor | None,
        scale: Tensor,
        replicas: int,
        position_weights: Mapping[str, Tensor] | None = None,
    ) -> LossOutput:
        """The clipped loss of the next micro-batch.

        Args:
            uniforms: of its draws.
            scale: 1 / (label tokens of the global batch), times `replicas`.
            replicas: processes whose gradients are averaged.
            position_weights: by term.
        """
        place = self._micro_batch
        self._micro_batch += 1
        output, kept = policy_gradient_nll(
            student,
            teacher,
            batch,
            terms,
            self._regime.strategy,
            frozen=self._frozen[place] if place < len(self._frozen) else None,
            uniforms=uniforms,
            scale=scale,
            row_scale=replicas / self._num_rows,
            position_weights=position_weights,
            chunk_bytes=self._args.chunk_bytes,
            metric_stride=self._args.metric_stride,
            teacher_share=self._regime.rollouts.teacher_share,
        )
        if place == len(self._frozen):
            self._frozen.append(kept)
        return output

    @property
    def ramp(self) -> ValidationRamp | None:
        """The adaptive share of the student's rows, which follows the validation loss."""
        return None if self.mixer is None else self.mixer.ramp

    def metrics(self) -> dict[str, float]:
        """Figures about what the student wrote since the last log, over all processes."""
        if self.mixer is None:
            return {}
        sums = {name: torch.tensor(float(value)) for name, value in self.mixer.read().items()}
        totals = reduce_sums(self._accelerator, sums, _SUMS)
        if self.mixer.replay is None:
            totals.pop("expired")
        if self.mixer.reader is None:
            totals.pop("unread")
        return rollout_metrics(totals, self._regime.prefixes.continue_tokens is None)

    def state_dict(self) -> dict[str, Any]:
        """State that a later step reads and a checkpoint must hold on every process."""
        return {
            "frozen": list(self._frozen) if self._regime.strategy.updates > 1 else [],
            "rows": None if self.mixer is None else self.mixer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._frozen = list(state["frozen"])
        if self.mixer is not None:
            self.mixer.load_state_dict(state["rows"])


def _check(regime: Regime, args: DistillConfig, validates: bool) -> None:
    if regime.prefixes.adaptive and not validates:
        raise ValueError(
            "prefixes: an adaptive share follows the validation loss, and there is none during training, or "
            "several: give data.validation (one set) and train.eval_strategy: steps."
        )
    if regime.repeats and args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"train.train_sampling_strategy: {args.train_sampling_strategy} does not go with repeated "
            "rows (rollouts.num_rollouts or strategy.updates above 1): use random or sequential."
        )
    if args.per_device_train_batch_size % regime.rollouts.num_rollouts:
        raise ValueError(
            f"train.per_device_train_batch_size ({args.per_device_train_batch_size}) counts completions: "
            f"it must be a multiple of rollouts.num_rollouts ({regime.rollouts.num_rollouts})."
        )
