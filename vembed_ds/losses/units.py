"""Vectors of length 1, made a few at a time: no copy of all of them is held, nor of their gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vembed_ds.similarity import SHORTEST, Embeddings

AT_A_TIME = 2**18  # numbers whose gradient is turned into the items'


@dataclass(frozen=True)
class Units:
    """Items whose vectors are to have length 1.

    Attributes:
        items: n, of any length.
        lengths: ``[n, 1]``, of token embeddings ``[n, L, 1]``, constants; 1 of a vector that has
            no direction, and of padding.
    """

    items: Embeddings
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.items)

    def part(self, rows: slice) -> Embeddings:
        """Some of the items, of unit length, without gradient; padding is 0, whatever it held."""
        some = self.items.rows(rows)
        values = some.values.detach()
        if some.mask is not None:
            values = values.masked_fill(~some.mask.unsqueeze(-1), 0.0)
        return Embeddings(values / self.lengths[rows], some.mask)

    def pull_back(self, grad: Tensor, scale: Tensor) -> Tensor:
        """Turn the gradient of vectors of length ``scale`` into that of the items, in place.

        Args:
            grad: ``[n, ...]``, with respect to ``scale * unit``; of the items afterwards.
            scale: ``[1]``, > 0.

        Returns:
            ``[1]`` float64, the gradient with respect to ``scale``.
        """
        of_scale = scale.new_zeros(1, dtype=torch.float64)
        for rows in self._parts():
            unit, some = self.part(rows).values, grad[rows]
            along = (unit * some).sum(dim=-1, keepdim=True)
            of_scale += along.sum(dtype=torch.float64)
            # A vector without a direction is nearly 0, and so is its share of this.
            some.sub_(unit.mul_(along)).mul_(scale / self.lengths[rows])
        return of_scale

    def _parts(self) -> Iterator[slice]:
        high = max(1, AT_A_TIME // max(1, self.items.values[:1].numel()))
        return (slice(top, top + high) for top in range(0, len(self), high))


@torch.no_grad()
def units(items: Embeddings) -> Units:
    """Measure the vectors of some items, of any length."""
    lengths = torch.linalg.vector_norm(items.values, dim=-1, keepdim=True)
    lengths = torch.where(lengths > SHORTEST, lengths, 1.0)
    if items.mask is not None:
        lengths = lengths.masked_fill(~items.mask.unsqueeze(-1), 1.0)
    return Units(items, lengths)
