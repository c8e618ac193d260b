"""Similarities of embeddings: cosine of vectors, MaxSim of token embeddings.

Shapes: n, m items; B rows, C columns of a block; L, M tokens of a row, of a column; D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Token similarities that MaxSim holds at a time (16 MB); blocks are recomputed in backward.
BLOCK_ELEMENTS = 2**22
SHORTEST = 1e-12  # of a vector that has a direction


def unit_length(values: Tensor) -> Tensor:
    """Vectors along the last axis scaled to length 1; one without a direction becomes about 0.

    Its gradient is that of a vector of length 1. ``functional.normalize`` divides it by 1e-12, so
    that its gradient is 1e12 times as large and, clipped, the whole of the step.
    """
    length = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    return values / torch.where(length > SHORTEST, length, 1.0)


@dataclass(frozen=True)
class Embeddings:
    """Items, each one vector or (late interaction) one vector per token.

    Attributes:
        values: ``[n, D]``, or ``[n, L, D]`` with a mask; any length.
        mask: ``[n, L]`` bool, true on real tokens; ``None`` for single vectors.

    Raises:
        ValueError: Values and mask do not fit, naming both shapes.
    """

    values: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        found = None if self.mask is None else tuple(self.mask.shape)
        expected = None if self.values.dim() == 2 else tuple(self.values.shape[:2])
        if self.values.dim() not in (2, 3) or found != expected:
            raise ValueError(
                f"embeddings of shape {tuple(self.values.shape)} with a mask of shape {found}: "
                "expected [n, D] without a mask, or [n, L, D] with a mask [n, L]"
            )
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise ValueError(f"the mask of token embeddings is {self.mask.dtype}; expected bool")

    def __len__(self) -> int:
        return int(self.values.shape[0])

    @property
    def width(self) -> int:
        """D."""
        return int(self.values.shape[-1])

    def normalized(self) -> Self:
        """Every vector scaled to length 1; padding set to 0, whatever it held."""
        values = self.values
        if self.mask is not None:
            values = values.masked_fill(~self.mask.unsqueeze(-1), 0.0)
        return replace(self, values=unit_length(values))

    def dims(self, start: int, stop: int) -> Self:
        """Some neighbouring dimensions of every vector, also of every token's."""
        return replace(self, values=self.values[..., start:stop])

    def prefix(self, width: int) -> Self:
        """The first ``width`` dimensions of every vector (Matryoshka)."""
        return self.dims(0, width)

    def to(self, device: torch.device) -> Self:
        """The same on another device; towards an accelerator nobody waits."""
        away = device.type != "cpu"
        mask = None if self.mask is None else self.mask.to(device, non_blocking=away)
        return replace(self, values=self.values.to(device, non_blocking=away), mask=mask)

    def float(self) -> Self:
        """The same in float32."""
        return replace(self, values=self.values.float())

    def rows(self, index: Tensor | slice | Sequence[int]) -> Self:
        """Some of the items, in this order."""
        mask = None if self.mask is None else self.mask[index]
        return replace(self, values=self.values[index], mask=mask)

    def padded(self, *, items: int | None = None, tokens: int | None = None) -> Self:
        """Zeros appended up to a number of items, and of tokens; masked where there is a mask."""
        more = 0 if items is None else items - len(self)
        if self.mask is None and more == 0:
            return self
        if self.mask is None:
            return replace(self, values=functional.pad(self.values, (0, 0, 0, more)))
        longer = 0 if tokens is None else tokens - self.mask.shape[1]
        return replace(
            self,
            values=functional.pad(self.values, (0, 0, 0, longer, 0, more)),
            mask=functional.pad(self.mask, (0, longer, 0, more)),
        )


def concatenate(parts: Sequence[Embeddings]) -> Embeddings:
    """Items of all parts, in order; token embeddings are padded to the longest part."""
    masks = [part.mask for part in parts if part.mask is not None]
    if not masks:
        return Embeddings(torch.cat([part.values for part in parts]))
    longest = max(mask.shape[1] for mask in masks)
    parts = [part.padded(tokens=longest) for part in parts]
    masks = [part.mask for part in parts if part.mask is not None]
    return Embeddings(torch.cat([part.values for part in parts]), torch.cat(masks))


