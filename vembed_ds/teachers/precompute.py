"""Embedding every item of data sets once with a frozen model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.loader import BatchLoader, enough_workers
from vembed_ds.data.processors import EncodedItem, ItemProcessor
from vembed_ds.data.sampler import shard_indices
from vembed_ds.data.teacher_items import Instructions
from vembed_ds.data.vector_table import SegmentWriter, VectorTable
from vembed_ds.distributed import comm
from vembed_ds.similarity import Embeddings
from vembed_ds.teachers.cache import ensure_cache, open_table
from vembed_ds.teachers.items import ITEMS, DistinctItems, ItemDataset, distinct_items

Embed = Callable[[Sequence[EncodedItem]], Embeddings]

GROUP = 16  # batches that are loaded together and sorted by length, for little padding


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
    loader = _loader(
        members,
        missing,
        processor=processor,
        instructions=instructions,
        batch_size=batch_size,
        num_workers=num_workers,
        timeout_seconds=timeout_seconds,
    )
    writer = SegmentWriter(folder)
    with torch.no_grad():
        _fill(writer, missing, loader, embed=embed, batch_size=batch_size)
    comm.run_together(writer.finish, doing=f"writing {folder}")
    return Precomputed(open_table(folder), len(missing))


def _loader(
    members: Sequence[PairDataset],
    distinct: DistinctItems,
    *,
    processor: ItemProcessor,
    instructions: Instructions,
    batch_size: int,
    num_workers: int,
    timeout_seconds: float,
) -> BatchLoader:
    """This rank's items, in groups of batches; equally many on every rank."""
    share = shard_indices(len(distinct), rank=comm.rank(), world_size=comm.world_size())
    group = batch_size * GROUP
    return BatchLoader(
        ItemDataset(members, distinct.addresses, processor=processor, instructions=instructions),
        [share[start : start + group] for start in range(0, len(share), group)],
        num_workers=enough_workers(len(share), most=num_workers),
        prefetch_factor=1,
        timeout_seconds=timeout_seconds,
    )


def _fill(
    writer: SegmentWriter,
    distinct: DistinctItems,
    loader: BatchLoader,
    *,
    embed: Embed,
    batch_size: int,
) -> None:
    share = -(-len(distinct) // comm.world_size())
    start = comm.rank() * share
    progress: tqdm[Any] = tqdm(
        total=share,
        desc=f"embedding {writer.folder.name}",
        disable=None if comm.is_main() else True,
    )
    for batch in loader:
        comm.raise_together(batch.error)
        items = batch.roles[ITEMS]
        for places in _by_size(items, batch_size=batch_size):
            rows = embed([items[place] for place in places])
            # The last ranks' shares are filled up with the first items: those are not theirs.
            own = [turn for turn, place in enumerate(places) if start + place < len(distinct)]
            keys = distinct.keys[[start + places[turn] for turn in own]]
            comm.run_together(
                functools.partial(writer.append, keys, rows.rows(own)),
                doing=f"writing {writer.folder}",
            )
            progress.update(len(places))
        start += len(items)
    progress.close()


def _by_size(items: Sequence[EncodedItem], *, batch_size: int) -> list[list[int]]:
    """Places of the items of each forward pass, the largest first: neighbours are of like size."""
    order = sorted(range(len(items)), key=lambda i: -sum(a.size for a in items[i].inputs.values()))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
