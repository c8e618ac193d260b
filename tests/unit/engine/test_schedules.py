"""Every schedule: the rates of its formula, for groups of different rates alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch

from vembed_ds.config.schema import OptimizerConfig
from vembed_ds.engine.schedules import build_schedule

STEPS, WARM_UP = 12, 3


def after_warm_up(ratio: Callable[[int], float]) -> Callable[[int], float]:
    return lambda step: step / WARM_UP if step < WARM_UP else ratio(step - WARM_UP)


LEFT = STEPS - WARM_UP
SHARES: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 1.0,
    "constant_with_warmup": after_warm_up(lambda done: 1.0),
    "linear": after_warm_up(lambda done: 1 - done / LEFT),
    "polynomial": after_warm_up(lambda done: 1 - done / LEFT),  # down to 1e-7
    "cosine": after_warm_up(lambda done: (1 + math.cos(math.pi * done / LEFT)) / 2),
    "cosine_with_restarts": after_warm_up(lambda done: (1 + math.cos(math.pi * done / LEFT)) / 2),
    "inverse_sqrt": after_warm_up(lambda done: math.sqrt(WARM_UP / (done + WARM_UP))),
}


def test_every_schedule_is_here() -> None:
    offered = get_args(OptimizerConfig.model_fields["scheduler_type"].annotation)
    assert set(SHARES) == set(offered)


@pytest.mark.parametrize("name", SHARES)
def test_rates(name: str) -> None:
    highest = (0.5, 0.02)
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": rate} for rate in highest]
    optimizer = torch.optim.SGD(groups, lr=highest[0])
    factory = build_schedule(name, num_steps=STEPS, warmup_steps=WARM_UP, warmup_ratio=0.0)
    schedule = factory(optimizer)
    for step in range(STEPS):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([rate * SHARES[name](step) for rate in highest], abs=1e-6)
        optimizer.step()
        schedule.step()
