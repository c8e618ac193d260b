"""An EMA teacher in shards is the average that one process would keep of the whole weights.

The teacher's parameters stay gathered between forward passes where nothing else is said (all are
below the threshold), and it embeds between any two updates: a stale weight would show. Model,
stage and placement of the student enter where its shard is looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import load_consolidated
from tests.parity.conftest import ds_config
from tests.worlds import World
from vembed_ds.engine.teacher_config import resolve_teacher_config

TOLERANCE = 1e-6
ON_HOST = {"offload_param": {"device": "cpu"}}
HOST_STUDENT = {"offload_optimizer": {"device": "cpu"}, **ON_HOST}

pytestmark = [pytest.mark.parity]


def teacher_ds_config(precision: str = "fp32", **zero: Any) -> dict[str, Any]:
    return resolve_teacher_config(
        {"zero_optimization": {"stage3_param_persistence_threshold": 10**5, **zero}},
        origin="teacher.json",
        precision=precision,
        world_size=2,
        device_type="cpu",
        fp16_supported=True,
        bf16_supported=True,
    )


CELLS: dict[str, dict[str, Any]] = {
    "ZeRO-0, clip": {"kind": "clip", "ds_config": ds_config(0, 2)},
    "ZeRO-1": {"ds_config": ds_config(1, 2)},
    **{
        f"ZeRO-{n}, bf16": {
            "ds_config": ds_config(n, 2, precision="bf16"),
            "teacher_ds_config": teacher_ds_config("bf16"),
        }
        for n in (2, 3)
    },
    "both on the host": {
        "kind": "clip",
        "ds_config": ds_config(3, 2, zero=HOST_STUDENT),
        "teacher_ds_config": teacher_ds_config(stage3_param_persistence_threshold=0, **ON_HOST),
    },
    "hpZ": {
        "ds_config": ds_config(3, 2),
        "teacher_ds_config": teacher_ds_config(
            zero_hpz_partition_size=2, stage3_param_persistence_threshold=20
        ),
    },
    "adapters, and the student's small weights stay gathered": {
        "kind": "clip",
        "lora": True,
        "ds_config": ds_config(3, 2, zero={"stage3_param_persistence_threshold": 10**6}),
    },
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.one_in(2)
def test_the_teacher_is_the_average(
    world: Callable[[int], World], folders: dict[float, Path], name: str
) -> None:
    arguments = {"kind": "shared", "teacher_ds_config": teacher_ds_config(), **CELLS[name]}
    for found in world(2).run(
        "tests.parity.ema_cases:follow", folder=str(folders[0.2]), **arguments
    ):
        for step in found["steps"]:
            assert step["weights"] <= TOLERANCE
            assert step["embeddings"] <= TOLERANCE
            assert step["student"] > 1e-3
            assert step["collectives"] == 0
            assert step["embedding collectives"] > 0
            # Half of every parameter, and at most one element of padding. (hpZ holds its second
            # shards of what is frozen.)
            assert name == "hpZ" or step["held"] <= found["total"] / 2 + found["parameters"]
        # BERT's pooler is not used, and frozen.
        assert found["frozen"] or (arguments["kind"] == "clip" and "lora" not in arguments)
        assert found["frozen are the student's"]
        assert found["buffers are the student's"]
        assert found["forwards"] == 3 * found["chunks"]
        assert not found["training"]


def test_resuming(
    world: Callable[[int], World], folders: dict[float, Path], tmp_path: Path
) -> None:
    """In bf16, where the average is more than the weights that are read off it."""
    results = world(2).run(
        "tests.parity.ema_cases:resume",
        folder=str(folders[0.0]),
        output=str(tmp_path),
        ds_config=ds_config(3, 2, precision="bf16"),
        teacher_ds_config=teacher_ds_config("bf16"),
    )
    for rank, found in enumerate(results):
        assert found["same"]
        assert f"ema_teacher_rank_{rank}.safetensors: missing" in found["error"]
    checkpoint = Path(results[0]["checkpoint"])
    files = sorted(checkpoint.glob("ema_teacher_rank_*"))
    assert len(files) == 2
    exported = load_consolidated(checkpoint)
    for file in files:
        file.unlink()
    without = load_consolidated(checkpoint)
    assert exported.keys() == without.keys()
    assert all(torch.equal(value, without[name]) for name, value in exported.items())
