"""Embeddings of a list of items, each rank's share of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vembed_ds.data.collators import Batch
from vembed_ds.data.loader import TIMEOUT_SECONDS, BatchLoader, enough_workers
from vembed_ds.data.processors import EncodedItem
from vembed_ds.data.sampler import own_share
from vembed_ds.distributed import comm
from vembed_ds.distributed.gather import gather_rows
from vembed_ds.distributed.phases import Kind, phase
from vembed_ds.distributed.progress import progress
from vembed_ds.evaluation.items import ItemList
from vembed_ds.similarity import Embeddings, concatenate

Embed = Callable[[Sequence[EncodedItem]], Embeddings]


def embed_share(
    items: ItemList,
    *,
    embed: Embed,
    batch_size: int,
    num_workers: int,
    prefetch_factor: int = 2,
    timeout_seconds: float = TIMEOUT_SECONDS,
    what: str = "items",
) -> Embeddings:
    """Embeds a contiguous share of the items on every rank, longest texts first.

    Collective, with equal numbers of ``embed`` calls: a model under ZeRO-3 embeds on all ranks together.

    Args:
        items: The same list on every rank, not empty.
        embed: From 1 to ``batch_size`` items to their embeddings.
        batch_size: Items per rank at a time.
        num_workers: Loader processes per rank, at most; few items are encoded in this process.
        prefetch_factor: Batches that the loader processes together prepare ahead.
        timeout_seconds: Longest wait for a loader process.
        what: Their name, for the progress bar.

    Returns:
        Items ``own_share(len(items))``, in order, float32; none of them on a rank without a share.

    Raises:
        DataError: When an item cannot be used.
        DistributedError: When one of another rank cannot be used.
    """
    share = own_share(len(items), rank=comm.rank(), world_size=comm.world_size())
    order = comm.run_together(lambda: _longest_first(items, share), doing=f"reading {what}")
    # As many as on every rank: one has an item less, or none.
    most = -(-len(items) // comm.world_size())
    places = [*order, *[0] * (most - len(order))]
    batches = [places[start : start + batch_size] for start in range(0, most, batch_size)]
    loader = BatchLoader(
        items,
        batches,
        num_workers=enough_workers(most, most=num_workers),
        prefetch_factor=prefetch_factor,
        timeout_seconds=timeout_seconds,
    )
    with torch.no_grad(), progress(most, what=f"embedding {what}") as bar:
        rows = concatenate([_embedded(batch, items.role, embed=embed, bar=bar) for batch in loader])
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.tensor(order, dtype=torch.int64) - share.start] = torch.arange(len(order))
    return rows.rows(back.to(rows.values.device)).float()


def gather_shares(rows: Embeddings) -> Embeddings:
    """The embeddings of all ranks, in rank order. Collective; shares may differ in length."""
    if comm.world_size() == 1:
        return rows
    tokens = 0 if rows.mask is None else rows.mask.shape[1]
    lengths, longest = zip(*comm.all_gather_ints([len(rows), tokens]), strict=True)
    padded = rows.padded(items=max(lengths), tokens=max(longest))
    kept = torch.cat(
        [torch.arange(length) + rank * max(lengths) for rank, length in enumerate(lengths)]
    ).to(rows.values.device)

    def gathered(values: Tensor) -> Tensor:
        return gather_rows(values)[kept]

    mask = None if padded.mask is None else gathered(padded.mask.to(torch.uint8)).bool()
    return Embeddings(gathered(padded.values), mask)


def _longest_first(items: ItemList, share: range) -> list[int]:
    """So that a batch has little padding; images, which all have one size, stay in order, unread."""
    if not items.has_texts:
        return list(share)
    lengths = {number: len(items.item(number).text or "") for number in share}
    return sorted(share, key=lambda number: -lengths[number])


def _embedded(batch: Batch, role: str, *, embed: Embed, bar: tqdm[Any]) -> Embeddings:
    comm.raise_together(batch.error)
    with phase(Kind.EMBEDDING, f"embedding {len(batch.roles[role])} items ({role})"):
        found = embed(batch.roles[role])
    bar.update(len(batch.roles[role]))
    return found
