"""What a loss compares: rows of this rank with columns of every rank, of which a part is made at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vembed_ds.losses.units import Units, units
from vembed_ds.similarity import Embeddings, check_kinds, unit_similarity

TILE_SIZES = {"cpu": 512}
"""Rows and columns of a tile, by the kind of device: a tile is to stay in the cache of a CPU core."""
TILE_SIZE = 4096
"""Of other devices, which need more at a time to be busy."""
ROW_SHARE = 32
""":func:`by_rows` takes this part of a tile's rows at least, whatever the number of columns."""


def tile_size_of(device: torch.device) -> int:
    """Rows and columns of a tile, when the run does not say."""
    return TILE_SIZES.get(device.type, TILE_SIZE)


PullBack = Callable[[Tensor, Tensor, Tensor], None]
"""Adds to the gradient of rows, and of columns, what one of their similarities makes of it."""


@dataclass(frozen=True)
class Similarities:
    """What is compared: B rows of this rank with C columns.

    Attributes:
        rows: B.
        columns: C, of the same kind and width.
        columns_choose: Of token embeddings, the columns' tokens take their closest of the row's,
            not the row's of the column's (MaxSim is not symmetric).
        reduction: MaxSim's.
        tile_size: Rows and columns of a tile, of token embeddings all their tokens; ``None``: all
            at once.
    """

    rows: Units
    columns: Units
    columns_choose: bool = False
    reduction: str = "mean"
    tile_size: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, C)``."""
        return len(self.rows), len(self.columns)

    def of(self, rows: Embeddings, columns: Embeddings) -> Tensor:
        """``[r, c]``: of some rows and columns of unit length."""
        if self.columns_choose:
            return unit_similarity(columns, rows, reduction=self.reduction).T
        return unit_similarity(rows, columns, reduction=self.reduction)

    def linearised(self, rows: Embeddings, columns: Embeddings) -> tuple[Tensor, PullBack]:
        """:meth:`of`, and what takes a gradient back from there."""
        if rows.mask is None or columns.mask is None:

            def pull_back(grad: Tensor, of_rows: Tensor, of_columns: Tensor) -> None:
                of_rows.addmm_(grad, columns.values)
                of_columns.addmm_(grad.T, rows.values)

            return self.of(rows, columns), pull_back
        leaves = [Embeddings(e.values.detach().requires_grad_(), e.mask) for e in (rows, columns)]
        with torch.enable_grad():
            similarity = self.of(*leaves)

        def through_tokens(grad: Tensor, *totals: Tensor) -> None:
            found = torch.autograd.grad(similarity, [leaf.values for leaf in leaves], grad)
            for total, more in zip(totals, found, strict=True):
                total += more

        return similarity.detach(), through_tokens

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """``[r, c]``, without gradient."""
        return self.of(self.rows.part(rows), self.columns.part(columns))

    def cut(self) -> tuple[int, int]:
        """Rows and columns of a tile, as square as the number of rows allows."""
        num_rows, num_columns = self.shape
        if self.tile_size is None:
            return max(1, num_rows), max(1, num_columns)
        most = max(1, self.tile_size**2 // self._numbers_per_pair())
        high = max(1, min(num_rows, max(math.isqrt(most), most // max(1, num_columns))))
        return high, max(1, most // high)

    def cut_rows(self) -> tuple[int, int]:
        """Rows at a time that are compared with all columns, and the number of columns."""
        num_rows, num_columns = (max(1, number) for number in self.shape)
        if self.tile_size is None:
            return num_rows, num_columns
        return max(1, self.tile_size**2 // num_columns, self.tile_size // ROW_SHARE), num_columns

    def _numbers_per_pair(self) -> int:
        """Similarities of tokens that a similarity is made of."""
        rows, columns = self.rows.items.mask, self.columns.items.mask
        if rows is None or columns is None:
            return 1
        return max(1, rows.shape[1] * columns.shape[1])


def similarities(
    rows: Embeddings,
    columns: Embeddings,
    *,
    tile_size: int | None,
    columns_choose: bool = False,
    reduction: str = "mean",
) -> Similarities:
    """The similarities of items of any length; see :class:`Similarities`.

    Raises:
        ValueError: Vectors against token embeddings, or unequal widths.
    """
    check_kinds(rows, columns)
    return Similarities(
        units(rows),
        units(columns),
        columns_choose=columns_choose,
        reduction=reduction,
        tile_size=tile_size,
    )
