"""The start-up self-test passes on a right schedule, leaves no trace, and stops a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parity.conftest import ds_config
from tests.parity.test_step_matrix import check
from tests.worlds import World
from vembed_ds.steps.self_test import TOLERANCES

CASE = "tests.parity.cases:self_test"


@pytest.mark.parametrize(
    ("stage", "zero"),
    [
        (0, {}),
        (1, {}),
        (2, {}),
        (3, {}),
        (2, {"offload_optimizer": {"device": "cpu"}}),
        (3, {"offload_optimizer": {"device": "cpu"}}),
    ],
)
@pytest.mark.one_in(2)
def test_it_passes_and_leaves_no_trace(
    world: Callable[[int], World],
    folders: dict[float, Path],
    reference: Callable[..., Any],
    stage: int,
    zero: dict[str, Any],
) -> None:
    config = ds_config(stage, 2, zero=zero)
    results = world(2).run(CASE, folder=str(folders[0.0]), ds_config=config)
    assert all(result["difference"] < 1e-5 for result in results)
    # Three steps behind it equal the plain ones: no gradient of the test is left over.
    check(reference("clip"), results)


def test_it_ignores_dropout(world: Callable[[int], World], folders: dict[float, Path]) -> None:
    results = world(2).run(CASE, folder=str(folders[0.2]), ds_config=ds_config(2, 2))
    assert all(result["difference"] < 1e-5 for result in results)


def test_a_loss_without_gradient_is_no_wrong_gradient(
    world: Callable[[int], World], folders: dict[float, Path]
) -> None:
    """Equal positives, or a collapsed model: noise divided by noise would be any number."""
    results = world(2).run(
        CASE, folder=str(folders[0.0]), ds_config=ds_config(2, 2), fault="loss without gradient"
    )
    assert all(0 < result["difference"] < 1e-5 for result in results)


def test_a_model_that_looks_at_its_padding_stops_the_run(
    world: Callable[[int], World], folders: dict[float, Path]
) -> None:
    results = world(2).run(
        CASE,
        folder=str(folders[0.0]),
        ds_config=ds_config(0, 2),
        kind="shared",
        fault="padding",
        tolerance=TOLERANCES["fp32"],
    )
    for result in results:
        assert "the gradients differ by" in result["error"]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.one_in(2)
def test_a_first_loss_scale_that_overflows_is_no_wrong_gradient(
    world: Callable[[int], World], folders: dict[float, Path], stage: int
) -> None:
    power = 24
    fp16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": power, "hysteresis": 1}
    config = ds_config(stage, 2, fp16=fp16)
    tolerance = TOLERANCES["fp16"]
    results = world(2).run(CASE, folder=str(folders[0.0]), ds_config=config, tolerance=tolerance)
    for result in results:
        assert result["scale"] == 2.0**power
        assert result["norms"][0] is None, "the first scale must overflow"
        assert 0 < result["difference"] < tolerance


@pytest.mark.parametrize(
    ("stage", "fault"),
    [(1, "repeated backward"), (2, "repeated backward"), (0, "batch statistics")],
)
def test_a_wrong_gradient_stops_the_run_on_every_rank(
    world: Callable[[int], World], folders: dict[float, Path], stage: int, fault: str
) -> None:
    config = ds_config(stage, 2)
    for result in world(2).run(CASE, folder=str(folders[0.0]), ds_config=config, fault=fault):
        assert "one chunk gives gradient norm" in result["error"]
        assert "one-item chunks give" in result["error"]
