"""Names that people write for a field of the trainer, and the field."""

from __future__ import annotations

__all__ = ["TRAINER_NAMES", "trainer_name"]

TRAINER_NAMES = {
    "batch": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "bs": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "grad_accum": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "lr": "learning_rate",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "seq_length": "max_length",
    "cutoff_len": "max_length",
    "scheduler": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type",
    "steps": "max_steps",
    "num_steps": "max_steps",
    "warmup": "warmup_steps",
    "wd": "weight_decay",
}


def trainer_name(name: str) -> str | None:
    """The field of `train` that a name means, itself included; None for a name that is not known here."""
    return name if name in TRAINER_NAMES.values() else TRAINER_NAMES.get(name)
