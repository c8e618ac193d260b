"""Every DeepSpeed key that is accepted trains exactly: three steps against the plain reference.

A cell sets keys to values that are not DeepSpeed's defaults, with buckets so small that gradients
are split. Keys that only matter elsewhere (what a save checks, how a log reads) are set as well:
accepted means that training with them was compared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.conftest import ds_config
from tests.parity.reference import train_plain
from tests.parity.test_step_matrix import PRECISIONS, check, update_error
from tests.worlds import World
from vembed_ds.engine.ds_config import resolve_ds_config
from vembed_ds.engine.ds_keys import PROVEN, PROVEN_OPTIMIZERS

pytestmark = [pytest.mark.parity]

TINY = {"reduce_bucket_size": 200, "allgather_bucket_size": 200}
ON_HOST = {"device": "cpu", "pin_memory": False}
# (stage, keys of zero_optimization)
ZERO: list[tuple[int, dict[str, Any]]] = [
    (1, {"contiguous_gradients": False, "ignore_unused_parameters": False}),
    (2, {"contiguous_gradients": False}),
    (2, {"reduce_scatter": False}),
    (1, {"allgather_partitions": False, **TINY}),
    (2, {"allgather_partitions": False, "overlap_comm": True, **TINY}),
    (1, {"overlap_comm": True, **TINY}),
    (2, {"use_multi_rank_bucket_allreduce": False, **TINY}),
    (3, {"overlap_comm": False, "contiguous_gradients": False, "reduce_scatter": False, **TINY}),
    (
        3,
        {
            "overlap_comm": True,
            "sub_group_size": 500,
            "stage3_max_live_parameters": 1,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 100,
            "stage3_param_persistence_threshold": 50,
            "stage3_model_persistence_threshold": 1000,
            "stage3_gather_16bit_weights_on_model_save": True,
            "memory_efficient_linear": False,
            "log_trace_cache_warnings": True,
        },
    ),
    (2, {"offload_optimizer": {**ON_HOST, "fast_init": True, "buffer_count": 2}}),
    (
        3,
        {
            "offload_optimizer": {**ON_HOST, "pipeline_read": True, "pipeline_write": True},
            "offload_param": {
                **ON_HOST,
                "buffer_count": 2,
                "buffer_size": 10_000,
                "max_in_cpu": 1000,
            },
        },
    ),
]
SGD = {"lr": 0.05, "momentum": 0.9}
ADAM = {"lr": 0.02, "betas": [0.8, 0.95], "eps": 1e-3}
# (stage, type, parameters, what DeepSpeed alone is told)
OPTIMIZERS: list[tuple[int, str, dict[str, Any], dict[str, Any]]] = [
    (0, "SGD", {**SGD, "nesterov": True, "weight_decay": 0.01}, {"foreach": True}),
    (2, "SGD", {**SGD, "nesterov": True, "weight_decay": 0.01}, {"fused": True}),
    (1, "AdamW", {**ADAM, "weight_decay": 0.1}, {"torch_adam": True, "foreach": True}),
    (3, "AdamW", {**ADAM, "weight_decay": 0.1}, {"torch_adam": True, "fused": True}),
    (2, "Adam", {**ADAM, "weight_decay": 0.0}, {"torch_adam": True}),
]
FP16 = {
    "enabled": True,
    "loss_scale": 0,
    "initial_scale_power": 6,
    "loss_scale_window": 2,
    "hysteresis": 1,
    "consecutive_hysteresis": True,
    "min_loss_scale": 2,
}
OTHER = {
    "bf16": {"enabled": False},
    "data_types": {"grad_accum_dtype": "fp32"},
    "checkpoint": {"tag_validation": "Fail", "parallel_write": {}},
    "activation_checkpointing": {},
}


def run(world: World, folder: Path, config: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    return world.run(
        "tests.parity.cases:train",
        folder=str(folder),
        kind="clip",
        ds_config=config,
        steps=3,
        chunk_size=5,
        bidirectional=True,
        temperature=0.1,
        **more,
    )


def test_every_accepted_key_has_a_cell() -> None:
    covered = {
        "zero_optimization": {"stage"}.union(*(keys for _, keys in ZERO)),
        "fp16": set(FP16),
        **{name: set(section) for name, section in OTHER.items()},
        "checkpoint.parallel_write": set(),
        "optimizer": {"type", "params"},
    }
    for part in ("offload_optimizer", "offload_param"):
        covered[f"zero_optimization.{part}"] = set().union(
            *(keys[part] for _, keys in ZERO if part in keys)
        )
    assert covered == {name: set(keys) for name, keys in PROVEN.items()}
    for kind in PROVEN_OPTIMIZERS:
        cells = [
            ours | theirs for _, name, ours, theirs in OPTIMIZERS if name.lower()[:4] == kind[:4]
        ]
        assert set().union(*cells) == PROVEN_OPTIMIZERS[kind], kind


@pytest.mark.parametrize(("stage", "keys"), ZERO)
def test_zero_optimization(
    world: Callable[[int], World],
    folders: dict[float, Path],
    reference: Callable[..., Any],
    stage: int,
    keys: dict[str, Any],
) -> None:
    check(reference("clip"), run(world(2), folders[0.0], ds_config(stage, 2, zero=keys)))


@pytest.mark.parametrize(("stage", "kind", "ours", "theirs"), OPTIMIZERS)
def test_optimizers(
    world: Callable[[int], World],
    folders: dict[float, Path],
    stage: int,
    kind: str,
    ours: dict[str, Any],
    theirs: dict[str, Any],
) -> None:
    expected = train_plain(
        folders[0.0],
        kind="clip",
        steps=3,
        optimizer={"type": kind, **ours},
        max_grad_norm=0.0,
        bidirectional=True,
        temperature=0.1,
        dropout_plan=None,
        decay_matrices_only=True,
    )
    optimizer = {"type": kind, "params": {**ours, **theirs}}
    config = ds_config(stage, 2, optimizer=optimizer)
    decay = ours["weight_decay"]
    check(expected, run(world(2), folders[0.0], config, weight_decay=decay))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16(
    world: Callable[[int], World],
    folders: dict[float, Path],
    reference: Callable[..., Any],
    stage: int,
) -> None:
    """The loss scale doubles at the second step; DeepSpeed alone would halve that step."""
    results = run(world(2), folders[0.0], ds_config(stage, 2, fp16=FP16))
    dtype, tolerance, tensor_tolerance = PRECISIONS["fp16"]
    for result in results:
        error = update_error(reference("clip", dtype=dtype), result["after"])
        assert error["whole"] <= tolerance, error
        assert error["worst"] <= tensor_tolerance, error


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_other_sections(
    world: Callable[[int], World],
    folders: dict[float, Path],
    reference: Callable[..., Any],
    stage: int,
) -> None:
    check(reference("clip"), run(world(2), folders[0.0], ds_config(stage, 2, **OTHER)))


def test_sgd_needs_no_key_of_its_own(
    world: Callable[[int], World], folders: dict[float, Path], reference: Callable[..., Any]
) -> None:
    """As resolved from a JSON that only names it: DeepSpeed would refuse it untested."""
    raw = {
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "SGD", "params": {"momentum": 0.9}},
    }
    config = resolve_ds_config(
        raw,
        origin="x.json",
        origins={},
        world_size=2,
        batch_size=6,
        precision="fp32",
        max_grad_norm=0.0,
        lr=0.05,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        device_type="cpu",
        fp16_supported=False,
        bf16_supported=True,
    )
    check(reference("clip"), run(world(2), folders[0.0], config))
    assert torch.is_tensor(reference("clip")["after"]["logit_scale"])
