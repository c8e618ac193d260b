"""Items of a data set to embeddings, group by group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from tqdm import tqdm

from vembed_ds.data.chunking import batches_by_size
from vembed_ds.data.loader import BatchLoader, enough_workers
from vembed_ds.data.processors import EncodedItem
from vembed_ds.data.workers import Samples
from vembed_ds.distributed import comm
from vembed_ds.distributed.phases import Kind, phase
from vembed_ds.encoding.items import ITEMS
from vembed_ds.inference import Encoder, embed_items
from vembed_ds.similarity import Embeddings, concatenate
from vembed_ds.teachers.identity import (
    identity_digest,
    model_digest,
    processor_digest,
    weights_digest,
)

Embed = Callable[[Sequence[EncodedItem]], Embeddings]

GROUP = 16  # batches that are loaded together and sorted by length, for little padding


def embedder(encoder: Encoder) -> Embed:
    """The model's embedding of a batch: float32 on the host, not normalised."""

    def embed(items: Sequence[EncodedItem]) -> Embeddings:
        return embed_items(encoder.model, encoder.processor, items)

    return embed


def model_fingerprint(encoder: Encoder) -> str:
    """12 digits of what the embeddings depend on: weights, how they are used, and the processor.

    Collective: every rank must have loaded the same model.

    Raises:
        DistributedError: The ranks have different models.
    """
    found = identity_digest(
        {
            "weights": weights_digest(encoder.model.encoder.state_dict().items()),
            "model": model_digest(encoder.model),
            "processor": processor_digest(encoder.processor, encoder.model.parts),
        }
    )
    comm.require_equal(found, what="the model")
    return found


def groups_of(rows: Sequence[int], *, batch_size: int) -> list[Sequence[int]]:
    """Neighbouring rows that are loaded together."""
    size = batch_size * GROUP
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def embed_groups(
    items: Samples,
    groups: Sequence[Sequence[int]],
    *,
    embed: Embed,
    batch_size: int,
    num_workers: int,
    name: str,
) -> Iterator[Embeddings]:
    """The embeddings of every group, in the order of its rows. Not collective.

    Args:
        items: Samples with the one role ``ITEMS``, an item each.
        groups: Rows.
        embed: From 1 to ``batch_size`` items to their embeddings.
        batch_size: Items in one forward pass; they are sorted by size within a group.
        num_workers: Loader processes, at most.
        name: What is embedded, for the progress bar that rank 0 shows in a terminal.

    Raises:
        VembedError: While iterating: an item cannot be read or encoded; names it.
    """
    total = sum(map(len, groups))
    loader = BatchLoader(
        items,
        groups,
        num_workers=enough_workers(total, most=num_workers),
        prefetch_factor=1,
    )
    with tqdm(
        total=total, desc=name, unit="item", disable=None if comm.is_main() else True
    ) as progress:
        for batch in loader:
            if batch.error is not None:
                raise batch.error
            encoded = batch.roles[ITEMS]
            parts, places = [], []
            for chosen in batches_by_size(encoded, batch_size=batch_size):
                with phase(Kind.EMBEDDING, f"embedding {len(chosen)} items ({name})"):
                    parts.append(embed([encoded[place] for place in chosen]))
                places += chosen
                progress.update(len(chosen))
            yield concatenate(parts).rows(torch.argsort(torch.tensor(places)))


def agreed(parts: Iterator[Embeddings], *, number: int, doing: str) -> Iterator[Embeddings]:
    """The next part on every rank, ``number`` times; what fails on one rank ends all.

    Collective, with the same number on every rank.

    Raises:
        VembedError: On every rank, when one cannot make its part.
    """
    for _ in range(number):
        yield comm.run_together(lambda: next(parts), doing=doing)
