"""The best documents of every query, of a corpus whose parts lie on different ranks.

Shapes: Q queries, C documents of a shard, c queries of a chunk, B documents of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vembed_ds.distributed import comm
from vembed_ds.distributed.gather import gather_rows
from vembed_ds.distributed.progress import progress
from vembed_ds.errors import ConfigError, DataError, VembedError
from vembed_ds.evaluation.faiss_index import check_faiss, nearest
from vembed_ds.similarity import Embeddings, check_kinds, unit_similarity

BLOCK_ELEMENTS = 2**24  # similarities held at a time: 64 MiB in float32
NO_ROW = -1  # of places that no document takes


class Found(NamedTuple):
    """The best documents of every query, best first; on the device of the embeddings.

    Attributes:
        scores: ``[Q, k]`` float32: cosine, or MaxSim; minus infinity where there is no document.
        rows: ``[Q, k]`` int64: rows of the whole corpus; ``NO_ROW`` where there is no document,
            because fewer than k compete.
    """

    scores: Tensor
    rows: Tensor


class Pairs(NamedTuple):
    """Queries with rows of the corpus, one after the other.

    Attributes:
        queries: ``[P]`` int64, ascending.
        rows: ``[P]`` int64: rows of the whole corpus.
    """

    queries: Tensor
    rows: Tensor


class Block(NamedTuple):
    """Similarities of some queries with some neighbouring documents.

    Attributes:
        queries: Which queries.
        start: Row of the first document in the whole corpus.
        scores: ``[c, B]`` float32; may be overwritten.
    """

    queries: slice
    start: int
    scores: Tensor

    def inside(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs that lie in this block: their numbers, and their places in ``scores``."""
        edges = torch.tensor([self.queries.start, self.queries.stop])
        first, last = torch.searchsorted(pairs.queries, edges).tolist()
        columns = pairs.rows[first:last] - self.start
        found = torch.nonzero((columns >= 0) & (columns < self.scores.shape[1])).flatten()
        lines = pairs.queries[first:last][found] - self.queries.start
        device = self.scores.device
        return found + first, lines.to(device), columns[found].to(device)


def search(
    query_emb: Embeddings,
    corpus_emb: Embeddings,
    *,
    k: int,
    chunk_size: int,
    reduction: str = "mean",
    ignored: Sequence[Sequence[int]] | Pairs | None = None,
    backend: str = "exact",
) -> Found:
    """The k most similar documents of every query, by cosine or MaxSim.

    Collective: every rank calls it with the same queries and its own shard of the corpus, and
    gets the same result. Shards follow each other in rank order, of any lengths, also 0: row 0 of
    a rank is the sum of the lengths before it. Documents of the same score come in the order of
    their rows; scores within rounding (1e-6) of each other may come in either order, as a matrix
    product of another shape rounds otherwise. Of those that share the last place faiss gives any.

    Args:
        query_emb: Q embeddings, the same on every rank, any floating dtype; compared in float32.
        corpus_emb: This rank's documents, on the device of ``query_emb``; host memory may be
            mapped from a file, which is read block by block.
        k: Documents per query, > 0.
        chunk_size: Queries compared at a time, > 0. Beside ``[Q, k]``, memory is one block of
            ``BLOCK_ELEMENTS`` similarities, or ``chunk_size`` where that is more.
        reduction: Of MaxSim.
        ignored: Per query, rows of the whole corpus that do not compete: the query itself, or what
            is known to answer it; or the same as pairs. The same on every rank.
        backend: ``exact``; ``faiss``: its exact flat index, of single vectors; ``faiss:INDEX``: an
            index of its factory, such as ``faiss:HNSW32``, which may miss documents.

    Returns:
        The same on every rank; its rows are those of the whole corpus.

    Raises:
        ConfigError: For an unknown backend, one that is not installed, or faiss with token
            embeddings.
        DataError: When no rank has a document.
        ValueError: When embeddings cannot be compared, or ``ignored`` has another length.
        VembedError: When embeddings are not finite, with their number.
        DistributedError: When they are not on another rank.
    """
    index = _faiss_index(backend, query_emb)
    pairs = _pairs(ignored, num_queries=len(query_emb))
    start = check_corpus(query_emb, corpus_emb)
    if index is not None:
        found = comm.run_together(
            lambda: _by_faiss(query_emb, corpus_emb, start=start, k=k, ignored=pairs, index=index),
            doing="searching with faiss",
        )
    else:
        found = _exact(
            query_emb,
            corpus_emb,
            start=start,
            k=k,
            chunk_size=chunk_size,
            reduction=reduction,
            ignored=pairs,
        )
    return _merged(found, k=k, chunk_size=chunk_size)


