"""Ranks in a corpus in shards, against loops; and metrics against trec_eval's of whole lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.test_search import SHARDS, make
from tests.worlds import World
from vembed_ds.distributed import comm
from vembed_ds.errors import VembedError
from vembed_ds.evaluation import search
from vembed_ds.evaluation.ranks import Relevance, relevant_ranks
from vembed_ds.evaluation.scoring import first_rank_values, means, trec_values
from vembed_ds.evaluation.search import pairs_of
from vembed_ds.similarity import Embeddings, similarity

NUM_QUERIES, NUM_DOCUMENTS = 7, 23
KS = (1, 3, 10)
# Document to grade; several right ones, high grades, and one query with many.
GRADES: list[dict[int, int]] = [
    {0: 1},
    {3: 2, 9: 1, 22: 1},
    {1: 1},
    {5: 3, 6: 1},
    {4: 1, 21: 2},
    {row: 1 + row % 3 for row in range(2, 14)},
    {8: 1},
]
IGNORED = [[3], [], [0, 2, 22], [], [5], [], [4, 6]]


def relevance(grades: list[dict[int, int]], ignored: list[list[int]]) -> Relevance:
    return Relevance(
        pairs_of(grades),
        torch.tensor([grade for found in grades for grade in found.values()]),
        pairs_of(ignored),
        len(grades),
    )


def data(kind: str, alike: int) -> tuple[Embeddings, Embeddings]:
    """Queries, and documents of which ``alike`` neighbours are equal."""
    corpus = make(kind, NUM_DOCUMENTS, seed=1)
    rows = [alike * (row // alike) for row in range(NUM_DOCUMENTS)]
    return make(kind, NUM_QUERIES, seed=0), corpus.rows(rows)


def case(
    *, kind: str, chunk_size: int = 3, block: int = 12, alike: int = 1, ignored: Any = IGNORED,
    poison: int | None = None,
) -> Any:  # fmt: skip
    """What a rank runs: ranks in the order of the pairs."""
    search.BLOCK_ELEMENTS = block
    queries, corpus = data(kind, alike)
    if poison is not None:
        corpus.values[poison] = torch.nan
    shard = corpus.rows(slice(*SHARDS[comm.world_size()][comm.rank()]))
    try:
        found = relevant_ranks(
            queries, shard, relevance(GRADES, ignored), chunk_size=chunk_size
        ).ranks
    except VembedError as error:
        return f"{type(error).__name__}: {error}"
    return found.tolist()


@pytest.fixture(autouse=True)
def _block_elements() -> Any:
    elements = search.BLOCK_ELEMENTS
    yield
    search.BLOCK_ELEMENTS = elements


def orders(kind: str, alike: int, ignored: Any) -> list[list[int]]:
    """All documents that compete, best first; of equal ones the less relevant first."""
    queries, corpus = data(kind, alike)
    scores = similarity(
        Embeddings(queries.values.double(), queries.mask),
        Embeddings(corpus.values.double(), corpus.mask),
    )
    return [
        sorted(
            set(range(NUM_DOCUMENTS)) - set(ignored[query]),
            key=lambda row: (-round(float(line[row]), 9), GRADES[query].get(row, 0)),
        )
        for query, line in enumerate(scores)
    ]


def on_ranks(world: Callable[[int], World], size: int, **options: Any) -> list[Any]:
    if size == 1:
        return [case(**options)]
    return world(size).run("tests.distributed.test_ranks:case", **options)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["vectors", "tokens"])
@pytest.mark.parametrize("alike", [1, 3, NUM_DOCUMENTS])
@pytest.mark.parametrize("ignored", [IGNORED, [[]] * NUM_QUERIES], ids=["ignored", "all"])
def test_ranks_equal_sorting(
    world: Callable[[int], World], world_size: int, kind: str, alike: int, ignored: Any
) -> None:
    found = orders(kind, alike, ignored)
    expected = [
        found[query].index(row) + 1 for query, grades in enumerate(GRADES) for row in grades
    ]
    for chunk_size, block in ((1, 1), (3, 12), (100, 2**20)):
        for ranks in on_ranks(
            world, world_size, kind=kind, alike=alike, ignored=ignored, chunk_size=chunk_size,
            block=block,
        ):  # fmt: skip
            if alike == 1:
                assert ranks == expected
            else:  # equal documents of one grade change places
                assert sorted_by_query(ranks) == sorted_by_query(expected)


def sorted_by_query(ranks: list[int]) -> list[list[tuple[int, int]]]:
    rest = iter(ranks)
    return [sorted((next(rest), grade) for grade in grades.values()) for grades in GRADES]


@pytest.mark.parametrize("alike", [1, 3, NUM_DOCUMENTS])
def test_metrics_equal_those_of_whole_lists(alike: int) -> None:
    """trec_eval is given every document with its place, not only the relevant ones."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    lists = orders("vectors", alike, IGNORED)
    judged = {str(q): {str(row): g for row, g in found.items()} for q, found in enumerate(GRADES)}
    run = {str(q): {str(row): -float(n) for n, row in enumerate(o)} for q, o in enumerate(lists)}
    cuts = ".1,3,10"
    names = {"success" + cuts, "recip_rank", "ndcg_cut" + cuts, "map_cut" + cuts, "map", "recall" + cuts}  # fmt: skip
    theirs = pytrec_eval.RelevanceEvaluator(judged, names).evaluate(run)
    own = {"recall": "success", "ndcg": "ndcg_cut", "map": "map_cut", "trec_recall": "recall"}
    expected = {f"{ours}@{k}": f"{name}_{k}" for ours, name in own.items() for k in KS}
    expected |= {"mrr": "recip_rank", "map": "map"}

    queries, corpus = data("vectors", alike)
    found = relevance(GRADES, IGNORED)
    ranks = relevant_ranks(queries, corpus, found, chunk_size=4).ranks
    values = first_rank_values(ranks, found, ks=KS) | trec_values(ranks, found, ks=KS)
    assert values.keys() == {*expected, *(f"mrr@{k}" for k in KS)}
    for ours, name in expected.items():
        wanted = [theirs[str(query)][name] for query in range(NUM_QUERIES)]
        assert values[ours] == pytest.approx(wanted, abs=1e-12), ours
    reciprocal = values["mrr"]
    assert values["mrr@3"].tolist() == [v if v >= 1 / 3 - 1e-9 else 0 for v in reciprocal]
    if alike == 1:  # else the case would say little
        assert all(0 < mean < 1 for mean in means(values).values())


