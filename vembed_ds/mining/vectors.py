"""Embedded queries and documents, each rank a part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.sampler import shard_indices
from vembed_ds.data.workers import Samples
from vembed_ds.distributed import comm
from vembed_ds.encoding.embedding import embed_groups, embedder, groups_of
from vembed_ds.encoding.items import ItemTable
from vembed_ds.evaluation.search import check_finite
from vembed_ds.inference import Encoder
from vembed_ds.mining.contents import Contents, PlacedItems
from vembed_ds.similarity import Embeddings, concatenate


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
