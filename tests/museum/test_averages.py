"""Bugs of averages: what a sum of losses is divided by."""

import pytest
import torch
from datasets import Dataset
from helpers.museum import exhibit, swap
from helpers.trainers import first_batch, gradient, make_trainer, rows, weights
from torch.distributions import Categorical, kl_divergence

from hpd.data import samplers
from hpd.data.collator import DistillCollator
from hpd.losses.functional import distillation_loss

VOCAB = 11


def logits_and_labels(size=(2, 9), seed=0):
    generator = torch.Generator().manual_seed(seed)
    sides = (torch.randn(*size, VOCAB, dtype=torch.float64, generator=generator) for _ in range(2))
    return *sides, torch.randint(VOCAB, size, generator=generator)


def test_mean_of_micro_batch_means(pair, tmp_path):
    trainer = make_trainer(pair, tmp_path, method="forward_kl", per_device_train_batch_size=1)
    singles = list(trainer.get_train_dataloader())
    together = trainer.data_collator(list(trainer.train_dataset))

    def measure():
        return gradient(trainer, singles)[1], gradient(trainer, [together])[1]

    def mutate(patch):
        def averaged(original):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                return original(self, model, inputs) * (len(inputs["input_ids"]) / len(singles))

            return compute_loss

        swap(patch, "hpd.training.trainer:DistillTrainer.compute_loss", averaged)

    exhibit(measure, mutate)


def test_accumulation_divides_or_multiplies_once_more(pair, tmp_path):
    def moved(steps):
        trainer = make_trainer(
            pair,
            tmp_path,
            method="forward_kl",
            train=rows(4),
            per_device_train_batch_size=4 // steps,
            gradient_accumulation_steps=steps,
        )
        start = weights(trainer)
        trainer.train()
        return weights(trainer) - start

    whole = moved(1)

    def measure():
        return moved(4), whole

    def mutate(patch):
        # The Trainer then takes the loss for a mean of the micro-batch, and divides it by their number.
        swap(patch, "hpd.training.student:StudentTrainer.loss_is_scaled_for_ga", lambda original: False)

    exhibit(measure, mutate, tolerance=1e-4)


def on_two_processes(patch, trainer):
    """Let the trainer believe that another process has the other half of the batch."""
    patch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 2))


def test_count_of_all_processes_is_divided_by_once_more(pair, tmp_path):
    trainer = make_trainer(pair, tmp_path, method="forward_kl", per_device_train_batch_size=4)
    halves = list(trainer.get_train_dataloader())
    whole = gradient(trainer, halves)[1]
    count = sum(half["labels"][:, 1:].ne(-100).sum() for half in halves)

    def measure():
        with pytest.MonkeyPatch.context() as patch:
            on_two_processes(patch, trainer)
            trainer.model.zero_grad()
            for half in halves:
                # Each on its own process; DDP takes the mean of their gradients.
                (
                    trainer.compute_loss(trainer.model.train(), dict(half), num_items_in_batch=count) / 2
                ).backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters()]), whole

    def mutate(patch):
        patch.setattr(trainer.args, "average_tokens_across_devices", False)

    exhibit(measure, mutate)


def test_evaluation_grows_with_the_number_of_processes(pair, tmp_path):
    trainer = make_trainer(pair, tmp_path, method="forward_kl")
    batch = first_batch(trainer)
    count = batch["labels"][:, 1:].ne(-100).sum()

    def loss():
        return trainer.compute_loss(trainer.model.eval(), dict(batch), num_items_in_batch=count)

    alone = loss()

    def measure():
        with pytest.MonkeyPatch.context() as patch:
            on_two_processes(patch, trainer)
            return loss(), alone

    def mutate(patch):
        def scaled_in_both_modes(original):
            def compute_loss(self, *given, **named):
                return original(self, *given, **named) * self.accelerator.num_processes

            return compute_loss

        swap(patch, "hpd.training.trainer:DistillTrainer.compute_loss", scaled_in_both_modes)

    exhibit(measure, mutate)


