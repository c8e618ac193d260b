"""Items that hold the same as others, so that one row of embeddings serves them all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import xxhash

from vembed_ds.data.processors import EncodedItem

_SAMPLE = 256  # values of an array that are looked at before it is read whole


def merge_equal(items: Sequence[EncodedItem]) -> tuple[list[EncodedItem], list[int]]:
    """Keep of equal items the first.

    Items are equal when all their inputs are, bit for bit: names, types, shapes, values. Whole
    images are compared only where a sample of their values is equal, because reading the images of
    a batch takes as long as copying them.

    Args:
        items: Of one stream.

    Returns:
        The items that are kept, in their order, and for every one of ``items`` the place there of
        the one that is equal to it.
    """
    alike: dict[bytes, list[int]] = defaultdict(list)
    for place, item in enumerate(items):
        alike[_digest(item, sample=True)].append(place)
    first = list(range(len(items)))
    for places in alike.values():
        if len(places) > 1:
            seen: dict[bytes, int] = {}
            for place in places:
                first[place] = seen.setdefault(_digest(items[place], sample=False), place)
    kept = [place for place, other in enumerate(first) if place == other]
    row = {place: number for number, place in enumerate(kept)}
    return [items[place] for place in kept], [row[other] for other in first]


def _digest(item: EncodedItem, *, sample: bool) -> bytes:
    """128 bits of an item's inputs, or of some values of each."""
    found = xxhash.xxh3_128()
    for name, array in sorted(item.inputs.items()):
        found.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        step = max(1, array.size // _SAMPLE) if sample else 1
        found.update(np.ascontiguousarray(array.reshape(-1)[::step]).data)
    return found.digest()
