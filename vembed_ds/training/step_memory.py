"""What a step keeps in memory, and what becomes smaller when there is none left."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from deepspeed.accelerator import get_accelerator

from vembed_ds.data.batches import StepPlan
from vembed_ds.data.chunking import ChunkBudget, halved
from vembed_ds.distributed import comm
from vembed_ds.distributed.phases import status_of
from vembed_ds.errors import OutOfMemoryError, one_line
from vembed_ds.steps.kept_graphs import KeptGraphs
from vembed_ds.steps.shortage import MemoryShortage, memory_cause

logger = logging.getLogger(__name__)

Explain = Callable[[BaseException, ChunkBudget, int], OutOfMemoryError]
"""The error of a run, from its cause, the chunks of the step, and the graphs that it kept."""


def unexplained(cause: BaseException, budget: ChunkBudget, kept_graphs: int) -> OutOfMemoryError:
    """Where nobody knows what else could be smaller."""
    return OutOfMemoryError(f"{status_of(cause)}: no memory: {one_line(cause)}")


class StepMemory:
    """Has a step made again when memory runs out: with fewer graphs, then in smaller chunks.

    Its gradient depends on neither. Where the passes of a chunk need the other ranks, these are in
    the middle of a collective when one has no memory, and cannot be told to begin again: the run ends.

    Args:
        graphs: How many chunks keep their graph.
        can_agree: Whether they need no other rank.
        explain: Makes the error that ends the run.

    Attributes:
        may_cut: Whether the model computes the same in smaller chunks; chunks are computed twice.
    """

    def __init__(
        self, graphs: KeptGraphs, *, can_agree: bool, explain: Explain = unexplained
    ) -> None:
        self.graphs = graphs
        self.may_cut = True
        self._can_agree, self._explain = can_agree, explain
        self._budget, self._largest = ChunkBudget(items=None), 1

    def begin(self, plan: StepPlan, budget: ChunkBudget) -> None:
        """A step is tried with this plan, which was cut by this budget. Local."""
        slices = [places for chunk in plan.chunks for places in chunk.values()]
        self._budget = budget
        self._largest = max(places.stop - places.start for places in slices)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Where nothing is made again, an error about memory says what the step really had.

        That may be smaller chunks, and fewer graphs, than are configured. Local.

        Raises:
            OutOfMemoryError: In the place of what ran out.
        """
        try:
            yield
        except (MemoryShortage, OutOfMemoryError):
            raise
        except Exception as error:
            cause = memory_cause(error)
            if cause is None:
                raise
            raise self._explain(cause, self._budget, self.graphs.number) from error

    def agree(self, cause: BaseException | None) -> None:
        """Whether memory ran out on any rank, as the step asks. Collective where ranks can agree.

        Args:
            cause: What ran out on this rank.

        Raises:
            MemoryShortage: On every rank.
            OutOfMemoryError: Where they cannot agree, on this rank.
        """
        if not self._can_agree:
            if cause is not None:
                raise self._explain(cause, self._budget, self.graphs.number) from cause
            return
        own = [int(cause is not None), self.graphs.number, self._largest]
        failed, number, largest = comm.all_max(own)
        if failed:
            raise MemoryShortage(cause, kept=number > 1, largest=largest)

    def make_room(self, shortage: MemoryShortage) -> ChunkBudget:
        """By which budget the step is cut when it is made again. Collective.

        Nothing may hold the step's tensors any more.

        Args:
            shortage: From :meth:`agree`.

        Raises:
            VembedError: On every rank: chunks cannot be smaller, or must not, and one graph is kept.
        """
        budget = self._budget
        smaller: ChunkBudget | None = budget
        if not shortage.kept:
            smaller = halved(budget, largest=shortage.largest) if self.may_cut else None
        error = None
        if smaller is None and shortage.cause is not None:
            error = self._explain(shortage.cause, replace(budget, items=1), 1)
        comm.raise_together(error)
        assert smaller is not None
        causes = [
            f"rank {rank}, {found}"
            for rank, found in enumerate(comm.all_gather_objects(_words(shortage.cause)))
            if found
        ]
        if shortage.kept:
            self.graphs.keep_fewer()
            remedy = "keeping one graph, and later fewer than up to now"
        else:
            self.graphs.keep_one()
            remedy = f"with {_change(budget, smaller)} from now on"
        logger.warning(
            "no memory: %s; the step is made again, with the same gradient, %s", causes[0], remedy
        )
        gc.collect()
        get_accelerator().empty_cache()  # its blocks have the sizes of the larger chunks
        return smaller


def _change(old: ChunkBudget, new: ChunkBudget) -> str:
    """In the words of the configuration."""
    items = "the whole batch" if old.items is None else old.items
    changes = [f"gradient_cache_chunk_size {items} -> {new.items}"]
    if old.tokens != new.tokens:
        changes.append(f"gradient_cache_chunk_tokens {old.tokens} -> {new.tokens}")
    return " and ".join(changes)


def _words(cause: BaseException | None) -> str:
    return "" if cause is None else f"{status_of(cause)} ({one_line(cause, length=150)})"
