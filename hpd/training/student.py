"""TRL's SFTTrainer around a student that hands its hidden states and head to a function."""

from __future__ import annotations

import contextlib
import datetime
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTTrainer, pack_dataset
from trl.data_utils import get_dataset_column_names
from trl.trainer.sft_trainer import global_then_local_main_first

from hpd.batch import (
    BEHAVIOR_LOGPROBS,
    POSITION_WEIGHTS,
    SOURCES,
    TEACHER_CHUNKS,
    TEACHER_PREFIXES,
    TokenBatch,
)
from hpd.data.byte_rows import TwoTokenizers, two_tokenizers
from hpd.data.convert import is_chat
from hpd.data.dates import own_template, set_date
from hpd.data.rows import format_of
from hpd.data.samplers import FilledOrder, fill, fills_last_batch
from hpd.data.stored_rollouts import mark_rollouts, without_rollouts
from hpd.data.teacher_prompts import TEACHER_PROMPT
from hpd.data.teacher_rows import check_prefixes
from hpd.data.tokens import label_rows
from hpd.data.weighed import weigh_rows
from hpd.data.written_rows import AnswerReader
from hpd.models.forward import adapt_head
from hpd.models.memory import own_weights
from hpd.models.quantized import check_trainable, put_back, trained_data
from hpd.models.slices import RowSlices
from hpd.models.token_bytes import end_of_answer
from hpd.training.arguments import DistillConfig, label_policy
from hpd.training.dates import own_copy
from hpd.training.engines import check_engine
from hpd.training.probing import packing_verdicts, probe_student, settle
from hpd.training.resumable import Resumable
from hpd.training.slicing import slices_of

__all__ = ["StudentTrainer"]

_LOGGER = logging.getLogger(__name__)

# Columns that rows have beside what TRL knows, a list with an entry for each token.
_OWN_COLUMNS = (TEACHER_PREFIXES, TEACHER_CHUNKS, POSITION_WEIGHTS)
_OF_ROLLOUTS = (BEHAVIOR_LOGPROBS, SOURCES)


@contextlib.contextmanager
def _switched_off(args: DistillConfig, name: str) -> Iterator[None]:
    """A switch that the parent class would read otherwise than we do is off inside."""
    asked = getattr(args, name)
    setattr(args, name, False)
    try:
        yield
    finally:
        setattr(args, name, asked)


