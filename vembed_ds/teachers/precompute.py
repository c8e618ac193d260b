"""Embedding every item of data sets once with a frozen model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.loader import BatchLoader, enough_workers
from vembed_ds.data.processors import EncodedItem, ItemProcessor
from vembed_ds.data.sampler import shard_indices
from vembed_ds.data.teacher_items import Instructions
from vembed_ds.data.vector_table import (
    RowArray,
    VectorTable,
    create_table,
    finish_table,
    read_identity,
    write_rows,
)
from vembed_ds.distributed import comm
from vembed_ds.errors import DataError
from vembed_ds.similarity import Embeddings, concatenate
from vembed_ds.teachers.items import ITEMS, DistinctItems, ItemDataset, distinct_items

Embed = Callable[[Sequence[EncodedItem]], Embeddings]

GROUP = 16  # batches that are loaded together and sorted by length, for little padding


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
) -> VectorTable:
    """The vectors of all items; a table that is there already is used when its identity is the same.

    Collective. Every rank embeds a share and makes equally many ``embed`` calls, so these may be
    collective too.

    Args:
        members: The data sets.
        folder: Where the table is kept; every rank must see it.
        identity: What the vectors depend on beside the items: the model, its processor, the data.
        processor: Of the frozen model.
        instructions: Of the frozen model.
        embed: From 1 to ``batch_size`` items to one vector each; called without gradient.
        batch_size: Items per rank at a time.
        num_workers: Loader processes per rank, at most.
        timeout_seconds: Longest wait for a loader process.

    Raises:
        DataError: On every rank, when an item cannot be read or encoded, or a vector is not finite.
    """
    found = comm.run_together(lambda: read_identity(folder), doing=f"reading {folder}")
    if found == dict(identity):
        return comm.run_together(lambda: VectorTable(folder), doing=f"reading {folder}")
    distinct = distinct_items(members, instructions)
    loader = _loader(
        members,
        distinct,
        processor=processor,
        instructions=instructions,
        batch_size=batch_size,
        num_workers=num_workers,
        timeout_seconds=timeout_seconds,
    )
    with torch.no_grad():
        _fill(folder, distinct, loader, embed=embed, batch_size=batch_size)
    comm.run_together(
        lambda: finish_table(folder, identity=identity) if comm.is_main() else None,
        doing=f"writing {folder}",
    )
    return comm.run_together(lambda: VectorTable(folder), doing=f"reading {folder}")


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
    folder: Path, distinct: DistinctItems, loader: BatchLoader, *, embed: Embed, batch_size: int
) -> None:
    share = -(-len(distinct) // comm.world_size())
    first, done = comm.rank() * share, 0
    progress: tqdm[Any] = tqdm(
        total=share, desc=f"embedding {folder.name}", disable=None if comm.is_main() else True
    )
    for batch in loader:
        comm.raise_together(batch.error)
        rows = _embed_sorted(batch.roles[ITEMS], embed=embed, batch_size=batch_size)
        if done == 0:
            _create(folder, distinct, width=rows.shape[1])
        # The last ranks' shares are filled up with the first items: those are not theirs to write.
        own = rows[: max(0, len(distinct) - first - done)]
        comm.run_together(
            functools.partial(_write, folder, own, start=first + done), doing=f"writing {folder}"
        )
        done += len(rows)
        progress.update(len(rows))
    progress.close()


def _create(folder: Path, distinct: DistinctItems, *, width: int) -> None:
    comm.run_together(
        lambda: create_table(folder, keys=distinct.keys, width=width) if comm.is_main() else None,
        doing=f"writing {folder}",
    )


def _embed_sorted(items: Sequence[EncodedItem], *, embed: Embed, batch_size: int) -> RowArray:
    """``[n, G]`` in the order of ``items``; neighbours in a forward pass are of like size."""
    order = sorted(range(len(items)), key=lambda i: -sum(a.size for a in items[i].inputs.values()))
    parts = [
        embed([items[place] for place in order[start : start + batch_size]])
        for start in range(0, len(order), batch_size)
    ]
    rows = concatenate(parts).values.float().cpu().numpy()
    restored = np.empty_like(rows)
    restored[order] = rows
    return restored


def _write(folder: Path, rows: RowArray, *, start: int) -> None:
    if not np.isfinite(rows).all():
        raise DataError(
            f"{folder.name}: the frozen model gives vectors that are not finite; use it in float32, "
            "or another model"
        )
    write_rows(folder, places=np.arange(start, start + len(rows)), rows=rows)