def test_lists_are_cut_where_trec_eval_is_used_to(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytrec_eval")
    judged = relevance([{0: 1, 1: 1}, {0: 1}, {0: 2}], [[], [], []])
    ranks = torch.tensor([1, 1000, 1001, 10**9])
    for chunk in (1, 2, 1000):  # also when the queries do not divide
        monkeypatch.setattr("vembed_ds.evaluation.scoring.CHUNK", chunk)
        values = trec_values(ranks, judged, ks=(1,))
        assert values["map"].tolist() == pytest.approx([(1 + 2 / 1000) / 2, 0, 0])
        assert values["ndcg@1"].tolist() == [1, 0, 0]
    assert first_rank_values(ranks, judged, ks=(1,))["mrr"].tolist() == [1, 1 / 1001, 1e-9]


def test_a_collapsed_model_finds_nothing() -> None:
    """Equal documents: rounding by the place of a column must not rank them."""
    generator = torch.Generator().manual_seed(0)
    point = torch.randn(1, 384, generator=generator)
    queries = Embeddings(torch.randn(9, 384, generator=generator))
    judged = relevance([{row: 1} for row in range(9)], [[]] * 9)
    ranks = relevant_ranks(queries, Embeddings(point.repeat(1003, 1)), judged, chunk_size=4)
    assert ranks.ranks.tolist() == [1003] * 9
    nowhere = Embeddings(torch.zeros(5, 384))
    judged = relevance([{2: 1}], [[]])
    assert relevant_ranks(nowhere.rows([0]), nowhere, judged, chunk_size=1).ranks.tolist() == [5]


def test_half_precision_is_compared_in_float32() -> None:
    queries, corpus = (Embeddings(part.values.bfloat16()) for part in data("vectors", 1))
    judged = relevance(GRADES, IGNORED)
    half = relevant_ranks(queries, corpus, judged, chunk_size=2)
    whole = relevant_ranks(queries.float(), corpus.float(), judged, chunk_size=2)
    assert half.ranks.tolist() == whole.ranks.tolist()
    assert half.scores.tolist() == whole.scores.tolist()


def test_documents_that_are_not_finite_stop_every_rank(world: Callable[[int], World]) -> None:
    other, own = on_ranks(world, 2, kind="vectors", poison=9)
    assert own.startswith("VembedError: 1 of 18 document embeddings are NaN or infinite")
    assert other.startswith("DistributedError: rank 1 failed: 1 of 18 document embeddings")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_queries_that_are_not_finite(value: float) -> None:
    queries, corpus = data("vectors", 1)
    queries.values[[1, 4], 2] = value
    with pytest.raises(VembedError, match=r"2 of 7 query embeddings .* the model has diverged"):
        relevant_ranks(queries, corpus, relevance(GRADES, IGNORED), chunk_size=2)


def test_one_query_with_hundreds_of_answers() -> None:
    """Limits are padded for a chunk of queries only; numbers are kept for each query's own."""
    generator = torch.Generator().manual_seed(0)
    queries = Embeddings(torch.randn(3, 4, generator=generator))
    corpus = Embeddings(torch.randn(400, 4, generator=generator))
    judged = relevance([{1: 1}, dict.fromkeys(range(0, 400, 2), 1), {2: 1}], [[], [], []])
    ranks = relevant_ranks(queries, corpus, judged, chunk_size=2).ranks.numpy()
    order = np.argsort(-similarity(queries, corpus)[1].numpy(), kind="stable")
    place = np.empty(400, dtype=int)
    place[order] = np.arange(1, 401)
    assert (np.sort(ranks[1:-1]) == np.sort(place[::2])).all()
