"""ZeRO-3: which parameters a module puts away is decided anew when the order of modules is.

DeepSpeed 0.19.8 records in which order modules run, and keeps a parameter gathered that is soon
used again. What it decides of a module at a place of that order it caches
(``PartitionedParameterCoordinator.__params_to_release``), and keeps when it records another order.
A run embeds without gradient before its first step and in every evaluation; what was decided
there, to put everything away, would hold for all training steps: 942 MB a step instead of 557
(benchmarks/README.md, W2, ``cache_pass``). The gradient is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

_DECIDES = "_PartitionedParameterCoordinator__params_to_release"
_RECORDS = "construct_parameter_trace_from_module_trace"


def forget_releases_with_the_order(engine: DeepSpeedEngine) -> bool:
    """Let an engine of ZeRO-3 forget what its modules release whenever it records a new order.

    Returns:
        Whether there was something to do: a DeepSpeed that does not cache it, or keeps it
        elsewhere, is left as it is.
    """
    coordinator: Any = engine.optimizer.parameter_offload.get_param_coordinator()
    forget = forget_releases()
    record = getattr(coordinator, _RECORDS, None)
    if forget is None or record is None:
        return False

    def record_and_forget() -> None:
        record()
        forget()

    setattr(coordinator, _RECORDS, record_and_forget)
    return True


def forget_releases() -> Callable[[], None] | None:
    """Clears what DeepSpeed cached of all engines' modules; ``None``: this DeepSpeed caches nothing."""
    return _cache_clear(getattr(PartitionedParameterCoordinator, _DECIDES, None))


def _cache_clear(function: Any) -> Callable[[], None] | None:
    """That of a cached function, or of one that a decorator without ``__wrapped__`` holds."""
    if hasattr(function, "cache_clear"):
        found: Callable[[], None] = function.cache_clear
        return found
    inside = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return next((c for c in map(_cache_clear, filter(callable, inside)) if c is not None), None)
