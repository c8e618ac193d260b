"""How many of a step's last chunks keep the graph of their first pass.

A kept graph spares its chunk the second forward pass. The chunks are differentiated from the last
to the first whatever is kept, so the number changes neither the gradient nor its rounding (but for
the last bit with ``zero3_gather: cache_pass``); it may differ between steps, and between ranks that
gather nothing together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import inf
from typing import TypeVar

from vembed_ds.data.batches import StepPlan
from vembed_ds.data.chunking import Size, padded, size_of
from vembed_ds.steps.meters import Meter

logger = logging.getLogger(__name__)

T = TypeVar("T")
Sizes = Mapping[tuple[str, str], int]  # of a chunk: by stream, its tokens, patches and their pairs


class GraphBudget:
    """How many graphs fit: known from a step that kept one at a time and was measured.

    Every chunk of that step is weighed. A step with a larger chunk than any before is measured too.

    Args:
        meter: Of the memory in which the graphs lie.
        reserve: Gives the bytes that later steps take beside what the measured one shows.
    """

    def __init__(self, meter: Meter, *, reserve: Callable[[], int] = lambda: 0) -> None:
        self._meter, self._reserve = meter, reserve
        self._largest: dict[tuple[str, str], int] = {}  # the most of each that was measured
        self._weights: list[int] | None = None  # of this step's graphs; None: it is not measured
        self.graph_bytes = 0
        """What the largest graph held."""
        self.spare_bytes: float = inf
        """What the measured step left for further ones; of several steps the least."""

    @contextmanager
    def step(self, plan: StepPlan) -> Iterator[int]:
        """How many of the last chunks can keep their graph in this step. Local."""
        chunks = padded_sizes(plan)
        shares = [self._share(chunk) for chunk in chunks]
        if max(shares) <= 1:
            yield self._fitting(shares)
            return
        self._weights = []
        self._meter.begin()
        try:
            yield 1
            self.graph_bytes = max(self.graph_bytes, *self._weights)
            self.spare_bytes = min(self.spare_bytes, self._meter.spare() - self._reserve())
            for name, size in (found for chunk in chunks for found in chunk.items()):
                self._largest[name] = max(size, self._largest.get(name, 0))
        finally:
            self._weights = None

    @property
    def measures(self) -> bool:
        """Whether the present step is measured."""
        return self._weights is not None

    def forward(self, run: Callable[[], T]) -> T:
        """A forward pass with gradient, weighed where the step is measured."""
        if self._weights is None:
            return run()
        result, weight = self._meter.weigh(run)
        self._weights.append(weight)
        return result

    def _share(self, chunk: Sizes) -> float:
        """How large the chunk is, in parts of the largest that was measured."""
        return max(
            (size / self._largest[n] if n in self._largest else inf for n, size in chunk.items()),
            default=0.0,
        )

    def _fitting(self, shares: Sequence[float]) -> int:
        left, number = self.spare_bytes, 1  # the step that was measured kept one
        for share in reversed(shares[:-1]):
            left -= share * self.graph_bytes
            if left < 0:
                break
            number += 1
        return number


class KeptGraphs:
    """Decides before every step.

    Args:
        number: Chunks that keep their graph, at least 1; a budget may say that more fit.
        budget: ``None``: the number stands.
        agree: Of the numbers that the ranks would keep, what all keep; collective. ``None``:
            every rank keeps what it likes.
    """

    def __init__(
        self,
        number: int = 1,
        *,
        budget: GraphBudget | None = None,
        agree: Callable[[int], int] | None = None,
    ) -> None:
        self._wanted, self._budget, self._agree = number, budget, agree
        self._most: float = inf  # less since memory ran out
        self._only_one = self._told = False
        self.number = 1
        """Graphs of the present step, or of the last one."""

    @contextmanager
    def step(self, plan: StepPlan) -> Iterator[int]:
        """How many chunks keep their graph in this step. Collective where the ranks agree."""
        limit = min(len(plan.chunks), 1 if self._only_one else self._most)
        self._only_one = False
        with self._fitting(plan, limit) as number:
            self.number = int(min(number, limit))
            if self._agree is not None and len(plan.chunks) > 1:
                self.number = self._agree(self.number)
            self._tell(len(plan.chunks))
            yield self.number

    def forward(self, run: Callable[[], T]) -> T:
        """A forward pass of a chunk with gradient."""
        return run() if self._budget is None else self._budget.forward(run)

    def keep_fewer(self) -> None:
        """Memory ran out while several were kept: now one, and later at most half of what was."""
        self._only_one = True
        if self.number > 1:
            self._most = self.number // 2

    def keep_one(self) -> None:
        """Memory ran out although one was kept: it remains at one."""
        self._most = 1

    def _fitting(self, plan: StepPlan, limit: float) -> AbstractContextManager[int]:
        if self._budget is None or limit == 1:
            return nullcontext(self._wanted)
        return self._budget.step(plan)

    def _tell(self, num_chunks: int) -> None:
        """Log the first decision."""
        budget = self._budget
        if self._told or num_chunks == 1 or (budget.measures if budget else self._wanted == 1):
            return
        self._told = True
        logger.info(
            "gradient cache: the graphs of %d of %d chunks are kept%s",
            self.number,
            num_chunks,
            ""
            if budget is None
            else f" (the largest takes {_megabytes(budget.graph_bytes)}, and there are "
            f"{_megabytes(budget.spare_bytes)} for further ones)",
        )


def padded_sizes(plan: StepPlan) -> list[Sizes]:
    """Of every chunk, how large it is in each stream, padding counted.

    In pairs too, as many as attention compares within the items: fewer but longer items of as many
    tokens may hold more.
    """
    items = {name: [size_of(item) for item in found] for name, found in plan.streams.items()}
    return [
        {
            (name, of): size
            for name, places in chunk.items()
            for of, size in _sizes(items[name][places]).items()
            if size
        }
        for chunk in plan.chunks
    ]


def _sizes(items: Sequence[Size]) -> dict[str, int]:
    whole = padded(items)
    return {
        "tokens": whole.tokens,
        "pairs of tokens": whole.tokens**2 // len(items),
        "patches": whole.patches,
        "pairs of patches": sum(item.patches**2 for item in items),
    }


def _megabytes(number: float) -> str:
    return f"{number / 2**20:,.0f} MB"