def test_evaluation_is_a_mean_of_batch_means(pair, tmp_path):
    trainer = make_trainer(pair, tmp_path, method="forward_kl", evaluation=rows(7, offset=3))

    def evaluated(batch_size):
        trainer.args.per_device_eval_batch_size = batch_size
        return trainer.evaluate()["eval_loss"]

    def measure():
        return evaluated(2), evaluated(7)

    def mutate(patch):
        def as_transformers_has_it(original):
            def log(self, logs, *rest):
                averaged = logs.get("eval_loss")
                original(self, logs, *rest)
                logs.update({} if averaged is None else {"eval_loss": averaged})

            return log

        swap(patch, "hpd.training.trainer:DistillTrainer.log", as_transformers_has_it)

    exhibit(measure, mutate)


def test_tokens_are_summed_and_rows_are_counted():
    student, teacher, labels = logits_and_labels()

    def loss(*sides):
        return distillation_loss(*sides, "forward_kl").loss

    def measure():
        # The same text twice in a row is the same text per token; only the seam is no position.
        twice = torch.cat([labels, labels], 1)
        twice[:, labels.shape[1]] = -100
        return loss(*(torch.cat([side, side], 1) for side in (student, teacher)), twice), loss(
            student, teacher, labels
        )

    def mutate(patch):
        def batchmean(original):
            def divided_by_rows(student, teacher, labels, *rest):
                output = original(student, teacher, labels, *rest)
                return output._replace(loss=output.loss * output.stats["tokens"] / len(labels))

            return divided_by_rows

        swap(patch, "hpd.losses.functional:_loss", batchmean)

    exhibit(measure, mutate)


def test_mean_runs_over_the_vocabulary_too():
    student, teacher, labels = logits_and_labels()

    def measure():
        sides = (Categorical(logits=side[:, :-1]) for side in (teacher, student))
        return distillation_loss(student, teacher, labels, "forward_kl").loss, kl_divergence(*sides).mean()

    def mutate(patch):
        def elementwise_mean(original):
            def forward_kl(whole):
                found = original(whole)
                return found._replace(value=found.value / VOCAB, factor=found.factor / VOCAB)

            return forward_kl

        swap(
            patch,
            "hpd.objectives.fused:FUSED",
            lambda table: {**table, "forward_kl": elementwise_mean(table["forward_kl"])},
        )

    exhibit(measure, mutate)


def test_masked_tokens_count_in_the_denominator():
    rows_of_five = [{"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, 300, 4, 5]}] * 2

    def collated(examples):
        return {name: torch.tensor([row[name] for row in examples]) for name in examples[0]}

    def measure():
        # A token that the teacher does not have is no label, for the loss and for the Trainer's count alike.
        inputs = DistillCollator(collated, vocab=256)(rows_of_five)
        return float(inputs["labels"][:, 1:].ne(-100).sum()), float(len(inputs["label_labels"]))

    def mutate(patch):
        def counted_before(original):
            def collate(self, examples):
                return {**original(self, examples), "labels": self.inner(examples)["labels"]}

            return collate

        swap(patch, "hpd.data.collator:DistillCollator.__call__", counted_before)

    exhibit(measure, mutate)


def test_last_batch_is_filled_with_copies():
    dataset = Dataset.from_list([{"input_ids": [i, i], "labels": [-100, i]} for i in range(5)])

    def measure():
        learned = [label for row in samplers.fill(dataset, 4)["labels"] for label in row if label != -100]
        return sorted(learned), list(range(5))

    def mutate(patch):
        def repeated(original):
            def fill(rows, multiple):
                return rows.select([i % len(rows) for i in range(len(original(rows, multiple)))])

            return fill

        swap(patch, "hpd.data.samplers:fill", repeated)

    exhibit(measure, mutate)
