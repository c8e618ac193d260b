"""Sums of exponentials whose terms come a tile at a time.

Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vembed_ds.losses.similarities import Similarities


class RunningSum:
    """``sum_c exp(x_ic)`` of every row.

    Attributes:
        highest: ``[B, 1]``, the largest x so far.
        sums: By name ``[B]`` float64, sums of ``exp(x - highest)``.
    """

    def __init__(self, names: Sequence[str], *, of: Similarities) -> None:
        num_rows, values = of.shape[0], of.rows.items.values
        self.highest = values.new_full((num_rows, 1), -torch.inf)
        self.sums = {name: values.new_zeros(num_rows, dtype=torch.float64) for name in names}

    def rise(self, rows: slice, logits: Tensor) -> Tensor:
        """Take the largest of new terms into account; gives ``exp(logits - highest)``.

        Args:
            rows: Which.
            logits: ``[r, c]``, minus infinity where there is no term.
        """
        before = self.highest[rows]
        highest = torch.maximum(before, logits.amax(dim=1, keepdim=True))
        factor = (before - _finite(highest)).squeeze(1).double().exp()
        for total in self.sums.values():
            total[rows] *= factor
        self.highest[rows] = highest
        return self.powers(rows, logits)

    def powers(self, rows: slice, logits: Tensor) -> Tensor:
        """``exp(logits - highest)``, of its own memory."""
        return (logits - _finite(self.highest[rows])).exp_()


def _finite(highest: Tensor) -> Tensor:
    """0 where a row has no term yet: infinity minus infinity is not a number."""
    return highest.masked_fill(highest == -torch.inf, 0.0)
