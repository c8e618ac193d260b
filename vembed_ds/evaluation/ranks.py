"""Ranks of all relevant documents, in a corpus whose parts lie on different ranks.

They say everything that retrieval metrics ask for, and take little room. Shapes: Q queries, P pairs
of a query with a relevant document, c queries of a chunk, B documents of a block, R relevant
documents of a query, at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vembed_ds.distributed import comm
from vembed_ds.evaluation import search
from vembed_ds.evaluation.search import Block, Pairs, check_corpus, similarity_blocks
from vembed_ds.similarity import Embeddings, paired_similarity

# Two equal documents get cosines that differ by some 1e-7, because a matrix product sums the
# columns at its edges in another order. Closer than this is a tie, or a collapsed model would
# score by rounding.
TIE = 1e-6


@dataclass(frozen=True)
class Relevance:
    """Which documents answer which queries.

    Attributes:
        pairs: Every query with every document that answers it; every query has one at least.
        grades: ``[P]`` int64, how well; > 0.
        ignored: Queries with documents that do not compete, such as the query itself; none of
            them is relevant.
        num_queries: Q.
    """

    pairs: Pairs
    grades: Tensor
    ignored: Pairs
    num_queries: int

    @property
    def counts(self) -> Tensor:
        """Relevant documents of each query, ``[Q]`` int64."""
        return torch.bincount(self.pairs.queries, minlength=self.num_queries)


class Ranked(NamedTuple):
    """Where the relevant documents stand; on the host.

    Attributes:
        ranks: ``[P]`` int64, from 1.
        scores: ``[P]`` float32: their similarity to the query.
    """

    ranks: Tensor
    scores: Tensor


def relevant_ranks(
    query_emb: Embeddings, corpus_emb: Embeddings, relevance: Relevance, *, chunk_size: int
) -> Ranked:
    """Every relevant document's rank among all documents, by cosine or MaxSim.

    Ties count against the model: an irrelevant document as similar as a relevant one (closer than
    ``TIE``) comes first, and of relevant ones the lower grade. A model that maps everything to one
    point finds nothing.

    Collective: every rank calls it with the same queries and its own shard of the corpus, as in
    :func:`vembed_ds.evaluation.search.search`, and gets the same result.

    Args:
        query_emb: Q embeddings, any floating dtype; compared in float32.
        corpus_emb: This rank's documents, on the device of ``query_emb``.
        relevance: The same on every rank; rows are those of the whole corpus.
        chunk_size: Queries compared at a time.

    Returns:
        In the order of ``relevance.pairs``.

    Raises:
        DataError: When no rank has a document.
        ValueError: When embeddings cannot be compared.
        VembedError: When embeddings are not finite, with their number.
        DistributedError: When they are not on another rank.
    """
    start = check_corpus(query_emb, corpus_emb)
    scores = pair_scores(query_emb, corpus_emb, relevance.pairs, start=start)
    order = _worst_first(relevance, scores)
    counts = relevance.counts
    first = torch.cumsum(counts, dim=0) - counts  # pair of each query
    slots = first + torch.arange(relevance.num_queries)  # a query has one more than pairs
    found = torch.zeros(len(scores) + relevance.num_queries, dtype=torch.int64)
    limits = scores[order] - TIE
    for block in similarity_blocks(query_emb, corpus_emb, start=start, chunk_size=chunk_size):
        _count(
            block,
            relevance,
            limits=_limits(limits, counts, first, block),
            slots=slots,
            found=found,
        )
    ahead = _ahead(comm.sum_over_ranks(found), slots=slots, counts=counts)
    ranks = torch.empty_like(ahead)
    ranks[order] = ahead
    return Ranked(ranks, scores)


def _worst_first(relevance: Relevance, scores: Tensor) -> Tensor:
    """Order of the pairs: by query, then similarity, of equal ones the higher grade first."""
    keys = (-relevance.grades.numpy(), scores.numpy(), relevance.pairs.queries.numpy())
    return torch.from_numpy(np.lexsort(keys))


def _limits(limits: Tensor, counts: Tensor, first: Tensor, block: Block) -> Tensor:
    """For each query of a block, from where on a document comes first: ``[c, R]``, ascending."""
    counts, first = counts[block.queries], first[block.queries]
    most = int(counts.max())
    padded = torch.full((len(counts), most), torch.inf)
    inside = torch.arange(most) < counts[:, None]
    padded[inside] = limits[first[0] : first[0] + counts.sum()]
    return padded.to(block.scores.device)


def _count(
    block: Block, relevance: Relevance, *, limits: Tensor, slots: Tensor, found: Tensor
) -> None:
    """Add to ``found``, for each query, how many documents reach 0, 1, 2, ... of its limits."""
    for pairs in (relevance.pairs, relevance.ignored):
        _, lines, columns = block.inside(pairs)
        block.scores[lines, columns] = -torch.inf
    reached = torch.searchsorted(limits, block.scores, right=True, out_int32=True)
    own = slots[block.queries].to(reached.device)
    numbers = torch.bincount((reached + (own - own[0])[:, None]).flatten()).cpu()
    found[own[0] : own[0] + len(numbers)] += numbers


def _ahead(found: Tensor, *, slots: Tensor, counts: Tensor) -> Tensor:
    """Rank of each pair, in the order of the limits, from the numbers that ``_count`` adds up."""
    total = torch.cumsum(found, dim=0)
    query = torch.arange(len(counts)).repeat_interleave(counts)
    number = torch.arange(len(query)) - (slots - torch.arange(len(slots)))[query]
    last = slots + counts
    irrelevant = total[last[query]] - total[slots[query] + number]
    return irrelevant + counts[query] - number


def pair_scores(
    query_emb: Embeddings, corpus_emb: Embeddings, pairs: Pairs, *, start: int
) -> Tensor:
    """Cosine or MaxSim of chosen pairs, each computed by the rank that has the document.

    Collective; arguments as of :func:`relevant_ranks`.

    Args:
        query_emb: Q embeddings.
        corpus_emb: This rank's documents.
        pairs: On the host; rows of the whole corpus, or negative: no document.
        start: From :func:`vembed_ds.evaluation.search.check_corpus`.

    Returns:
        ``[P]`` float32 on the host; 0 where there is no document.
    """
    scores = torch.zeros(len(pairs.rows))
    places = pairs.rows - start
    own = torch.nonzero((pairs.rows >= 0) & (places >= 0) & (places < len(corpus_emb))).flatten()
    for chosen in torch.split(own, _pairs_at_a_time(query_emb, corpus_emb)):
        queries, documents = (
            embeddings.rows(index.to(embeddings.values.device)).float()
            for embeddings, index in (
                (query_emb, pairs.queries[chosen]),
                (corpus_emb, places[chosen]),
            )
        )
        scores[chosen] = paired_similarity(queries, documents).cpu()
    return comm.sum_over_ranks(scores)


def _pairs_at_a_time(query_emb: Embeddings, corpus_emb: Embeddings) -> int:
    """Pairs whose vectors, and similarities of tokens, are a block."""
    tokens = [1 if one.mask is None else one.mask.shape[1] for one in (query_emb, corpus_emb)]
    each = sum(tokens) * query_emb.width + tokens[0] * tokens[1]
    return max(1, search.BLOCK_ELEMENTS // each)
