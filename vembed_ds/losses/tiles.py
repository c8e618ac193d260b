"""Losses over B x C similarities, a tile at a time: memory does not grow with the square of a batch.

The forward pass goes over all tiles and keeps a few numbers per row; the backward pass computes every
tile once more, and from it the gradient of its rows and columns (Inf-CL, Cheng et al. 2024, arXiv
2410.17243, section 3.2).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vembed_ds.losses.similarities import Similarities
from vembed_ds.similarity import Embeddings

Gradients = dict[int, tuple[Tensor, Tensor]]
"""Of rows and columns, by the number of their matrix."""


@dataclass(frozen=True)
class Tile:
    """``scale * similarity + bias`` of some rows and columns.

    Attributes:
        matrix: The number of the matrix that it is of.
        rows: Which.
        columns: Which.
        logits: ``[r, c]``; not to be changed.
    """

    matrix: int
    rows: slice
    columns: slice
    logits: Tensor

    def mirrored(self, matrix: int, num_rows: int) -> Tile:
        """The tile of the transposed matrix, of so many rows; it may have none."""
        rows = slice(self.columns.start, min(self.columns.stop, num_rows))
        logits = self.logits[:, : max(0, num_rows - self.columns.start)]
        return Tile(matrix, rows, self.rows, logits.T)


class TileLoss(Protocol):
    """A loss that can be computed tile by tile, in any order: a term for every row."""

    def add(self, tile: Tile) -> None:
        """Take a tile into account."""

    def terms(self) -> Tensor:
        """``[B]``, when every tile was added."""

    def gradient(self, tile: Tile, outer: Tensor) -> Tensor:
        """With respect to the tile's logits, as a tensor of its own.

        Args:
            tile: As it was added.
            outer: ``[r, 1]``, the gradient with respect to the terms of its rows.
        """


def tiled(
    loss: TileLoss,
    matrices: Sequence[Similarities | None],
    *,
    scale: Tensor | float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """The terms of a loss over the tiles of some matrices; once differentiable. Local.

    Args:
        loss: Counts the matrices from 0.
        matrices: All of one number of rows. ``None``: the transposed of the first one's first B
            columns, which is not computed again.
        scale: ``[1]`` if it is learned; > 0.
        bias: ``[1]``.

    Returns:
        ``[B]``, with gradient.
    """
    return _run(loss, _Work(matrices, Similarities.cut), scale, bias)


def by_rows(
    matrix: Similarities, terms: Callable[[slice, Tensor], Tensor], *, scale: Tensor | float = 1.0
) -> Tensor:
    """:func:`tiled` for losses that need all columns of a row together: a few rows at a time.

    Args:
        matrix: B rows.
        terms: From some rows and their logits ``[r, C]`` to ``[r]``; constant but for the logits.
        scale: As in :func:`tiled`.
    """
    return _run(_RowTerms(terms), _Work([matrix], Similarities.cut_rows), scale, None)


class _RowTerms:
    """What by_rows is given, as a loss of tiles that hold whole rows."""

    def __init__(self, terms: Callable[[slice, Tensor], Tensor]) -> None:
        self._terms, self._found = terms, list[Tensor]()

    def add(self, tile: Tile) -> None:
        self._found.append(self._terms(tile.rows, tile.logits))

    def terms(self) -> Tensor:
        return torch.cat(self._found)

    def gradient(self, tile: Tile, outer: Tensor) -> Tensor:
        logits = tile.logits.detach().requires_grad_()
        with torch.enable_grad():
            terms = self._terms(tile.rows, logits)
        (grad,) = torch.autograd.grad(terms, logits, outer.squeeze(1))
        return grad


@dataclass(frozen=True)
class _Work:
    """What is computed.

    Attributes:
        matrices: As in :func:`tiled`.
        cut: From a matrix to the rows and columns of its tiles.
    """

    matrices: Sequence[Similarities | None]
    cut: Callable[[Similarities], tuple[int, int]]

    @cached_property
    def computed(self) -> dict[int, Similarities]:
        """By their numbers."""
        return {number: m for number, m in enumerate(self.matrices) if m is not None}

    def values(self) -> list[Tensor]:
        """Of every computed matrix the rows' and the columns'."""
        return [part.items.values for m in self.computed.values() for part in (m.rows, m.columns)]

    def zeros(self) -> Gradients:
        """For the gradients of every computed matrix's rows and columns."""
        return {
            number: (
                torch.zeros_like(m.rows.items.values),
                torch.zeros_like(m.columns.items.values),
            )
            for number, m in self.computed.items()
        }

    def pull_back(self, totals: Gradients, scale: Tensor) -> Tensor:
        """From unit vectors to the items, in place; gives the gradient of the scale."""
        of_scale = scale.new_zeros(1, dtype=torch.float64)
        for number, (of_rows, of_columns) in totals.items():
            of_scale += self.computed[number].rows.pull_back(of_rows, scale)
            self.computed[number].columns.pull_back(of_columns, torch.ones_like(scale))
        return of_scale

    def parts(self, scale: Tensor) -> Iterator[tuple[int, slice, slice, Embeddings, Embeddings]]:
        """Of every tile its matrix, where it is, and its rows, of length ``scale``, and columns."""
        for number, matrix in self.computed.items():
            (num_rows, num_columns), (high, wide) = matrix.shape, self.cut(matrix)
            for top in range(0, num_rows, high):
                rows = slice(top, min(top + high, num_rows))
                some_rows = matrix.rows.part(rows)
                some_rows.values.mul_(scale)
                for left in range(0, num_columns, wide):
                    columns = slice(left, min(left + wide, num_columns))
                    yield number, rows, columns, some_rows, matrix.columns.part(columns)

    def mirrors(self, tile: Tile) -> list[Tile]:
        """Tiles of other matrices that a tile holds as well."""
        num_rows = self.computed[0].shape[0]
        if tile.matrix or tile.columns.start >= num_rows:
            return []
        return [tile.mirrored(n, num_rows) for n, m in enumerate(self.matrices) if m is None]


