"""Cutting a rank's batch into chunks, stream by stream.

A *stream* is all items that are embedded in one way, whatever their role: with a shared text
encoder, queries and positives are one stream; with two towers, texts and images are two, and items
that are both are a third. The loss never sees the cut: embeddings go back to the places their
roles had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vembed_ds.data.processors import EncodedItem
from vembed_ds.similarity import Embeddings
from vembed_ds.streams import mask_name


@dataclass(frozen=True)
class StepPlan:
    """One rank's batch as streams, and the chunks to cut from them.

    Attributes:
        streams: The encoded items of every stream, role after role.
        roles: For every role, the place of each of its items: ``(stream, position)``.
        chunks: For every chunk, the slice of each stream that it embeds; a stream that is not
            in a chunk has nothing left there.
    """

    streams: dict[str, list[EncodedItem]]
    roles: dict[str, list[tuple[str, int]]]
    chunks: list[dict[str, slice]]


def count_streams(roles: Mapping[str, Sequence[EncodedItem]], names: Sequence[str]) -> list[int]:
    """How many items of the batch go to each of the streams ``names``."""
    found = [item.stream for items in roles.values() for item in items]
    return [found.count(name) for name in names]


def plan_step(
    roles: Mapping[str, Sequence[EncodedItem]],
    *,
    chunk_size: int | None,
    counts: Mapping[str, int] | None = None,
    fillers: Mapping[str, EncodedItem] | None = None,
) -> StepPlan:
    """Lay the items of all roles out as streams and cut them into chunks.

    Args:
        roles: Encoded items of this rank, by role.
        chunk_size: Items of each stream per chunk; ``None``: everything is one chunk.
        counts: Per stream, the largest number of items on any rank. Ranks with fewer chunks
            get filler chunks, because under ZeRO-3 a forward pass that only some ranks make
            never ends. ``None``: this rank's own numbers.
        fillers: One valid item per stream, for a rank that has too few of its own.

    Returns:
        The plan; equal chunk counts and streams per chunk on every rank when ``counts`` is
        the same on every rank.
    """
    streams: dict[str, list[EncodedItem]] = {}
    places: dict[str, list[tuple[str, int]]] = {}
    for role, items in roles.items():
        places[role] = []
        for item in items:
            stream = streams.setdefault(item.stream, [])
            places[role].append((item.stream, len(stream)))
            stream.append(item)
    counts = counts or {name: len(items) for name, items in streams.items()}
    chunks = _cut_chunks(counts, chunk_size)
    _fill_up(streams, counts, chunk_size, fillers or {})
    return StepPlan(streams, places, chunks)


def role_index(plan: StepPlan) -> dict[str, np.ndarray]:
    """For every role, the rows of its items in the concatenation of all streams.

    Streams are concatenated in the order of ``plan.streams``.
    """
    offsets: dict[str, int] = {}
    total = 0
    for name, items in plan.streams.items():
        offsets[name] = total
        total += len(items)
    return {
        role: np.array([offsets[stream] + position for stream, position in places], dtype=np.int64)
        for role, places in plan.roles.items()
    }


def collect_roles(plan: StepPlan, outputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Embeddings]:
    """Put the embeddings of all chunks back to the places of their roles, with gradient.

    Args:
        plan: From :func:`plan_step`.
        outputs: For every chunk, what the model gave for each of its streams: ``[n, D]``, or
            ``[n, L, D]`` with ``[n, L]`` bool under :func:`mask_name`.

    Returns:
        For every role its embeddings in the order of its items; token embeddings padded to the
        role's longest.
    """
    named = [name for name in plan.streams for chunk in outputs if name in chunk]
    values = [chunk[name] for name in plan.streams for chunk in outputs if name in chunk]
    masks = [
        chunk[mask_name(name)]
        for name in plan.streams
        for chunk in outputs
        if mask_name(name) in chunk
    ]
    assert len(masks) in (0, len(named)), "every stream gives tokens, or none does"
    length = max((value.shape[1] for value in values if value.dim() == 3), default=0)
    rows = torch.cat([_lengthened(value, length) for value in values])
    mask = (
        torch.cat([functional.pad(m, (0, length - m.shape[1])) for m in masks]) if masks else None
    )
    index = {
        role: torch.from_numpy(places).to(rows.device) for role, places in role_index(plan).items()
    }
    return {
        role: Embeddings(rows[places]) if mask is None else _shortened(rows, mask, places)
        for role, places in index.items()
    }


def _lengthened(values: Tensor, length: int) -> Tensor:
    return (
        values if values.dim() == 2 else functional.pad(values, (0, 0, 0, length - values.shape[1]))
    )


def _shortened(rows: Tensor, mask: Tensor, places: Tensor) -> Embeddings:
    """Token embeddings of some rows, without the columns that are padding in all of them."""
    chosen = mask[places]
    used = chosen.any(dim=0).nonzero()
    length = int(used.max()) + 1 if len(used) else 1
    return Embeddings(rows[places, :length], chosen[:, :length])


def _cut_chunks(counts: Mapping[str, int], chunk_size: int | None) -> list[dict[str, slice]]:
    if chunk_size is None:
        chunk_size = max(counts.values())
    num_chunks = -(-max(counts.values()) // chunk_size)
    return [
        {
            name: slice(start, min(start + chunk_size, count))
            for name, count in counts.items()
            if start < count
        }
        for start in range(0, num_chunks * chunk_size, chunk_size)
    ]


def _fill_up(
    streams: dict[str, list[EncodedItem]],
    counts: Mapping[str, int],
    chunk_size: int | None,
    fillers: Mapping[str, EncodedItem],
) -> None:
    """Give every chunk of every stream at least one item; a filler is in no role."""
    for name, count in counts.items():
        items = streams.setdefault(name, [])
        size = chunk_size or max(count, 1)
        last_chunk_start = (count - 1) // size * size if count else 0
        if count and len(items) <= last_chunk_start:
            items.extend([fillers[name]] * (last_chunk_start + 1 - len(items)))
