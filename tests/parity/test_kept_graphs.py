"""I1: how many chunks keep their graph changes no bit of the update.

With one that is kept the step is compared with the reference in ``test_step_matrix``; here the
others are compared with it. With dropout, except in 16 bit. Both towers of "skip" have steps
without them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.conftest import ds_config
from tests.thinning import one_in
from tests.worlds import World

STEPS, CHUNK_SIZE = 3, 3
KEPT = [(1, 1), (2, 2), (99, 99)]
UNLIKE = [(1, 3)]  # where a chunk needs no other rank
SETTINGS = ["plain", "bf16", "huggingface", "deepspeed"]  # the last two: activation checkpointing

pytestmark = [pytest.mark.parity]


@pytest.mark.parametrize(
    ("kind", "stage", "setting"), one_in(4, ["clip", "skip"], [0, 1, 2, 3], SETTINGS)
)
@pytest.mark.one_in(3)
def test_the_update_is_the_same_bit_for_bit(
    world: Callable[[int], World], folders: dict[float, Path], kind: str, stage: int, setting: str
) -> None:
    is_16_bit = setting == "bf16"
    for found in world(2).run(
        "tests.parity.cases:train_by_kept",
        kept=KEPT if stage == 3 else KEPT + UNLIKE,
        folder=str(folders[0.0 if is_16_bit else 0.2]),
        kind=kind,
        ds_config=ds_config(stage, 2, precision=setting if is_16_bit else "fp32"),
        steps=STEPS,
        chunk_size=CHUNK_SIZE,
        bidirectional=True,
        temperature=0.1,
        checkpointing=setting if setting in ("huggingface", "deepspeed") else None,
    ):
        one, *others = found
        for other in others:
            assert_same(one, other)
        once = found[2]["forwards"]
        assert [result["forwards"] for result in found[:3]] == [
            2 * once - STEPS,
            2 * once - 2 * STEPS,
            once,
        ]


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Losses, gradient norms and parameters, bit for bit."""
    assert one["losses"] == other["losses"]
    assert one["norms"] == other["norms"]
    assert one["after"].keys() == other["after"].keys()
    for name, value in one["after"].items():
        assert torch.equal(value, other["after"][name]), name
