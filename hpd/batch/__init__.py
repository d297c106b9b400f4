"""What flows from the data to the loss: label positions, their keys, and the collator that finds them."""

from hpd.batch.collated import (
    DATASET,
    IGNORE_INDEX,
    POSITION_WEIGHTS,
    STUDENT,
    TEACHER_CHUNKS,
    TEACHER_PREFIXES,
    DistillCollator,
    TokenBatch,
    as_teacher_reads,
    teacher_inputs,
    token_batch,
)
from hpd.batch.keys import uniforms

__all__ = [
    "DATASET",
    "IGNORE_INDEX",
    "POSITION_WEIGHTS",
    "STUDENT",
    "TEACHER_CHUNKS",
    "TEACHER_PREFIXES",
    "DistillCollator",
    "TokenBatch",
    "as_teacher_reads",
    "teacher_inputs",
    "token_batch",
    "uniforms",
]