class StudentTrainer(Resumable, SFTTrainer):
    """Data, engine and files of a distilled student; the loss is a subclass's.

    Args:
        model: a loaded causal language model, or a path or Hub id.
        args: of training.
        peft_config: as in TRL; an adapter on the output head is supported.
        recomputes: True if the loss reads the head again in the backward pass.
        repeats_rows: True if rows come several times in a row from the dataset.
        prompts: True if prompts without completions are enough, since the student writes every row.
        writes: True if the student writes rows.
        teacher_tokenizer: of a teacher that reads the rows in tokens of its own (vocabulary: bytes).
        **kwargs: as `SFTTrainer` takes them.
    """

    args: DistillConfig
    model: Any  # the student, perhaps as a PeftModel
    _first_day: datetime.date
    """The day that the run began, which its chat template prints."""
    _day: datetime.date | None = None
    """The same where the template prints it."""
    _weight_column: str | None = None
    """The column of the rows that a term is weighed by."""
    _stored = False
    """True if the rows are rollouts that were written earlier, with the log-probabilities of their writer."""
    _slices: RowSlices | None = None
    """This process's part of rows that several share (context parallelism)."""
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
        prompts: bool = False,
        writes: bool = False,
        teacher_tokenizer: Any = None,
        **kwargs: Any,
    ):
        self._repeats_rows = repeats_rows
        self._teacher_tokenizer = teacher_tokenizer
        self._both: TwoTokenizers | None = None
        self._prompts, self._writes, self._chat = prompts, writes, False
        _read_on_every_process(args)
        self._labels = label_policy(args)
        if "processing_class" in kwargs:
            kwargs["processing_class"] = own_copy(kwargs["processing_class"], args.chat_template_path)
        check_trainable(model)
        model, peft_config, hide_head = adapt_head(model, peft_config, args.seed)
        trained = trained_data(model)
        # Turns are found by our own reader, whose templates and formats are more than TRL's.
        with hide_head, _switched_off(args, "assistant_only_loss"):
            super().__init__(model, args=args, peft_config=peft_config, **kwargs)  # type: ignore[arg-type]
        check_trainable(self.model)  # loaded only now, if it was a path
        put_back(self.model, trained)
        check_engine(args, self.accelerator, recomputes=recomputes)
        student = self.accelerator.unwrap_model(self.model)
        own_weights(student)
        if self._slices is not None:
            self._slices.attach(student, "student")
        self._base_model = student.get_base_model() if hasattr(student, "get_base_model") else student
        self.verdicts = probe_student(student, self._base_model, self.processing_class, self.padding_free)
        """What the probes of student and teacher found."""
        self.verdicts += packing_verdicts(args)
        settle(self.verdicts)
        # The model's own loss may not; ours shifts labels and needs the label count of the accumulated batch.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, name: str
    ) -> Any:
        """Rows of every format (docs/reference/data-formats.md) as token ids; TRL cuts and packs them."""
        self._day = set_date(self._tokenizer, self._first_day)
        if formatting_func is None and dataset is not None:
            field, prompts = args.dataset_text_field, self._prompts and name == "train"
            kept = [] if self._weight_column is None else [self._weight_column]
            kept += [BEHAVIOR_LOGPROBS] if self._stored else []
            layout = format_of(dataset, {"text": field} if field != "text" else {}, prompts, kept)
            if layout is not None:
                if self._writes and name == "train":
                    self._chat = is_chat(dataset, layout, self._labels, prompts=prompts)
                with global_then_local_main_first():
                    dataset = label_rows(
                        dataset,
                        layout,
                        self._tokenizer,
                        self._labels,
                        prompts=prompts,
                        num_proc=args.dataset_num_proc,
                        other=self.two_tokenizers(),
                        writes=self._writes and name == "train",
                    )
        if dataset is None:
            return None
        rows: Any = dataset
        if self._weight_column is not None:
            with global_then_local_main_first():
                rows = weigh_rows(rows, self._weight_column, num_proc=args.dataset_num_proc)
        rows = self._with_behavior(rows, name, args)
        columns = get_dataset_column_names(rows)
        if self._teacher_tokenizer is not None and TEACHER_CHUNKS not in columns:
            raise ValueError(
                "The rows are prepared already, in the student's tokens, and train.vocabulary: bytes needs "
                "their text: give them as prompt and completion, without formatting_func."
            )
        if TEACHER_PREFIXES in columns:
            same = name == "train" and TEACHER_CHUNKS not in columns
            check_prefixes(rows if same else None, args.truncation_mode)
            if packing:
                return _packed(rows, args)
        elif packing and (POSITION_WEIGHTS in columns or BEHAVIOR_LOGPROBS in columns):
            return _packed(rows, args)
        elif TEACHER_PROMPT in columns:
            raise ValueError(
                f"The rows are prepared already and have a {TEACHER_PROMPT}, which would have no effect: "
                "give them as prompt and completion."
            )
        return super()._prepare_dataset(rows, processing_class, args, packing, formatting_func, name)

    def _with_behavior(self, rows: Any, name: str, args: Any) -> Any:
        """Rows of training as rollouts that were stored, where they are."""
        if self._stored and name == "train":
            with global_then_local_main_first():
                return mark_rollouts(rows, num_proc=args.dataset_num_proc)
        if not self._stored and BEHAVIOR_LOGPROBS in get_dataset_column_names(rows):
            raise ValueError(
                f"The rows have the column {BEHAVIOR_LOGPROBS}, which would have no effect: set prefixes: "
                "{student: 1, stored: true} with strategy: policy_gradient, or remove the column."
            )
        return without_rollouts(rows) if self._stored else rows

    def two_tokenizers(self) -> TwoTokenizers | None:
        """What rows need in order to be read in the teacher's tokens too; None: it has the student's."""
        if self._teacher_tokenizer is None:
            return None
        if self._both is None:
            set_date(self._teacher_tokenizer, self._first_day)
            self._both = two_tokenizers(self._tokenizer, self._teacher_tokenizer)
        return self._both

    def answer_reader(self) -> AnswerReader | None:
        """Reads the student's own rows to a teacher with another tokenizer; None: it has the student's."""
        both = self.two_tokenizers()
        if both is None or not self._writes:
            return None
        return AnswerReader(both, end_of_answer(both.tokenizer, both.teacher, self._chat))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        assert self._signature_columns is not None
        own = (*_OWN_COLUMNS, *(_OF_ROLLOUTS if self._stored else ()))
        own = [name for name in own if name not in self._signature_columns]
        self._signature_columns = [*self._signature_columns, *own]

    @property
    def is_sharded(self) -> bool:
        """True if the model can only run on all processes at once."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def sharing(self) -> int:
        """Processes that share each row; 1: every one reads rows of its own."""
        return 1 if self._slices is None else self._slices.size

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self._slices = slices_of(self.accelerator)

    def _prepare_context_parallel_inputs(self, model: Any, inputs: Any) -> Any:
        # Not here: draws, counts and what the teacher is asked are those of whole rows (`label_positions`).
        return contextlib.nullcontext, inputs

    def label_positions(self, model: Any, inputs: dict[str, Any]) -> tuple[dict[str, Any], TokenBatch]:
        """What a collated batch's forward takes, and its label positions: this process's part of both."""
        batch = TokenBatch.pop(inputs)
        if self._slices is None:
            return inputs, batch
        self._slices.probe(model, "student")
        return self._slices.cut(inputs, batch)

    def floating_point_ops(self, inputs: Any) -> int:
        """As in transformers; of rows that several processes share, each counts its part."""
        return super().floating_point_ops(inputs) // self.sharing

    def balancing(
        self, sums: dict[str, Tensor], num_items_in_batch: Tensor | int | None
    ) -> Callable[[Tensor], Tensor] | None:
        """Return what a micro-batch's loss gains by the balancing loss of a mixture of experts.

        As in TRL: router_aux_loss_coef times the mean over the accumulated micro-batches. None for other
        models.

        Args:
            sums: gains the balancing loss itself.
            num_items_in_batch: as `compute_loss` has it.
        """
        if not self.aux_loss_enabled:
            return None
        steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps

        def balance(aux_loss: Tensor) -> Tensor:
            sums["aux_loss"], sums["aux_batches"] = aux_loss.detach(), torch.ones_like(aux_loss)
            return self.router_aux_loss_coef * aux_loss / steps

        return balance

    def wrap_again(self) -> None:
        """Have training wrap a student that an evaluation before it has prepared.

        The Trainer prepares it there without DistributedDataParallel and marks it as prepared, after which
        accelerate would not wrap it: each process would train a student of its own.
        """
        model = self.model
        unwrapped = self.model_wrapped is model and getattr(model, "_is_accelerate_prepared", False)
        if self.accelerator.num_processes == 1 or self.is_sharded or not unwrapped:
            return
        if (original := model.__dict__.pop("_original_forward", None)) is not None:
            model.forward = original
        model._is_accelerate_prepared = False
        self.accelerator._models.remove(model)

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
        # dataloader_drop_last is about steps: what is measured on held-out rows is measured on all of them.
        keeping = (
            contextlib.nullcontext() if is_training else _switched_off(self.args, "dataloader_drop_last")
        )
        with keeping:
            if fills_last_batch(self.args, dataset) and not (is_training and self._repeats_rows):
                count = len(dataset)
                dataset = fill(dataset, batch_size * self.args.world_size // self.sharing)
                shuffled = is_training and self.args.train_sampling_strategy == "random"

                def order(rows: Any) -> FilledOrder:
                    return FilledOrder(count, len(rows), shuffled, self.args.data_seed)

                sampler_fn = order
            return super()._get_dataloader(
                dataset, description, batch_size, sampler_fn, is_training, dataloader_key
            )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict:
            # ZeRO-2 hands a tied head out as a copy, which would be a second tensor in the file.
            tied = getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", {})
            state_dict = {name: t for name, t in state_dict.items() if tied.get(name) not in state_dict}
        # A template whose date the run has fixed is saved as it was.
        with own_template(self._tokenizer):
            super()._save(output_dir, state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole student, loadable by `from_pretrained` in one process, whatever engine shards
        it."""
        if self.is_fsdp_enabled and not _internal_call:
            # The Trainer silently writes nothing here where checkpoints are sharded.
            weights = self.accelerator.get_state_dict(self.model)
            self._save(output_dir or self.args.output_dir, state_dict=weights)
            return
        super().save_model(output_dir, _internal_call)


