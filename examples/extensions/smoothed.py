"""The labels themselves, smoothed, as a teacher of your own: named in a recipe as "smoothed:Smoothed"."""

import math

import torch

from hpd.losses import Head, Scores
from hpd.teachers import Teacher


class Smoothed(Teacher):
    """p = 1 - epsilon + epsilon / V at the label, epsilon / V at each other of V tokens.

    With `method: forward_kl` the gradient is that of cross-entropy with label smoothing.

    Args:
        epsilon: what the other tokens share, in (0, 1).
    """

    def __init__(self, epsilon: float = 0.1) -> None:
        if not 0.0 < epsilon < 1.0:
            raise ValueError(f"epsilon must be in (0, 1), got {epsilon}")
        self._epsilon = epsilon
        self._vocab = 0

    def prepare(self, student, accelerator) -> None:
        # The student's head may have more rows than its tokenizer has tokens.
        self._vocab = len(accelerator.unwrap_model(student).get_output_embeddings().weight)

    def scores(self, inputs, batch) -> Scores:
        other = self._epsilon / self._vocab
        logits = torch.full((len(batch.labels), self._vocab), math.log(other), device=batch.labels.device)
        logits.scatter_(1, batch.labels[:, None], math.log(1.0 - self._epsilon + other))
        # Without a weight, hidden states are logits already.
        return Scores(logits, Head(weight=None))
