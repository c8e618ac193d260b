"""Retrieval over the validation set: every rank embeds a shard, all ranks get the metrics.

Queries and documents are told apart by content: five captions of one image are five queries
with one document, and several images of one caption are one query with several answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vembed_ds.data.collators import Batch
from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.loader import TIMEOUT_SECONDS, BatchLoader, enough_workers
from vembed_ds.data.processors import EncodedItem, content_key
from vembed_ds.data.sampler import shard_indices
from vembed_ds.distributed import comm
from vembed_ds.distributed.gather import gather_rows
from vembed_ds.distributed.phases import Kind, phase
from vembed_ds.errors import DataError, VembedError, counted
from vembed_ds.evaluation.metrics import (
    check_finite,
    first_relevant_rank,
    mean_reciprocal_rank,
    recall_at_k,
)
from vembed_ds.similarity import Embeddings, concatenate

CHUNK_ELEMENTS = 2**24  # similarities held at a time: 64 MiB in float32

Embed = Callable[[Sequence[EncodedItem]], Embeddings]


@dataclass(frozen=True)
class Judgments:
    """Which documents answer which queries.

    Attributes:
        query_records: For each distinct query, the first record that holds it.
        document_records: For each distinct document, the first record that holds it.
        relevant: For each distinct query, its documents as positions in ``document_records``.
        same: For each distinct query, the document that holds the same, in image-to-image
            search for example: it neither answers the query nor competes. ``None``: there is none.
    """

    query_records: list[int]
    document_records: list[int]
    relevant: list[list[int]]
    same: list[int | None]


def evaluate_retrieval(
    dataset: PairDataset,
    *,
    embed: Embed,
    batch_size: int,
    recall_k: Sequence[int],
    num_workers: int,
    prefetch_factor: int = 2,
    timeout_seconds: float = TIMEOUT_SECONDS,
    dims: Sequence[int] = (),
    judgments: Judgments | None = None,
) -> dict[str, float]:
    """Recall@k and MRR of searching all distinct positives with all distinct queries.

    Collective: every rank calls it, and makes the same number of ``embed`` calls. The result is the same on every rank, and does not depend on
    their number or on the batch size.

    Args:
        dataset: Validation pairs.
        embed: From 1 to ``batch_size`` items to their embeddings, on any device; called without
            gradient. The caller puts the model into evaluation mode.
        batch_size: Items per rank at a time.
        recall_k: The k of Recall@k.
        num_workers: Loader processes per rank, at most; few items are encoded in this process.
        prefetch_factor: Batches that the loader processes together prepare ahead.
        timeout_seconds: Longest wait for a loader process.
        dims: Prefixes of the embeddings to measure beside the whole.
        judgments: From ``read_judgments`` of the same data, to read the records only once.

    Returns:
        ``recall@{k}`` for every k, ``mrr``, ``num_queries`` and ``num_documents``; the first two
        also as ``..._d{dim}`` for every dim.

    Raises:
        DataError: When a record cannot be used, or a k is not below the number of documents.
        VembedError: When embeddings are not finite.
        DistributedError: When this happened on another rank.
    """
    if judgments is None:
        judgments = read_judgments(dataset)
    check_recall_k(recall_k, judgments=judgments, origin=dataset.reader.origin)
    query_emb, corpus_emb = embed_distinct(
        dataset,
        judgments,
        embed=embed,
        batch_size=batch_size,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        timeout_seconds=timeout_seconds,
    )
    return prefix_metrics(query_emb, corpus_emb, judgments, recall_k=recall_k, dims=dims)


def prefix_metrics(
    query_emb: Embeddings,
    corpus_emb: Embeddings,
    judgments: Judgments,
    *,
    recall_k: Sequence[int],
    dims: Sequence[int] = (),
) -> dict[str, float]:
    """:func:`retrieval_metrics` of whole embeddings, and of their prefixes (Matryoshka).

    Collective; arguments as there.
    """
    metrics = retrieval_metrics(query_emb, corpus_emb, judgments, recall_k=recall_k)
    for dim in dims:
        found = retrieval_metrics(
            query_emb.prefix(dim), corpus_emb.prefix(dim), judgments, recall_k=recall_k
        )
        metrics |= {f"{k}_d{dim}": v for k, v in found.items() if not k.startswith("num_")}
    return metrics


def read_judgments(dataset: PairDataset) -> Judgments:
    """Compares the records by content, without decoding them.

    Collective: every rank reads its shard; the result is the same on every rank.

    Raises:
        DataError: When a record cannot be used, or holds the same as query and as positive.
        DistributedError: When a record of another rank cannot be used.
    """
    keys: list[list[str]] = []
    error: VembedError | None = None
    try:
        records = map(dataset.record, _shard(dataset))
        keys = [[content_key(record.query), content_key(record.positive)] for record in records]
    except VembedError as found:
        error = found
    comm.raise_together(error)
    shards = comm.all_gather_objects(np.array(keys, dtype=np.bytes_))
    queries, documents = np.concatenate(shards)[: len(dataset)].T  # without padding, see _gathered
    if (same := np.flatnonzero(queries == documents)).size:
        record = dataset.record(int(same[0])).index
        raise DataError(
            f"{dataset.reader.origin}, record {record}: query and positive hold the same, so that "
            "every model finds it; evaluate on other pairs"
        )
    return _judgments(queries.tolist(), documents.tolist())


def check_recall_k(recall_k: Sequence[int], *, judgments: Judgments, origin: str) -> None:
    """Refuse a Recall@k that every model would reach.

    Args:
        recall_k: The k of Recall@k.
        judgments: Of the validation set.
        origin: Its name, for the message.

    Raises:
        DataError: When a k is not below the number of documents.
    """
    check_cutoffs(recall_k, num_documents=len(judgments.document_records), origin=origin)


def check_cutoffs(recall_k: Sequence[int], *, num_documents: int, origin: str) -> None:
    """:func:`check_recall_k` of any documents."""
    if too_large := [k for k in recall_k if k >= num_documents]:
        choice = f"choose k below {num_documents} or " if num_documents > 1 else ""
        raise DataError(
            f"eval_recall_k={too_large[0]}: {origin} has "
            f"{counted(num_documents, 'distinct document')}, so that Recall@{too_large[0]} is always "
            f"100 %; {choice}evaluate on more data"
        )


def embed_distinct(
    dataset: PairDataset,
    judgments: Judgments,
    *,
    embed: Embed,
    batch_size: int,
    num_workers: int,
    prefetch_factor: int = 2,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> tuple[Embeddings, Embeddings]:
    """Embeds every distinct query and document once, a shard on every rank.

    Collective, with equal numbers of ``embed`` calls; arguments as in ``evaluate_retrieval``.

    Returns:
        Q queries and C documents, float32, in the order of ``judgments``, on the device of the
        embeddings, the same on every rank.

    Raises:
        DataError: When a record cannot be used.
        DistributedError: When a record of another rank cannot be used.
    """

    def embedded(role: str, records: Sequence[int]) -> Embeddings:
        shard = [
            records[place]
            for place in shard_indices(len(records), rank=comm.rank(), world_size=comm.world_size())
        ]
        loader = BatchLoader(
            dataset.only(role),
            [shard[start : start + batch_size] for start in range(0, len(shard), batch_size)],
            num_workers=enough_workers(len(shard), most=num_workers),
            prefetch_factor=prefetch_factor,
            timeout_seconds=timeout_seconds,
        )
        rows = concatenate([_embed_batch(batch, role, embed=embed) for batch in loader])
        return _gathered_embeddings(rows, num_rows=len(records))

    with torch.no_grad():
        return (
            embedded("query", judgments.query_records),
            embedded("positive", judgments.document_records),
        )


def retrieval_metrics(
    query_emb: Embeddings,
    corpus_emb: Embeddings,
    judgments: Judgments,
    *,
    recall_k: Sequence[int],
    reduction: str = "mean",
) -> dict[str, float]:
    """Metrics of embedded queries and documents; every rank compares a share of the queries.

    Collective. Arguments are the same on every rank.

    Args:
        query_emb: Q, in the order of ``judgments``.
        corpus_emb: C, in the order of ``judgments``.
        judgments: Of the same records.
        recall_k: The k of Recall@k.
        reduction: Of MaxSim, for token embeddings.

    Returns:
        ``recall@{k}`` for every k, ``mrr``, ``num_queries`` and ``num_documents``.

    Raises:
        VembedError: When embeddings are not finite.
    """
    check_finite(query_emb, name="query")  # all of them, so that all ranks stop
    num_queries, num_documents = len(query_emb.values), len(corpus_emb.values)
    share = shard_indices(num_queries, rank=comm.rank(), world_size=comm.world_size())
    ranks = first_relevant_rank(
        query_emb.rows(share),
        corpus_emb,
        [judgments.relevant[row] for row in share],
        ignored=[judgments.same[row] for row in share],
        chunk_size=query_chunk(num_documents),
        reduction=reduction,
    )
    ranks = _gathered(ranks.to(query_emb.values.device), num_rows=num_queries).cpu()
    return {
        **{f"recall@{k}": recall_at_k(ranks, k) for k in recall_k},
        "mrr": mean_reciprocal_rank(ranks),
        "num_queries": num_queries,
        "num_documents": num_documents,
    }


def query_chunk(num_documents: int) -> int:
    """Queries to compare at a time, so that memory stays bounded."""
    return max(1, CHUNK_ELEMENTS // num_documents)


def _shard(dataset: PairDataset) -> list[int]:
    return shard_indices(len(dataset), rank=comm.rank(), world_size=comm.world_size())


def _gathered(rows: Tensor, *, num_rows: int) -> Tensor:
    """Rows of all shards; those beyond ``num_rows`` are the padding of ``shard_indices``."""
    return gather_rows(rows)[:num_rows]


def _gathered_embeddings(rows: Embeddings, *, num_rows: int) -> Embeddings:
    """The same of embeddings; tokens are padded to the longest of any rank."""
    if rows.mask is None:
        return Embeddings(_gathered(rows.values, num_rows=num_rows))
    (length,) = comm.all_max([rows.mask.shape[1]])
    rows = rows.padded(tokens=length)
    assert rows.mask is not None
    mask = _gathered(rows.mask.to(torch.uint8), num_rows=num_rows).bool()
    return Embeddings(_gathered(rows.values, num_rows=num_rows), mask)


def _embed_batch(batch: Batch, role: str, *, embed: Embed) -> Embeddings:
    comm.raise_together(batch.error)
    with phase(Kind.EMBEDDING, f"embedding {len(batch.roles[role])} items ({role})"):
        return embed(batch.roles[role])


def _judgments(queries: Sequence[bytes], documents: Sequence[bytes]) -> Judgments:
    """From the content keys of all records."""
    query_places, query_records = _distinct(queries)
    document_places, document_records = _distinct(documents)
    relevant: list[dict[int, None]] = [{} for _ in query_records]
    for query, document in zip(queries, documents, strict=True):
        relevant[query_places[query]][document_places[document]] = None
    same = [document_places.get(queries[record]) for record in query_records]
    return Judgments(query_records, document_records, [list(found) for found in relevant], same)


def _distinct(keys: Sequence[bytes]) -> tuple[dict[bytes, int], list[int]]:
    """The place of each distinct key, in order of appearance, and its first record."""
    first = {key: record for record, key in reversed(list(enumerate(keys)))}
    records = sorted(first.values())
    return {keys[record]: place for place, record in enumerate(records)}, records
