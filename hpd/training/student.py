"""TRL's SFTTrainer around a student that hands its hidden states and head to a function."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from hpd.data.repair import repair
from hpd.data.samplers import FilledOrder, fill, fills_last_batch
from hpd.models.forward import adapt_head, add_head_function
from hpd.training.arguments import DistillConfig, check_engine
from hpd.training.resumable import Resumable

__all__ = ["StudentTrainer"]


class StudentTrainer(Resumable, SFTTrainer):
    """Data, engine and files of a distilled student; the loss is a subclass's.

    Args:
        model: a loaded causal language model, or a path or Hub id.
        args: of training.
        peft_config: as in TRL; an adapter on the output head is supported.
        recomputes: True if the loss reads the head again in the backward pass.
        repeats_rows: True if rows come several times in a row from the dataset.
        **kwargs: as `SFTTrainer` takes them.
    """

    args: DistillConfig
    model: Any  # the student, perhaps as a PeftModel
    # The loss is already divided by the label tokens of the accumulated batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: DistillConfig,
        peft_config: PeftConfig | None,
        *,
        recomputes: bool,
        repeats_rows: bool,
        **kwargs: Any,
    ):
        self._repeats_rows = repeats_rows
        model, peft_config, hide_head = adapt_head(model, peft_config, args.seed)
        with hide_head:
            super().__init__(model, args=args, peft_config=peft_config, **kwargs)  # type: ignore[arg-type]
        check_engine(args, self.accelerator, recomputes=recomputes)
        student = self.accelerator.unwrap_model(self.model)
        self._base_model = student.get_base_model() if hasattr(student, "get_base_model") else student
        add_head_function(self._base_model)
        # The model's own loss may not; ours shifts labels and needs the label count of the accumulated batch.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True

    @property
    def is_sharded(self) -> bool:
        """True if the model can only run on all processes at once."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def progress(self) -> float:
        """Share of the training steps that lie behind."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        if fills_last_batch(self.args, dataset) and not (is_training and self._repeats_rows):
            count = len(dataset)
            dataset = fill(dataset, batch_size * self.args.world_size)
            shuffled = is_training and self.args.train_sampling_strategy == "random"

            def order(rows: Any) -> FilledOrder:
                return FilledOrder(count, len(rows), shuffled, self.args.data_seed)

            sampler_fn = order
        return super()._get_dataloader(
            dataset, description, batch_size, sampler_fn, is_training, dataloader_key
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole student, loadable by `from_pretrained` in one process, whatever engine shards
        it."""
        if self.is_fsdp_enabled and not _internal_call:
            # The Trainer silently writes nothing here where checkpoints are sharded.
            weights = self.accelerator.get_state_dict(self.model)
            self._save(output_dir or self.args.output_dir, state_dict=weights)
            return
        super().save_model(output_dir, _internal_call)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, *others: Any, **more: Any
    ) -> Any:
        labels = "completion" if args.completion_only_loss is not False else "all"
        if isinstance(processing_class, PreTrainedTokenizerBase):
            labels = "assistant" if args.assistant_only_loss else labels
            with args.main_process_first(desc="rows"):
                dataset = repair(dataset, processing_class, labels, num_proc=args.dataset_num_proc)
        return super()._prepare_dataset(dataset, processing_class, args, *others, **more)
