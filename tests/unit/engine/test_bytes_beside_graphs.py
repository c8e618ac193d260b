"""What a first step that keeps one graph does not show of the memory of later ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vembed_ds.engine.choices import Gather
from vembed_ds.engine.train_engine import TrainEngine


def engine(stage: int, gather: Gather, *, updated: bool = False, offload: bool = False) -> Any:
    """Around 30 parameters, 20 of them trained, in 16 bit, on two ranks; not made by DeepSpeed."""
    trained, frozen = (nn.Parameter(torch.zeros(n, dtype=torch.bfloat16)) for n in (20, 10))
    module = nn.ParameterList([trained, frozen.requires_grad_(False)])
    if stage == 3:
        for parameter in module:
            parameter.ds_numel, parameter.data = parameter.numel(), torch.zeros(0)
    found = TrainEngine.__new__(TrainEngine)
    found.engine = SimpleNamespace(
        module=module,
        dp_world_size=2,
        basic_optimizer=SimpleNamespace(state={"a": "moment"} if updated else {}),
        zero_use_cpu_optimizer=lambda: offload,
    )
    found.zero_stage, found._trained = stage, [trained]
    found._whole = None if gather is Gather.PER_MODULE else object()  # type: ignore[assignment]
    return found


@pytest.mark.parametrize(
    ("stage", "gather", "made", "expected"),
    [
        (0, Gather.PER_MODULE, {}, 8 * 20),
        (0, Gather.PER_MODULE, {"updated": True}, 0),
        (2, Gather.PER_MODULE, {}, 8 * 20 // 2),
        (2, Gather.PER_MODULE, {"offload": True}, 0),
        (3, Gather.ONCE, {}, 8 * 20 // 2),
        (3, Gather.PER_MODULE, {"updated": True}, 4 * 30),  # an empty part of float32
    ],
)
def test_moments_and_whole_parameters_are_set_aside(
    stage: int, gather: Gather, made: dict[str, bool], expected: int
) -> None:
    assert engine(stage, gather, **made).bytes_beside_graphs == expected
