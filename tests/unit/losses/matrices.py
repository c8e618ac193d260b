"""Similarities and judgements that are given as whole matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vembed_ds.losses.judges import Judged
from vembed_ds.losses.similarities import Similarities
from vembed_ds.losses.units import Units
from vembed_ds.similarity import Embeddings


class AsTheyAre(Units):
    """Items that count as vectors of length 1, whatever their length."""

    def pull_back(self, grad: Tensor, scale: Tensor) -> Tensor:
        grad.mul_(scale)
        return torch.zeros_like(scale)


def matrix(similarity: Tensor, *, tile_size: int | None = None) -> Similarities:
    """Rows and columns of whose dot products ``[B, C]`` is made."""
    one = torch.eye(similarity.shape[1], dtype=similarity.dtype)
    rows, columns = (AsTheyAre(Embeddings(x), torch.ones(len(x), 1)) for x in (similarity, one))
    return Similarities(rows, columns, tile_size=tile_size)


@dataclass(frozen=True)
class GivenJudge:
    """What a teacher says of all rows."""

    judged: Judged

    def tile(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        return self.judged.teacher[rows, columns], self.judged.known[rows, columns]

    def of_rows(self, rows: slice) -> Judged:
        found = self.judged
        parts = (found.teacher, found.known, found.own, found.explicit, found.tie)
        return Judged(*[part[rows] for part in parts])
