"""Which moment of a step is the fullest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vembed_ds.planning.activations import ChunkMemory
from vembed_ds.planning.loss import LossMemory
from vembed_ds.planning.memory import Cut, peak_of
from vembed_ds.planning.states import States

NOTHING = States(**dict.fromkeys(States.__dataclass_fields__, 0))
CHUNK = ChunkMemory(saved=5, forward_peak=6, peak=8, first_peak=50)


@pytest.mark.parametrize(("kept", "expected"), [(1, 100 + 50), (2, 100 + 50 + 5)])
def test_parameters_that_are_gathered_for_all_chunks_are_there_when_the_first_is_differentiated(
    kept: int, expected: int
) -> None:
    """zero3_gather=cache_pass: they are put away before a chunk is computed again."""
    states = replace(NOTHING, gathered=100, gathered_again=10)
    cut = Cut(chunks=4, kept=kept, chunk=CHUNK)
    found = peak_of(states, cut, LossMemory(1, 2), precision="fp32", per_chunk=False)
    assert found.phase == "backward pass of the first chunk"
    assert found.total == expected + 1


@pytest.mark.parametrize(("kept", "gathered"), [(1, 10), (2, 100)])
def test_and_until_all_that_were_kept_are_differentiated(kept: int, gathered: int) -> None:
    states = replace(NOTHING, gathered=100, gathered_again=10, gradients=1000)
    cut = Cut(chunks=4, kept=kept, chunk=CHUNK)
    found = peak_of(states, cut, LossMemory(1, 2), precision="fp32", per_chunk=False)
    assert found.phase == "backward pass of a later chunk"
    assert found.total == 1000 + gathered + CHUNK.peak + 1
