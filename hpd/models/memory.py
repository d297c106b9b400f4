"""Weights in memory of their own."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["own_weights"]


def own_weights(model: nn.Module) -> None:
    """Copy every weight and buffer that lies on the CPU into memory of this process, in place.

    `from_pretrained` leaves them in a private mapping of the checkpoint's file. Whoever then writes that
    file again in place (an export, rsync --inplace, a copy) changes them: the kernel drops the pages of a
    private mapping when its file is cut, those that training has written to as well, and the model is the
    file's again, without an error. Quantized weights are computed, so they are the process's own already.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and type(tensor) in (torch.Tensor, nn.Parameter):
            tensor.data = tensor.data.clone()
