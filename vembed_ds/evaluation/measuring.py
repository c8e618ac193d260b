"""Measuring a model on a retrieval task: embed, rank, score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vembed_ds.data.loader import TIMEOUT_SECONDS
from vembed_ds.errors import ConfigError, DataError, counted
from vembed_ds.evaluation.embedding import Embed, embed_share, gather_shares
from vembed_ds.evaluation.ranks import Ranked, relevant_ranks
from vembed_ds.evaluation.scoring import (
    Values,
    first_rank_values,
    has_trec_eval,
    means,
    trec_values,
)
from vembed_ds.evaluation.search import Pairs, search
from vembed_ds.evaluation.tasks import RetrievalTask
from vembed_ds.similarity import Embeddings

QUERY_CHUNK = 1024  # queries compared at a time; search chooses as many documents as fit


@dataclass(frozen=True)
class Measured:
    """A model on a task; the same on every rank, but for ``corpus_emb``.

    Attributes:
        values: Metric to the value of every query, ``[Q]`` float64; of prefixes as
            ``..._d{dim}``.
        ranked: Where the relevant documents stand, by whole embeddings.
        query_emb: Q embeddings.
        corpus_emb: This rank's documents.
    """

    values: Values
    ranked: Ranked
    query_emb: Embeddings
    corpus_emb: Embeddings

    @property
    def metrics(self) -> dict[str, float]:
        """Mean over the queries of every metric."""
        return means(self.values)


@dataclass(frozen=True)
class Neighbours:
    """What stands before or beside the relevant documents; on the host.

    Attributes:
        rows: ``[Q, n]`` the best documents; -1 where there is none.
        wrong_scores: ``[Q]`` similarity of the best one that is not relevant; minus infinity where
            there is none.
    """

    rows: Tensor
    wrong_scores: Tensor


def measure(
    task: RetrievalTask,
    *,
    embed: Embed,
    ks: Sequence[int],
    batch_size: int,
    num_workers: int,
    prefetch_factor: int = 2,
    timeout_seconds: float = TIMEOUT_SECONDS,
    dims: Sequence[int] = (),
    device: torch.device | None = None,
    trec_eval: bool = True,
) -> Measured:
    """Embed all queries and documents of a task, and score how the documents are ranked.

    Collective: every rank embeds a share, and compares all queries with its share of the documents.
    The result does not depend on the number of ranks.

    Args:
        task: The same on every rank.
        embed: From 1 to ``batch_size`` items to their embeddings; called without gradient.
        ks: Numbers of documents looked at, each below the number of documents.
        batch_size: Items per rank at a time.
        num_workers: Loader processes per rank, at most.
        prefetch_factor: Batches that the loader processes together prepare ahead.
        timeout_seconds: Longest wait for a loader process.
        dims: Prefixes of the embeddings to measure beside the whole (Matryoshka).
        device: Where embeddings are compared; ``None``: where ``embed`` leaves them.
        trec_eval: Whether trec_eval computes further metrics, where it is installed.

    Raises:
        ConfigError: A prefix is wider than the embeddings.
        DataError: An item cannot be used, or a k is not below the number of documents.
        VembedError: Embeddings are not finite.
        DistributedError: This happened on another rank.
    """
    check_cutoffs(ks, num_documents=len(task.documents), origin=task.origin)

    def embedded(what: str) -> Embeddings:
        rows = embed_share(
            task.queries if what == "queries" else task.documents,
            embed=embed,
            batch_size=batch_size,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            timeout_seconds=timeout_seconds,
            what=what,
        )
        return rows if device is None else rows.to(device)

    query_emb = gather_shares(embedded("queries"))
    check_dims(dims, width=query_emb.width)
    corpus_emb = embedded("documents")
    ranked = _ranked(task, query_emb, corpus_emb)
    values = _values(task, ranked, ks=ks, trec_eval=trec_eval)
    for dim in dims:
        of_prefix = _ranked(task, query_emb.prefix(dim), corpus_emb.prefix(dim))
        found = _values(task, of_prefix, ks=ks, trec_eval=trec_eval)
        values |= {f"{name}_d{dim}": value for name, value in found.items()}
    return Measured(values, ranked, query_emb, corpus_emb)


def training_metrics(task: RetrievalTask, **options: Any) -> dict[str, float]:
    """What training tells of its validation data: :func:`measure` without what takes long.

    Collective; arguments and errors as there.

    Returns:
        ``recall@{k}`` for every k and ``mrr``, both also as ``..._d{dim}``; ``num_queries`` and
        ``num_documents``.
    """
    found = measure(task, **options, trec_eval=False).metrics
    sizes = {"num_queries": len(task.queries), "num_documents": len(task.documents)}
    return {k: v for k, v in found.items() if not k.startswith("mrr@")} | sizes


def check_cutoffs(ks: Sequence[int], *, num_documents: int, origin: str) -> None:
    """Refuse a Recall@k that every model would reach.

    Args:
        ks: Of ``eval_recall_k``.
        num_documents: Of the task.
        origin: Its name, for the message.

    Raises:
        DataError: A k is not below the number of documents.
    """
    if too_large := [k for k in ks if k >= num_documents]:
        choice = f"choose k below {num_documents} or " if num_documents > 1 else ""
        raise DataError(
            f"eval_recall_k={too_large[0]}: {origin} has "
            f"{counted(num_documents, 'distinct document')}, so that Recall@{too_large[0]} is always "
            f"100 %; {choice}evaluate on more data"
        )


def neighbours(task: RetrievalTask, measured: Measured, *, number: int) -> Neighbours:
    """The best documents of every query, and the best wrong one. Collective.

    Args:
        task: What was measured.
        measured: From :func:`measure`.
        number: Documents per query.
    """
    relevance = task.relevance
    rows = search(
        measured.query_emb,
        measured.corpus_emb,
        k=number,
        chunk_size=QUERY_CHUNK,
        ignored=relevance.ignored,
    ).rows
    both = [torch.cat(parts) for parts in zip(relevance.pairs, relevance.ignored, strict=True)]
    order = both[0].argsort(stable=True)
    wrong = search(
        measured.query_emb,
        measured.corpus_emb,
        k=1,
        chunk_size=QUERY_CHUNK,
        ignored=Pairs(both[0][order], both[1][order]),
    ).scores
    return Neighbours(rows.cpu(), wrong[:, 0].cpu())


def check_dims(dims: Sequence[int], *, width: int) -> None:
    """Refuse prefixes that the embeddings do not have: they would be measured as the whole.

    Raises:
        ConfigError: Naming the widest.
    """
    if dims and max(dims) > width:
        raise ConfigError(
            f"--dims {max(dims)}: the model's embeddings have {width} dimensions; leave out what is "
            f"above {width}"
        )


def _ranked(task: RetrievalTask, query_emb: Embeddings, corpus_emb: Embeddings) -> Ranked:
    return relevant_ranks(query_emb, corpus_emb, task.relevance, chunk_size=QUERY_CHUNK)


def _values(task: RetrievalTask, ranked: Ranked, *, ks: Sequence[int], trec_eval: bool) -> Values:
    values = first_rank_values(ranked.ranks, task.relevance, ks=ks)
    if trec_eval and has_trec_eval():
        values |= trec_values(ranked.ranks, task.relevance, ks=ks)
    return values
