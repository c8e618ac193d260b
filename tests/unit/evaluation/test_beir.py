"""Folders of BEIR: what is read, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from vembed_ds.data.processors import EncodedItem, ItemProcessor
from vembed_ds.data.records import Item
from vembed_ds.errors import DataError
from vembed_ds.evaluation.beir import beir_task, is_beir
from vembed_ds.evaluation.tasks import RetrievalTask

CORPUS = [
    {"_id": "d1", "title": "Rice", "text": "boil it", "metadata": {"url": "x"}},
    {"_id": "d2", "title": "", "text": "the capital of France", "metadata": {"url": "y"}},
    {"_id": "d3", "title": "Paris", "text": "", "metadata": {"url": "z"}},
    {"_id": "7", "title": "Echo", "text": "an argument", "metadata": {"url": "z"}},
    {"_id": "8", "title": "Other", "text": "of the same id only", "metadata": {"url": "z"}},
]
QUERIES = [
    {"_id": "q1", "text": "how to cook rice"},
    {"_id": "q2", "text": "Paris"},
    {"_id": "7", "text": "an argument"},
    {"_id": "8", "text": "another text"},
    {"_id": "q5", "text": "of the training split"},
]
QRELS = [
    ("q1", "d1", 2),
    ("q1", "d2", 0),
    ("q2", "d3", 1),
    ("q2", "d2", 3),
    ("7", "d1", 1),
    ("8", "7", 1),
]


class NoProcessor(ItemProcessor):
    """Nothing is encoded here."""

    def encode(self, item: Item, *, origin: str, augment_seed: int | None) -> EncodedItem:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_beir(
    folder: Path,
    *,
    corpus: Sequence[dict[str, Any]] = CORPUS,
    queries: Sequence[dict[str, Any]] = QUERIES,
    **qrels: Sequence[tuple[str, str, Any]],
) -> Path:
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels").mkdir()
    for split, lines in (qrels or {"test": QRELS, "train": [("q5", "d1", 1)]}).items():
        text = "query-id\tcorpus-id\tscore\n"
        text += "".join(f"{query}\t{document}\t{score}\n" for query, document, score in lines)
        (folder / "qrels" / f"{split}.tsv").write_text(text)
    return folder


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., RetrievalTask]:
    """Writes a folder and reads it."""

    def run(
        *, split: str | None = None, leave_out: bool = False, image_root: str = "", **content: Any
    ) -> RetrievalTask:
        return beir_task(
            write_beir(tmp_path, **content),
            split=split,
            processor=NoProcessor(),
            leave_out_unanswered=leave_out,
            image_root=image_root,
            instructions={"query": "ask: ", "positive": "tell: "},
        )

    return run


def test_texts_and_judgments(read: Callable[..., RetrievalTask], tmp_path: Path) -> None:
    task = read()
    assert task.retrieval_mode == "t2t"
    queries = [task.queries.item(number) for number in range(len(task.queries))]
    assert [query.text for query in queries] == [
        "how to cook rice",
        "Paris",
        "an argument",
        "another text",
    ]
    assert queries[0].instruction == "ask: "
    documents = [task.documents.item(number) for number in range(len(task.documents))]
    texts = [
        "Rice boil it",
        "the capital of France",
        "Paris",
        "Echo an argument",
        "Other of the same id only",
    ]
    assert [document.text for document in documents] == texts
    assert documents[0].instruction == "tell: "
    found = task.relevance
    assert found.pairs.queries.tolist() == [0, 1, 1, 2, 3]
    assert found.pairs.rows.tolist() == [0, 1, 2, 0, 3]
    assert found.grades.tolist() == [2, 3, 1, 1, 1]
    assert task.origin == f"{tmp_path} (test)"
    assert task.notes == ("1 queries of other splits are left out",)


def test_other_texts_of_the_same_ids_have_another_fingerprint(
    read: Callable[..., RetrievalTask], tmp_path: Path
) -> None:
    before = read().fingerprint
    for number, (corpus, queries) in enumerate(
        [
            ([{**CORPUS[0], "text": "changed"}, *CORPUS[1:]], QUERIES),
            ([{**CORPUS[0], "title": "changed"}, *CORPUS[1:]], QUERIES),
            (CORPUS, [{**QUERIES[0], "text": "changed"}, *QUERIES[1:]]),
        ]
    ):
        (folder := tmp_path / str(number)).mkdir()
        write_beir(folder, corpus=corpus, queries=queries)
        task = beir_task(folder, split=None, processor=NoProcessor(), image_root="")
        assert task.fingerprint != before
    (same := tmp_path / "same").mkdir()
    write_beir(same, corpus=[{**row, "metadata": {"url": ""}} for row in CORPUS])
    assert beir_task(same, split=None, processor=NoProcessor(), image_root="").fingerprint == before


def test_a_query_does_not_find_itself(read: Callable[..., RetrievalTask]) -> None:
    """The document of the same id and text; not one that only has the same id."""
    ignored = read().relevance.ignored
    assert (ignored.queries.tolist(), ignored.rows.tolist()) == ([2], [3])


def test_a_document_that_is_judged_relevant_competes(read: Callable[..., RetrievalTask]) -> None:
    task = read(test=[*QRELS, ("7", "7", 1), ("q5", "d1", 1)])
    assert task.relevance.ignored.queries.tolist() == []
    assert task.notes == ()


def test_splits(read: Callable[..., RetrievalTask]) -> None:
    task = read(split="train")
    assert [task.queries.item(n).text for n in range(len(task.queries))] == [
        "of the training split"
    ]
    assert task.notes == ("4 queries of other splits are left out",)


def test_the_only_split_needs_no_name(read: Callable[..., RetrievalTask]) -> None:
    assert len(read(dev=[(query["_id"], "d1", 1) for query in QUERIES]).queries) == 5


def test_images(read: Callable[..., RetrievalTask], tmp_path: Path) -> None:
    corpus = []
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        corpus.append({"_id": name, "image": f"{name}.png"})
    queries = [{"_id": "q1", "text": "a"}]
    task = read(corpus=corpus, queries=queries, test=[("q1", "b", 1)], image_root=str(tmp_path))
    assert task.retrieval_mode == "t2i"
    assert str(task.documents.item(1).image) == str(tmp_path / "b.png")


def test_folders_are_told_apart(tmp_path: Path) -> None:
    assert not is_beir(tmp_path)
    assert not is_beir("pairs.jsonl")
    assert is_beir(write_beir(tmp_path))


def test_queries_without_a_relevant_document(read: Callable[..., RetrievalTask]) -> None:
    """One is judged, but nothing is relevant; the other is in no split."""
    task = read(
        test=[("q1", "d1", 1), ("q2", "d2", 0)],
        leave_out=True,
        dev=[("7", "d1", 1), ("8", "d1", 1)],
    )
    assert [task.queries.item(n).text for n in range(len(task.queries))] == ["how to cook rice"]
    assert task.notes[0] == "2 queries of other splits are left out"
    assert task.notes[1].startswith("2 of 3 queries are left out: they have no relevant document (")
    assert "queries.jsonl, record 1" in task.notes[1]
    assert "queries.jsonl, record 4" in task.notes[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"corpus": [*CORPUS, CORPUS[1]]}, r"corpus.jsonl: _id 'd2' stand there twice \(1 in all\)"),
        ({"queries": [*QUERIES, QUERIES[0]]}, r"queries.jsonl: _id 'q1' stand there twice"),
        ({"corpus": []}, r"corpus.jsonl: holds no records"),
        ({"corpus": [{"_id": "d1", "body": "x"}]}, r"the columns are '_id', 'body'; needed are '_id' and 'text'"),
        ({"corpus": [{"_id": None, "text": "x"}, {"_id": "1", "text": "x"}]}, r"record 0: _id is missing"),
        ({"test": [("q1", "d9", 1)]}, r"test.tsv: 1 of the column corpus-id are not in corpus.jsonl: 'd9'"),
        ({"test": [("q9", "d1", 1)]}, r"test.tsv: 1 of the column query-id are not in queries.jsonl: 'q9'"),
        ({"test": [*QRELS, QRELS[0]]}, r"test.tsv, line 8: \('q1', 'd1'\) is judged twice; keep one"),
        ({"test": [("q1", "d1", 0.5)]}, r"line 2: the score '0.5' is no whole number"),
        ({"test": [("q1", "d1", "")]}, r"line 2: the score '' is no whole number"),
        ({"split": "dev"}, r"--split dev: there is no qrels/dev.tsv; choose one of test, train"),
        ({"dev": QRELS, "train": QRELS}, r"--split test: there is no qrels/test.tsv"),
        ({"test": QRELS}, r"1 of 5 queries have no relevant document \(.*queries.jsonl, record 4\)"),
        ({"test": [("q1", "d1", 0)]}, r"all of 5 queries have no relevant document"),
    ],
)  # fmt: skip
def test_what_is_wrong(
    read: Callable[..., RetrievalTask], content: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(**content)


def test_missing_files(tmp_path: Path) -> None:
    def problem() -> str:
        with pytest.raises(DataError) as caught:
            beir_task(tmp_path, split=None, processor=NoProcessor(), image_root="")
        return str(caught.value)

    write_beir(tmp_path)
    (tmp_path / "qrels" / "test.tsv").write_text("q1 0 d1 1\n")  # as TREC has them
    assert "the first line is 'q1 0 d1 1'; it must name the columns 'query-id'" in problem()
    for file in (tmp_path / "qrels").iterdir():
        file.unlink()
    assert "qrels: holds no SPLIT.tsv, such as test.tsv; give judgments" in problem()
    (tmp_path / "queries.jsonl").unlink()
    assert "queries.jsonl: file does not exist; a folder of BEIR has corpus.jsonl" in problem()
