"""Other people's operators on a problem of benchmarks/head.py, and what the products alone take.

Each is left out, with the reason, where its package or its device is not to be had.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from head import Problem

__all__ = ["naive", "peers"]

Run = Callable[[], None]


def peers(problem: Problem) -> tuple[dict[str, Run], dict[str, str]]:
    """Operators by name, and why others are left out."""
    found: dict[str, Run] = {}
    left_out: dict[str, str] = {}
    for name, make in _all(problem):
        try:
            found[name] = make()
        except (ImportError, AttributeError) as error:
            left_out[name] = f"{type(error).__name__}: {error}"
    if problem.hidden.device.type == "cpu":
        for name in [name for name in found if name.startswith("Liger")]:
            del found[name]
            left_out[name] = "its kernels need a GPU"
    return found, left_out


def _all(problem: Problem) -> Iterator[tuple[str, Callable[[], Run]]]:
    for name, beta in (("TRL forward KL", 0.0), ("TRL JSD 0.5", 0.5), ("TRL reverse KL", 1.0)):
        yield name, lambda beta=beta: _trl(problem, beta)
    yield "torch linear_cross_entropy", lambda: _linear_cross_entropy(problem, chunked=False)
    yield "torch linear_cross_entropy, chunks", lambda: _linear_cross_entropy(problem, chunked=True)
    yield "Liger cross-entropy", lambda: _liger_cross_entropy(problem)
    for name, beta in (("Liger forward KL", 0.0), ("Liger JSD 0.5", 0.5), ("Liger reverse KL", 1.0)):
        yield name, lambda beta=beta: _liger_jsd(problem, beta)


def _backward(problem: Problem, loss: Callable[[], Any]) -> Run:
    def run() -> None:
        problem.hidden.grad = problem.weight.grad = None
        loss().backward()

    return run


def _trl(problem: Problem, beta: float) -> Run:
    function: Any = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    p = problem
    return _backward(
        p,
        lambda: function.apply(p.hidden, p.weight, None, p.teacher_hidden, p.teacher_weight, None, beta)[
            0
        ].mean(),
    )


def _linear_cross_entropy(problem: Problem, chunked: bool) -> Run:
    """torch's own: out of whole logits, as it does unless asked, or in chunks, which it chooses by device and
    dtype."""
    function: Any = F.linear_cross_entropy  # type: ignore[attr-defined]
    options = None
    if chunked:
        module: Any = importlib.import_module("torch.nn.modules.linear_cross_entropy_options")
        options = module.LinearCrossEntropyOptions()
    p = problem
    return _backward(p, lambda: function(p.hidden, p.weight, p.labels, options=options))


def _liger_cross_entropy(problem: Problem) -> Run:
    module: Any = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    p = problem
    return _backward(
        p, lambda: module.LigerFusedLinearCrossEntropyFunction.apply(p.hidden, p.weight, p.labels)[0]
    )


def _liger_jsd(problem: Problem, beta: float) -> Run:
    module: Any = importlib.import_module("liger_kernel.ops.fused_linear_jsd")
    p = problem
    return _backward(
        p,
        lambda: module.LigerFusedLinearJSDFunction.apply(
            p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, None, beta
        ),
    )


def naive(problem: Problem) -> Run:
    """Forward KL out of whole logits, as a training loop of a few lines writes it."""
    p = problem

    def loss() -> torch.Tensor:
        log_q = F.log_softmax((p.hidden @ p.weight.T).float(), -1)
        with torch.no_grad():
            log_p = F.log_softmax((p.teacher_hidden @ p.teacher_weight.T).float(), -1)
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    return _backward(p, loss)
