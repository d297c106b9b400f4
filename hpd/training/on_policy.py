"""What an optimiser step keeps beside the model: who writes its rows, what its updates share, how both are
resumed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import TrainerCallback

from hpd.batch import TokenBatch
from hpd.data.samplers import RepeatedRows
from hpd.generation.rollouts import RolloutEngine, make_engine
from hpd.losses import LossOutput, Scores, TeacherScores
from hpd.losses.policy_gradient import policy_gradient_nll
from hpd.methods.terms import sources_used
from hpd.training.checkpoints import reading
from hpd.training.mixing import PrefixMixer, rollout_metrics

if TYPE_CHECKING:
    from hpd.training.trainer import DistillTrainer

__all__ = ["StepState"]


_STATE_KEY = "hpd_student_share"


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
)


class StepState:
    """The data regime and the strategy at work in a trainer.

    Raises:
        ValueError: an adaptive share without evaluation, or repeated rows that the data or the batch size do
            not allow.
    """

    def __init__(self, trainer: DistillTrainer):
        self._trainer, self._regime = trainer, trainer.regime
        self._frozen: list[Any] = []
        self._micro_batch = 0
        self._num_rows: Tensor | float = 1.0
        self.mixer = self._make_mixer() if self._regime.prefixes.on_policy else None
        args = trainer.args
        if self._regime.prefixes.adaptive and (trainer.eval_dataset is None or args.eval_strategy == "no"):
            raise ValueError(
                "prefixes: an adaptive share follows the validation loss, and there is none during training: "
                "give data.validation and train.eval_strategy: steps."
            )
        if self._regime.repeats and args.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train.train_sampling_strategy: {args.train_sampling_strategy} does not go with repeated "
                "rows (rollouts.num_rollouts or strategy.updates above 1): use random or sequential."
            )
        if args.per_device_train_batch_size % self._regime.rollouts.num_rollouts:
            raise ValueError(
                f"train.per_device_train_batch_size ({args.per_device_train_batch_size}) counts completions: "
                f"it must be a multiple of rollouts.num_rollouts ({self._regime.rollouts.num_rollouts})."
            )

    def _make_mixer(self) -> PrefixMixer:
        trainer, regime = self._trainer, self._regime
        replay = regime.rollouts.replay
        return PrefixMixer(
            regime.prefixes,
            regime.rollouts,
            trainer.data_collator,
            self._make_engine,
            seed=trainer.args.seed,
            max_length=trainer.args.max_length,
            on_dataset="dataset" in sources_used(trainer.terms),
            num_updates=regime.strategy.updates,
            collective=trainer.accelerator.num_processes > 1,
            with_behaviour=bool(replay and replay.importance),
        )

    def _make_engine(self) -> RolloutEngine:
        trainer = self._trainer
        return make_engine(
            self._regime.rollouts,
            lambda: cast(nn.Module, trainer.model_wrapped),
            trainer.accelerator.unwrap_model(trainer.model),
            trainer.accelerator,
            trainer._tokenizer,
            getattr(trainer.teacher, "model", None),
        )

    def sampler(self, own: Sampler | None, rows: Any) -> Sampler | None:
        """The sampler of training rows: the Trainer's own, unless rows come several times."""
        regime, args = self._regime, self._trainer.args
        if not regime.repeats:
            return own
        if own is None:
            raise ValueError(
                "rollouts.num_rollouts and strategy.updates above 1 repeat rows, which a stream cannot."
            )
        batch = self._trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = None if args.train_sampling_strategy == "sequential" else args.seed
        return RepeatedRows(
            rows,
            batch // regime.rollouts.num_rollouts,
            regime.rollouts.num_rollouts,
            regime.strategy.updates,
            seed,
        )

    def begin(self, batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The micro-batches of an optimiser step, before their labels are counted."""
        state, strategy = self._trainer.state, self._regime.strategy
        out = list(batches)
        if self.mixer is not None:
            out = self.mixer(out, state.global_step, state.global_step / max(state.max_steps, 1))
        self._micro_batch = 0
        if state.global_step % strategy.updates == 0:
            self._frozen = []
        if strategy.type == "policy_gradient" and strategy.mean == "sequence":
            count = torch.tensor(float(sum(len(batch["label_row_lengths"]) for batch in out)))
            accelerator = self._trainer.accelerator
            self._num_rows = accelerator.reduce(count.to(accelerator.device), "sum").clamp_min(1.0)  # type: ignore[union-attr]
        return out

    def policy_gradient(
        self,
        student: Scores,
        teacher: TeacherScores,
        batch: TokenBatch,
        scale: Tensor,
        numbers: Tensor | None,
        replicas: int,
    ) -> LossOutput:
        """The clipped loss of the next micro-batch.

        Args:
            scale: 1 / (label tokens of the global batch), times `replicas`.
            numbers: uniform numbers of its draws.
            replicas: processes whose gradients are averaged.
        """
        place = self._micro_batch
        self._micro_batch += 1
        args, rollouts = self._trainer.args, self._regime.rollouts
        output, kept = policy_gradient_nll(
            student,
            teacher,
            batch,
            self._trainer.terms,
            self._regime.strategy,
            frozen=self._frozen[place] if place < len(self._frozen) else None,
            uniforms=numbers,
            scale=scale,
            row_scale=replicas / self._num_rows,
            chunk_bytes=args.chunk_bytes,
            metric_stride=args.metric_stride,
            teacher_share=rollouts.teacher_share,
        )
        if place == len(self._frozen):
            self._frozen.append(kept)
        return output

    def metrics(self) -> dict[str, float]:
        """What the student wrote since the last log, over all processes."""
        if self.mixer is None:
            return {}
        sums = {name: torch.tensor(float(value)) for name, value in self.mixer.read().items()}
        if self.mixer.replay is not None:
            sums.setdefault("expired", torch.tensor(0.0))
        totals = self._trainer.reduce_sums(sums, _SUMS)
        if self.mixer.replay is None:
            totals.pop("expired")
        return rollout_metrics(totals, self._regime.prefixes.continue_tokens is None)

    @property
    def _has_state(self) -> bool:
        return self._regime.rollouts.replay is not None or self._regime.strategy.updates > 1

    def state(self) -> dict[str, Any] | None:
        """What a step changes and a later one reads; None: nothing."""
        if not self._has_state:
            return None
        rows = None if self.mixer is None else self.mixer.state_dict()
        return {"rows": rows, "frozen": list(self._frozen)}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on where `state` was called."""
        if state is not None:
            self._frozen = state["frozen"]
            if self.mixer is not None:
                self.mixer.load_state_dict(state["rows"])

    def save(self, checkpoint: str) -> None:
        """Write this process's part of a checkpoint."""
        if self._has_state:
            torch.save(self.state(), self._file(checkpoint))

    def load(self, checkpoint: str) -> None:
        """Go on where `save` was called.

        Raises:
            ValueError: the checkpoint has no such part, for example since it was written by fewer processes.
        """
        if not self._has_state:
            return
        file = self._file(checkpoint)
        if not file.is_file():
            raise ValueError(
                f"{checkpoint} holds no {file.name}, which replay and repeated updates need to go on: resume "
                "with as many processes as the checkpoint was written with, or start again with --overwrite."
            )
        # Several processes on a CPU call it cpu:0, which torch.load does not know.
        device = self._trainer.accelerator.device.type
        with reading(file):
            self.restore(torch.load(file, weights_only=True, map_location=device))

    def _file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"rollouts-rank{self._trainer.accelerator.process_index}.pt"

    @property
    def callback(self) -> TrainerCallback:
        """Follows the validation loss, where the student's share does."""
        return _ShareFollowsLoss(self)


class _ShareFollowsLoss(TrainerCallback):
    def __init__(self, step: StepState):
        self._step = step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(_STATE_KEY)
        if saved and self._step.mixer is not None and self._step.mixer.ramp is not None:
            self._step.mixer.ramp.load_state_dict(saved)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        ramp = None if self._step.mixer is None else self._step.mixer.ramp
        if ramp is not None and metrics and "eval_loss" in metrics:
            ramp.update(metrics["eval_loss"])
            state.stateful_callbacks[_STATE_KEY] = ramp.state_dict()
