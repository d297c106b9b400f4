"""The teacher's side of the operator: the logits of a chunk, or the log-probabilities of a few tokens.

Axes: C positions of a chunk, n tokens per position, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hpd.losses.heads import Scores, TeacherScores, TopKScores
from hpd.losses.products import for_products, logits, project_, wide
from hpd.methods.supports import LOGPROB_FLOOR

__all__ = [
    "NOT_LINEAR",
    "is_known_by_token",
    "known_metrics",
    "label_alone",
    "log_normalizer",
    "mass_outside",
    "tail_mass",
    "teacher_logits",
    "teacher_logits_",
    "token_logprobs",
    "unread",
]


NOT_LINEAR = ("forward_kl", "reverse_kl", "teacher_entropy", "top1_agreement", "acceptance")
"""Metrics that an unbiased estimate of the teacher's distribution does not give without bias."""


def is_known_by_token(teacher: TeacherScores) -> bool:
    """True if single log-probabilities are available without the logits of the whole vocabulary."""
    return isinstance(teacher, TopKScores) or (teacher.log_z is not None and teacher.head.weight is not None)


def teacher_logits_(
    teacher: TeacherScores, labels: Int[Tensor, "C"], out: Float[Tensor, "C V"]
) -> Float[Tensor, "C V"]:
    """Logits of the common vocabulary, or log-probabilities where the teacher knows those, put into `out`.

    Args:
        teacher: as `for_products` made it ready.
        labels: the label of each position.
        out: scratch.
    """
    return _spread_(teacher, labels, out) if isinstance(teacher, TopKScores) else project_(teacher, out)


def mass_outside(
    teacher: TeacherScores, labels: Int[Tensor, "C"], vocab: int, common_logits: Float[Tensor, "C V"] | None
) -> Float[Tensor, "C"]:
    """Teacher mass on tokens that the student does not have (policy `shared_prefix`).

    Args:
        teacher: not yet cut.
        labels: the label of each position.
        vocab: size of the common vocabulary.
        common_logits: the teacher's logits of it; None: the teacher's own `log_z` serves.
    """
    if isinstance(teacher, TopKScores):
        beyond = teacher.tokens >= vocab
        tail = _tail(teacher, labels).exp()[:, 0] * (teacher.vocab - vocab - beyond.sum(-1))
        return (teacher.logprobs.exp() * beyond).sum(-1) + tail
    if common_logits is None:
        assert teacher.log_z is not None
        return torch.exp(_log_outside(teacher, vocab, wide(teacher.hidden)) - teacher.log_z)
    return torch.sigmoid(
        _log_outside(teacher, vocab, common_logits.dtype) - torch.logsumexp(common_logits, -1)
    )


def tail_mass(teacher: TopKScores, labels: Int[Tensor, "C"]) -> Float[Tensor, "C"]:
    """Teacher mass on tokens of which nothing but their sum is known."""
    label_apart = ~(teacher.tokens == labels[:, None]).any(-1)
    return (1.0 - teacher.logprobs.exp().sum(-1) - label_apart * teacher.label_logprobs.exp()).clamp_min(0.0)


def _log_outside(teacher: Scores, vocab: int, dtype: torch.dtype) -> Float[Tensor, "C"]:
    """Log of the sum of exp(logit) over the tokens beyond the common vocabulary."""
    hidden, head, _ = teacher
    if head.weight is None:
        hidden = hidden[:, vocab:]
    else:
        head = head._replace(weight=head.weight[vocab:])
    if head.bias is not None:
        head = head._replace(bias=head.bias[vocab:])
    num_extra = teacher.vocab - vocab
    extra = hidden.new_empty(len(hidden), num_extra, dtype=dtype)
    return torch.logsumexp(project_(for_products(Scores(hidden, head), num_extra), extra), -1)


def log_normalizer(teacher: TeacherScores, labels: Int[Tensor, "C"], vocab: int) -> Float[Tensor, "C"]:
    """log Z of the common vocabulary, from the stored one of the whole: what lies outside is subtracted."""
    if isinstance(teacher, TopKScores):
        log_z = torch.zeros_like(teacher.label_logprobs)
    else:
        assert teacher.log_z is not None
        log_z = teacher.log_z.to(wide(teacher.hidden))
    if teacher.vocab <= vocab:
        return log_z
    outside = mass_outside(teacher, labels, vocab, None)
    # Stored and computed here in different orders: rounding must not leave a negative remainder.
    return log_z + torch.log1p(-outside.clamp_max(1.0 - torch.finfo(log_z.dtype).eps))


