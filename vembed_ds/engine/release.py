"""Letting go of engines, in a process that goes on without them.

DeepSpeed 0.19.8 keeps an engine, with the model and the optimizer's state, for as long as the process
lives: its hooks in the graph's leaves are where the garbage collector does not look, and ZeRO-3 puts the
model into a global list and into a cache. ZeRO-3 also replaces ``torch.nn.functional.linear`` by one of its own, in the
whole process: whatever is trained there afterwards rounds otherwise.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import parameter_offload
from torch.nn import functional

from vembed_ds.engine.module_order import forget_releases

_made: weakref.WeakSet[Any] = weakref.WeakSet()


def remember_engine(engine: Any) -> None:
    """Note an engine that was made, for :func:`engines_released`."""
    _made.add(engine)


@contextmanager
def engines_released() -> Iterator[None]:
    """Take apart, at the end, every engine that was made inside. Every rank enters and leaves it.

    The memory is free as soon as nobody holds the model any more, and :func:`free_memory` is called.
    """
    before, linear = set(_made), functional.linear
    try:
        yield
    finally:
        for engine in set(_made) - before:
            _release(engine)
        functional.linear = linear


def free_memory() -> None:
    """Collect what nobody holds any more, and give the accelerator's memory back."""
    gc.collect()
    get_accelerator().empty_cache()


def _release(engine: Any) -> None:
    engine.destroy()
    if (forget := forget_releases()) is not None:
        forget()  # what it held of engines that remain is found again
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not engine.module]
