"""Embeddings of either kind, one vector or one per token, and how similar they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of n items.

    Args:
        values: ``[n, D]``, or ``[n, L, D]`` one vector per token.
        mask: ``[n, L]`` bool, true on real tokens; ``None`` for ``[n, D]``.
    """

    values: Tensor
    mask: Tensor | None = None

    def rows(self, places: slice | Sequence[int] | Tensor) -> Embeddings:
        """Some of the items, in this order."""
        return Embeddings(self.values[places], None if self.mask is None else self.mask[places])

    def float(self) -> Embeddings:
        """The same in float32."""
        return Embeddings(self.values.float(), self.mask)

    def padded(self, length: int) -> Embeddings:
        """Token embeddings with padding up to ``length`` tokens; vectors as they are."""
        if self.mask is None:
            return self
        more = length - self.mask.shape[1]
        return Embeddings(
            functional.pad(self.values, (0, 0, 0, more)), functional.pad(self.mask, (0, more))
        )


def concatenated(parts: Sequence[Embeddings]) -> Embeddings:
    """All items of several parts; token embeddings are padded to the longest."""
    length = max((part.mask.shape[1] for part in parts if part.mask is not None), default=0)
    padded = [part.padded(length) for part in parts]
    masks = [part.mask for part in padded if part.mask is not None]
    values = torch.cat([part.values for part in padded])
    return Embeddings(values, torch.cat(masks) if masks else None)


def similarity(rows: Embeddings, columns: Embeddings, *, reduction: str = "mean") -> Tensor:
    """Placeholder until the losses part lands: cosine of vectors ``[n, m]``."""
    assert rows.mask is None
    return (
        functional.normalize(rows.values, dim=-1) @ functional.normalize(columns.values, dim=-1).T
    )
