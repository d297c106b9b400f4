"""Gradients of which most is nearly nothing: some columns are multiplied, the rest comes back at rank one.

Axes: C positions of a chunk, D hidden, V vocabulary, L live columns.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hpd.losses.products import Gradients, accumulate, add_product_, product_
from hpd.losses.tile import Sums, add

__all__ = ["GradientFilter"]

# Above this share of live columns, gathering them costs more than it saves (measured at H 576), and the chunk
# is multiplied whole.
_MOST_LIVE = 0.8


class GradientFilter:
    r"""`products.accumulate` with most columns of the gradient left out of both products.

    With G the chunk's gradient with respect to the logits, a column is live if one of its entries is above
    :math:`\tau = \varepsilon \frac{1}{C} \sum_{nv} |G_{nv}|` in size: a share of a position's mean absolute
    sum, so that the relative error is about the same early in training and late. Let R be G with its live
    columns set to zero, :math:`R^+` its positive entries and :math:`R^-` the others. Then

    .. math:: G \approx G_\text{live} + \frac{r^+ c^{+\top}}{t^+} + \frac{r^- c^{-\top}}{t^-},

    with r the row sums, c the column sums and t the total of each part. So every row and every column keeps
    its sum, and at a position n the gradient of the hidden state is off by at most

    .. math:: 2\, (r^+_n + |r^-_n|) \max_v \lVert W_v - \bar W \rVert, \qquad r^+_n + |r^-_n| \le \tau V,

    for any vector :math:`\bar W`, since the error's row sums are zero. The bias gets its exact gradient.

    Args:
        share: :math:`\varepsilon`.
        scratch: at least as large as a chunk's gradient, free to be overwritten while one is added.
        sums: gains the share of live columns (`gradient_live`), and of the gradient's absolute sum that is
            given back at rank one (`gradient_returned`), each times the positions.
    """

    def __init__(self, share: float, scratch: Float[Tensor, "C V"], sums: Sums):
        self._share, self._scratch, self._sums = share, scratch, sums
        self._of_head: list[tuple[Tensor, Tensor]] = []

    def accumulate(
        self,
        gradient: Float[Tensor, "C V"],
        hidden: Float[Tensor, "C D"],
        weight: Float[Tensor, "V D"] | None,
        gradients: Gradients,
        chunk: slice,
    ) -> None:
        """As `products.accumulate`, but for the head's share of rank one, which `finish` adds."""
        assert weight is not None, "logits are refused at the door"
        full, gradient = gradient, gradient.to(hidden.dtype)
        positive, column_sums = self._signs(gradient)
        whole = column_sums.abs().sum().clamp_min(torch.finfo(gradient.dtype).tiny)
        live = torch.maximum(gradient.amax(0), -gradient.amin(0)) > self._share * whole / len(gradient)
        columns = live.nonzero()[:, 0]
        if len(columns) > _MOST_LIVE * len(live):
            accumulate(full, hidden, weight, gradients, chunk)
            self._count(len(gradient), 1.0, torch.zeros_like(whole))
            return
        if gradients.bias is not None:
            gradients.bias[: len(live)] += full.sum(0, dtype=gradients.bias.dtype)
        dead = (~live).to(gradient.dtype)
        rows = torch.stack([positive @ dead, gradient @ dead], 1)
        rows[:, 1] -= rows[:, 0]
        of_columns = column_sums * dead
        totals = of_columns.sum(1, keepdim=True)
        self._count(len(gradient), len(columns) / len(live), totals.abs().sum() / whole)
        of_columns /= torch.where(totals == 0.0, 1.0, totals)
        some = gradient.index_select(1, columns)
        if gradients.hidden is not None:
            target = gradients.hidden[chunk]
            product_(some, weight.index_select(0, columns), target)
            add_product_(rows, of_columns @ weight, target)
        if gradients.weight is not None:
            if chunk.start == 0:
                gradients.weight.zero_()
            found = gradients.weight.new_empty(len(columns), hidden.shape[1])
            product_(some.t(), hidden, found)
            gradients.weight.index_add_(0, columns, found)
            # A product of inner size two reads and writes the whole head: once for all chunks.
            self._of_head.append((of_columns, rows.t() @ hidden))

    def finish(self, gradients: Gradients) -> None:
        """Add the head's share of rank one, of all chunks."""
        if gradients.weight is None or not self._of_head:
            return
        columns, hidden = (torch.cat(side) for side in zip(*self._of_head, strict=True))
        add_product_(columns.t(), hidden, gradients.weight[: columns.shape[1]])

    def _signs(self, gradient: Float[Tensor, "C V"]) -> tuple[Float[Tensor, "C V"], Float[Tensor, "2 V"]]:
        """The positive entries, in the scratch, and the column sums of these and of the others."""
        scratch = self._scratch[: len(gradient)]
        positive = torch.clamp(gradient, min=0.0, out=scratch if scratch.dtype == gradient.dtype else None)
        # Products with vectors run at the speed of memory, which sums over a dimension do not.
        ones = gradient.new_ones(len(gradient))
        sums = torch.stack([ones @ positive, ones @ gradient])
        sums[1] -= sums[0]
        return positive, sums

    def _count(self, positions: int, live: float, returned: Tensor) -> None:
        ones = returned.new_ones(positions)
        add(self._sums, gradient_live=ones * live, gradient_returned=ones * returned)
