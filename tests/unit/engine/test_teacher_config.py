"""A teacher's DeepSpeed JSON: what is filled, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from vembed_ds.engine.ds_config import load_ds_config
from vembed_ds.engine.teacher_config import resolve_teacher_config
from vembed_ds.engine.teacher_engine import teacher_dtype
from vembed_ds.errors import ConfigError

SHIPPED = Path(__file__).parents[3] / "ds_configs"
OURS: dict[str, Any] = {
    "origin": "t.json",
    "precision": "bf16",
    "world_size": 8,
    "device_type": "cpu",
    "fp16_supported": False,
    "bf16_supported": True,
}


def resolve(raw: dict[str, Any] | None, **ours: Any) -> dict[str, Any]:
    return resolve_teacher_config(raw, **(OURS | ours))


def test_the_shipped_file_is_what_is_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime import config as deepspeed_config

    raw = load_ds_config(SHIPPED / "teacher_zero3.json")
    resolved = resolve(raw)
    assert resolved == resolve(None)
    zero = resolved["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["stage3_param_persistence_threshold"] == zero["stage3_prefetch_bucket_size"] == 0
    assert resolved["train_batch_size"] == 8
    assert resolved["bf16"] == {"enabled": True}
    assert resolved["fp16"] == {"enabled": False}
    assert str(teacher_dtype(resolved)) == "torch.bfloat16"
    assert str(teacher_dtype(resolve(None, precision="fp32"))) == "torch.float32"
    monkeypatch.setattr(deepspeed_config.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(deepspeed_config.dist, "get_world_size", lambda: 8)
    DeepSpeedConfig(resolved)


def test_what_may_be_set() -> None:
    zero = {
        "offload_param": {"device": "cpu", "pin_memory": True},
        "offload_optimizer": {"device": "none"},
        "zero_hpz_partition_size": 4,
        "stage3_prefetch_bucket_size": 10,
        "stage3_max_reuse_distance": "auto",
    }
    raw = {"zero_optimization": zero, "gradient_clipping": "auto", "scheduler": None}
    before = json.dumps(raw)
    resolved = resolve(raw)
    assert json.dumps(raw) == before
    found = resolved["zero_optimization"]
    assert found["offload_param"] == zero["offload_param"]
    assert found["zero_hpz_partition_size"] == 4
    assert found["stage3_prefetch_bucket_size"] == 10
    assert found["stage3_max_reuse_distance"] == 0
    assert not {"gradient_clipping", "scheduler"} & resolved.keys()
    assert "offload_optimizer" not in found


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (
            {"optimizer": {"type": "AdamW"}},
            "optimizer (t.json): refused, a teacher is frozen and has no optimizer; remove it",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler (t.json): refused, a teacher is frozen"),
        ({"gradient_clipping": 1.0}, "gradient_clipping (t.json): refused, a teacher is frozen"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer (t.json): refused, a teacher is frozen",
        ),
        (
            {"zero_optimization": {"stage": 2}},
            "zero_optimization.stage=2 (t.json): a teacher is sharded at stage 3; set 3, or",
        ),
        (
            {"train_micro_batch_size_per_gpu": 16},
            "train_micro_batch_size_per_gpu=16 (t.json): a teacher has no batch of its own; set",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            'zero_optimization.offload_param.device="nvme" (t.json): not proven in this version',
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu", "nvme_path": "/x"}}},
            'offload_param.nvme_path="/x" (t.json): refused, only the device cpu is supported',
        ),
        (
            {"zero_optimization": {"zero_hpz_partition_size": 3}},
            "zero_optimization.zero_hpz_partition_size=3 (t.json): must divide the 8 ranks",
        ),
        (
            {"zero_optimization": {"memory_efficient_linear": True}},
            "memory_efficient_linear=true (t.json): replaces the linear layer of the whole process",
        ),
        (
            {"fp16": {"enabled": True}},
            "fp16.enabled=true (t.json) contradicts teacher_precision=bf16",
        ),
        (
            {"zero_optimization": {"zero_quantized_weights": True}},
            "zero_optimization.zero_quantized_weights=true (t.json): refused, it changes",
        ),
        (
            {"zero_optimisation": {}},
            "zero_optimisation (t.json): not a DeepSpeed key; did you mean",
        ),
        ({"zero_optimization": 3}, "zero_optimization=3 (t.json): expected an object of its keys"),
    ],
)
def test_what_is_refused(raw: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(raw)
    (found,) = caught.value.problems
    assert problem in found


def test_a_precision_that_the_device_lacks() -> None:
    with pytest.raises(ConfigError, match="teacher_precision=fp16: not supported on device type c"):
        resolve(None, precision="fp16")


def test_a_trainers_file_is_refused_by_all_that_trains() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(load_ds_config(SHIPPED / "zero2_offload.json"))
    named = {problem.split(" ")[0].split("=")[0] for problem in caught.value.problems}
    assert named == {
        "optimizer",
        "zero_optimization.offload_optimizer",
        "zero_optimization.stage",
    }
