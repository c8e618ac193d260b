"""Every DeepSpeed key that is accepted trains as the plain reference does.

A cell is a DeepSpeed JSON as a user would write it: it is resolved, so that it must be accepted
as well, and trains three steps. Each key of the allow-lists has a value in some cell that is not
DeepSpeed's default. Keys that change nothing in training (what a save checks, buffers for NVMe)
share a cell; each of the others is in a cell that fails when it alone loses a gradient.

Sizes are so small that gradients and shards split, also in the middle of a parameter.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
from torch.nn import functional

from tests.parity import cases
from tests.parity.conftest import update_error
from tests.parity.data import GLOBAL_BATCH
from tests.parity.reference import train_plain
from tests.parity.test_adamw import ADAMW
from tests.parity.test_step_matrix import PRECISIONS, check
from tests.worlds import World
from vembed_ds.engine import ds_keys
from vembed_ds.engine.ds_config import resolve_ds_config

pytestmark = [pytest.mark.parity]

BUCKET = 500  # elements; the word embeddings alone have 800, most parameters fewer than 300
SGD = {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}}
NESTEROV = {"lr": 0.02, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}
# Who computes the update; the plain reference does not know these.
IMPLEMENTATION = ("torch_adam", "fused", "foreach")
ON_HOST = {"device": "cpu", "pin_memory": False}


@dataclass(frozen=True)
class Cell:
    """Keys of ``zero_optimization`` and of other sections, and at which stages to train."""

    stages: tuple[int, ...]
    zero: dict[str, Any] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)
    kind: str = "clip"
    precision: str = "fp32"


def optimizer(name: str, params: dict[str, Any]) -> dict[str, Any]:
    return {"optimizer": {"type": name, "params": params}}


CELLS = {
    "reduce_scatter": Cell((1, 2, 3), {"reduce_scatter": False}),
    "overlap_comm": Cell((1, 2), {"overlap_comm": True}),
    "no overlap_comm": Cell((3,), {"overlap_comm": False}),
    "use_multi_rank_bucket_allreduce": Cell((1, 2), {"use_multi_rank_bucket_allreduce": False}),
    "allgather_partitions": Cell((1, 2), {"allgather_partitions": False}),
    "one element": Cell(
        (1, 2, 3), {"reduce_bucket_size": 1, "allgather_bucket_size": 64}, kind="skip"
    ),
    "nothing stays gathered": Cell(
        (3,),
        {
            "sub_group_size": 100,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 100,
        },
    ),
    "some stay gathered": Cell(
        (3,), {"stage3_param_persistence_threshold": 100, "stage3_model_persistence_threshold": 200}
    ),
    "a copy per machine": Cell((3,), {"zero_hpz_partition_size": 2}, kind="skip"),
    "linear, saving, logging": Cell(
        (0, 3),
        {
            "memory_efficient_linear": False,
            "stage3_gather_16bit_weights_on_model_save": True,
            "log_trace_cache_warnings": True,
        },
        {"checkpoint": {"tag_validation": "Fail", "parallel_write": {"pipeline_stage": False}}},
    ),
    "offload_optimizer": Cell(
        (1, 2, 3),
        {
            "offload_optimizer": {
                **ON_HOST,
                "buffer_count": 1,
                "pipeline_read": True,
                "pipeline_write": True,
                "fast_init": True,
            },
            "ignore_unused_parameters": False,  # read where the optimizer is offloaded
        },
        {"zero_force_ds_cpu_optimizer": False},
        kind="skip",
    ),
    "offload_param": Cell(
        (3,),
        {"offload_param": {**ON_HOST, "buffer_count": 1, "buffer_size": 10, "max_in_cpu": 0}},
    ),
    "fp32": Cell((0, 2), other={"data_types": {"grad_accum_dtype": "fp32"}}),
    "bf16": Cell(
        (0, 1, 2, 3),
        other={"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}},
        precision="bf16",
    ),
    "fp16": Cell(
        (1, 2, 3),
        other={
            "fp16": {"enabled": True, "loss_scale": 128},
            "data_types": {"grad_accum_dtype": "fp16"},
        },
        precision="fp16",
    ),
    "fp16, scale doubled at every step but the first": Cell(
        (1, 2, 3),
        other={
            "fp16": {
                "enabled": True,
                "loss_scale": 0,
                "initial_scale_power": 6,
                "loss_scale_window": 1,
            }
        },
        precision="fp16",
    ),
    "SGD, foreach": Cell((0, 2), other=optimizer("SGD", {**NESTEROV, "foreach": True})),
    "SGD, fused": Cell((0, 3), other=optimizer("SGD", {**NESTEROV, "fused": True})),
}
for _name, _stages in {"AdamW": (0, 2, 3), "Adam": (0, 1)}.items():  # to DeepSpeed they are one
    _params = {**ADAMW, "torch_adam": True}
    CELLS |= {
        f"{_name}, foreach": Cell(
            _stages[::2], other=optimizer(_name, {**_params, "foreach": True})
        ),
        f"{_name}, fused": Cell(_stages[:2], other=optimizer(_name, {**_params, "fused": True})),
        f"{_name}, DeepSpeed's": Cell(
            _stages[1:],
            {"offload_optimizer": {"device": "cpu"}},
            optimizer(_name, {**ADAMW, "torch_adam": False}),
        ),
    }
OVERFLOW = Cell(
    (1, 3),
    other={
        "fp16": {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": 24,
            "loss_scale_window": 1,
            "hysteresis": 3,
            "consecutive_hysteresis": True,
            "min_loss_scale": 2,
        }
    },
    kind="skip",
    precision="fp16",
)


def written(cell: Cell, stage: int) -> dict[str, Any]:
    """The cell's JSON."""
    zero = {"stage": stage, "reduce_bucket_size": BUCKET}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # partition the smallest too
    return {"zero_optimization": zero | cell.zero, "optimizer": SGD, **cell.other}


