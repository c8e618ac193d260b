"""What DeepSpeed caches of its modules is forgotten with the order they were in."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest

from vembed_ds.engine import module_order


class _Coordinator:
    """As DeepSpeed's, with what it is asked for."""

    def __init__(self) -> None:
        self.order = "first"

    def construct_parameter_trace_from_module_trace(self) -> None:
        self.order = "second"

    @functools.lru_cache  # noqa: B019
    def decide(self, module: str) -> str:
        return self.order


def _range(function: Any) -> Any:
    """As DeepSpeed's decorator: it says nothing of what it wraps."""

    def wrapped(*arguments: Any) -> Any:
        return function(*arguments)

    return wrapped


def _engine(coordinator: Any) -> Any:
    offload = SimpleNamespace(get_param_coordinator=lambda: coordinator)
    return SimpleNamespace(optimizer=SimpleNamespace(parameter_offload=offload))


@pytest.mark.parametrize("decorate", [lambda function: function, _range])
def test_a_new_order_is_decided_anew(monkeypatch: pytest.MonkeyPatch, decorate: Any) -> None:
    coordinator = _Coordinator()
    monkeypatch.setattr(
        module_order.PartitionedParameterCoordinator,
        module_order._DECIDES,
        decorate(_Coordinator.decide),
    )
    assert coordinator.decide("module") == "first"
    assert module_order.forget_releases_with_the_order(_engine(coordinator))
    assert coordinator.decide("module") == "first"
    coordinator.construct_parameter_trace_from_module_trace()
    assert coordinator.decide("module") == "second"


def test_the_installed_deepspeed_caches_it() -> None:
    decides = getattr(module_order.PartitionedParameterCoordinator, module_order._DECIDES)
    assert module_order._cache_clear(decides) is not None


def test_one_that_does_not_cache_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = _Coordinator()
    monkeypatch.delattr(module_order.PartitionedParameterCoordinator, module_order._DECIDES)
    assert not module_order.forget_releases_with_the_order(_engine(coordinator))
    assert "construct_parameter_trace_from_module_trace" not in vars(coordinator)
