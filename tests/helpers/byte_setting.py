"""Two small vocabularies of bytes, and chunks of random tokens between them."""

import torch

from hpd.batch import TokenBatch
from hpd.losses import Head, Scores
from hpd.losses.byte_events import VocabularyBytes, byte_events

STUDENT = [b"a", b"b", b"c", b"ab", b"ba", b"abc", b"cc", b"", b"<end>", b"<role>"]
TEACHER = [b"<eos>", b"c", b"bc", b"a", b"b", b"aa", b"bcc", b"ca", b"ab", b"b", b"abca", b"<bos>", b"cab"]
DTYPE = torch.float64


def vocabulary(texts, ends=(), special=(), size=None):
    return VocabularyBytes(texts, frozenset(ends), frozenset([*special, *ends]), size or len(texts))


STUDENT_WORDS = vocabulary(STUDENT, ends=[8], special=[9], size=12)
TEACHER_WORDS = vocabulary(TEACHER, ends=[0], special=[11])
EVENTS = byte_events(STUDENT_WORDS, TEACHER_WORDS)
SAME = byte_events(STUDENT_WORDS, STUDENT_WORDS)
COUNTS, TEACHER_COUNTS = [1, 2, 1, 3, 1, 1, 4], [1, 1, 3, 2, 1, 2, 1]


def scores(count, vocab, seed, dtype=DTYPE, requires_grad=False, softcap=None):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 5, generator=generator, dtype=dtype, requires_grad=requires_grad)
    weight = torch.randn(vocab, 5, generator=generator, dtype=dtype, requires_grad=requires_grad)
    return Scores(hidden, Head(weight, softcap=softcap))


def batch_of(counts, teacher_counts, vocab=12, teacher_vocab=13):
    """Chunks of so many tokens on either side, with labels drawn at random."""
    generator = torch.Generator().manual_seed(9)
    sides = []
    for sizes, size in ((counts, vocab), (teacher_counts, teacher_vocab)):
        chunks = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        sides.append((chunks, torch.randint(size, (len(chunks),), generator=generator)))
    (chunks, labels), (teacher_chunks, teacher_labels) = sides
    nothing = torch.zeros_like(labels)
    return TokenBatch(
        nothing, labels, nothing, nothing.sum(), chunks=chunks, teacher_chunks=teacher_chunks,
        teacher_labels=teacher_labels,
    )  # fmt: skip


def gradients(student, loss):
    return torch.autograd.grad(loss, [student.hidden, student.head.weight])


def setting(softcap=None):
    student = scores(sum(COUNTS), 12, 0, requires_grad=True, softcap=softcap)
    return student, scores(sum(TEACHER_COUNTS), 13, 1), batch_of(COUNTS, TEACHER_COUNTS)


def log_probs(side):
    return torch.log_softmax(side.hidden @ side.head.weight.t(), -1)
