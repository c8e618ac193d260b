"""Dynamic loss scaling: a step that overflows leaves no trace but a smaller scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.conftest import OPTIMIZER, ds_config, update_error
from tests.parity.reference import train_plain
from tests.parity.test_step_matrix import PRECISIONS
from tests.worlds import World

pytestmark = [pytest.mark.parity]

POWER = 24
COSINE = (2, 6)
RATES = [0.0, 0.5, 1.0, (1 + math.cos(math.pi / 4)) / 2]  # of the highest, by applied steps
STEPS = 3
# Hysteresis 1: halve at the first overflow (DeepSpeed's default waits for the second).
FP16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": POWER, "hysteresis": 1}


@pytest.fixture(scope="module")
def expected(folders: dict[float, Path]) -> dict[str, Any]:
    """Plain fp16 steps that need no loss scale."""
    return train_plain(
        folders[0.0],
        kind="skip",
        steps=STEPS,
        optimizer=OPTIMIZER,
        max_grad_norm=0.0,
        bidirectional=True,
        temperature=0.1,
        dropout_plan=None,
        dtype=torch.float16,
        cosine=COSINE,
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.one_in(2)
def test_an_overflow_is_skipped_and_halves_the_scale(
    world: Callable[[int], World], folders: dict[float, Path], expected: dict[str, Any], stage: int
) -> None:
    results = world(2).run(
        "tests.parity.cases:overflow",
        folder=str(folders[0.0]),
        kind="skip",
        ds_config=ds_config(stage, 2, fp16=FP16),
        steps=STEPS,
        cosine=COSINE,
    )
    assert results[0]["attempts"] == results[1]["attempts"]  # scales too, on every rank
    check_attempts(results[0]["attempts"])
    # The steps that were applied are the plain ones: no moment kept a trace of an overflow.
    _, tolerance, tensor_tolerance = PRECISIONS["fp16"]
    for result in results:
        error = update_error(expected, result["after"])
        assert error["whole"] <= tolerance, error
        assert error["worst"] <= tensor_tolerance, error


def check_attempts(attempts: list[dict[str, Any]]) -> None:
    """Skipped: nothing changes but the scale. Applied: weights move, the schedule advances."""
    assert attempts[0]["norm"] is None, "the first scale must overflow"
    scale, applied = 2.0**POWER, 0
    for attempt in attempts:
        if attempt["norm"] is None:
            scale /= 2
            assert not attempt["changed"]
        else:
            assert math.isfinite(attempt["norm"])
            assert attempt["changed"] == (RATES[applied] > 0)
            applied += 1
        assert attempt["scale"] == scale
        assert attempt["rate"] == pytest.approx(OPTIMIZER["lr"] * RATES[applied])
    assert applied == STEPS
