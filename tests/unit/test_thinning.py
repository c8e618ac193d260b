"""The cells that the default suite runs cover every pair of settings."""

from __future__ import annotations

from itertools import combinations

import pytest

from tests.parity.test_step_matrix import CHUNKS, KINDS, STAGES
from tests.thinning import one_in


@pytest.mark.parametrize(
    ("every", "axes"),
    [(3, (range(11), STAGES, range(2), list(CHUNKS))), (2, (KINDS, STAGES, range(2), range(2)))],
)
def test_every_two_settings_meet(every: int, axes: tuple[list[object], ...]) -> None:
    cells = one_in(every, *axes)
    kept = [cell.values for cell in cells if not cell.marks]
    assert len(kept) == pytest.approx(len(cells) / every, abs=1)
    for one, other in combinations(range(len(axes)), 2):
        met = {(cell[one], cell[other]) for cell in kept}
        assert len(met) == len(list(axes[one])) * len(list(axes[other])), (one, other)
