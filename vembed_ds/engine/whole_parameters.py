"""ZeRO-3: parameters gathered once for several passes, instead of by every module call.

DeepSpeed's hooks gather a module's parameters before its forward and backward pass and put them
away behind it: three times a chunk where chunks are replayed. Here all are gathered at once, and
the hooks do nothing until they are put away again. So neither the order of modules that
DeepSpeed has learnt nor what it gathers ahead is disturbed by passes that it does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import (
    GatheredParameters,
    InsertPostInitMethodToModuleSubClasses,
    ZeroParamStatus,
)
from deepspeed.utils import z3_leaf_module
from torch import nn
from torch.nn import functional

from vembed_ds.distributed.phases import Kind, phase

_NEEDED = ("forward_hooks", "backward_hooks", "fwd_pre_hook", "get_param_coordinator")
_HOOKS_PER_MODULE = 4  # before and behind its forward pass, for that and for the backward pass


class WholeParameters:
    """Lets a ZeRO-3 engine hold its parameters whole for a while.

    Args:
        engine: At stage 3, as :func:`missing_internals` expects it.
        without: Parameters that no pass needs; they stay in parts.
    """

    def __init__(self, engine: DeepSpeedEngine, *, without: Collection[nn.Parameter] = ()) -> None:
        self._offload: Any = engine.optimizer.parameter_offload
        left_out = set(without)
        self._parameters: list[Any] = [p for p in engine.module.parameters() if p not in left_out]
        self._hooks_act = True
        self._held = ExitStack()
        for handle in _handles(self._offload):
            hooks = handle.hooks_dict_ref()
            hooks[handle.id] = self._unless_held(hooks[handle.id])

    @contextmanager
    def held(self) -> Iterator[None]:
        """All parameters whole inside, at the latest until its end. Collective.

        The parameters must not be changed inside. When the body raises, parameters and hooks are
        as before.
        """
        try:
            self._hold()
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Put the parameters away, if they are held; hooks gather them again. Local."""
        self._hooks_act = True
        self._held.close()

    def _hold(self) -> None:
        with phase(Kind.WAITING, "gathering the parameters"):
            # What an evaluation has asked for ahead may still be under way.
            self._offload.get_param_coordinator()._clean_inflight_param_registry()
            # Small ones stay gathered between steps. The states are the same on every rank, or
            # DeepSpeed's own gathers would not meet.
            apart = [p for p in self._parameters if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
            self._held.enter_context(GatheredParameters(apart))
        self._held.enter_context(_own_linear())
        self._hooks_act = False

    def _unless_held(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def switched(*arguments: Any) -> Any:
            return hook(*arguments) if self._hooks_act else None

        return switched


@contextmanager
def _own_linear() -> Iterator[None]:
    """PyTorch's linear function in the place of DeepSpeed's, which spares whole weights and takes longer.

    DeepSpeed replaces it in the whole process (``memory_efficient_linear``), and remembers it.
    """
    replaced = functional.linear
    functional.linear = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", replaced)
    try:
        yield
    finally:
        functional.linear = replaced


def missing_internals(engine: DeepSpeedEngine) -> str | None:
    """What of DeepSpeed 0.19.8 this relies on and does not find, in words; ``None``: nothing.

    Args:
        engine: At stage 3.
    """
    offload: Any = getattr(engine.optimizer, "parameter_offload", None)
    for name in _NEEDED:
        if not hasattr(offload, name):
            return f"its optimizer has no parameter_offload.{name}"
    if not hasattr(offload.get_param_coordinator(), "_clean_inflight_param_registry"):
        return "its parameter coordinator does not tell what is being gathered"
    found = [handle for handle in _handles(offload) if handle.id in (handle.hooks_dict_ref() or ())]
    expected = 1 + _HOOKS_PER_MODULE * _places(engine.module)
    if len(found) != expected:
        return f"its hooks on modules are {len(found)} and not {expected}"
    return None


def _handles(offload: Any) -> list[Any]:
    """Of all hooks that gather parameters or put them away."""
    return [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]


def _places(module: nn.Module) -> int:
    """How often DeepSpeed visits a module and those in it; one that two share, twice."""
    inside = () if z3_leaf_module(module) else module.children()
    return 1 + sum(map(_places, inside))