def _packed(rows: Any, args: DistillConfig) -> Any:
    """Rows packed as TRL does, which would leave the teacher's prompts and the rows' weights out."""
    if args.packing_strategy != "bfd" or args.max_length is None:
        raise ValueError(
            "Behind prompts of the teacher's own, and with a weight for each row, whole rows are packed, up "
            "to a length: set train.max_length, and "
            f"train.packing_strategy: bfd (it is {args.packing_strategy}, max_length {args.max_length})."
        )
    with global_then_local_main_first():
        marked = _OF_ROLLOUTS if BEHAVIOR_LOGPROBS in get_dataset_column_names(rows) else ()
        own = [name for name in (*_OWN_COLUMNS, *marked) if name in get_dataset_column_names(rows)]
        rows = rows.select_columns(["input_ids", "labels", *own])
        if args.shuffle_dataset:
            rows = rows.shuffle(seed=args.seed)
        options: Any = {"num_proc": args.dataset_num_proc} if isinstance(rows, Dataset) else {}
        rows = pack_dataset(rows, args.max_length, args.packing_strategy, options)
        return rows.shuffle(seed=args.seed) if args.shuffle_dataset else rows


def _read_on_every_process(args: DistillConfig) -> None:
    """Have each process read a stream itself.

    Accelerate would join the batches of all processes and cut them again, and label positions are counted in
    the batch as it was collated.
    """
    if args.accelerator_config.dispatch_batches:  # type: ignore[union-attr]
        _LOGGER.warning(
            "accelerator_config.dispatch_batches: true is taken as false: each process reads the rows itself."
        )
    args.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]
