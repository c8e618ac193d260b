"""What this project's switches are compared at: keys of the configuration, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.peers.job import Variant

Keys = Mapping[str, Any]

STANDARD: Keys = {"use_gradient_cache": False}
SLICED: Keys = {  # a layer takes the whole batch, so many items at a time
    "use_gradient_cache": False,
    "gradient_checkpointing": True,
    "gradient_checkpointing_slice_size": 32,
}
LEAN: Keys = {"gradient_cache_kept_graphs": 1}  # the least memory: only the last chunk is kept


def cached(**keys: Any) -> dict[str, Any]:
    """The gradient cache, with chunks as the task has them where ``keys`` say nothing else."""
    return {"use_gradient_cache": True, **keys}


def ours(name: str, keys: Keys, **options: Any) -> Variant:
    """A variant of this project.

    Args:
        name: In tables, behind ``ours``.
        keys: Of the configuration.
        options: ``stage`` of ZeRO (0), ``ranks``, and what a :class:`Variant` has beside them.
    """
    own = {n: options.pop(n) for n in ("symmetric", "frozen_text") if n in options}
    return Variant(
        f"ours, {name}", "ours", "benchmarks.peers.ours:train", {"keys": keys, **options}, **own
    )