def check_corpus(query_emb: Embeddings, corpus_emb: Embeddings) -> int:
    """Refuse what cannot be searched, on every rank.

    Collective; arguments as of :func:`search`.

    Returns:
        The row of this rank's first document in the whole corpus.

    Raises:
        DataError: When no rank has a document.
        ValueError: When embeddings cannot be compared.
        VembedError: When embeddings are not finite, with their number.
        DistributedError: When they are not on another rank.
    """
    check_kinds(query_emb, corpus_emb)
    lengths = [length for (length,) in comm.all_gather_ints([len(corpus_emb)])]
    if not sum(lengths):
        raise DataError("the corpus is empty: there is no document to search; give some")
    error: VembedError | None = None
    try:
        check_finite(query_emb, name="query")
        check_finite(corpus_emb, name="document")
    except VembedError as found:
        error = found
    comm.raise_together(error)
    return sum(lengths[: comm.rank()])


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


def similarity_blocks(
    query_emb: Embeddings,
    corpus_emb: Embeddings,
    *,
    start: int,
    chunk_size: int,
    reduction: str = "mean",
) -> Iterator[Block]:
    """All similarities of the queries with this rank's documents, a block at a time.

    Every document is normalised once, and blocks come in the order of the rows. Not collective; rank 0
    shows a progress bar.

    Args:
        query_emb: As of :func:`search`; finite.
        corpus_emb: The same.
        start: From :func:`check_corpus`.
        chunk_size: Queries of a block.
        reduction: Of MaxSim.
    """
    queries = query_emb.float().normalized()
    width = max(1, BLOCK_ELEMENTS // chunk_size)
    with progress(len(corpus_emb), what="comparing documents") as bar:
        for left in range(0, len(corpus_emb), width):
            documents = corpus_emb.rows(slice(left, left + width)).float().normalized()
            for top in range(0, len(queries), chunk_size):
                places = slice(top, min(top + chunk_size, len(queries)))
                scores = unit_similarity(queries.rows(places), documents, reduction=reduction)
                yield Block(places, start + left, scores)
            bar.update(len(documents))


def _exact(
    query_emb: Embeddings,
    corpus_emb: Embeddings,
    *,
    start: int,
    k: int,
    chunk_size: int,
    reduction: str,
    ignored: Pairs | None,
) -> Found:
    best = _nothing(len(query_emb), k, device=query_emb.values.device)
    for block in similarity_blocks(
        query_emb, corpus_emb, start=start, chunk_size=chunk_size, reduction=reduction
    ):
        if ignored is not None:
            _, lines, columns = block.inside(ignored)
            block.scores[lines, columns] = -torch.inf
        scores, columns = _best_columns(block.scores, min(k, block.scores.shape[1]))
        rows = torch.where(scores > -torch.inf, columns + block.start, NO_ROW)
        found = _best_of([Found(*(part[block.queries] for part in best)), Found(scores, rows)], k)
        best.scores[block.queries], best.rows[block.queries] = found
    return best


def _by_faiss(
    query_emb: Embeddings,
    corpus_emb: Embeddings,
    *,
    start: int,
    k: int,
    ignored: Pairs | None,
    index: str,
) -> Found:
    device = query_emb.values.device
    best = _nothing(len(query_emb), k, device=device)
    # More are asked for, as those to ignore may be the best ones.
    most = 0 if ignored is None else int(torch.bincount(ignored.queries, minlength=1).max())
    if not (wanted := min(k + most, len(corpus_emb))):
        return best
    scores, columns = nearest(query_emb, corpus_emb, k=wanted, index=index)
    columns, order = columns.sort(dim=1)  # equal scores come in row order
    scores, rows = scores.gather(1, order), torch.where(columns < 0, NO_ROW, columns + start)
    if ignored is not None:
        rows = rows.masked_fill(_among(rows, ignored), NO_ROW)
    found = Found(scores.masked_fill(rows == NO_ROW, -torch.inf).to(device), rows.to(device))
    return _best_of([best, found], k)


def _among(rows: Tensor, pairs: Pairs) -> Tensor:
    """Which of the ``[Q, k]`` rows are among the pairs of their query."""
    if not len(pairs.rows):
        return torch.zeros_like(rows, dtype=torch.bool)
    base = int(max(rows.max(), pairs.rows.max())) + 1
    own = torch.arange(len(rows))[:, None] * base + rows
    return torch.isin(own, pairs.queries * base + pairs.rows) & (rows >= 0)


def _best_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Like ``topk`` of ``[c, B]``, but equal scores come, and are left out, in column order."""
    values, columns = scores.topk(k)
    cut = (scores >= values[:, -1:]).sum(dim=1) > k  # equal ones on both sides of the last place
    if cut.any():
        columns[cut] = scores[cut].sort(dim=1, descending=True, stable=True).indices[:, :k]
    columns = columns.sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _best_of(parts: Sequence[Found], k: int) -> Found:
    """The best k of lists that follow each other in row order."""
    rows = torch.cat([part.rows for part in parts], dim=1)
    scores, order = torch.cat([part.scores for part in parts], dim=1).sort(
        dim=1, descending=True, stable=True
    )
    return Found(scores[:, :k], rows.gather(1, order)[:, :k])


def _nothing(num_queries: int, k: int, *, device: torch.device) -> Found:
    return Found(
        torch.full((num_queries, k), -torch.inf, device=device),
        torch.full((num_queries, k), NO_ROW, device=device),
    )


def _merged(own: Found, *, k: int, chunk_size: int) -> Found:
    """The best of all ranks' lists; a chunk at a time, as all of them are as many as the ranks."""
    if comm.world_size() == 1:
        return own
    for top in range(0, len(own.rows), chunk_size):
        places = slice(top, top + chunk_size)
        gathered = [
            gather_rows(part[places]).chunk(comm.world_size()) for part in (own.scores, own.rows)
        ]
        best = _best_of([Found(*lists) for lists in zip(*gathered, strict=True)], k)
        own.scores[places], own.rows[places] = best
    return own


def _pairs(ignored: Sequence[Sequence[int]] | Pairs | None, *, num_queries: int) -> Pairs | None:
    if ignored is None or isinstance(ignored, Pairs):
        return ignored
    if len(ignored) != num_queries:
        raise ValueError(f"{num_queries} queries, but {len(ignored)} lists of ignored rows")
    return pairs_of(ignored)


def pairs_of(rows: Sequence[Iterable[int]]) -> Pairs:
    """The rows of query 0, of query 1, ..., as pairs."""
    listed = [list(found) for found in rows]
    counts = torch.tensor([len(found) for found in listed], dtype=torch.int64)
    return Pairs(
        torch.arange(len(listed)).repeat_interleave(counts),
        torch.tensor([row for found in listed for row in found], dtype=torch.int64),
    )


def _faiss_index(backend: str, query_emb: Embeddings) -> str | None:
    """The index that a backend names; ``None`` for our own search."""
    if backend == "exact":
        return None
    name, _, index = backend.partition(":")
    if name != "faiss":
        raise ConfigError(f"backend={backend}: unknown; choose exact, faiss or faiss:INDEX")
    if query_emb.mask is not None:
        raise ConfigError(
            f"backend={backend}: faiss compares single vectors, and this is a late-interaction "
            "model, with a vector for each token; choose exact"
        )
    check_faiss(index or "Flat")
    return index or "Flat"