def _run(loss: TileLoss, work: _Work, scale: Tensor | float, bias: Tensor | None) -> Tensor:
    values = work.values()
    if not isinstance(scale, Tensor):
        scale = values[0].new_full((1,), scale)
    found: Tensor = _Tiled.apply(loss, work, scale, bias, *values)  # type: ignore[no-untyped-call]
    return found


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss: TileLoss, work: _Work, scale: Tensor, bias: Tensor | None, *values: Tensor
    ) -> Tensor:
        # The values are those of `work`, which nobody else changes.
        ctx.loss, ctx.work = loss, work
        ctx.save_for_backward(scale, bias)
        with _as_given(scale):
            for number, rows, columns, *items in work.parts(scale):
                similarity = work.computed[number].of(*items)
                tile = Tile(number, rows, columns, _plus(similarity, bias))
                for view in (tile, *work.mirrors(tile)):
                    loss.add(view)
            return loss.terms().to(scale.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale, bias = ctx.saved_tensors
        with _as_given(scale):
            totals, learned = _gradients(ctx.loss, ctx.work, scale, bias, grads[0].unsqueeze(1))
        return (None, None, *learned, *itertools.chain(*totals.values()))


def _gradients(
    loss: TileLoss, work: _Work, scale: Tensor, bias: Tensor | None, outer: Tensor
) -> tuple[Gradients, tuple[Tensor, Tensor | None]]:
    """Of every computed matrix's rows and columns; of scale and bias.

    Args:
        loss: Has seen every tile.
        work: What is computed.
        scale: ``[1]``.
        bias: ``[1]``, if there is one.
        outer: ``[B, 1]``, with respect to the terms.
    """
    totals = work.zeros()
    of_bias = scale.new_zeros(1, dtype=torch.float64)
    for number, rows, columns, *items in work.parts(scale):
        similarity, pull_back = work.computed[number].linearised(*items)
        tile = Tile(number, rows, columns, _plus(similarity, bias))
        grad = loss.gradient(tile, outer[rows])
        for view in work.mirrors(tile):
            grad[:, : len(view.logits)] += loss.gradient(view, outer[view.rows]).T
        if bias is not None:
            of_bias += grad.sum(dtype=torch.float64)
        of_rows, of_columns = totals[number]
        pull_back(grad, of_rows[rows], of_columns[columns])
    of_scale = work.pull_back(totals, scale).to(scale.dtype)
    return totals, (of_scale, None if bias is None else of_bias.to(bias.dtype))


def _as_given(scale: Tensor) -> torch.autocast:
    """Autocast would round what is compared to 16 bit, and in one of the two passes only."""
    return torch.autocast(scale.device.type, enabled=False)


def _plus(similarity: Tensor, bias: Tensor | None) -> Tensor:
    return similarity if bias is None else similarity + bias
