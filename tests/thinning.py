"""Which cells of a large matrix the default suite runs; ``--all`` runs every cell."""

from __future__ import annotations

from collections import Counter
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


def one_in_n(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Of a test marked ``one_in(n)`` its cases 0, n, 2 n, ...; of any other test, all.

    An ``n`` that shares no factor with the number of an axis's values passes through all of them.
    """
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        marker = item.get_closest_marker("one_in")
        test = item.nodeid.partition("[")[0]
        if marker is None or seen[test] % marker.args[0] == 0:
            kept.append(item)
        seen[test] += 1
    return kept
