"""Mining on all ranks: each embeds a part, all search together, and all hold the result.

Shapes: Q distinct queries, n negatives of each, P pairs of query and positive, k candidates, c of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.sampler import shard_indices
from vembed_ds.distributed import comm
from vembed_ds.encoding.items import ItemTable
from vembed_ds.evaluation.embedding import gather_shares
from vembed_ds.evaluation.ranks import pair_scores
from vembed_ds.evaluation.search import Pairs, search
from vembed_ds.mining.contents import Contents, IntArray
from vembed_ds.mining.rules import NAMES, Rules, Scored, choose
from vembed_ds.mining.vectors import Model, Vectors, embed_contents
from vembed_ds.similarity import Embeddings

QUERIES = 8192  # of all ranks, that are searched together
COMPARED = 256  # of them that are compared at a time

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Mined:
    """What was found; the same on every rank.

    Attributes:
        negatives: ``[Q, n]``, rows of the documents, the most similar first; -1 where there are fewer.
        scores: ``[Q, n]``, their similarities; minus infinity where there are fewer.
        positive_scores: ``[P]``, in the order of ``Contents.positives``.
        dropped: ``[Q, len(NAMES)]``, candidates that each rule dropped.
        candidates: ``[Q]``, how many there were.
    """

    negatives: IntArray
    scores: FloatArray
    positive_scores: FloatArray
    dropped: IntArray
    candidates: IntArray


def mine(
    model: Model,
    contents: Contents,
    dataset: PairDataset,
    corpus: ItemTable | None,
    *,
    rules: Rules,
    guide: Model | None = None,
    batch_size: int,
    num_workers: int,
    queries_at_a_time: int = QUERIES,
) -> Mined:
    """Find the negatives of every distinct query. Collective.

    Args:
        model: Finds them.
        contents: Of the data.
        dataset: Pairs.
        corpus: Further documents.
        rules: Which of them count; ``guide_margin`` where there is a guide.
        guide: Says which of them may be answers.
        batch_size: Items of a rank in one forward pass.
        num_workers: Loader processes per rank, at most.
        queries_at_a_time: Queries of all ranks that are searched together.

    Raises:
        VembedError: On every rank: a record cannot be used, or an embedding is not finite.
    """
    options = {"batch_size": batch_size, "num_workers": num_workers}
    vectors = embed_contents(model, contents, dataset, corpus, **options)
    guiding = None if guide is None else embed_contents(guide, contents, dataset, corpus, **options)
    size, num_queries = comm.world_size(), len(contents.queries)
    mined = _nothing(contents, rules)
    shards = [shard_indices(num_queries, rank=rank, world_size=size) for rank in range(size)]
    step = max(1, queries_at_a_time // size)
    for top in tqdm(
        range(0, len(shards[0]), step),
        desc="searching",
        unit="chunk",
        disable=None if comm.is_main() else True,
    ):
        part = slice(top, top + step)
        queries = [query for shard in shards for query in shard[part]]
        _mine_chunk(mined, queries, part, contents, vectors, guiding, rules)
    return mined


def _mine_chunk(
    mined: Mined,
    queries: list[int],
    part: slice,
    contents: Contents,
    vectors: Vectors,
    guiding: Vectors | None,
    rules: Rules,
) -> None:
    """Write the rows of some queries; those that fill up the last shard are written twice, alike."""
    query_emb = gather_shares(vectors.queries.rows(part))
    found = search(
        query_emb,
        vectors.documents,
        k=min(rules.num_candidates, len(contents.documents)),
        chunk_size=COMPARED,
        ignored=contents.excluded.pairs(queries),
    )
    rows, scores = found.rows.cpu(), found.scores.cpu()
    positive, each = _positive_scores(query_emb, queries, contents, vectors)
    guided = None
    if guiding is not None:
        guided = _guided(
            gather_shares(guiding.queries.rows(part)), queries, rows, contents, guiding
        )
    chosen = choose(Scored(scores, positive), rules=rules, queries=queries, guide=guided)
    taken = chosen.places.clamp(min=0)
    none = chosen.places < 0
    mined.negatives[queries] = rows.gather(1, taken).masked_fill(none, -1).numpy()
    mined.scores[queries] = scores.gather(1, taken).masked_fill(none, -torch.inf).numpy()
    mined.dropped[queries] = chosen.dropped.numpy()
    mined.candidates[queries] = (rows >= 0).sum(dim=1).numpy()
    for query, values in zip(queries, each, strict=True):
        mined.positive_scores[contents.starts[query] : contents.starts[query + 1]] = values.numpy()


def _positive_scores(
    query_emb: Embeddings, queries: list[int], contents: Contents, vectors: Vectors
) -> tuple[Tensor, list[Tensor]]:
    """``[c]``: of the least similar positive of every query; and of each positive."""
    counts = torch.from_numpy(np.diff(contents.starts)[queries])
    documents = [contents.positives[contents.starts[q] : contents.starts[q + 1]] for q in queries]
    lines = torch.arange(len(queries)).repeat_interleave(counts)
    pairs = Pairs(lines, torch.from_numpy(np.concatenate(documents)))
    scores = pair_scores(query_emb, vectors.documents, pairs, start=vectors.start)
    least = torch.full((len(queries),), torch.inf).scatter_reduce(0, lines, scores, "amin")
    return least, list(torch.split(scores, counts.tolist()))


def _guided(
    query_emb: Embeddings, queries: list[int], rows: Tensor, contents: Contents, guiding: Vectors
) -> Scored:
    """What the guide says of the candidates ``rows`` ``[c, k]`` that the model found."""
    lines = torch.arange(len(queries)).repeat_interleave(rows.shape[1])
    pairs = Pairs(lines, rows.flatten())
    scores = pair_scores(query_emb, guiding.documents, pairs, start=guiding.start)
    positive, _ = _positive_scores(query_emb, queries, contents, guiding)
    return Scored(scores.reshape(rows.shape), positive)


def _nothing(contents: Contents, rules: Rules) -> Mined:
    num_queries = len(contents.queries)
    shape = (num_queries, rules.num_negatives)
    return Mined(
        negatives=np.full(shape, -1, dtype=np.int64),
        scores=np.full(shape, -np.inf, dtype=np.float32),
        positive_scores=np.zeros(len(contents.positives), dtype=np.float32),
        dropped=np.zeros((num_queries, len(NAMES)), dtype=np.int64),
        candidates=np.zeros(num_queries, dtype=np.int64),
    )
