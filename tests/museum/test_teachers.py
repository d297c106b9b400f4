"""Bugs of teachers: who is asked, in what mode, and about which tokens."""

import copy
import math

import torch
from helpers.museum import exhibit, swap
from helpers.trainers import first_batch, gradient, make_trainer
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hpd.batch import TokenBatch
from hpd.data.collator import DistillCollator
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
        modes = [module.training for module in trainer.model.modules()]
        return modes, [True] * len(modes)

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
        # Whoever hands all parameters with a gradient to an optimizer moves the teacher.
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
    collate = DistillCollator(DataCollatorForLanguageModeling(pad_token_id=0))
    # A log-probability of -0.7 belongs to token 7, and so on.
    rows = [
        {"input_ids": [1, 7, 8], "labels": [-100, 7, 8], "behavior_logprobs": [nan, -0.7, -0.8]},
        {"input_ids": [1, 2, 3, 9], "labels": [-100, -100, -100, 9], "behavior_logprobs": [nan] * 3 + [-0.9]},
    ]

    def measure():
        taken = TokenBatch.pop(collate(rows))
        return torch.nan_to_num(taken.behavior_logprobs), -taken.labels / 10.0

    def mutate(patch):
        def as_if_rows_ended_together(original):
            return lambda inputs, values: torch.tensor(
                [row[:1] * (inputs["input_ids"].shape[1] - len(row)) + row for row in values]
            )

        swap(patch, "hpd.data.collator:_laid_out", as_if_rows_ended_together)

    exhibit(measure, mutate)
