"""A trainer on a tiny pair, and what tests read from it."""

import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hpd import DistillConfig, DistillTrainer

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def rows(count=8, offset=0):
    return [
        {
            "prompt": f"say {WORDS[(i + offset) % 10]}:",
            "completion": " " + " ".join(WORDS[: 1 + (3 * i + offset) % 7]),
        }
        for i in range(count)
    ]


def make_trainer(
    pair,
    folder,
    *,
    method="hpd",
    train=None,
    evaluation=None,
    teacher=None,
    peft_config=None,
    terms=(),
    **options,
):
    student_dir, teacher_dir = pair
    # Gradient checks compare exactly, so the data order must not depend on the batch size.
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "metric_stride": 1,
        "dataset_num_proc": None,
        "max_length": 64,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
    }
    regime = {
        name: options.pop(name)
        for name in ("prefixes", "rollouts", "strategy", "guards", "teacher_tokenizer")
        if name in options
    }
    settings.update(options)
    return DistillTrainer(
        **regime,
        model=AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32),
        teacher=teacher
        if teacher is not None
        else AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32),
        method=method,
        terms=terms,
        args=DistillConfig(output_dir=str(folder), **settings),
        train_dataset=train if isinstance(train, IterableDataset) else Dataset.from_list(train or rows()),
        eval_dataset=Dataset.from_list(evaluation) if evaluation is not None else None,
        processing_class=AutoTokenizer.from_pretrained(student_dir),
        peft_config=peft_config,
    )


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def first_batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def gradient(trainer, batches=None):
    """Gradient of one global batch, without an optimizer."""
    trainer.model.zero_grad()
    batches = batches if batches is not None else list(trainer.get_train_dataloader())
    count = sum(b["labels"][:, 1:].ne(-100).sum() for b in batches)
    total = 0.0
    for batch in batches:
        loss = trainer.compute_loss(trainer.model.train(), dict(batch), num_items_in_batch=count)
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def _stop_at(step):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= step

    return Stop()
