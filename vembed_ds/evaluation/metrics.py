"""Retrieval metrics from embeddings; pure functions of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vembed_ds.errors import VembedError
from vembed_ds.similarity import Embeddings, similarity

# Two equal documents get cosines that differ by some 1e-7, because a matrix product sums the
# columns at its edges in another order. Closer than this is a tie, or a collapsed model would
# score by rounding.
TIE = 1e-6


def first_relevant_rank(
    query_emb: Embeddings,
    corpus_emb: Embeddings,
    relevant: Sequence[Sequence[int]],
    *,
    chunk_size: int,
    ignored: Sequence[int | None] = (),
    reduction: str = "mean",
) -> Tensor:
    """Rank of the best-ranked relevant document of every query, by cosine or MaxSim.

    Ties count against the query: an irrelevant document as similar as the best relevant one
    comes first, so a model that maps everything to one point finds nothing.

    Args:
        query_emb: Q embeddings, any floating dtype; compared in float32.
        corpus_emb: C embeddings, on the device of ``query_emb``.
        relevant: Per query, the rows of ``corpus_emb`` that answer it; at least one.
        chunk_size: Queries compared at a time; memory is ``chunk_size * C`` floats.
        ignored: Per query, a row of ``corpus_emb`` that does not compete, if there is one.
        reduction: Of MaxSim.

    Returns:
        ``[Q]`` int64 on the host, from 1.

    Raises:
        ValueError: When a query has no relevant document, or ``relevant`` another length.
        VembedError: When embeddings are not finite, with their number.
    """
    empty = [row for row, documents in enumerate(relevant) if not documents]
    if empty or len(relevant) != len(query_emb.values):
        raise ValueError(
            f"{len(query_emb.values)} queries, {len(relevant)} lists of relevant documents, "
            f"{len(empty)} of them empty; give every query at least one"
        )
    if not len(query_emb.values):
        return torch.empty(0, dtype=torch.int64)
    return torch.cat(
        [
            _ranks(
                cosine,
                relevant[start : start + len(cosine)],
                ignored[start : start + len(cosine)],
            )
            for start, cosine in _similarities(
                query_emb, corpus_emb, chunk_size=chunk_size, reduction=reduction
            )
        ]
    ).cpu()


def top_documents(
    query_emb: Embeddings,
    corpus_emb: Embeddings,
    *,
    k: int,
    chunk_size: int,
    reduction: str = "mean",
) -> Tensor:
    """The best documents of every query, by cosine or MaxSim.

    Args:
        query_emb: Q embeddings, Q > 0, any floating dtype; compared in float32.
        corpus_emb: C embeddings, on the device of ``query_emb``.
        k: Documents per query, at most C.
        chunk_size: Queries compared at a time.
        reduction: Of MaxSim.

    Returns:
        ``[Q, k]`` int64 on the host: rows of ``corpus_emb``, best first.

    Raises:
        VembedError: When embeddings are not finite, with their number.
    """
    chunks = _similarities(query_emb, corpus_emb, chunk_size=chunk_size, reduction=reduction)
    return torch.cat([cosine.topk(k).indices for _, cosine in chunks]).cpu()


def recall_at_k(ranks: Tensor, k: int) -> float:
    """Share of queries with a relevant document among the first ``k``.

    Args:
        ranks: ``[Q]`` int64 from ``first_relevant_rank``, Q > 0.
        k: Number of documents looked at, > 0.
    """
    return float((ranks <= k).double().mean())


def mean_reciprocal_rank(ranks: Tensor) -> float:
    """Mean of 1 / rank over all queries, whatever the rank.

    Args:
        ranks: ``[Q]`` int64 from ``first_relevant_rank``, Q > 0.
    """
    return float(ranks.double().reciprocal().mean())


def check_finite(embeddings: Embeddings, *, name: str) -> None:
    """Refuse embeddings that hold NaN or infinity.

    Args:
        embeddings: N of them.
        name: What they embed, for the message.

    Raises:
        VembedError: With the number of rows that are not finite.
    """
    values = embeddings.values
    bad = int((~torch.isfinite(values).flatten(1).all(dim=1)).sum())
    if bad:
        raise VembedError(
            f"{bad} of {len(values)} {name} embeddings are NaN or infinite: the model has "
            "diverged; go back to an earlier checkpoint, or train with a lower lr or in fp32"
        )


def _similarities(
    query_emb: Embeddings, corpus_emb: Embeddings, *, chunk_size: int, reduction: str
) -> Iterator[tuple[int, Tensor]]:
    """Yields the first query of each chunk and its similarities ``[c, C]`` float32."""
    check_finite(query_emb, name="query")
    check_finite(corpus_emb, name="document")
    queries, corpus = query_emb.float(), corpus_emb.float()
    for start in range(0, len(queries.values), chunk_size):
        chunk = queries.rows(slice(start, start + chunk_size))
        yield start, similarity(chunk, corpus, reduction=reduction)


def _ranks(
    cosine: Tensor, relevant: Sequence[Sequence[int]], ignored: Sequence[int | None]
) -> Tensor:
    """Ranks ``[c]`` of a chunk; overwrites ``cosine`` ``[c, C]``."""
    columns = torch.tensor([column for documents in relevant for column in documents])
    counts = torch.tensor([len(documents) for documents in relevant])
    rows = torch.arange(len(relevant)).repeat_interleave(counts).to(cosine.device)
    found = cosine[rows, columns.to(cosine.device)]
    best = cosine.new_full((len(relevant),), -torch.inf).scatter_reduce(0, rows, found, "amax")
    cosine[rows, columns.to(cosine.device)] = -torch.inf  # they do not compete with each other
    for row, column in enumerate(ignored):
        if column is not None:
            cosine[row, column] = -torch.inf
    return 1 + (cosine >= best[:, None] - TIE).sum(dim=1)
