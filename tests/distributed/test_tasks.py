"""Retrieval tasks on one rank and on two: pairs, more documents, labels; against loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from tests.distributed.test_evaluation import ContentProcessor, vector_of
from tests.worlds import World
from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.processors import EncodedItem, content_key
from vembed_ds.data.records import Item, RecordReader
from vembed_ds.errors import VembedError
from vembed_ds.evaluation.embedding import embed_share, gather_shares
from vembed_ds.evaluation.items import corpus_columns, open_items
from vembed_ds.evaluation.measuring import measure, neighbours
from vembed_ds.evaluation.ranks import relevant_ranks
from vembed_ds.evaluation.scoring import first_rank_values, means
from vembed_ds.evaluation.tasks import pairs_task
from vembed_ds.similarity import Embeddings

# Caption "a" has two images, image "0" two captions, and one record stands twice.
PAIRS = [("a", "0"), ("b", "0"), ("a", "1"), ("c", "2"), ("d", "3"), ("e", "4"), ("d", "3")]
LABELS = [1, 2, 1, 2, 3, 3, 3]
CORPUS = ["9", "0", "8", "7", "8"]  # one of the pairs' and one that stands twice
ROOT = "/pictures"


def make_pairs(
    pairs: Sequence[tuple[str, str]], *, mode: str, labels: Sequence[int] | None
) -> PairDataset:
    columns: dict[str, Any] = dict(
        zip(("query", "positive"), zip(*pairs, strict=True), strict=True)
    )
    if labels is not None:
        columns["label"] = labels
    table = datasets.Dataset.from_dict({name: list(column) for name, column in columns.items()})
    reader = RecordReader(
        table.column_names, retrieval_mode=mode, column_mapping={}, image_root=ROOT, origin="val.jsonl"
    )  # fmt: skip
    return PairDataset(table, reader=reader, processor=ContentProcessor(), seed=0)


def make_corpus(
    pairs: PairDataset, values: Sequence[str], labels: Sequence[int] | None
) -> PairDataset:
    letter = pairs.reader.letters["positive"]
    column = {"t": "text", "i": "image"}[letter]
    rows: dict[str, Any] = {column: list(values)}
    if labels is not None:
        rows["label"] = list(labels)
    table = datasets.Dataset.from_dict(rows)
    return open_items(
        table,
        letter=letter,
        columns=corpus_columns(pairs.reader, table.column_names),
        origin="corpus.jsonl",
        processor=ContentProcessor(),
        image_root=ROOT,
    )


def case(
    *,
    pairs: Sequence[tuple[str, str]] = PAIRS,
    mode: str = "t2i",
    corpus: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    corpus_labels: Sequence[int] | None = None,
    by_label: bool = False,
    leave_out: bool = False,
    batch_size: int = 2,
    num_workers: int = 0,
    ks: Sequence[int] | None = None,
    dims: Sequence[int] = (),
) -> Any:
    """What a rank runs: mean metrics and what else a task says, or the error."""
    data = make_pairs(pairs, mode=mode, labels=labels)
    more = None if corpus is None else make_corpus(data, corpus, corpus_labels)

    def embed(items: Sequence[EncodedItem]) -> Embeddings:
        assert not torch.is_grad_enabled()
        assert 0 < len(items) <= batch_size
        return Embeddings(torch.from_numpy(np.stack([i.inputs["features"] for i in items])))

    if ks is not None:
        return measured(data, ks=ks, dims=dims, embed=embed)
    try:
        task = pairs_task(data, corpus=more, by_label=by_label, leave_out_unanswered=leave_out)
        options: Any = {"embed": embed, "batch_size": batch_size, "num_workers": num_workers}
        queries = gather_shares(embed_share(task.queries, **options))
        shard = embed_share(task.documents, **options)
    except VembedError as error:
        return f"{type(error).__name__}: {error}"
    ranks = relevant_ranks(queries, shard, task.relevance, chunk_size=3).ranks
    return {
        "metrics": means(first_rank_values(ranks, task.relevance, ks=(1, 2, 4))),
        "size": (len(task.queries), len(task.documents)),
        "fingerprint": task.fingerprint,
        "notes": task.notes,
        "whole": gather_shares(shard).values,
    }


def measured(data: PairDataset, *, ks: Sequence[int], dims: Sequence[int], embed: Any) -> Any:
    """All metrics, and the best documents of every query."""
    task = pairs_task(data)
    try:
        found = measure(task, embed=embed, ks=ks, dims=dims, batch_size=2, num_workers=0)
    except VembedError as error:
        return f"{type(error).__name__}: {error}"
    near = neighbours(task, found, number=3)
    return {
        "metrics": found.metrics,
        "rows": near.rows.tolist(),
        "wrong": near.wrong_scores.tolist(),
    }


def vectors(values: Sequence[str], letter: str) -> dict[str, np.ndarray]:
    items = [Item(text=v) if letter == "t" else Item(image=f"{ROOT}/{v}") for v in values]
    return {v: vector_of(content_key(i)).astype(float) for v, i in zip(values, items, strict=True)}


def brute_force(
    pairs: Sequence[tuple[str, str]] = PAIRS,
    *,
    mode: str = "t2i",
    corpus: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    corpus_labels: Sequence[int] | None = None,
    by_label: bool = False,
) -> dict[str, float]:
    asking = vectors([query for query, _ in pairs], mode[0])
    found = vectors([d for _, d in pairs] + list(corpus or []), mode[-1])
    classes: dict[str, set[int]] = {name: set() for name in found}
    if by_label:
        for name, label in [
            *((d, label) for (_, d), label in zip(pairs, labels or [], strict=True)),
            *(zip(corpus or [], corpus_labels, strict=True) if corpus_labels else ()),
        ]:
            classes[name].add(label)
    ranks = []
    for query, q in asking.items():
        right = {d for first, d in pairs if first == query}
        if by_label:
            own = {
                label
                for (first, _), label in zip(pairs, labels or [], strict=True)
                if first == query
            }
            right = {d for d in found if classes[d] & own}
        itself = {query} if mode[0] == mode[-1] else set()
        cosine = {d: q @ v / np.linalg.norm(q) / np.linalg.norm(v) for d, v in found.items()}
        if not (right := right - itself):
            continue
        best = max(cosine[d] for d in right)
        ranks.append(1 + sum(cosine[d] >= best for d in found if d not in right | itself))
    return {
        **{f"recall@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 2, 4)},
        "mrr": sum(1 / rank for rank in ranks) / len(ranks),
    }


def on_ranks(world: Callable[[int], World], size: int, **options: Any) -> list[Any]:
    if size == 1:
        return [case(**options)]
    return world(size).run("tests.distributed.test_tasks:case", **options)


# Images of one class each, searched with each other: query and positive are the same.
SELF = [(str(number), str(number)) for number in range(9)]
SELF_LABELS = [0, 0, 1, 1, 1, 2, 2, 0, 1]
CASES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "pairs": ({}, (5, 5)),
    "text to text": ({"mode": "t2t"}, (5, 5)),
    "more documents": ({"corpus": CORPUS}, (5, 8)),
    "more texts": ({"corpus": CORPUS, "mode": "t2t"}, (5, 8)),
    "labels": ({"labels": LABELS, "by_label": True}, (5, 5)),
    "labels of more documents": (
        {"labels": LABELS, "by_label": True, "corpus": CORPUS, "corpus_labels": [1, 2, 3, 1, 3]},
        (5, 8),
    ),
    "more documents without labels": (
        {"labels": LABELS, "by_label": True, "corpus": CORPUS},
        (5, 8),
    ),
    "itself": ({"pairs": SELF, "labels": SELF_LABELS, "by_label": True, "mode": "i2i"}, (9, 9)),
}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_equals_brute_force(world: Callable[[int], World], world_size: int, name: str) -> None:
    options, size = CASES[name]
    (alone,) = on_ranks(world, 1, **options)
    for batch_size in (1, 3, 100):
        for found in on_ranks(world, world_size, **options, batch_size=batch_size):
            expected = brute_force(**options)
            assert {key: found["metrics"][key] for key in expected} == pytest.approx(expected)
            assert found["size"] == size
            assert found["fingerprint"] == alone["fingerprint"]
            assert torch.equal(found["whole"], alone["whole"]), "in order, whatever the shares"
    assert 0 < expected["mrr"] < 1


def test_what_is_measured_has_one_fingerprint() -> None:
    """Other queries, documents or answers have another."""
    cases: list[dict[str, Any]] = [
        {},
        {"corpus": CORPUS},
        {"pairs": PAIRS[1:]},
        {"pairs": PAIRS[::-1]},
    ]
    cases.append({"labels": LABELS, "by_label": True})
    found = [case(**options)["fingerprint"] for options in cases]
    assert len(set(found)) == len(cases)
    assert case(labels=LABELS)["fingerprint"] == found[0], "labels do not matter by themselves"


def test_more_ranks_than_items(world: Callable[[int], World]) -> None:
    pairs = [("a", "0")]
    (alone,) = on_ranks(world, 1, pairs=pairs, corpus=["1"])
    for found in on_ranks(world, 2, pairs=pairs, corpus=["1"]):
        assert found["metrics"] == alone["metrics"]
        assert found["size"] == (1, 2)


def test_workers_change_nothing() -> None:
    """In this process only: the ranks of a test world may not have children."""
    pairs = [(str(number), str(number % 40)) for number in range(140)]
    alone, helped = case(pairs=pairs), case(pairs=pairs, num_workers=1)
    assert alone["metrics"] == helped["metrics"]
    assert torch.equal(alone["whole"], helped["whole"])


@pytest.mark.parametrize("world_size", [1, 2])
def test_queries_that_nothing_answers(world: Callable[[int], World], world_size: int) -> None:
    options: Any = {
        "pairs": SELF,
        "labels": [0, 0, 1, 1, 1, 5, 6, 7, 8],
        "mode": "i2i",
        "by_label": True,
    }
    for error in on_ranks(world, world_size, **options):
        assert error == (
            "DataError: val.jsonl: 4 of 9 queries have no other document of their class (val.jsonl, "
            "record 5, val.jsonl, record 6, val.jsonl, record 7 and 1 more): no model could find one; "
            "correct the data, or leave them out with --ignore_queries_without_answers"
        )
    expected = brute_force(**options)
    for found in on_ranks(world, world_size, **options, leave_out=True):
        assert {key: found["metrics"][key] for key in expected} == pytest.approx(expected)
        assert found["size"] == (5, 9), "they are documents still"
        (note,) = found["notes"]
        assert note.startswith(
            "4 of 9 queries are left out: they have no other document of their class"
        )
    alone = {**options, "labels": range(9)}
    for error in on_ranks(world, world_size, **{**alone, "labels": list(range(9))}, leave_out=True):
        assert "all of 9 queries have no other document of their class" in error
        assert "nothing can be measured" in error


@pytest.mark.parametrize("world_size", [1, 2])
def test_bad_data_stops_every_rank(world: Callable[[int], World], world_size: int) -> None:
    for error in on_ranks(world, world_size, by_label=True):
        assert error.startswith(
            "ConfigError: --by_label: val.jsonl has no labels; name their column"
        )
    for error in on_ranks(world, world_size, pairs=[*SELF[:1], ("1", "2")], mode="i2i"):
        assert error.startswith("DataError: val.jsonl, record 0: query and positive hold the same")
    blank = on_ranks(world, world_size, corpus=["9", " "], mode="t2t")
    assert "corpus.jsonl, record 1, column 'text': ' ' is a blank text" in blank[-1]
    assert all("corpus.jsonl, record 1" in error for error in blank)
    bad = on_ranks(world, world_size, corpus=["9", "bad"], mode="t2t")  # found when it is encoded
    assert all("corpus.jsonl, record 1, positive: bad text" in error for error in bad)


def test_a_corpus_without_the_column() -> None:
    data = make_pairs(PAIRS, mode="t2t", labels=None)
    table = datasets.Dataset.from_dict({"passage": ["x"]})
    with pytest.raises(
        VembedError, match=r"corpus.jsonl: no column 'text'; the columns are 'passage'"
    ):
        open_items(
            table,
            letter="t",
            columns=corpus_columns(data.reader, table.column_names),
            origin="corpus.jsonl",
            processor=ContentProcessor(),
            image_root="",
        )


def test_measuring_is_the_same_on_two_ranks(world: Callable[[int], World]) -> None:
    options: Any = {"mode": "t2t", "ks": [1, 2, 4], "dims": [2, 3]}
    (alone,) = on_ranks(world, 1, **options)
    for found in on_ranks(world, 2, **options):
        assert found["metrics"] == alone["metrics"]
        assert found["rows"] == alone["rows"]
        assert found["wrong"] == pytest.approx(alone["wrong"], abs=1e-6)
    expected = brute_force(mode="t2t")
    assert {key: alone["metrics"][key] for key in expected} == pytest.approx(expected)
    of_prefixes = [
        [v for name, v in alone["metrics"].items() if name.endswith(f"_d{dim}")] for dim in (2, 3)
    ]
    assert of_prefixes[0] != of_prefixes[1]
    assert len(of_prefixes[0]) >= len(expected)


def test_neighbours_equal_sorting() -> None:
    found = case(ks=[1])
    asking, documents = (
        vectors(values, letter) for values, letter in (("abcde", "t"), ("01234", "i"))
    )
    right = {query: {d for first, d in PAIRS if first == query} for query in asking}
    for number, (query, q) in enumerate(asking.items()):
        cosine = {
            d: float(q @ v / np.linalg.norm(q) / np.linalg.norm(v)) for d, v in documents.items()
        }
        order = sorted(cosine, key=lambda d: -cosine[d])
        assert found["rows"][number] == [int(d) for d in order[:3]]
        wrong = max(cosine[d] for d in order if d not in right[query])
        assert found["wrong"][number] == pytest.approx(wrong, abs=1e-6)


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_cannot_be_measured(world: Callable[[int], World], world_size: int) -> None:
    for error in on_ranks(world, world_size, ks=[1, 5]):
        assert error.startswith("DataError: eval_recall_k=5: val.jsonl has 5 distinct documents")
    for error in on_ranks(world, world_size, ks=[1], dims=[2, 8]):
        assert error.startswith("ConfigError: --dims 8: the model's embeddings have 4 dimensions")
