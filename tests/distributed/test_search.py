"""Search of a corpus in shards, against one plain product of matrices."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.worlds import World
from vembed_ds.distributed import comm
from vembed_ds.errors import VembedError
from vembed_ds.evaluation import search as module
from vembed_ds.evaluation.search import NO_ROW, search
from vembed_ds.similarity import Embeddings

NUM_QUERIES, NUM_DOCUMENTS, WIDTH = 7, 23, 6
SHARDS = {1: [(0, 23)], 2: [(0, 5), (5, 23)]}  # of unequal lengths
IGNORED = [[3], [], [0, 1, 22], [], [5], [], [4, 6]]


def make(kind: str, num: int, *, seed: int) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    if kind == "vectors":
        return Embeddings(torch.randn(num, WIDTH, generator=generator))
    lengths = torch.randint(1, 4, (num, 1), generator=generator)
    values = torch.randn(num, 3, WIDTH, generator=generator)
    return Embeddings(values, torch.arange(3)[None] < lengths)


def case(
    *,
    kind: str = "vectors",
    k: int = 5,
    chunk_size: int = 3,
    block: int = 12,
    repeat: bool = False,
    poison: int | None = None,
    num_documents: int = NUM_DOCUMENTS,
    widths: tuple[int, int] = (WIDTH, WIDTH),
    shards: list[tuple[int, int]] | None = None,
    **options: Any,
) -> Any:
    """What a rank runs: scores and rows, or the error."""
    module.BLOCK_ELEMENTS = block  # of similarities: blocks of few documents
    queries, corpus = make(kind, NUM_QUERIES, seed=0), make(kind, num_documents, seed=1)
    queries, corpus = queries.prefix(widths[0]), corpus.prefix(widths[1])
    if repeat:  # every document stands three times
        corpus = corpus.rows([row // 3 for row in range(num_documents)])
    if poison is not None:
        corpus.values[poison] = torch.nan
    shards = shards or SHARDS[comm.world_size()]
    shard = corpus.rows(slice(*shards[comm.rank()]))
    try:
        found = search(queries, shard, k=k, chunk_size=chunk_size, **options)
    except (VembedError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return found.scores, found.rows


def plain(*, kind: str, k: int, repeat: bool, ignored: Any, reduction: str) -> Any:
    queries, corpus = make(kind, NUM_QUERIES, seed=0), make(kind, NUM_DOCUMENTS, seed=1)
    if repeat:
        corpus = corpus.rows([row // 3 for row in range(NUM_DOCUMENTS)])
    if kind == "vectors":
        unit = torch.nn.functional.normalize
        scores = unit(queries.values.double()) @ unit(corpus.values.double()).T
    else:
        scores = torch.tensor(
            [
                [maxsim(queries, q, corpus, d, reduction) for d in range(NUM_DOCUMENTS)]
                for q in range(NUM_QUERIES)
            ]
        )
    for query, rows in enumerate(ignored or []):
        scores[query, rows] = -torch.inf
    values, rows = scores.sort(dim=1, descending=True, stable=True)
    values, rows = values[:, :k], rows[:, :k]
    return values.float(), torch.where(values > -torch.inf, rows, NO_ROW)


def maxsim(queries: Embeddings, q: int, corpus: Embeddings, d: int, reduction: str) -> float:
    assert queries.mask is not None
    assert corpus.mask is not None
    tokens = queries.values[q][queries.mask[q]].double(), corpus.values[d][corpus.mask[d]].double()
    cosine = torch.nn.functional.cosine_similarity(tokens[0][:, None], tokens[1][None], dim=-1)
    best = cosine.max(dim=1).values
    return float(best.mean() if reduction == "mean" else best.sum())


def on_ranks(world: Callable[[int], World], size: int, **options: Any) -> list[Any]:
    if size == 1:
        return [case(**options)]
    return world(size).run("tests.distributed.test_search:case", **options)


@pytest.fixture(autouse=True)
def _block_elements() -> Any:
    elements = module.BLOCK_ELEMENTS
    yield
    module.BLOCK_ELEMENTS = elements


def agree(found: Any, expected: Any) -> None:
    assert found[0].dtype == torch.float32
    assert found[1].dtype == torch.int64
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=2e-6)
    assert found[1].tolist() == expected[1].tolist()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["vectors", "tokens"])
@pytest.mark.parametrize("ignored", [None, IGNORED], ids=["all", "ignored"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equals_one_product(
    world: Callable[[int], World], world_size: int, kind: str, ignored: Any, reduction: str
) -> None:
    for k, chunk_size, block in ((1, 1, 1), (5, 3, 12), (NUM_DOCUMENTS + 2, 100, 2**24)):
        options = {"kind": kind, "k": k, "ignored": ignored, "reduction": reduction}
        expected = plain(**options, repeat=False)
        for found in on_ranks(world, world_size, **options, chunk_size=chunk_size, block=block):
            width = min(k, NUM_DOCUMENTS)
            agree((found[0][:, :width], found[1][:, :width]), expected)
            assert (found[1][:, width:] == NO_ROW).all()
            assert (found[0][:, width:] == -torch.inf).all()


@pytest.mark.parametrize("world_size", [1, 2])
def test_equal_scores_come_in_row_order(world: Callable[[int], World], world_size: int) -> None:
    """Blocks of one shape round alike, so that equal documents have equal scores."""
    expected = plain(kind="vectors", k=7, repeat=True, ignored=None, reduction="mean")
    assert (expected[0][:, 1:] == expected[0][:, :-1]).any()
    shards = [(0, 12), (12, 23)] if world_size == 2 else None
    for found in on_ranks(
        world, world_size, k=7, repeat=True, chunk_size=7, block=7, shards=shards
    ):
        agree(found, expected)


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")
def test_equal_scores_of_faiss_come_in_row_order() -> None:
    documents = torch.eye(3)[[0, 1, 0, 0, 2, 0]]
    query = Embeddings(torch.tensor([[1.0, 0.0, 0.5]]))
    for ignored, expected in ((None, [0, 2, 3, 5, 4]), ([[2]], [0, 3, 5, 4, 1])):
        found = search(
            query, Embeddings(documents), k=5, chunk_size=1, ignored=ignored, backend="faiss"
        )
        assert found.rows.tolist() == [expected]


def test_a_rank_without_documents(world: Callable[[int], World]) -> None:
    expected = plain(kind="tokens", k=5, repeat=False, ignored=IGNORED, reduction="mean")
    for shards in ([(0, 0), (0, 23)], [(0, 23), (23, 23)]):
        for found in on_ranks(world, 2, kind="tokens", ignored=IGNORED, shards=shards):
            agree(found, expected)


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("ignored", [None, IGNORED], ids=["all", "ignored"])
@pytest.mark.parametrize("backend", ["faiss", "faiss:HNSW32"])
def test_faiss_finds_the_same(
    world: Callable[[int], World], world_size: int, ignored: Any, backend: str
) -> None:
    """So few documents that the approximate index misses none."""
    expected = plain(kind="vectors", k=5, repeat=False, ignored=ignored, reduction="mean")
    for found in on_ranks(world, world_size, ignored=ignored, backend=backend):
        agree(found, expected)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_documents": 0}, "DataError: the corpus is empty: there is no document to search"),
        ({"widths": (6, 5)}, r"ValueError: embeddings of shapes \(7, 6\) and \(\d+, 5\)"),
        ({"ignored": [[1]]}, "ValueError: 7 queries, but 1 lists of ignored rows"),
        ({"backend": "scann"}, "ConfigError: backend=scann: unknown; choose exact, faiss or"),
        (
            {"backend": "faiss", "kind": "tokens"},
            "ConfigError: backend=faiss: faiss compares single vectors, and this is a late-inter",
        ),
        ({"backend": "faiss:Nonsense"}, "ConfigError: backend=faiss:Nonsense: faiss cannot make"),
        ({"backend": "faiss:IVF64,Flat"}, "cannot be built from .* documents"),
    ],
)
def test_what_cannot_be_searched(
    world: Callable[[int], World], world_size: int, options: dict[str, Any], message: str
) -> None:
    if "faiss:" in options.get("backend", ""):
        pytest.importorskip("faiss")
    if options.get("num_documents") == 0 and world_size == 2:
        options = {**options, "shards": [(0, 0), (0, 0)]}
    for error in on_ranks(world, world_size, **options):
        assert isinstance(error, str)
        assert re.search(message, error), error


def test_documents_that_are_not_finite_stop_every_rank(world: Callable[[int], World]) -> None:
    (alone,) = on_ranks(world, 1, poison=9)
    assert alone.startswith("VembedError: 1 of 23 document embeddings are NaN or infinite")
    other, own = on_ranks(world, 2, poison=9)
    assert own.startswith("VembedError: 1 of 18 document embeddings are NaN or infinite")
    assert other.startswith("DistributedError: rank 1 failed: 1 of 18 document embeddings")


def test_a_missing_faiss_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert "faiss is not installed; run pip install 'vembed-ds[faiss]'" in case(backend="faiss")


def test_many_equal_scores_are_cut_in_row_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of equal ones ``topk`` chooses depends on device and size; here the last ones."""
    topk = torch.Tensor.topk

    def last_ones(self: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, columns = topk(self.flip(1), k)
        return values, self.shape[1] - 1 - columns

    monkeypatch.setattr(torch.Tensor, "topk", last_ones)
    queries, corpus = Embeddings(torch.ones(3, 4)), Embeddings(torch.ones(400, 4))
    corpus.values[[7, 300], 0] = 0.5  # less similar
    found = search(queries, corpus, k=9, chunk_size=2)
    assert found.rows.tolist() == [[0, 1, 2, 3, 4, 5, 6, 8, 9]] * 3
