"""Bugs of teachers: who is asked, in what mode, and about which tokens."""

import copy
import math

import torch
from helpers.museum import exhibit, swap
from helpers.trainers import first_batch, gradient, make_trainer
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from hpd.batch import DistillCollator, TokenBatch
from hpd.losses.products import logits
from hpd.models.forward import scores_of


def with_dropout(folder):
    """The model of a folder, with dropout wherever its family has it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attention_dropout=0.5)


def test_teacher_drops_out(pair, tmp_path):
    trainer = make_trainer(pair, tmp_path, teacher=with_dropout(pair[1]))
    batch = first_batch(trainer)
    taken = TokenBatch.pop(dict(batch))

    def asked():
        # Engines and callbacks switch whole trees of modules to training.
        trainer.teacher.model.train()
        return logits(trainer.teacher.scores(dict(batch), taken))

    def measure():
        return asked(), asked()

    def mutate(patch):
        def without_eval(original):
            def scores_of(model, inputs, index):
                with torch.no_grad():
                    patch.setattr(type(model), "eval", lambda self: self)
                    return original(model, inputs, index)

            return scores_of

        swap(patch, "hpd.models.forward:scores_of", without_eval)

    exhibit(measure, mutate, tolerance=1e-6)


def test_asking_the_teacher_ends_the_students_dropout(pair, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(pair, tmp_path, teacher="self", peft_config=lora)
    batch = first_batch(trainer)

    def measure():
        trainer.model.train()
        trainer.teacher.scores(dict(batch), TokenBatch.pop(dict(batch)))
        return [module.training for module in trainer.model.modules()], [
            True for _ in trainer.model.modules()
        ]

    def mutate(patch):
        def left_in_eval(original):
            def scores_of(model, inputs, index):
                found = original(model, inputs, index)
                model.eval()
                return found

            return scores_of

        swap(patch, "hpd.models.forward:scores_of", left_in_eval)

    exhibit(measure, mutate)


def test_teacher_learns_too(pair, tmp_path):
    def measure():
        trainer = make_trainer(pair, tmp_path, method="reverse_kl")
        before = copy.deepcopy(trainer.teacher.model.state_dict())
        gradient(trainer)
        teacher = list(trainer.teacher.model.parameters())
        # Whoever hands all parameters with a gradient to an optimiser moves the teacher.
        torch.optim.SGD(teacher, lr=1.0).step()
        after = trainer.teacher.model.state_dict()
        asks = any(p.requires_grad for p in teacher)
        return [asks, all(torch.equal(after[name], value) for name, value in before.items())], [False, True]

    def mutate(patch):
        def trainable(original):
            def init(self, model):
                original(self, model)
                model.requires_grad_(True)

            return init

        swap(patch, "hpd.teachers.model:ModelTeacher.__init__", trainable)

    exhibit(measure, mutate)


def test_student_is_compared_with_itself(pair, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    trainer = make_trainer(pair, tmp_path, method="forward_kl", teacher="self", peft_config=lora)
    base = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    apart = make_trainer(pair, tmp_path, method="forward_kl", teacher=base)
    batch = first_batch(trainer)

    def measure():
        taken = TokenBatch.pop(dict(batch))
        found = logits(trainer.teacher.scores(dict(batch), taken))
        return found, logits(apart.teacher.scores(dict(batch), taken))

    def mutate(patch):
        def adapter_left_on(original):
            return lambda self, inputs, batch: scores_of(trainer.model, inputs, batch.index)

        swap(patch, "hpd.teachers.model:SelfTeacher.scores", adapter_left_on)

    exhibit(measure, mutate)


def test_log_probabilities_belong_to_other_columns():
    nan = math.nan
    rows = [
        {"input_ids": [1, 7, 8], "behavior_logprobs": [nan, -0.7, -0.8], "sources": [0, 1, 1]},
        {"input_ids": [1, 2, 3, 4, 9], "behavior_logprobs": [nan] * 4 + [-0.9], "sources": [0] * 4 + [1]},
    ]

    def padded(examples):
        width = max(len(row["input_ids"]) for row in examples)
        short = [width - len(row["input_ids"]) for row in examples]
        ids = [row["input_ids"] + [0] * gap for row, gap in zip(examples, short, strict=True)]
        labels = [
            [
                token if source else -100
                for token, source in zip(row["input_ids"], row["sources"], strict=True)
            ]
            + [-100] * gap
            for row, gap in zip(examples, short, strict=True)
        ]
        mask = [[1] * (width - gap) + [0] * gap for gap in short]
        return {
            name: torch.tensor(value)
            for name, value in (("input_ids", ids), ("labels", labels), ("attention_mask", mask))
        }

    def measure():
        taken = TokenBatch.pop(DistillCollator(padded)(rows))
        return taken.behavior_logprobs, -taken.labels / 10.0

    def mutate(patch):
        # Written from the first completion token on, as if all prompts were equally long.
        def from_one_column(original):
            def laid_out(input_ids, values):
                first = [
                    sum(math.isnan(x) for x in row) if isinstance(row[0], float) else 0 for row in values
                ]
                moved = [row[a:] + [0.0] * a for row, a in zip(values, first, strict=True)]
                return (
                    original(input_ids, values) if not max(first) else original(input_ids, moved).roll(1, 1)
                )

            return laid_out

        swap(patch, "hpd.batch:_laid_out", from_one_column)

    exhibit(measure, mutate)
