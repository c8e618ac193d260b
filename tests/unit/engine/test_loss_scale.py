"""The loss scale grows behind a good step and shrinks within a bad one."""

from __future__ import annotations

import pytest

from vembed_ds.engine.loss_scale import LossScaleUpdates
from vembed_ds.errors import DivergedError


class Optimizer:
    """Counts like DeepSpeed's; fails at its smallest scale."""

    def __init__(self) -> None:
        self.scale = 4

    def _update_scale(self, has_overflow: bool = False) -> None:
        if has_overflow and self.scale == 1:
            raise Exception("already at minimum")
        self.scale = self.scale // 2 if has_overflow else self.scale * 2


def test_growth_waits_for_the_step() -> None:
    optimizer = Optimizer()
    updates = LossScaleUpdates(optimizer)
    optimizer._update_scale(False)
    assert optimizer.scale == 4
    updates.after_step()
    assert optimizer.scale == 8
    updates.after_step()
    assert optimizer.scale == 8


def test_an_overflow_shrinks_it_at_once_and_ends_at_the_smallest() -> None:
    optimizer = Optimizer()
    updates = LossScaleUpdates(optimizer)
    for expected in (2, 1):
        optimizer._update_scale(True)
        updates.after_step()
        assert optimizer.scale == expected
    with pytest.raises(DivergedError, match="overflows at the smallest loss scale"):
        optimizer._update_scale(True)