def resolved(raw: dict[str, Any], precision: str) -> dict[str, Any]:
    params = raw["optimizer"]["params"]
    return resolve_ds_config(
        raw,
        origin="cell",
        origins={},
        world_size=2,
        batch_size=GLOBAL_BATCH // 2,
        precision=precision,
        max_grad_norm=max_grad_norm(raw),
        lr=params["lr"],
        betas=tuple(params.get("betas", (0.9, 0.999))),
        eps=params.get("eps", 1e-8),
        weight_decay=params.get("weight_decay", 0.0),
        device_type="cpu",
        fp16_supported=True,
        bf16_supported=True,
    )


def max_grad_norm(raw: dict[str, Any]) -> float:
    """For Adam, 1: the tolerance of `test_adamw` holds for gradients of that norm."""
    return 0.0 if raw["optimizer"]["type"] == "SGD" else 1.0


def train(**settings: Any) -> dict[str, Any]:
    """In a rank: `cases.train`, starting with torch's own linear function.

    ZeRO-3 replaces it for the rest of the process unless ``memory_efficient_linear`` is false, so
    an earlier cell would decide what this one trains with.
    """
    own = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", functional.linear)
    functional.linear = own
    result = cases.train(**settings)
    return {**result, "linear_replaced": functional.linear is not own}


@pytest.fixture(scope="module")
def plain(folders: dict[float, Path]) -> Callable[..., dict[str, Any]]:
    """``plain(cell)``: three steps of one process with the cell's optimizer, cached."""

    @functools.cache
    def compute(
        kind: str,
        name: str,
        params: str,
        clip: float,
        precision: str,
        cosine: tuple[int, int] | None,
    ) -> dict[str, Any]:
        settings = json.loads(params)
        return train_plain(
            folders[0.0],
            kind=kind,
            steps=3,
            optimizer={"type": name, **settings},
            max_grad_norm=clip,
            bidirectional=True,
            temperature=0.1,
            dropout_plan=None,
            dtype=PRECISIONS[precision][0] if precision in PRECISIONS else torch.float32,
            decay_matrices_only="weight_decay" in settings,
            cosine=cosine,
        )

    def of_cell(cell: Cell, *, cosine: tuple[int, int] | None = None) -> dict[str, Any]:
        raw = written(cell, 0)
        given = raw["optimizer"]
        params = {k: v for k, v in given["params"].items() if k not in IMPLEMENTATION}
        name = "SGD" if given["type"] == "SGD" else "AdamW"
        return compute(
            cell.kind, name, json.dumps(params), max_grad_norm(raw), cell.precision, cosine
        )

    return of_cell


