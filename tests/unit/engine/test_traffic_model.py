"""The model of bytes per step against figures that were measured on the wire.

56 MB of parameters, 8 chunks, 2 ranks, gloo, over all ranks: `tests/parity/test_traffic.py` counts
those of a small model.
"""

from __future__ import annotations

from typing import Any

import pytest

from vembed_ds.engine.traffic_model import (
    predict_embedding_bytes,
    predict_step_bytes,
    reused_share,
)


@pytest.mark.parametrize(
    ("settings", "megabytes"),
    [
        ({"zero_stage": 0}, 112),
        ({"zero_stage": 1}, 168),
        ({"zero_stage": 2}, 168),
        ({"zero_stage": 2, "gradient_reduction": "per_chunk"}, 952),
        ({"zero_stage": 3, "zero3_gather": "once"}, 168),
        ({"zero_stage": 3, "zero3_gather": "cache_pass"}, 560),
        ({"zero_stage": 3, "zero3_gather": "per_module"}, 560),
        # Where nothing is kept gathered from one pass to the next:
        ({"zero_stage": 3, "zero3_gather": "cache_pass", "reused": 0.0}, 952),
        (
            {"zero_stage": 3, "zero3_gather": "per_module", "kept_chunks": 0, "reused": 0.0},
            1456,
        ),
        (
            {
                "zero_stage": 3,
                "zero3_gather": "per_module",
                "kept_chunks": 0,
                "gradient_reduction": "per_chunk",
                "reused": 0.0,
            },
            2240,
        ),
    ],
)
def test_measured_megabytes(settings: dict[str, Any], megabytes: float) -> None:
    predicted = predict_step_bytes(
        world_size=2,
        parameters=14_000_000,
        trained=14_000_000,
        element_size=4,
        num_chunks=8,
        scatter_units=2,
        **settings,
    )
    assert 2 * predicted.total / 1e6 == pytest.approx(megabytes)


def test_small_frozen_and_many() -> None:
    settings: dict[str, Any] = {
        "world_size": 4,
        "zero_stage": 3,
        "parameters": 1000,
        "trained": 100,
        "element_size": 2,
        "num_chunks": 5,
        "kept_chunks": 2,
        "zero3_gather": "cache_pass",
        "persistent": 200,
        "reused": 0.5,
    }
    found = predict_step_bytes(**settings)
    assert found == (0.75 * 2 * 800 * (1 + 3 * 1.5), 0, 0.75 * 2 * 100, 0.75 * 2 * 200)
    nearby = predict_step_bytes(**settings, machine_ranks=2)
    assert nearby[:2] == (0.75 * 2 * 800, 0.5 * 2 * 800 * 3 * 1.5)
    assert predict_embedding_bytes(world_size=4, rows=8, width=10) == 0.75 * 2 * 4 * 80


def test_what_is_reused() -> None:
    """Counted from a parameter's forward to its backward pass: all that come behind it, twice."""
    assert reused_share(100, 200) == reused_share(100, 10**9) == 1
    assert reused_share(100, 50) == 0.25
    assert reused_share(100, 0) == 0
