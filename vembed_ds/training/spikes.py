"""Steps whose loss or gradient stands out from those before."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median

WINDOW = 100  # steps behind the median
QUIET = 20  # first steps, of which nothing is said: there is nothing to compare them with


class SpikeWatch:
    """Compares every value with the median of those before, which one spike does not move.

    Args:
        factor: How many times the median a value must be to stand out, > 1; ``None``: none does.
    """

    def __init__(self, factor: float | None) -> None:
        self._factor = factor
        self._seen: dict[str, deque[float]] = {}
        self._standing_out = False

    def see(self, values: Mapping[str, float]) -> list[str]:
        """What stands out of a step, in words; nothing when the step before stood out too.

        Args:
            values: By name, finite. Where the median is not above 0, nothing stands out.
        """
        if self._factor is None:
            return []
        found = []
        for name, value in values.items():
            seen = self._seen.setdefault(name, deque(maxlen=WINDOW))
            middle = median(seen) if len(seen) >= QUIET else 0.0
            if middle > 0 and value > self._factor * middle:
                found.append(
                    f"the {name} {value:.4g} is {value / middle:.0f} times the median of the last "
                    f"{len(seen)} steps ({middle:.4g})"
                )
            seen.append(value)
        first = not self._standing_out
        self._standing_out = bool(found)
        return found if first else []
