"""The prediction of a running engine is the model's, with what the engine is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vembed_ds.engine.choices import Gather, Reduce
from vembed_ds.engine.step_traffic import StepTraffic
from vembed_ds.engine.traffic_model import predict_embedding_bytes, predict_step_bytes


def engine(module: nn.Module, *, reuse_distance: int) -> Any:
    return SimpleNamespace(
        module=module,
        dp_world_size=2,
        device=torch.device("cpu"),
        zero_optimization_stage=lambda: 3,
        zero_max_reuse_distance=lambda: reuse_distance,
        zero_hpz_partition_size=lambda: 1,
    )


@pytest.mark.parametrize(
    ("reuse_distance", "reused"),
    [(0, 0.0), (100, 0.25), (300, 0.75), (400, 1.0), (10**9, 1.0)],
)
@pytest.mark.parametrize("gather", [Gather.CACHE_PASS, Gather.PER_MODULE])
def test_a_model_of_200_elements(gather: Gather, reuse_distance: int, reused: float) -> None:
    module = nn.ParameterList([torch.zeros(120), torch.zeros(80)])
    found = StepTraffic(
        engine(module, reuse_distance=reuse_distance), gather=gather, reduce=Reduce.ONCE, idle=[]
    ).predict(num_chunks=4, kept_chunks=1, gathered_values=24)
    shared: dict[str, Any] = {"world_size": 2, "scatter_units": 2}
    step = predict_step_bytes(
        zero_stage=3,
        parameters=200,
        trained=200,
        element_size=4,
        num_chunks=4,
        zero3_gather=gather.value,
        reused=reused,
        **shared,
    )
    assert found == step.total + predict_embedding_bytes(rows=24, width=1, **shared)
