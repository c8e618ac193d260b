"""What of a step is shown beside its loss; nothing here has a gradient, or draws random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from vembed_ds.losses.batch import GlobalBatch
from vembed_ds.losses.comparison import Selection, compare
from vembed_ds.losses.inputs import Watched

SAMPLE = 256
"""Queries, or items of a role, of a rank that are looked at."""


def watch(
    batch: GlobalBatch,
    watched: Watched,
    *,
    selection: Selection,
    reduction: str,
    num_layers: int = 1,
) -> None:
    """Note what a step that is logged tells of a gathered batch. Local.

    Args:
        batch: All columns.
        watched: Filled.
        selection: What is a positive and a negative for the loss.
        reduction: MaxSim's.
        num_layers: That the embeddings hold side by side; the last, which is exported, is looked at.
    """
    columns = [batch.documents, *([] if batch.queries is None else [batch.queries])]
    watched.gathered_values = sum(found.items.values.numel() for found in columns)
    if batch.scores is None:  # graded pairs: they may be no positives at all
        width = batch.query.width
        last = batch.dims(width - width // num_layers, width)
        watched.accuracy = in_batch_accuracy(last, selection=selection, reduction=reduction)


@torch.no_grad()
def in_batch_accuracy(
    batch: GlobalBatch, *, selection: Selection, reduction: str = "mean"
) -> Tensor:
    """Share of this rank's queries that find a positive of theirs above all of their negatives. Local.

    Looked at are the first ``SAMPLE`` queries, against the columns of all ranks, a tile at a time. A
    tie is a miss, so that equal embeddings score 0.

    Args:
        batch: The gathered batch.
        selection: What is a positive and a negative for the loss.
        reduction: MaxSim's.

    Returns:
        Scalar float32 on the device.
    """
    found = compare(batch, "query_to_doc", selection=selection, reduction=reduction)
    similarities = found.similarities
    number, num_columns = min(SAMPLE, similarities.shape[0]), similarities.shape[1]
    high, wide = similarities.cut()
    hits = []
    for first in range(0, number, high):
        rows = slice(first, min(first + high, number))
        best = batch.query.values.new_full((2, rows.stop - rows.start), -torch.inf)
        for start in range(0, num_columns, wide):
            places = slice(start, min(start + wide, num_columns))
            tile, choice = similarities.tile(rows, places), found.choose(rows, places)
            negative = choice.negative(tile)
            positive = torch.zeros_like(negative)
            if choice.positive is not None:
                positive = choice.positive.update(positive, torch.ones_like)
            highest = [tile.masked_fill(~of, -torch.inf).amax(dim=1) for of in (positive, negative)]
            best = torch.maximum(best, torch.stack(highest))
        hits.append(best[0] > best[1])
    return torch.cat(hits).float().mean()
