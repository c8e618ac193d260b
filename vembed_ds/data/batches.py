"""Cutting a rank's batch into chunks, stream by stream.

A *stream* is all items that one encoder tower embeds, whatever their role: with a shared text
encoder, queries and positives are one stream; with two towers, texts and images are two. The
loss never sees the cut: embeddings go back to the places their roles had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vembed_ds.data.processors import EncodedItem


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
