"""A batch of padded tensors as the items that the training step plans with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vembed_ds.data.collators import Batch
from vembed_ds.data.processors import EncodedItem, ItemProcessor
from vembed_ds.errors import DataError
from vembed_ds.streams import JOINT
from vembed_ds.training.data_utils import (
    TensorBatch,
    unpack_negative_batch,
    unpack_positive_batch,
    unpack_query_batch,
)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ItemizedBatch(Batch):
    """Items, and the tensors that they were.

    Attributes:
        tensors: As the loader gave them.
    """

    tensors: TensorBatch = field(default_factory=dict)


def itemize(tensors: TensorBatch, *, retrieval_mode: str, streams: Sequence[str]) -> ItemizedBatch:
    """Take a batch apart into its items.

    Args:
        tensors: B records, with the keys of :mod:`vembed_ds.training.data_utils`.
        retrieval_mode: What the roles hold.
        streams: Of the model.

    Raises:
        DataError: An input is missing, or the numbers of items disagree.
    """
    inputs = {
        "query": unpack_query_batch(tensors, retrieval_mode),
        "positive": unpack_positive_batch(tensors, retrieval_mode),
    }
    roles = {role: _items(found, streams) for role, found in inputs.items()}
    size = len(roles["query"])
    if len(roles["positive"]) != size:
        raise DataError(f"{size} queries, but {len(roles['positive'])} positives in one batch")
    negatives = unpack_negative_batch(tensors)
    counts = None
    if negatives is not None:
        roles["negative"] = _items(negatives, streams)
        counts = _counts(tensors.get("neg_counts"), total=len(roles["negative"]), size=size)
    labels = tensors.get("labels")
    return ItemizedBatch(
        indices=list(range(size)),
        roles=roles,
        keys={role: [_key(item) for item in items] for role, items in roles.items()},
        negative_counts=counts,
        labels=None if labels is None else [int(label) for label in labels],
        tensors=tensors,
    )


class TensorItems(ItemProcessor):
    """Pads items that were taken out of padded tensors; encodes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, EncodedItem] = {}  # by stream

    def remember(self, batch: Batch) -> None:
        """Keep an item of every stream, to fill up with."""
        for item in (item for items in batch.roles.values() for item in items):
            self.seen.setdefault(item.stream, item)

    def filler(self, stream: str) -> EncodedItem:
        """Any item of the stream.

        Raises:
            DataError: This rank has seen none.
        """
        if stream not in self.seen:
            raise DataError(
                f"another rank's batch has {stream} items and this rank has seen none to fill up "
                "with; give every rank the same kinds of items"
            )
        return self.seen[stream]

    def pad(self, stream: str, items: Sequence[EncodedItem]) -> dict[str, Tensor]:
        """Join items again; texts are filled on the right with zeros, which masks leave out."""
        columns = {name: [item.inputs[name] for item in items] for name in items[0].inputs}
        return {name: _join(name, rows) for name, rows in columns.items()}


def _items(inputs: Mapping[str, Tensor], streams: Sequence[str]) -> list[EncodedItem]:
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items()}
    grid = arrays.get("image_grid_thw")
    size = len(arrays["input_ids"] if "input_ids" in arrays else arrays["pixel_values"])
    rows = {name: list(array) for name, array in arrays.items()}
    if grid is not None:
        if len(grid) != size:
            raise DataError(
                f"image_grid_thw has {len(grid)} images for {size} items; give one image each"
            )
        ends = np.cumsum(grid.prod(axis=1))[:-1]
        rows["pixel_values"] = np.split(arrays["pixel_values"], ends)
        rows["image_grid_thw"] = [row[None] for row in grid]
    stream = _stream(inputs, streams)
    return [
        EncodedItem(stream, _unpadded({name: rows[name][i] for name in rows})) for i in range(size)
    ]


def _stream(inputs: Mapping[str, Tensor], streams: Sequence[str]) -> str:
    if "pixel_values" not in inputs:
        return "text"
    both = "input_ids" in inputs and JOINT in streams
    return JOINT if both else "image"


def _unpadded(inputs: dict[str, Array]) -> dict[str, Array]:
    """Cut what is padding on the right; chunks are padded to their own longest."""
    mask = inputs.get("attention_mask")
    if mask is None or not mask.any():
        return inputs
    length = int(np.flatnonzero(mask)[-1]) + 1
    whole = len(mask)
    return {
        name: array[:length] if array.ndim == 1 and len(array) == whole else array
        for name, array in inputs.items()
    }


def _join(name: str, rows: Sequence[Array]) -> Tensor:
    if name == "image_grid_thw" or (name == "pixel_values" and rows[0].ndim == 2):
        return torch.from_numpy(np.concatenate(rows))
    if rows[0].ndim != 1:
        return torch.from_numpy(np.stack(rows))
    return torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(row) for row in rows], batch_first=True
    )


def _counts(given: Any, *, total: int, size: int) -> list[int]:
    counts = [total // size] * size if given is None else [int(count) for count in given]
    if sum(counts) != total or len(counts) != size:
        raise DataError(
            f"{total} negatives for {size} queries do not fit neg_counts={counts}; give the number "
            "of negatives of each query as neg_counts"
        )
    return counts


def _key(item: EncodedItem) -> int:
    digest = blake2b(digest_size=8)
    for name, array in sorted(item.inputs.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)
