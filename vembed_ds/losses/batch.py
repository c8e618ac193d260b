"""The batch as a loss sees it: this rank's rows, and the items of every rank as columns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vembed_ds.distributed import comm
from vembed_ds.distributed.gather import gather_rows
from vembed_ds.losses.inputs import LossInputs
from vembed_ds.similarity import Embeddings, concatenate


@dataclass(frozen=True)
class Columns:
    """C items of every rank, in rank order, with gradient.

    Attributes:
        items: Their embeddings.
        owner: ``[C]`` int64, the pair each belongs to, counted over all ranks.
        explicit: ``[C]`` bool, whether it is an explicit negative of that pair.
        keys: ``[C]`` int64 content hashes, if known.
        guide: ``[C, G]`` vectors of the guide model, if there is one.
    """

    items: Embeddings
    owner: Tensor
    explicit: Tensor
    keys: Tensor | None
    guide: Tensor | None


@dataclass(frozen=True)
class GlobalBatch:
    """B rows of this rank against the columns of N ranks.

    Attributes:
        query: This rank's B queries.
        positive: This rank's B positives.
        index: ``[B]`` int64, the number of each row's pair, counted over all ranks.
        first: The first of them.
        num_pairs: N * B.
        documents: ``N * B`` positives in rank order, then the explicit negatives of all ranks.
        queries: ``N * B`` queries; ``None`` when the loss compares nothing with queries.
        labels: ``[N * B]`` int64, if there are labels.
        scores: ``[N * B]`` float64, if there are scores.
        local: The inputs of this rank.
        tile_size: Rows and columns that the losses compare at a time; ``None``: all.
        part: Stands before the names of what the loss of this batch is the sum of.
    """

    query: Embeddings
    positive: Embeddings
    index: Tensor
    first: int
    num_pairs: int
    documents: Columns
    queries: Columns | None
    labels: Tensor | None
    scores: Tensor | None
    local: LossInputs
    tile_size: int | None = None
    part: str = ""

    def note(self, name: str, loss: Tensor) -> None:
        """Keep a part of the loss for the log; scalar."""
        self.local.parts[self.part + name] = loss.detach().float()

    def dims(self, start: int, stop: int) -> Self:
        """The same batch, of every embedding only some neighbouring dimensions."""
        return replace(
            self,
            query=self.query.dims(start, stop),
            positive=self.positive.dims(start, stop),
            documents=_dims(self.documents, start, stop),
            queries=None if self.queries is None else _dims(self.queries, start, stop),
        )

    def scale(self, temperature: float) -> Tensor | float:
        """What multiplies similarities: learned when the model learns it, else fixed."""
        learned = self.local.logit_scale
        return 1.0 / temperature if learned is None else learned.exp()


def gather_batch(inputs: LossInputs, *, queries: bool, tile_size: int | None = None) -> GlobalBatch:
    """Gather the columns of a loss over ranks, with gradient.

    Negatives are padded to the most of any rank and token embeddings to the longest of any rank;
    the padding of negatives is removed again, so their number may differ between ranks.

    Collective: every rank calls it with equal B. Every rank builds the same graph, so that the
    collectives of the backward pass meet.

    Args:
        inputs: This rank's share.
        queries: Also gather the queries.
        tile_size: As of the batch.

    Raises:
        ValueError: Counts that do not fit; a mistake of the caller, on this rank only.
    """
    inputs.check()
    num_rows, device = len(inputs.query), inputs.query.values.device
    every_pair = torch.arange(num_rows * comm.world_size(), device=device)
    first = comm.rank() * num_rows
    sizes = _agree_on_sizes(inputs)
    keys, guide = inputs.positive_keys, inputs.guide
    documents = Columns(
        items=_gather_items(inputs.positive, tokens=sizes["positive"]),
        owner=every_pair,
        explicit=torch.zeros_like(every_pair, dtype=torch.bool),
        keys=_gather(keys),
        guide=None if guide is None else _gather(guide.positive),
    )
    if sizes["negatives"]:
        documents = _append(documents, _gather_negatives(inputs, sizes))
    return GlobalBatch(
        query=inputs.query,
        positive=inputs.positive,
        index=every_pair[first : first + num_rows],
        first=first,
        num_pairs=len(every_pair),
        documents=documents,
        queries=_gather_queries(inputs, documents, sizes) if queries else None,
        labels=_gather(inputs.labels),
        scores=_gather(inputs.scores),
        local=inputs,
        tile_size=tile_size,
    )


def _agree_on_sizes(inputs: LossInputs) -> dict[str, int]:
    """Largest of any rank: tokens per role, and the number of explicit negatives. Collective."""
    roles = {"query": inputs.query, "positive": inputs.positive, "negative": inputs.negative}
    sizes = {
        role: 0 if items is None or items.mask is None else items.mask.shape[1]
        for role, items in roles.items()
    }
    sizes["negatives"] = 0 if inputs.negative is None else len(inputs.negative)
    if inputs.negative is None and inputs.query.mask is None:
        return sizes  # the same on every rank: nothing to agree on
    return dict(zip(sizes, comm.all_max(list(sizes.values())), strict=True))


def _gather_queries(inputs: LossInputs, documents: Columns, sizes: dict[str, int]) -> Columns:
    guide = None if inputs.guide is None else _gather(inputs.guide.query)
    num_pairs = len(inputs.query) * comm.world_size()
    return Columns(
        items=_gather_items(inputs.query, tokens=sizes["query"]),
        owner=documents.owner[:num_pairs],
        explicit=documents.explicit[:num_pairs],
        keys=_gather(inputs.query_keys),
        guide=guide,
    )


def _gather_negatives(inputs: LossInputs, sizes: dict[str, int]) -> Columns:
    assert inputs.negative is not None
    assert inputs.negative_counts is not None
    most, device = sizes["negatives"], inputs.negative.values.device
    # Counted on the host: asking the accelerator how many there are would wait for it.
    counts = np.array(comm.all_gather_ints(inputs.negative_counts.tolist()))
    is_real = np.arange(most) < counts.sum(axis=1, keepdims=True)
    real = torch.from_numpy(np.flatnonzero(is_real)).to(device, non_blocking=True)

    def gather(rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        padding = (0, 0) * (rows.dim() - 1) + (0, most - rows.shape[0])
        return gather_rows(functional.pad(rows, padding))[real]

    padded = inputs.negative.padded(items=most)
    owners = np.repeat(np.arange(counts.size), counts.flatten())
    owner = torch.from_numpy(owners).to(device, non_blocking=True)
    return Columns(
        items=_gather_items(padded, tokens=sizes["negative"]).rows(real),
        owner=owner,
        explicit=torch.ones_like(owner, dtype=torch.bool),
        keys=gather(inputs.negative_keys),
        guide=None if inputs.guide is None else gather(inputs.guide.negative),
    )


def _gather_items(items: Embeddings, *, tokens: int) -> Embeddings:
    """Embeddings of every rank; all ranks have as many items, and then as many tokens."""
    items = items.padded(tokens=tokens)
    values = gather_rows(items.values)
    if items.mask is None:
        return Embeddings(values)
    # Not every backend carries bool.
    return Embeddings(values, gather_rows(items.mask.to(torch.uint8)).bool())


def _gather(rows: Tensor | None) -> Tensor | None:
    return None if rows is None else gather_rows(rows)


def _append(first: Columns, second: Columns) -> Columns:
    def join(parts: Iterable[Tensor | None]) -> Tensor | None:
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == 2 else None

    return Columns(
        items=concatenate([first.items, second.items]),
        owner=torch.cat([first.owner, second.owner]),
        explicit=torch.cat([first.explicit, second.explicit]),
        keys=join((first.keys, second.keys)),
        guide=join((first.guide, second.guide)),
    )


def _dims(columns: Columns, start: int, stop: int) -> Columns:
    return replace(columns, items=columns.items.dims(start, stop))
