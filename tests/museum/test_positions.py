"""Bugs of positions: what is read at t and learned at t + 1."""

import torch
from accelerate import Accelerator
from helpers.absolute_model import absolute_positions
from helpers.museum import exhibit, swap
from helpers.trainers import first_batch, make_trainer
from tiny_models import tiny_tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from hpd.batch import TokenBatch
from hpd.data.collator import DistillCollator
from hpd.generation.rollouts import StudentRollouts
from hpd.losses.functional import distillation_loss
from hpd.methods.prefixes import RolloutConfig

VOCAB = 12


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """Rows with padding on their right; every token but the first two is a label."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_teacher_is_read_one_position_late(pair, tmp_path):
    student, _ = pair
    trainer = make_trainer((student, student), tmp_path, method="forward_kl")
    batch = first_batch(trainer)

    def measure():
        return trainer.compute_loss(trainer.model, dict(batch)), 0.0

    def mutate(patch):
        def late(original):
            return lambda self, inputs, batch: original(self, inputs, batch._replace(index=batch.index + 1))

        swap(patch, "hpd.teachers.model:ModelTeacher.scores", late)

    exhibit(measure, mutate, tolerance=1e-6)


def test_labels_are_shifted_twice():
    batch = padded([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9]])
    logits = torch.randn(2, 8, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def measure():
        taken = TokenBatch.pop(DistillCollator(lambda rows: dict(batch))([{}]))
        got = cross_entropy(logits.flatten(0, 1)[taken.index], taken.labels)
        return got, cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    def mutate(patch):
        def shifted(original):
            return lambda inputs, *rest, **named: original(
                {**inputs, "labels": inputs["labels"].roll(-1, 1)}, *rest, **named
            )

        swap(patch, "hpd.data.collator:token_batch", shifted)

    exhibit(measure, mutate)


def test_draw_is_compared_with_the_label_before():
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(2, 9, VOCAB, dtype=torch.float64, generator=generator).requires_grad_()
    teacher = torch.randn(2, 9, VOCAB, dtype=torch.float64, generator=generator)
    labels = torch.randint(VOCAB, (2, 9), generator=generator)

    def measure():
        drawn = distillation_loss(student, teacher, labels, "hpd", draws=labels[:, 1:]).loss
        alone = distillation_loss(student, teacher, labels, "hpd", support="label").loss
        return torch.autograd.grad(drawn, student)[0], torch.autograd.grad(alone, student)[0]

    def mutate(patch):
        def before(original):
            return lambda self, draws, labels: original(self, draws, labels.roll(1))

        swap(patch, "hpd.methods.supports:Support._coefficients", before)

    exhibit(measure, mutate)


def test_padding_on_the_left_moves_the_positions():
    student, teacher = absolute_positions(0), absolute_positions(1)
    config = RolloutConfig(max_new_tokens=6, teacher_share=0.9)
    engine = StudentRollouts(lambda: student, Accelerator(cpu=True), tiny_tokenizer(), config, teacher)
    numbers = torch.rand(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def measure():
        beside, _ = engine.generate([[40, 41], [50] * 20], [6, 6], numbers, 0)
        (alone,) = engine.generate([[40, 41]], [6], numbers[:1], 0)
        return beside.tokens, alone.tokens

    def mutate(patch):
        def without_positions(original):
            def init(self, sampling, mask):
                original(self, sampling, mask)
                teacher = self._teacher
                self._teacher = lambda **given: teacher(**{**given, "position_ids": None})

            return init

        swap(patch, "hpd.generation.drawing:_TeacherMixture.__init__", without_positions)

    exhibit(measure, mutate)
