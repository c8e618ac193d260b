"""Embedded queries and documents, each rank a part, and the scores of chosen pairs of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.sampler import shard_indices
from vembed_ds.data.workers import Samples
from vembed_ds.distributed import comm
from vembed_ds.distributed.gather import gather_rows
from vembed_ds.encoding.embedding import embed_groups, embedder, groups_of
from vembed_ds.encoding.items import ItemTable
from vembed_ds.evaluation.metrics import check_finite
from vembed_ds.inference import Encoder
from vembed_ds.mining.contents import Contents, PlacedItems
from vembed_ds.similarity import Embeddings, concatenate, paired_similarity

PAIR_ELEMENTS = 2**22  # of vectors that are multiplied pair by pair at a time


@dataclass(frozen=True)
class Model:
    """A model, and what it reads before queries and documents.

    Attributes:
        encoder: The model.
        query_instruction: Before queries.
        document_instruction: Before documents.
        name: For the progress bar.
    """

    encoder: Encoder
    query_instruction: str
    document_instruction: str
    name: str = "model"


@dataclass(frozen=True)
class Vectors:
    """A model's embeddings of everything; each rank has a part, on its device.

    Attributes:
        queries: The rank's ``shard_indices`` of the queries: equally many on every rank.
        documents: The rank's documents; the parts follow each other in rank order.
        start: The first of them.
    """

    queries: Embeddings
    documents: Embeddings
    start: int


def embed_contents(
    model: Model,
    contents: Contents,
    dataset: PairDataset,
    corpus: ItemTable | None,
    *,
    batch_size: int,
    num_workers: int,
) -> Vectors:
    """Embed every distinct query and document once. Collective.

    Raises:
        VembedError: On every rank, when an item cannot be read or encoded, or an embedding is not finite:
            NaN is above no limit, so that a guide would take nothing for an answer.
    """

    def embedded(what: str, rows: Sequence[int]) -> Embeddings:
        is_query = what == "queries"
        items = PlacedItems(
            dataset,
            corpus,
            contents.queries if is_query else contents.documents,
            processor=model.encoder.processor,
            instruction=model.query_instruction if is_query else model.document_instruction,
        )
        found = _embedded(
            model.encoder,
            items,
            rows,
            batch_size=batch_size,
            num_workers=num_workers,
            name=f"{model.name}: {what}",
        )
        name = f"{model.name}'s {'query' if is_query else 'document'}"
        comm.run_together(lambda: check_finite(found, name=name), doing=f"embedding {what}")
        return found

    share = -(-len(contents.documents) // comm.world_size())
    start = min(comm.rank() * share, len(contents.documents))
    end = min(start + share, len(contents.documents))
    own = shard_indices(len(contents.queries), rank=comm.rank(), world_size=comm.world_size())
    return Vectors(embedded("queries", own), embedded("documents", range(start, end)), start)


def _embedded(
    encoder: Encoder,
    items: Samples,
    rows: Sequence[int],
    *,
    batch_size: int,
    num_workers: int,
    name: str,
) -> Embeddings:
    groups = groups_of(rows, batch_size=batch_size)
    embed = embedder(encoder)
    parts: Iterator[Embeddings] = embed_groups(
        items, groups, embed=embed, batch_size=batch_size, num_workers=num_workers, name=name
    )
    (number,) = comm.all_max([len(groups)])
    # One group after the other together, so that what one rank cannot read ends all at once.
    made = [
        comm.run_together(lambda: next(parts, None), doing=f"embedding {name}")
        for _ in range(number)
    ]
    found = [part for part in made if part is not None]
    if not found:  # fewer documents than ranks
        found = [embed([encoder.processor.filler(encoder.model.parts[0])]).rows(slice(0, 0))]
    return concatenate(found).to(encoder.device)


def gather_chunk(rows: Embeddings) -> Embeddings:
    """The rows of all ranks, equally many of each, in rank order. Collective."""
    if rows.mask is None:
        return Embeddings(gather_rows(rows.values))
    (length,) = comm.all_max([rows.mask.shape[1]])
    rows = rows.padded(tokens=length)
    assert rows.mask is not None
    mask = gather_rows(rows.mask.to(torch.uint8)).bool()
    return Embeddings(gather_rows(rows.values), mask)


def pair_scores(
    query_emb: Embeddings, vectors: Vectors, *, queries: Tensor, documents: Tensor
) -> Tensor:
    """Cosine or MaxSim of chosen pairs.

    Collective, with the same arguments but for ``vectors`` on every rank.

    Args:
        query_emb: c queries.
        vectors: This rank's documents.
        queries: ``[P]`` rows of ``query_emb``, on the host.
        documents: ``[P]`` rows of all documents, on the host; negative: none.

    Returns:
        ``[P]`` float32 on the host; minus infinity where there is no document.
    """
    end = vectors.start + len(vectors.documents)
    own = torch.nonzero((documents >= vectors.start) & (documents < end)).flatten()
    device = query_emb.values.device
    scores = torch.full((len(queries),), -torch.inf, device=device)
    for part in torch.split(own, _pairs_at_a_time(query_emb, vectors.documents)):
        rows = query_emb.rows(queries[part].to(device)).float()
        columns = vectors.documents.rows((documents[part] - vectors.start).to(device)).float()
        scores[part.to(device)] = paired_similarity(rows, columns)
    if comm.world_size() > 1:
        scores = gather_rows(scores).reshape(comm.world_size(), -1).amax(dim=0)
    return scores.cpu()


def _pairs_at_a_time(query_emb: Embeddings, document_emb: Embeddings) -> int:
    tokens = [1 if one.mask is None else one.mask.shape[1] for one in (query_emb, document_emb)]
    each = sum(tokens) * query_emb.width + tokens[0] * tokens[1]
    return max(1, PAIR_ELEMENTS // each)
