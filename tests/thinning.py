"""Which cells of a large matrix the default suite runs; ``--all`` runs every cell."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet


def one_in(every: int, *axes: Iterable[Any]) -> list[ParameterSet]:
    """Every cell of the axes' product; all but one in ``every`` are marked slow.

    Any two values of two axes meet in a cell that stays, if another axis has ``every`` values or
    more (a Latin square).

    Args:
        every: How many cells one stands for.
        axes: The values of each parameter.
    """
    levels = [list(axis) for axis in axes]
    cells = product(*(range(len(axis)) for axis in levels))
    return [
        pytest.param(
            *(axis[number] for axis, number in zip(levels, cell, strict=True)),
            marks=[pytest.mark.slow] if sum(cell) % every else [],
        )
        for cell in cells
    ]