def token_logprobs(
    teacher: TeacherScores, log_z: Float[Tensor, "C"], labels: Int[Tensor, "C"], tokens: Int[Tensor, "C n"]
) -> Float[Tensor, "C n"]:
    """Log-probabilities of some tokens, in nats: a row of the head each, or a look-up.

    Args:
        teacher: known by token (`is_known_by_token`).
        log_z: as `log_normalizer` gives it.
        labels: the label of each position.
        tokens: which ones.
    """
    if isinstance(teacher, TopKScores):
        return _look_up(teacher, labels, tokens) - log_z[:, None]
    hidden, head, _ = teacher
    assert head.weight is not None
    rows = head.weight[tokens].to(log_z.dtype)  # [C, n, D]
    z = torch.einsum("cnd,cd->cn", rows, hidden.to(log_z.dtype))
    if head.bias is not None:
        z = z + head.bias[tokens]
    z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z - log_z[:, None]


def label_alone(teacher: TopKScores, labels: Int[Tensor, "N"]) -> TopKScores:
    """The same, where terms read the label alone: it has its own probability, another token the rest."""
    known = teacher.label_logprobs
    other = torch.where(labels > 0, labels - 1, 1)
    rest = torch.log((-torch.expm1(known)).clamp_min(torch.finfo(known.dtype).tiny))
    return teacher._replace(tokens=torch.stack([labels, other], 1), logprobs=torch.stack([known, rest], 1))


def unread(labels: Int[Tensor, "N"], vocab: int) -> TopKScores:
    """What stands for a teacher that no term reads and of which no metric is taken.

    Args:
        labels: the label of each position.
        vocab: tokens that both models have: the student's softmax runs over them.
    """
    nothing = torch.zeros(len(labels), 1, device=labels.device)
    return TopKScores(labels[:, None], nothing, nothing[:, 0], vocab, drawn=True)


def known_metrics(teacher: TeacherScores, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The metrics of two distributions that are true where the teacher's is an estimate from draws: those of
    the student alone."""
    drawn = isinstance(teacher, TopKScores) and teacher.drawn
    return {name: value for name, value in sums.items() if not drawn or name not in NOT_LINEAR}


def _look_up(teacher: TopKScores, labels: Tensor, tokens: Tensor) -> Tensor:
    matches = tokens[:, :, None] == teacher.tokens[:, None, :]  # [C, n, k]
    found = torch.where(matches, teacher.logprobs[:, None, :], -torch.inf).amax(-1)
    found = torch.where(matches.any(-1), found, _tail(teacher, labels))
    return torch.where(tokens == labels[:, None], teacher.label_logprobs[:, None], found)


def _tail(teacher: TopKScores, labels: Tensor) -> Float[Tensor, "C 1"]:
    """Log-probability of a token that is neither among the k nor the label."""
    if teacher.drawn:
        return torch.full_like(teacher.logprobs[:, :1], LOGPROB_FLOOR)
    label_apart = ~(teacher.tokens == labels[:, None]).any(-1, keepdim=True)  # [C, 1]
    known = (
        teacher.logprobs.double().exp().sum(-1, keepdim=True)
        + label_apart * teacher.label_logprobs.double().exp()[:, None]
    )
    others = (teacher.vocab - teacher.tokens.shape[1] - label_apart.long()).clamp_min(1)
    log_share = torch.log((1.0 - known).clamp_min(torch.finfo(torch.float32).tiny) / others)
    return torch.minimum(log_share.to(teacher.logprobs.dtype), teacher.logprobs.amin(-1, keepdim=True))


def _spread_(teacher: TopKScores, labels: Tensor, out: Tensor) -> Tensor:
    out.copy_(_tail(teacher, labels).expand_as(out))
    # A token that the student does not have is written over the label's place, which is filled last.
    inside = teacher.tokens < out.shape[1]
    if teacher.drawn:
        # The label has the weight that it was drawn with, not its probability, and nothing stands for what
        # lies outside.
        tail = out[:, :1].clone()
        token, weight = torch.where(inside, teacher.tokens, 0), teacher.logprobs.to(out.dtype)
        return out.scatter_reduce_(1, token, torch.where(inside, weight, tail), "amax")
    out.scatter_(1, torch.where(inside, teacher.tokens, labels[:, None]), teacher.logprobs.to(out.dtype))
    return out.scatter_(1, labels[:, None], teacher.label_logprobs.to(out.dtype)[:, None])


def teacher_logits(scores: TeacherScores, labels: Tensor, vocab: int, like: Tensor) -> Tensor:
    """`[N, vocab]` logits of a teacher, never differentiated.

    Args:
        scores: what the teacher knows at N positions.
        labels: the label of each.
        vocab: of the first so many tokens.
        like: a tensor of the student's, whose device and dtype count.
    """
    if isinstance(scores, TopKScores):
        return teacher_logits_(scores, labels, like.new_empty(len(labels), vocab, dtype=torch.float32))
    return logits(scores, vocab).detach()
