"""Training's evaluation is the same for any number of ranks, batch size and workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from zlib import crc32

import datasets
import numpy as np
import pytest
import torch

from tests.worlds import World
from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.processors import EncodedItem, ItemProcessor, content_key, stream_of
from vembed_ds.data.records import Item, RecordReader
from vembed_ds.errors import DataError, VembedError
from vembed_ds.evaluation.measuring import training_metrics
from vembed_ds.evaluation.tasks import pairs_task
from vembed_ds.similarity import Embeddings

WIDTH = 4
RECALL_K = (1, 2, 4)
# 7 records: caption "a" has two images, image "0" two captions, and one record stands twice.
PAIRS = [("a", "0"), ("b", "0"), ("a", "1"), ("c", "2"), ("d", "3"), ("e", "4"), ("d", "3")]


class ContentProcessor(ItemProcessor):
    """Encodes an item as a vector drawn from its content; refuses the text ``bad``."""

    def encode(self, item: Item, *, origin: str, augment_seed: int | None) -> EncodedItem:
        assert augment_seed is None  # evaluation never augments
        if item.text == "bad":
            raise DataError(f"{origin}: bad text")
        vector = vector_of(content_key(item))
        return EncodedItem(stream_of(item, origin=origin), {"features": vector})


def vector_of(key: str) -> np.ndarray:
    return np.random.default_rng(crc32(key.encode())).normal(size=WIDTH).astype(np.float32)


def make_dataset(pairs: Sequence[tuple[str, Any]], *, mode: str) -> PairDataset:
    table = datasets.Dataset.from_dict(
        {"query": [first for first, _ in pairs], "positive": [last for _, last in pairs]}
    )
    reader = RecordReader(
        table.column_names,
        retrieval_mode=mode,
        column_mapping={},
        image_root="/pictures",
        origin="val.jsonl",
    )
    return PairDataset(table, reader=reader, processor=ContentProcessor(), seed=0)


def evaluate(
    pairs: Sequence[tuple[str, Any]],
    *,
    mode: str = "t2i",
    batch_size: int = 2,
    num_workers: int = 0,
    recall_k: Sequence[int] = RECALL_K,
    poison: float | None = None,
) -> dict[str, Any]:
    """What a rank runs: the metrics or the error, and the calls of ``embed``."""
    calls: list[tuple[str, int]] = []

    def embed(items: Sequence[EncodedItem]) -> Embeddings:
        assert not torch.is_grad_enabled()
        calls.append((items[0].stream, len(items)))
        rows = torch.from_numpy(np.stack([item.inputs["features"] for item in items]))
        return Embeddings(rows if poison is None else torch.where(rows == poison, torch.nan, rows))

    try:
        metrics = training_metrics(
            pairs_task(make_dataset(pairs, mode=mode)),
            embed=embed,
            batch_size=batch_size,
            ks=recall_k,
            num_workers=num_workers,
        )
    except VembedError as error:
        return {"error": f"{type(error).__name__}: {error}", "calls": calls}
    return {"metrics": metrics, "calls": calls}


def brute_force(pairs: Sequence[tuple[str, str]], *, mode: str) -> dict[str, float]:
    """Loops over distinct contents, in float64."""
    streams = {"t": lambda value: Item(text=value), "i": lambda v: Item(image=f"/pictures/{v}")}
    vectors = [
        {value: vector_of(content_key(streams[letter](value))).astype(float) for value in side}
        for letter, side in zip((mode[0], mode[-1]), zip(*pairs, strict=True), strict=True)
    ]
    ranks = []
    for query, q in vectors[0].items():
        right = {document for first, document in pairs if first == query}
        cosine = {
            key: float(q @ d / np.linalg.norm(q) / np.linalg.norm(d))
            for key, d in vectors[1].items()
        }
        best = max(cosine[document] for document in right)
        others = [key for key in cosine if key not in right and (mode, key) != ("i2i", query)]
        ranks.append(1 + sum(cosine[key] >= best for key in others))
    return {
        **{f"recall@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in RECALL_K},
        "mrr": sum(1 / rank for rank in ranks) / len(ranks),
        "num_queries": len(vectors[0]),
        "num_documents": len(vectors[1]),
    }


def on_ranks(world: Callable[[int], World], size: int, pairs: Any, **options: Any) -> list[Any]:
    if size == 1:
        return [evaluate(pairs, **options)]
    return world(size).run("tests.distributed.test_evaluation:evaluate", pairs=pairs, **options)


def test_reference_is_not_trivial() -> None:
    expected = brute_force(PAIRS, mode="t2i")
    assert expected["num_queries"] == 5
    assert expected["num_documents"] == 5
    assert 0 < expected["recall@1"] < expected["recall@4"]


@pytest.mark.parametrize("mode", ["t2i", "t2t", "i2t", "i2i"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("world_size", [1, 2])
def test_equals_brute_force(
    world: Callable[[int], World], world_size: int, batch_size: int, mode: str
) -> None:
    results = on_ranks(world, world_size, PAIRS, mode=mode, batch_size=batch_size)
    for result in results:
        assert result["metrics"] == pytest.approx(brute_force(PAIRS, mode=mode), rel=1e-12)
        assert result["calls"] == results[0]["calls"]  # equal numbers of forward passes
    share = -(-5 // world_size)  # of the distinct queries, and of the distinct documents
    assert len(results[0]["calls"]) == 2 * -(-share // batch_size)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_query_does_not_find_itself(world: Callable[[int], World], world_size: int) -> None:
    """Images of one thing, each searched with the one before: every query is a document too."""
    pairs = [(str(number), str((number + 1) % 6)) for number in range(6)]
    for result in on_ranks(world, world_size, pairs, mode="i2i"):
        assert result["metrics"] == pytest.approx(brute_force(pairs, mode="i2i"))
        assert result["metrics"]["recall@1"] > 0  # nothing would be found before the query itself
    same = [*pairs, ("9", "9")]
    for result in on_ranks(world, world_size, same, mode="i2i"):
        assert result["error"] == (
            "DataError: val.jsonl, record 6: query and positive hold the same, so that every "
            "model finds it; evaluate on other pairs"
        )


def test_more_ranks_than_queries(world: Callable[[int], World]) -> None:
    """One distinct query for two ranks: both shards wrap around."""
    pairs = [("a", str(number)) for number in range(5)]
    for result in on_ranks(world, 2, pairs):
        assert result["metrics"] == pytest.approx(brute_force(pairs, mode="t2i"))


def test_workers_change_nothing() -> None:
    """In this process only: the ranks of a test world may not have children."""
    alone, helped = evaluate(PAIRS), evaluate(PAIRS, num_workers=2)
    assert helped == alone
    assert helped["metrics"] == pytest.approx(brute_force(PAIRS, mode="t2i"))


@pytest.mark.parametrize(
    ("text", "message"), [(" ", "is a blank text"), ("bad", "record 5, query: bad text")]
)
def test_a_bad_record_stops_every_rank(
    world: Callable[[int], World], text: str, message: str
) -> None:
    """Blank: found when the records are compared; bad: when they are encoded."""
    pairs = [*PAIRS[:5], (text, "4"), PAIRS[6]]
    (alone,) = on_ranks(world, 1, pairs)
    assert alone["error"].startswith("DataError: val.jsonl, record 5")
    assert message in alone["error"]
    other, own = on_ranks(world, 2, pairs)
    assert own["error"] == alone["error"]
    assert other["error"].startswith("DistributedError: rank 1 failed: val.jsonl, record 5")


def test_embeddings_that_are_not_finite_stop_every_rank(world: Callable[[int], World]) -> None:
    poison = float(vector_of(content_key(Item(text="e")))[0])  # a record of rank 1
    for result in on_ranks(world, 2, PAIRS, poison=poison):
        assert result["error"].startswith("VembedError: 1 of 5 query embeddings are NaN")


@pytest.mark.parametrize("world_size", [1, 2])
def test_recall_that_every_model_reaches_is_refused(
    world: Callable[[int], World], world_size: int
) -> None:
    for result in on_ranks(world, world_size, PAIRS, recall_k=[1, 5]):
        assert result["error"] == (
            "DataError: eval_recall_k=5: val.jsonl has 5 distinct documents, so that Recall@5 is "
            "always 100 %; choose k below 5 or evaluate on more data"
        )
        assert result["calls"] == []  # before anything is embedded
