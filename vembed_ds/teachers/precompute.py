"""Embedding every item of data sets once with a frozen model."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from vembed_ds.data.chunking import batches_by_size
from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.loader import BatchLoader, enough_workers
from vembed_ds.data.processors import EncodedItem, ItemProcessor
from vembed_ds.data.sampler import shard_indices
from vembed_ds.data.teacher_items import Instructions
from vembed_ds.data.vector_table import KeyArray, SegmentWriter, VectorTable
from vembed_ds.data.workers import Samples
from vembed_ds.distributed import comm
from vembed_ds.similarity import Embeddings
from vembed_ds.teachers.cache import ensure_cache, open_table
from vembed_ds.teachers.items import ITEMS, ItemDataset, distinct_items

Embed = Callable[[Sequence[EncodedItem]], Embeddings]

GROUP = 16  # batches that are loaded together and sorted by length, for little padding
# After so long a rank makes a segment of what it has: a run that is killed loses no more.
SEGMENT_SECONDS = 300.0


class Precomputed(NamedTuple):
    """A table that has every item, and how many of them it did not have before."""

    table: VectorTable
    num_embedded: int


def precompute(
    members: Sequence[PairDataset],
    *,
    folder: Path,
    identity: Mapping[str, Any],
    processor: ItemProcessor,
    instructions: Instructions,
    embed: Embed,
    batch_size: int,
    num_workers: int,
    timeout_seconds: float,
) -> Precomputed:
    """Embed the items that a table has not, and add them to it.

    Collective. Every rank embeds a share and makes equally many ``embed`` calls, none when nothing
    is missing; so these may be collective too, and may load the model when they are first called.
    What a run has embedded before it is killed, the next one does not embed again.

    Args:
        members: The data sets.
        folder: Where the table is kept, made where there is none; every rank must see it.
        identity: What the vectors depend on beside the items: the model, its processor.
        processor: Of the frozen model.
        instructions: Of the frozen model.
        embed: From 1 to ``batch_size`` items to one vector, or one per token, each; called without
            gradient.
        batch_size: Items per rank at a time.
        num_workers: Loader processes per rank, at most.
        timeout_seconds: Longest wait for a loader process.

    Raises:
        VembedError: On every rank: an item cannot be read or encoded, a vector is not finite, the
            table belongs to another model or is damaged, or it cannot be written.
    """
    table = ensure_cache(folder, identity=identity)
    distinct = distinct_items(members, instructions)
    missing = distinct.where(~table.has(distinct.keys))
    if not len(missing):
        return Precomputed(table, 0)
    table = fill_table(
        folder,
        missing.keys,
        ItemDataset(members, missing.addresses, processor=processor, instructions=instructions),
        embed=embed,
        batch_size=batch_size,
        num_workers=num_workers,
        timeout_seconds=timeout_seconds,
    )
    return Precomputed(table, len(missing))


def fill_table(
    folder: Path,
    keys: KeyArray,
    items: Samples,
    *,
    embed: Embed,
    batch_size: int,
    num_workers: int,
    timeout_seconds: float,
) -> VectorTable:
    """Embed items and add them to a table; as :func:`precompute`, of which arguments are not said here.

    Args:
        folder: Of the table.
        keys: ``[N]`` of the items, distinct, none of them in the table; N > 0.
        items: The N items, each in a sample of the one role ``ITEMS``.
        embed: As there.
        batch_size: As there.
        num_workers: As there.
        timeout_seconds: As there.

    Returns:
        The table, with them.
    """
    share = shard_indices(len(keys), rank=comm.rank(), world_size=comm.world_size())
    group = batch_size * GROUP
    loader = BatchLoader(
        items,
        [share[start : start + group] for start in range(0, len(share), group)],
        num_workers=enough_workers(len(share), most=num_workers),
        prefetch_factor=1,
        timeout_seconds=timeout_seconds,
    )
    segments = _Segments(folder)
    with torch.no_grad():
        _fill(segments, keys, loader, embed=embed, batch_size=batch_size)
    comm.run_together(segments.finish, doing=f"writing {folder}")
    return open_table(folder)


class _Segments:
    """Writes one segment behind the other. Local; so the ranks need not agree on when."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._begin()

    def append(self, keys: KeyArray, items: Embeddings) -> None:
        """Keep some items, see :meth:`SegmentWriter.append`."""
        self._writer.append(keys, items)
        if time.monotonic() - self._begun > SEGMENT_SECONDS:
            self.finish()
            self._begin()

    def finish(self) -> None:
        """Make a segment of what is not in one yet."""
        self._writer.finish()

    def _begin(self) -> None:
        self._writer, self._begun = SegmentWriter(self.folder), time.monotonic()


def _fill(
    segments: _Segments, keys: KeyArray, loader: BatchLoader, *, embed: Embed, batch_size: int
) -> None:
    share = -(-len(keys) // comm.world_size())
    start = comm.rank() * share
    progress: tqdm[Any] = tqdm(
        total=share,
        desc=f"embedding {segments.folder.name}",
        disable=None if comm.is_main() else True,
    )
    for batch in loader:
        comm.raise_together(batch.error)
        items = batch.roles[ITEMS]
        for places in batches_by_size(items, batch_size=batch_size):
            rows = embed([items[place] for place in places])
            # The last ranks' shares are filled up with the first items: those are not theirs.
            own = [turn for turn, place in enumerate(places) if start + place < len(keys)]
            found = keys[[start + places[turn] for turn in own]]
            comm.run_together(
                functools.partial(segments.append, found, rows.rows(own)),
                doing=f"writing {segments.folder}",
            )
            progress.update(len(places))
        start += len(items)
    progress.close()
