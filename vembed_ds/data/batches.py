"""Sorting a rank's batch and cutting it into chunks, stream by stream.

A *stream* is all items that are embedded in one way, whatever their role: with a shared text
encoder, queries and positives are one stream; with two towers, texts and images are two, and items
that are both are a third. The loss sees neither order nor cut: embeddings go back to the places
their roles had.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vembed_ds.data.chunking import ChunkBudget, Size, cut, order_of, padded, size_of, split
from vembed_ds.data.duplicates import merge_equal
from vembed_ds.data.processors import EncodedItem
from vembed_ds.distributed import comm
from vembed_ds.similarity import Embeddings
from vembed_ds.streams import JOINT, mask_name

FillerFunction = Callable[[str], EncodedItem]


@dataclass(frozen=True)
class StepPlan:
    """One rank's batch as streams, and the chunks to cut from them.

    Attributes:
        streams: The encoded items of every stream, in the order in which they are embedded.
        roles: For every role, the place of each of its items: ``(stream, position)``. Equal items
            may have one place.
        chunks: For every chunk, the slice of each stream that it embeds; a stream that is not
            in a chunk has nothing left there.
        units: For every chunk, how much it embeds: tokens, with their padding, and patches of images.
    """

    streams: dict[str, list[EncodedItem]]
    roles: dict[str, list[tuple[str, int]]]
    chunks: list[dict[str, slice]]
    units: list[int]


@dataclass(frozen=True)
class Layout:
    """One rank's batch, sorted and cut by itself: before the ranks agree on their chunks.

    Attributes:
        streams: As in :class:`StepPlan`.
        roles: As in :class:`StepPlan`.
        sizes: Of the items of every stream.
        cuts: The chunks of every stream.
    """

    streams: dict[str, list[EncodedItem]]
    roles: dict[str, list[tuple[str, int]]]
    sizes: dict[str, list[Size]]
    cuts: dict[str, list[slice]]

    def count_chunks(self, names: Sequence[str]) -> list[int]:
        """How many chunks this rank would make of each of the streams ``names``."""
        return [len(self.cuts.get(name, [])) for name in names]

    def alone(self) -> StepPlan:
        """The plan of a rank that no other one waits for. Local."""
        own = {name: len(found) for name, found in self.cuts.items()}
        return self.plan(own, filler=_none_needed)

    def plan(self, counts: Mapping[str, int], *, filler: FillerFunction) -> StepPlan:
        """The plan of a step whose every stream has as many chunks on every rank. Local.

        Under ZeRO-3 a forward pass that only some ranks make never ends. So a rank with fewer
        chunks cuts its largest ones again; where it has fewer items than chunks, the last ones
        hold a filler each, which is in no role.

        Args:
            counts: Chunks of every stream, at least this rank's own.
            filler: Gives a valid item of a stream.
        """
        streams = {name: [*self.streams.get(name, [])] for name in counts}
        sizes = {name: [*self.sizes.get(name, [])] for name in counts}
        cuts: dict[str, list[slice]] = {}
        for name, count in counts.items():
            cuts[name] = split(self.cuts.get(name, []), sizes[name], number=count)
            if missing := count - len(cuts[name]):
                item, end = filler(name), len(streams[name])
                streams[name] += [item] * missing
                sizes[name] += [size_of(item)] * missing
                cuts[name] += [slice(place, place + 1) for place in range(end, end + missing)]
        chunks = [
            {name: found[number] for name, found in cuts.items() if number < len(found)}
            for number in range(max(counts.values(), default=0))
        ]
        units = [
            sum(padded(sizes[name][places]).units for name, places in chunk.items())
            for chunk in chunks
        ]
        return StepPlan(streams, self.roles, chunks, units)


def lay_out(
    roles: Mapping[str, Sequence[EncodedItem]],
    *,
    budget: ChunkBudget,
    merged: Collection[str] = (),
) -> Layout:
    """Sort the items of all roles stream by stream, and cut them. Local.

    Args:
        roles: Encoded items of this rank, by role.
        budget: Of the chunks of every stream.
        merged: Streams in which equal items become one row.
    """
    members: dict[str, list[EncodedItem]] = {}
    places: dict[str, list[tuple[str, int]]] = {}
    for role, items in roles.items():
        places[role] = []
        for item in items:
            found = members.setdefault(item.stream, [])
            places[role].append((item.stream, len(found)))
            found.append(item)
    streams, sizes, moved = {}, {}, {}
    for name, items in members.items():
        rows, row_of = merge_equal(items) if name in merged else (items, range(len(items)))
        unsorted = [size_of(item) for item in rows]
        order = order_of(unsorted, budget)
        position = {row: place for place, row in enumerate(order)}
        streams[name] = [rows[row] for row in order]
        sizes[name] = [unsorted[row] for row in order]
        moved[name] = [position[row] for row in row_of]
    return Layout(
        streams,
        {role: [(name, moved[name][place]) for name, place in p] for role, p in places.items()},
        sizes,
        cuts={name: cut(found, budget) for name, found in sizes.items()},
    )


def plan_step(
    roles: Mapping[str, Sequence[EncodedItem]],
    *,
    budget: ChunkBudget,
    streams: Sequence[str],
    filler: FillerFunction,
    merged: Collection[str] = (),
) -> StepPlan:
    """The chunks of this rank's items, as many of every stream as on the other ranks. Collective.

    Args:
        roles: Encoded items of this rank, by role.
        budget: Of the chunks of every stream.
        streams: All that items may belong to, in one order on every rank.
        filler: Gives a valid item of a stream, where this rank has too few.
        merged: As of :func:`lay_out`.
    """
    layout = lay_out(roles, budget=budget, merged=merged)
    counts = comm.all_max(layout.count_chunks(streams))
    return layout.plan(dict(zip(streams, counts, strict=True)), filler=filler)


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
    index = role_index(plan)
    sent = {
        role: torch.from_numpy(places).to(rows.device, non_blocking=True)
        for role, places in index.items()
    }
    if mask is None:
        return {role: Embeddings(rows[places]) for role, places in sent.items()}
    # Without the columns that are padding in all of a role's items.
    lengths = _most_tokens(plan, outputs)
    ends = {role: max(1, lengths[places].max(initial=0)) for role, places in index.items()}
    return {
        role: Embeddings(rows[places, : ends[role]], mask[places, : ends[role]])
        for role, places in sent.items()
    }


def _lengthened(values: Tensor, length: int) -> Tensor:
    return (
        values if values.dim() == 2 else functional.pad(values, (0, 0, 0, length - values.shape[1]))
    )


def _most_tokens(plan: StepPlan, outputs: Sequence[Mapping[str, Tensor]]) -> np.ndarray:
    """``[R]``: behind how many columns each row is padding, rows as in :func:`role_index`.

    The masks know better for a text that the tokenizer padded; asking them waits for the device.
    """
    found: list[int] = []
    for name, items in plan.streams.items():
        for chunk, output in zip(plan.chunks, outputs, strict=True):
            if name not in output:
                continue
            own, width = items[chunk[name]], output[name].shape[1]
            # A column per token of a text; of an item that is both, patches stand behind them.
            texts = name != JOINT and all("input_ids" in item.inputs for item in own)
            found += [len(item.inputs["input_ids"]) if texts else width for item in own]
    return np.array(found, dtype=np.int64)


def _none_needed(stream: str) -> EncodedItem:
    raise AssertionError(f"{stream}: as many chunks as it has need no filler")
