"""`DistillTrainer`: TRL's SFTTrainer with the loss of the table and a teacher; the rest is inherited."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import TrainOutput

from hpd.batch import TokenBatch
from hpd.config.schema import GuardsConfig
from hpd.data.collator import DistillCollator
from hpd.data.rows import validation_sets
from hpd.data.weighed import check_weighed, weight_column
from hpd.files import write_atomically
from hpd.generation.rollouts import RolloutEngine, make_engine
from hpd.losses import Scores, TeacherScores
from hpd.losses.byte_chunks import byte_nll
from hpd.losses.byte_events import ByteEvents
from hpd.losses.operator import LossOutput, loss_by_source
from hpd.losses.position_weights import position_weights
from hpd.methods.byte_forms import check_forms, check_likeliest
from hpd.methods.prefixes import Prefixes, RolloutConfig
from hpd.methods.regime import choose_regime
from hpd.methods.strategy import StrategyConfig
from hpd.methods.table import choose_terms
from hpd.methods.terms import Term, TermConfig, as_evaluated, num_uniforms, sources_used
from hpd.models.forward import label_inputs
from hpd.models.pairing import common_vocab
from hpd.teachers import RoutedScores, Teacher, TeacherUnavailable
from hpd.teachers.sources import as_teacher, knows_likeliest
from hpd.training.arguments import as_config
from hpd.training.card import Card
from hpd.training.cutting import common_share, cut_batch
from hpd.training.dates import first_day_of_folder, keep_day
from hpd.training.following import Following
from hpd.training.guards import check_overlap, further_sums
from hpd.training.measured import MeasuredTrainer
from hpd.training.metrics import MetricSums, add_sums, input_tokens
from hpd.training.nonfinite import NonFinite
from hpd.training.on_policy import StepState
from hpd.training.preflight import check_best_metric, check_call, check_teacher, own_tokenizer
from hpd.training.probing import check_rows, check_seen, check_writer, settle
from hpd.training.scheduled import ScheduledTerms
from hpd.training.settings import check_operator
from hpd.training.slicing import check_slicing

__all__ = ["DistillTrainer"]


class DistillTrainer(MeasuredTrainer):
    """Distill `teacher` into `model`.

    The loss is the sum over label tokens divided by the label tokens of the whole global batch (all
    processes, all accumulation steps), so that the gradient does not depend on how the batch was split.

    Args:
        model: the student: a loaded causal language model, or a path or Hub id.
        teacher: a loaded model, a path or Hub id, "self", or any `Teacher`.
        method: a name of METHODS (default hpd); `method_kwargs` are its parameters.
        terms: an explicit list of terms instead of a method.
        prefixes: shares of dataset and student rows; None: the method's, which is the dataset alone for most.
        rollouts: how the student writes its rows.
        strategy: how weights meet the gradient: a `StrategyConfig`, or its type.
        guards: thresholds that warn, or stop and save.
        args: a `DistillConfig`, or an `SFTConfig` or `TrainingArguments`.
        peft_config: as in TRL; an adapter on the output head is supported.
        teacher_tokenizer: the teacher's tokenizer or its path, where it does not lie beside the teacher; the
            student's is compared with it. With `vocabulary="bytes"` the teacher reads its rows in it.
        **kwargs: everything else that `SFTTrainer` takes: train_dataset, eval_dataset, processing_class,
            callbacks, ... With `compute_metrics`, evaluations compute whole logits in a second forward pass.

    Raises:
        ValueError: method and terms together, unknown names, settings without effect, tokenizers that differ,
            or vocabularies that differ under `vocabulary="error"`.
    """

    _tag_names = ["hpd", "distillation"]  # noqa: RUF012 (TRL's type)
    _name = "HPD"

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher: str | PreTrainedModel | Teacher,
        method: str | None = None,
        method_kwargs: Mapping[str, Any] | None = None,
        terms: Sequence[TermConfig | Term] = (),
        prefixes: Prefixes | None = None,
        rollouts: RolloutConfig | None = None,
        strategy: StrategyConfig | str | None = None,
        guards: GuardsConfig | None = None,
        args: TrainingArguments | None = None,
        peft_config: PeftConfig | None = None,
        teacher_tokenizer: str | PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        args = as_config(args)
        method = method if method or terms else "hpd"
        configs = choose_terms(method, method_kwargs or {}, terms)
        self._schedule = ScheduledTerms(configs)
        self.terms = self._schedule.at(0.0)
        self.regime = choose_regime(method, self.terms, prefixes, rollouts, strategy)
        self._clips = self.regime.strategy.type == "policy_gradient"
        check_operator(args, self._clips)
        # Further updates of a batch continue with what the first one froze, position by position.
        self._cuts = common_share(self._schedule.at(0.0)) is not None and self.regime.strategy.updates == 1
        self._weight_column, self._stored = weight_column(self.terms), self.regime.prefixes.stored
        self._method_name = method or ("terms" if terms else "hpd")
        check_call(model, teacher, teacher_tokenizer, args, {**kwargs, "peft_config": peft_config})
        check_slicing(args, self.terms, self.regime, model, teacher, {**kwargs, "peft_config": peft_config})
        check_teacher(method, self.regime, teacher, kwargs.get("train_dataset"))
        own = own_tokenizer(teacher, teacher_tokenizer, kwargs.get("processing_class"), args)
        check_forms(configs, self.regime, guards, args.byte_length if own is not None else None)
        self._first_day = first_day_of_folder(cast(str, args.output_dir), teacher)
        super().__init__(
            guards or GuardsConfig(),
            model,
            args,
            peft_config,
            recomputes=self._clips,
            repeats_rows=self.regime.repeats,
            prompts=self.regime.needs_prompts_only,
            writes=self.regime.prefixes.on_policy,
            teacher_tokenizer=own,
            **kwargs,
        )
        self.teacher = as_teacher(teacher, args.trust_remote_code)
        self.teacher.check_terms(configs)
        self._events: ByteEvents | None = None
        vocab = self._common_vocabulary(configs)
        metrics = bool(args.metric_stride) or self._guards.overlap or self._events is not None
        self._runs_teacher = self.regime.runs_teacher(self.terms, metrics)
        self._take_teacher()
        self.data_collator = DistillCollator(self.data_collator, vocab)
        self._introduce_rows()
        self._set_up_state()

    def _common_vocabulary(self, configs: Sequence[TermConfig | Term]) -> int | None:
        """Tokens that both models have; None where the teacher tells no number, or has its own tokens."""
        vocab, size = self.teacher.vocab, self._base_model.config.get_text_config().vocab_size
        if (both := self.two_tokenizers()) is not None:
            self._events, vocab = both.events(size, vocab or size).to(self.accelerator.device), None
            if knows_likeliest(self.teacher):
                check_likeliest(configs)
        elif vocab is not None:
            vocab = common_vocab(self._base_model, vocab, self.args.vocabulary)
        self._shared_vocab = vocab or size
        return vocab

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """Write README.md into the output folder; transformers calls it whenever it saves there.

        Args:
            model_name: the model's name; None: the folder's.
            dataset_name: a data set's id on the Hub.
            tags: not read; a card of hpd has its own.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        teacher = getattr(self.teacher.model, "config", None)
        card = Card(
            name=self.hub_model_id or model_name or folder.name,
            student=str(getattr(self._base_model.config, "_name_or_path", "") or "a student"),
            teacher=str(getattr(teacher, "_name_or_path", "") or type(self.teacher).__name__),
            method=self._method_name,
            datasets=(dataset_name,) if dataset_name else (),
            adapter=isinstance(self.accelerator.unwrap_model(self.model), PeftModel),
        )
        write_atomically(folder / "README.md", card.text())

    def _take_teacher(self) -> None:
        """Place the teacher beside the student, and try it on a few tokens."""
        check_seen(self, self.teacher, self.regime.prefixes.on_policy)
        check_writer(self.train_dataset, self.regime.rollouts)
        check_weighed(self.terms, self.train_dataset)
        check_overlap(self._guards, self.teacher.drawn)
        for rows in (self.train_dataset, self.eval_dataset):
            # A teacher with a tokenizer of its own reads other tokens.
            reads = None if self._events is not None else self.teacher.model
            check_rows(rows, self.processing_class, {"student": self._base_model, "teacher": reads})
        # Sharded weights cannot be probed; whole ones are where they were loaded until they are placed.
        found = self.teacher.probe(self.padding_free) if self.is_sharded else []
        self._place_teacher()
        if self.teacher.follows:
            self.add_callback(Following(self.teacher))
        found = found or self.teacher.probe(self.padding_free)
        self.verdicts += found
        settle(found)

    def _set_up_state(self) -> None:
        """Make what is kept from step to step; checkpoints hold it, but for the sums of evaluation."""
        self.sums = {"train": MetricSums(self.accelerator), "eval": MetricSums(self.accelerator)}
        self._step = StepState(
            self.regime,
            self.args,
            self.accelerator,
            self.data_collator,
            self._make_engine,
            on_dataset="dataset" in sources_used(self.terms),
            validates="" in validation_sets(self.eval_dataset) and self.args.eval_strategy != "no",
            reader=self.answer_reader(),
        )
        self._sums_before: dict[str, float] = {}
        ramp = self._step.ramp
        self.stateful = {
            "sums": self.sums["train"],
            "on_policy": self._step,
            "watch": self._watch,
            "terms": self._schedule,
            **({"share": ramp} if ramp is not None else {}),
            **({"teacher": self.teacher} if self.teacher.follows else {}),
        }
        self.needs_own_state = self._step.must_be_saved

    def _make_engine(self) -> RolloutEngine:
        return make_engine(
            self.regime.rollouts,
            lambda: cast(nn.Module, self.model_wrapped),
            self.accelerator.unwrap_model(self.model),
            self.accelerator,
            self._tokenizer,
            self.teacher.model,
        )

    def _introduce_rows(self) -> None:
        """Show the teacher the rows of the datasets, once; from then on batches ask it as they are collated,
        one ahead of the step."""
        held_out = validation_sets(self.eval_dataset).values()
        # A stream has no end that one could wait for; there, the lookup itself finds a missing row.
        read = (self.train_dataset, *held_out) if self._runs_teacher else held_out
        known = [rows for rows in read if isinstance(rows, Dataset)]
        self.teacher.register_rows(itertools.chain.from_iterable(map(self.data_collator.rows, known)))
        # A loader's workers have no connection, a stream's batches travel from one process to the others, and
        # rows that are not trained on need no answer.
        dispatched = self.accelerator.num_processes > 1 and not isinstance(self.train_dataset, Dataset)
        elsewhere = self.args.dataloader_num_workers > 0 or dispatched or self.regime.prefixes.on_policy
        # The ends of answers may be cut off first, and processes that share rows ask about their parts.
        late = self._cuts or self.sharing > 1 or (self.teacher.remote and elsewhere)
        ahead = self.teacher.asks_ahead and self._runs_teacher and not late
        self.data_collator.ask = self.teacher.ask if ahead else None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, within `resuming`.

        Raises:
            TeacherUnavailable: a remote teacher stayed away; the steps done are saved.
            NonFinite: a loss or gradient was NaN or infinite, and the guard's policy is to stop; likewise.
            ValueError: the checkpoint is of a run whose chat template printed another date.
        """
        if self.args.metric_for_best_model is not None and self.compute_metrics is None:
            check_best_metric(self.args, self.evaluation_names())
        self.wrap_again()
        with self.resuming(resume_from_checkpoint, saved_by=(TeacherUnavailable, NonFinite)) as checkpoint:
            if self._day is not None:
                keep_day(self._day, cast(str, self.args.output_dir), checkpoint, self.is_world_process_zero())
            return super().train(checkpoint, *args, **kwargs)
        return TrainOutput(self.state.global_step, float("nan"), {})

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch; its statistics stay on the device until the next log."""
        if return_outputs:
            raise ValueError("The fused loss builds no logits: call predict(), or the model itself.")
        training = self.model.training
        inputs, batch = self.label_positions(model, inputs)
        teacher = self._teacher_scores(inputs, batch)
        num_tokens = max(len(batch.labels), 1) if num_items_in_batch is None else num_items_in_batch
        scale = 1.0 / torch.as_tensor(num_tokens, device=batch.labels.device).clamp(min=1)
        replicas = 1
        if training and self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The count covers every process and DDP averages the gradients: undo that average.
            replicas = self.accelerator.num_processes // self.get_tp_size()
            scale = scale * replicas
        # As a result of the forward they would be cast to FSDP2's bfloat16, counts and all.
        stats: dict[str, Tensor] = {}
        head_function = functools.partial(
            self._loss, teacher=teacher, batch=batch, scale=scale, replicas=replicas, stats=stats
        )
        balance = self.balancing(stats, num_items_in_batch)
        loss = model(**label_inputs(inputs, batch.index), head_function=head_function, balance=balance)
        if training:
            self.record_loss(loss, teacher)
        counts = {"labels_dropped": batch.dropped, "num_tokens": input_tokens(inputs)}
        counts |= {} if batch.cut is None else {"labels_cut": batch.cut}
        self.sums["train" if training else "eval"].add({**counts, **stats})
        return loss

    def _loss(
        self,
        student: Scores,
        *,
        teacher: TeacherScores | RoutedScores,
        batch: TokenBatch,
        scale: Tensor,
        replicas: int,
        stats: dict[str, Tensor],
    ) -> Tensor:
        """The loss at a micro-batch's label positions, inside the model's forward; `stats` gains its sums."""
        training = self.model.training
        terms = self.terms if training else as_evaluated(self.terms)
        # It is a sum over positions, so each teacher's positions may be summed on their own.
        parts = teacher.parts if isinstance(teacher, RoutedScores) else ((None, teacher),)
        weights = position_weights(terms, batch, student, parts, self.args.chunk_bytes)
        total = torch.zeros((), device=scale.device)
        for positions, scores in parts:
            at, some = (slice(None), batch) if positions is None else batch.of_teacher(positions)
            of_student = student.at(None if positions is None else at)
            draws = self._uniforms(some, num_uniforms(terms))
            weighed: Any = {"position_weights": {k: w[at] for k, w in weights.items()}} if weights else {}
            if training and self._clips:
                output = self._step.policy_gradient(
                    of_student, scores, some, terms, uniforms=draws, scale=scale, replicas=replicas, **weighed
                )
            else:
                output = self._operator(
                    of_student,
                    scores,
                    some,
                    terms,
                    uniforms=draws,
                    scale=scale,
                    chunk_bytes=self.args.chunk_bytes,
                    metric_stride=self.args.metric_stride if training else 1,
                    **weighed,
                )
            total = total + output.loss
            add_sums(stats, output.stats)
            if training:
                stride, gaps = self.args.metric_stride, self._schedule.reads_gaps
                add_sums(stats, further_sums(self._guards, gaps, of_student, scores, some, stride))
        return total

    @property
    def _operator(self) -> Callable[..., LossOutput]:
        """The loss where nothing is clipped: of tokens, or of chunks of bytes."""
        if self._events is not None:
            return functools.partial(byte_nll, events=self._events, length=self.args.byte_length)
        given = {name: getattr(self.args, name) for name in ("impl", "kl_estimator", "gradient_filter")}
        return functools.partial(loss_by_source, **given)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of the next step; none where a resumed run has no step left to do."""
        self.stop_if_asked()
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return [], None
        before = self.take_state()
        if self._schedule.moves:
            self.terms = self._schedule.at(self.progress)
            self._sums_before = self.sums["train"].totals(self._schedule.observed)
        # Rollouts come in before the label tokens are counted.
        batches = self._step.begin(
            list(itertools.islice(epoch_iterator, num_batches)), self.state.global_step, self.progress
        )
        num_items = self._get_num_items_in_batch(batches, device)
        if self._cuts and (share := common_share(self.terms)) is not None:
            batches = [cut_batch(batch, share) for batch in batches]
        # Here, before the step: no process has entered a collective operation that the others would wait in.
        if self._runs_teacher and (failure := self._teacher_failure(batches)):
            self.put_state(before)
            raise TeacherUnavailable(failure)
        self.begin_record(batches, before)
        return batches, num_items

    def end_step(self) -> None:
        """Count the step, and move what adapts by what it showed."""
        limit, norm = self.args.max_grad_norm, (self.last_step or {}).get("grad_norm")
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # FSDP2's is spread over the processes
        clipped = norm > limit if limit and norm is not None else False
        counted = torch.as_tensor(clipped, device=self.accelerator.device).float()
        self.sums["train"].add({"clipped": counted, "steps": torch.ones_like(counted)})
        if self._schedule.moves:
            now = self.sums["train"].totals(self._schedule.observed)
            of_step = {name: value - self._sums_before[name] for name, value in now.items()}
            self._schedule.observe(of_step, (self.state.global_step + 1) / max(self.state.max_steps, 1))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return self._step.sampler(super()._get_train_sampler(rows), rows, self._train_batch_size)
