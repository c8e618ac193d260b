"""Metrics of a run, handed to a function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CallbackSink:
    """A function of the user's.

    Args:
        call: Given the metrics, by name, and the step.
    """

    call: Callable[[Mapping[str, float], int], object]

    def write(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Call it with a copy."""
        self.call(dict(metrics), step)

    def close(self) -> None:
        """Nothing is left to do."""
