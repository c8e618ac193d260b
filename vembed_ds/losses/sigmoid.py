"""SigLIP: every pair is a decision of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vembed_ds.losses.batch import GlobalBatch
from vembed_ds.losses.comparison import Comparison, Selection, compare
from vembed_ds.losses.positives import Positives
from vembed_ds.losses.tiles import Tile, tiled


def sigmoid(batch: GlobalBatch, *, selection: Selection) -> Tensor:
    """Sigmoid loss with trained scale and bias (Zhai et al. 2023, arXiv 2303.15343, eq. 1).

    ``L = -(1/B) sum_ij log sigmoid(z_ij (exp(t) s_ij + b))``, z is 1 for positives and -1 for
    negatives, explicit ones included. Columns that are neither have no term.

    Local: the sum over this rank's rows, divided by their number.

    Args:
        batch: The gathered batch, with ``logit_scale`` t and ``logit_bias`` b.
        selection: What is a positive and a negative.

    Returns:
        Scalar float32.

    Raises:
        ValueError: Scale or bias is missing.
    """
    scale, bias = batch.local.logit_scale, batch.local.logit_bias
    if scale is None or bias is None:
        raise ValueError("loss_type=sigmoid needs logit_scale and logit_bias of the model")
    found = compare(batch, "query_to_doc", selection=selection)
    return tiled(_Decisions(found), [found.similarities], scale=scale.exp(), bias=bias).mean()


class _Decisions:
    """``-sum_j log sigmoid(z_ij x_ij) = sum_j log(1 + exp(-z_ij x_ij))`` of every row i."""

    def __init__(self, found: Comparison) -> None:
        num_rows, _ = found.similarities.shape
        self._found = found
        self._sums = found.similarities.rows.lengths.new_zeros(num_rows, dtype=torch.float64)

    def add(self, tile: Tile) -> None:
        """See :class:`TileLoss`."""
        wrong, _ = self._wrong(tile)
        self._sums[tile.rows] += functional.softplus(wrong, threshold=50).sum(dim=1)

    def terms(self) -> Tensor:
        """See :class:`TileLoss`."""
        return self._sums

    def gradient(self, tile: Tile, outer: Tensor) -> Tensor:
        """See :class:`TileLoss`."""
        wrong, positive = self._wrong(tile)
        grad = torch.sigmoid(wrong).mul_(outer)
        return grad if positive is None else positive.update(grad, torch.neg)

    def _wrong(self, tile: Tile) -> tuple[Tensor, Positives | None]:
        """``-z_ij x_ij``, minus infinity where there is no term; and where z is 1."""
        choice = self._found.choose(tile.rows, tile.columns)
        wrong = tile.logits
        if choice.positive is not None:
            wrong = choice.positive.update(wrong, torch.neg)
        if choice.left_out is not None:
            wrong = wrong.masked_fill(choice.left_out, -torch.inf)
        return wrong, choice.positive
