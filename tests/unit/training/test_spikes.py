"""F26: what stands out from the steps before, and what does not."""

from __future__ import annotations

import random

import pytest

from vembed_ds.training.spikes import QUIET, SpikeWatch


def seen(watch: SpikeWatch, values: list[float]) -> list[int]:
    """Steps, from 0, of which something was said."""
    return [step for step, value in enumerate(values) if watch.see({"gradient norm": value})]


def test_a_spike_is_described_once() -> None:
    watch = SpikeWatch(10.0)
    assert seen(watch, [2.0] * QUIET) == []
    assert watch.see({"gradient norm": 50.0}) == [
        f"the gradient norm 50 is 25 times the median of the last {QUIET} steps (2)"
    ]
    assert watch.see({"gradient norm": 60.0}) == []  # nothing new
    assert seen(watch, [2.0, 19.0, 21.0]) == [2]


@pytest.mark.parametrize("seed", [0, 1])
def test_no_false_alarms(seed: int) -> None:
    generator = random.Random(seed)
    noise = [generator.lognormvariate(0.0, 0.5) for _ in range(1000)]
    falling = [5.0 * 0.99**step + 0.1 * value for step, value in enumerate(noise)]
    growing = [0.01 * 1.005**step * value for step, value in enumerate(noise)]
    for values in (noise, falling, growing):
        assert seen(SpikeWatch(10.0), values) == []


def test_the_first_steps_are_quiet() -> None:
    assert seen(SpikeWatch(10.0), [1000.0, *[1.0] * 5, 500.0]) == []


def test_values_that_are_not_above_zero_have_no_factor() -> None:
    assert seen(SpikeWatch(10.0), [-1.0] * 30 + [5.0]) == []
    assert seen(SpikeWatch(10.0), [0.0] * 30 + [5.0]) == []


def test_it_can_be_switched_off() -> None:
    assert seen(SpikeWatch(None), [1.0] * 50 + [1e9]) == []
