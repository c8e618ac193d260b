"""Where the positives of a tile's rows are: in one column each, or wherever a mask says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Positives(Protocol):
    """What a loss asks about the positives of r rows among c columns."""

    def count(self) -> Tensor:
        """``[r]``, how many there are."""

    def sums(self, values: Tensor) -> Tensor:
        """``[r]``, of ``[r, c]`` values there."""

    def update(self, values: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """``[r, c]``, with the values there changed; ``change`` may combine them with ``[r, 1]``."""


@dataclass(frozen=True)
class OwnColumn:
    """At most one positive in a row; a hundred times faster than a mask of 512 x 512.

    Attributes:
        place: ``[r, 1]`` int64, a column.
        here: ``[r, 1]`` bool, whether the positive is there, or in another tile.
    """

    place: Tensor
    here: Tensor

    def count(self) -> Tensor:
        """See :class:`Positives`."""
        return self.here.squeeze(1)

    def sums(self, values: Tensor) -> Tensor:
        """See :class:`Positives`."""
        return values.gather(1, self.place).masked_fill(~self.here, 0.0).squeeze(1)

    def update(self, values: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """See :class:`Positives`."""
        before = values.gather(1, self.place)
        return values.scatter(1, self.place, torch.where(self.here, change(before), before))


@dataclass(frozen=True)
class Marked:
    """Any number of positives in a row.

    Attributes:
        mask: ``[r, c]`` bool.
    """

    mask: Tensor

    def count(self) -> Tensor:
        """See :class:`Positives`."""
        return self.mask.sum(dim=1)

    def sums(self, values: Tensor) -> Tensor:
        """See :class:`Positives`."""
        return values.masked_fill(~self.mask, 0.0).sum(dim=1)

    def update(self, values: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """See :class:`Positives`."""
        return torch.where(self.mask, change(values), values)


def own_column(index: Tensor, start: int, stop: int) -> OwnColumn:
    """Of rows whose positives are the columns ``[r]``, among the columns from start to stop."""
    place = (index - start).unsqueeze(1)
    return OwnColumn(place.clamp(0, stop - start - 1), (place >= 0) & (place < stop - start))