def check_16_bit(expected: dict[str, Any], after: dict[str, torch.Tensor], precision: str) -> None:
    _, tolerance, tensor_tolerance = PRECISIONS[precision]
    error = update_error(expected, after)
    assert error["whole"] <= tolerance, error
    assert error["worst"] <= tensor_tolerance, error


@pytest.mark.parametrize(
    ("name", "stage"), [(name, stage) for name, cell in CELLS.items() for stage in cell.stages]
)
@pytest.mark.one_in(3)
def test_exact(
    world: Callable[[int], World],
    folders: dict[float, Path],
    plain: Callable[..., dict[str, Any]],
    name: str,
    stage: int,
) -> None:
    cell = CELLS[name]
    raw = written(cell, stage)
    results = world(2).run(
        "tests.parity.test_ds_keys:train",
        folder=str(folders[0.0]),
        kind=cell.kind,
        ds_config=resolved(raw, cell.precision),
        steps=3,
        chunk_size=5,
        bidirectional=True,
        temperature=0.1,
        weight_decay=raw["optimizer"]["params"].get("weight_decay"),
        # Otherwise most of ZeRO-3's keys would have no effect.
        modes={"zero3_gather": "per_module"},
    )
    expected = plain(cell)
    for result in results:
        own_linear = cell.zero.get("memory_efficient_linear") is False
        assert result["linear_replaced"] == (stage == 3 and not own_linear)
        if cell.precision == "fp32":
            check(expected, [result])
        else:
            tolerance = PRECISIONS[cell.precision][1]
            assert result["losses"] == pytest.approx(expected["losses"], rel=tolerance)
            check_16_bit(expected, result["after"], cell.precision)


@pytest.mark.parametrize("stage", OVERFLOW.stages)
def test_overflow(
    world: Callable[[int], World],
    folders: dict[float, Path],
    plain: Callable[..., dict[str, Any]],
    stage: int,
) -> None:
    cosine = (2, 6)
    results = world(2).run(
        "tests.parity.cases:overflow",
        folder=str(folders[0.0]),
        kind=OVERFLOW.kind,
        ds_config=resolved(written(OVERFLOW, stage), "fp16"),
        steps=3,
        cosine=cosine,
    )
    for result in results:
        check_16_bit(plain(OVERFLOW, cosine=cosine), result["after"], "fp16")
        scales = [attempt["scale"] for attempt in result["attempts"]]
        # hysteresis 3: the first two overflows are forgiven. window 1: doubled after two steps.
        assert scales[:3] == [2.0**24, 2.0**24, 2.0**23]
        assert scales[-1] == 2 * scales[-2]


def values(raw: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Every key that a JSON sets: its name, value, and DeepSpeed's default."""
    for section, defaults in ds_keys._section_defaults().items():
        for key, value in (ds_keys.value_at(raw, section) or {}).items():
            yield f"{section}.{key}", value, defaults[key]
    kind = ds_keys.optimizer_type(raw)
    defaults = ds_keys._optimizer_defaults(kind)
    for key, value in raw["optimizer"]["params"].items():
        default = defaults[key]
        yield f"{kind}.{key}", value, list(default) if isinstance(default, tuple) else default


def test_every_accepted_key_has_a_cell() -> None:
    tried = {
        name
        for cell in [*CELLS.values(), OVERFLOW]
        for stage in cell.stages
        for name, value, default in values(written(cell, stage))
        if value != default
    }
    lists = ds_keys.PROVEN | ds_keys.PROVEN_OPTIMIZERS
    accepted = {f"{section}.{key}" for section, keys in lists.items() for key in keys}
    # It can only be DeepSpeed's default.
    assert tried - {"checkpoint.parallel_write.pipeline_stage"} == accepted