def similarity(rows: Embeddings, columns: Embeddings, *, reduction: str = "mean") -> Tensor:
    """Cosine of vectors, MaxSim of token embeddings, of every row with every column.

    MaxSim (Khattab and Zaharia 2020, arXiv 2004.12832, eq. 3): each real token of the row takes
    its closest real token of the column, ``S = sum_l max_m cos(q_l, d_m)``; ``mean`` divides by
    the row's number of real tokens. An item without any real token has similarity 0.

    Args:
        rows: n items of any length; the queries of MaxSim.
        columns: m items of the same kind and width.
        reduction: ``mean`` or ``sum`` over the row's tokens; no matter for single vectors.

    Returns:
        ``[n, m]`` in the dtype of the values.

    Raises:
        ValueError: Vectors against token embeddings, or unequal widths.
    """
    check_kinds(rows, columns)
    return unit_similarity(rows.normalized(), columns.normalized(), reduction=reduction)


def unit_similarity(rows: Embeddings, columns: Embeddings, *, reduction: str = "mean") -> Tensor:
    """:func:`similarity` of items that :meth:`Embeddings.normalized` has scaled already."""
    if rows.mask is None or columns.mask is None:
        return rows.values @ columns.values.T
    if not len(rows) or not len(columns):
        return rows.values.new_zeros(len(rows), len(columns))
    pair = max(1, rows.mask.shape[1] * columns.mask.shape[1])
    wide = min(len(columns), max(1, BLOCK_ELEMENTS // pair))
    high = max(1, BLOCK_ELEMENTS // (pair * wide))
    if len(rows) <= high and len(columns) <= wide:
        return _maxsim(rows.values, rows.mask, columns.values, columns.mask, reduction)
    return torch.cat(
        [
            torch.cat(
                [
                    _maxsim_block(
                        rows.rows(slice(top, top + high)),
                        columns.rows(slice(left, left + wide)),
                        reduction,
                    )
                    for left in range(0, len(columns), wide)
                ],
                dim=1,
            )
            for top in range(0, len(rows), high)
        ]
    )


def paired_similarity(rows: Embeddings, columns: Embeddings, *, reduction: str = "mean") -> Tensor:
    """The diagonal of :func:`similarity`: of row i with column i only.

    Args:
        rows: As in :func:`similarity`.
        columns: As many as rows.
        reduction: As in :func:`similarity`.

    Returns:
        ``[n]``.
    """
    check_kinds(rows, columns)
    rows, columns = rows.normalized(), columns.normalized()
    if rows.mask is None or columns.mask is None:
        return (rows.values * columns.values).sum(dim=-1)
    tokens_BLM = rows.values @ columns.values.transpose(1, 2)
    best_BL = _best_token(tokens_BLM, columns.mask.unsqueeze(1))
    return _over_tokens(best_BL, rows.mask, reduction)


def check_kinds(rows: Embeddings, columns: Embeddings) -> None:
    """Refuse items that cannot be compared.

    Raises:
        ValueError: Vectors against token embeddings, or unequal widths.
    """
    if rows.values.dim() != columns.values.dim() or rows.width != columns.width:
        raise ValueError(
            f"embeddings of shapes {tuple(rows.values.shape)} and {tuple(columns.values.shape)} "
            "cannot be compared: both must be vectors or both token embeddings, of one width"
        )


def _maxsim_block(rows: Embeddings, columns: Embeddings, reduction: str) -> Tensor:
    block: Tensor = checkpoint(
        _maxsim,
        rows.values,
        rows.mask,
        columns.values,
        columns.mask,
        reduction,
        use_reentrant=False,
        preserve_rng_state=False,
    )
    return block


def _maxsim(
    row_BLD: Tensor, row_mask_BL: Tensor, column_CMD: Tensor, column_mask_CM: Tensor, reduction: str
) -> Tensor:
    tokens_BLCM = torch.einsum("bld,cmd->blcm", row_BLD, column_CMD)
    best_BLC = _best_token(tokens_BLCM, column_mask_CM)
    return _over_tokens(best_BLC.transpose(1, 2), row_mask_BL.unsqueeze(1), reduction)


def _best_token(tokens: Tensor, mask: Tensor) -> Tensor:
    """Largest over the last axis where ``mask``; 0 where nothing is real, not minus infinity."""
    best = tokens.masked_fill(~mask, -torch.inf).amax(dim=-1)
    return torch.where(mask.any(dim=-1), best, torch.zeros_like(best))


def _over_tokens(best: Tensor, mask: Tensor, reduction: str) -> Tensor:
    """Sum or mean over the last axis, the row's tokens."""
    total = (best * mask.to(best.dtype)).sum(dim=-1)
    return total if reduction == "sum" else total / mask.sum(dim=-1).clamp(min=1)
