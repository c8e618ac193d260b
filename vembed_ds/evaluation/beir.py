"""A folder as BEIR has them (Thakur 2021): ``corpus.jsonl``, ``queries.jsonl``, ``qrels/SPLIT.tsv``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch

from vembed_ds.data.columns import IMAGE, TEXT, Part, listed
from vembed_ds.data.fingerprint import own_fingerprint
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.data.readers import load_table
from vembed_ds.errors import DataError, one_line
from vembed_ds.evaluation.items import TITLE, ItemList, open_items
from vembed_ds.evaluation.ranks import Relevance
from vembed_ds.evaluation.search import Pairs
from vembed_ds.evaluation.tasks import SHOWN, RetrievalTask, answered, fingerprint

CORPUS, QUERIES, QRELS, ID = "corpus.jsonl", "queries.jsonl", "qrels", "_id"
QREL_COLUMNS = ["query-id", "corpus-id", "score"]
LETTERS: dict[frozenset[Part], str] = {
    frozenset((TEXT,)): "t",
    frozenset((IMAGE,)): "i",
    frozenset((TEXT, IMAGE)): "x",
}


def is_beir(path: str | Path) -> bool:
    """Whether a folder is laid out like BEIR's."""
    return (Path(path) / CORPUS).exists() or (Path(path) / QRELS).is_dir()


def beir_task(
    folder: Path,
    *,
    split: str | None,
    processor: ItemProcessor,
    leave_out_unanswered: bool = False,
    **options: Any,
) -> RetrievalTask:
    """Search the whole corpus with the queries that ``qrels/SPLIT.tsv`` judges.

    Texts stand in the column ``text``, images in ``image``; a document's ``title`` is put before its
    text. Grades above 0 are relevant. A document that has the id and the text of the query does not
    compete (ArguAna), unless it is judged relevant.

    Args:
        folder: The folder.
        split: Which qrels; ``None``: the only ones there are, or ``test``.
        processor: Encodes items.
        leave_out_unanswered: Leave out queries without a relevant document.
        options: Further ones of :class:`vembed_ds.data.records.RecordReader`.

    Raises:
        DataError: A file is missing or broken, an id is missing or stands there twice, or a query
            has no relevant document.
    """
    documents = _Side(folder / CORPUS, processor=processor, titled=True, **options)
    asking = _Side(folder / QUERIES, processor=processor, titled=False, **options)
    files = _qrel_files(folder)
    chosen = _chosen(files, split)
    judged = _read_qrels(files[chosen], query_ids=asking.ids, corpus_ids=documents.ids)
    elsewhere = _queries_of([file for name, file in files.items() if name != chosen])
    others = np.isin(asking.ids, elsewhere) & ~np.isin(asking.ids, judged["query-id"].unique())
    asked = np.flatnonzero(~others)  # also those that no split judges: they have no answer
    relevance = _relevance(judged, asking.ids[asked], documents.ids)
    relevance = replace(relevance, ignored=_themselves(asking, asked, documents, relevance))
    task = RetrievalTask(
        f"{folder} ({chosen})",
        f"{asking.letter}2{documents.letter}",
        ItemList("query", [(asking.dataset, asked.tolist())]),
        ItemList("positive", [(documents.dataset, range(len(documents.ids)))]),
        relevance,
        fingerprint(
            [*asking.ids[asked], *documents.ids, asking.contents, documents.contents], relevance
        ),
        (f"{others.sum()} queries of other splits are left out",) if others.any() else (),
    )
    return answered(task, leave_out=leave_out_unanswered, what="no relevant document")


class _Side:
    """``corpus.jsonl`` or ``queries.jsonl``; options of the reader besides.

    Attributes:
        table: Its rows.
        ids: ``[n]`` texts, each once.
        letter: What they are, as in ``retrieval_mode``.
        dataset: To be encoded.
    """

    def __init__(
        self, file: Path, *, processor: ItemProcessor, titled: bool, **options: Any
    ) -> None:
        if not file.exists():
            raise DataError(
                f"{file}: file does not exist; a folder of BEIR has {CORPUS}, {QUERIES} and {QRELS}/"
            )
        self.table = load_beir_table(file)
        names = self.table.column_names
        columns: dict[Part, str] = {part: part for part in (TEXT, IMAGE) if part in names}
        if not columns or ID not in names:
            raise DataError(
                f"{file}: the columns are {listed(names)}; needed are {ID!r} and 'text' or 'image'"
            )
        self.ids = _ids(self.table, file)
        self.letter = LETTERS[frozenset(columns)]
        self.dataset = open_items(
            self.table,
            letter=self.letter,
            columns=columns,
            origin=str(file),
            processor=processor,
            titled=titled and TITLE in names and TEXT in columns,
            **options,
        )

    @property
    def contents(self) -> str:
        """A hash of everything that is embedded; of images in files, of their paths."""
        return own_fingerprint(self.dataset.table)

    def text(self, row: int) -> str | None:
        """Without the title."""
        text: str | None = self.table[row].get(TEXT)
        return text


def load_beir_table(file: Path) -> datasets.Dataset:
    """A file of the folder; errors name the flag of the command.

    Raises:
        DataError: It is broken or empty.
    """
    try:
        return load_table([str(file)], key="val_data_path")
    except DataError as error:
        raise DataError(str(error).replace("val_data_path", "--data")) from error


def _ids(table: datasets.Dataset, file: Path) -> Any:
    """Texts ``[n]``.

    Raises:
        DataError: One is missing, or stands there twice.
    """
    ids = pd.Series(table.data.column(ID).to_pandas())
    if ids.isna().any():
        raise DataError(f"{file}, record {int(ids.isna().to_numpy().argmax())}: {ID} is missing")
    ids = ids.astype(str)
    if (twice := ids.duplicated()).any():
        shown = ", ".join(map(repr, ids[twice].unique()[:SHOWN]))
        raise DataError(
            f"{file}: {ID} {shown} stand there twice ({twice.sum()} in all); judgments would be of "
            "either: give every record its own"
        )
    return ids.to_numpy(dtype=object)


def _qrel_files(folder: Path) -> dict[str, Path]:
    files = {file.stem: file for file in sorted((folder / QRELS).glob("*.tsv"))}
    if not files:
        raise DataError(f"{folder / QRELS}: holds no SPLIT.tsv, such as test.tsv; give judgments")
    return files


def _chosen(files: dict[str, Path], split: str | None) -> str:
    if split is None and len(files) == 1:
        return next(iter(files))
    split = "test" if split is None else split
    if split not in files:
        raise DataError(
            f"--split {split}: there is no {QRELS}/{split}.tsv; choose one of {', '.join(files)}"
        )
    return split


def _read_qrels(file: Path, *, query_ids: Any, corpus_ids: Any) -> Any:
    """Judgments, all of whose ids are known: texts, and ``score`` as whole numbers."""
    found = _qrel_table(file)
    known = {"query-id": (query_ids, QUERIES), "corpus-id": (corpus_ids, CORPUS)}
    for column, (ids, name) in known.items():
        missing = found[column][~found[column].isin(ids)].unique()
        if len(missing):
            shown = ", ".join(map(repr, missing[:SHOWN]))
            raise DataError(
                f"{file}: {len(missing)} of the column {column} are not in {name}: {shown}; the files "
                "do not belong together: correct one of them"
            )
    twice = found.duplicated(["query-id", "corpus-id"])
    if twice.any():
        line = int(twice.to_numpy().argmax())
        pair = tuple(found.loc[line, ["query-id", "corpus-id"]])
        raise DataError(f"{file}, line {line + 2}: {pair} is judged twice; keep one line")
    scores = pd.to_numeric(found["score"], errors="coerce")
    bad = (scores.isna() | (scores % 1 != 0)).to_numpy()
    if bad.any():
        line = int(bad.argmax())
        raise DataError(
            f"{file}, line {line + 2}: the score {found['score'][line]!r} is no whole number, such as "
            "0 (not relevant), 1 or 2"
        )
    return found.assign(score=scores.astype(np.int64))


def _qrel_table(file: Path) -> Any:
    try:
        found = pd.read_csv(file, sep="\t", dtype=str, keep_default_na=False, quoting=3)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {one_line(error)}; save it as UTF-8") from error
    if list(found.columns) != QREL_COLUMNS:
        raise DataError(
            f"{file}: the first line is {listed(list(found.columns))}; it must name the columns "
            f"{listed(QREL_COLUMNS)}, separated by tabs"
        )
    return found


def _queries_of(files: Sequence[Path]) -> list[str]:
    """Ids of the queries that these qrels judge."""
    return [name for file in files for name in _qrel_table(file)["query-id"].unique()]


def _relevance(judged: Any, query_ids: Any, corpus_ids: Any) -> Relevance:
    found = judged[judged["score"] > 0]
    pairs = pd.DataFrame(
        {
            "query": pd.Index(query_ids).get_indexer(found["query-id"]),
            "document": pd.Index(corpus_ids).get_indexer(found["corpus-id"]),
            "score": found["score"].to_numpy(),
        }
    ).sort_values(["query", "document"])
    query, document, score = (torch.from_numpy(pairs[n].to_numpy(np.int64).copy()) for n in pairs)
    nobody = torch.empty(0, dtype=torch.int64)
    return Relevance(Pairs(query, document), score, Pairs(nobody, nobody), len(query_ids))


def _themselves(asking: _Side, asked: Any, documents: _Side, relevance: Relevance) -> Pairs:
    """Queries with the document of the same id and text, unless it is relevant."""
    rows = pd.Index(documents.ids).get_indexer(asking.ids[asked])
    relevant = set(zip(*(numbers.tolist() for numbers in relevance.pairs), strict=True))
    found = [
        (query, row)
        for query, row in enumerate(rows.tolist())
        if row >= 0
        and (query, row) not in relevant
        and asking.text(int(asked[query])) == documents.text(row) is not None
    ]
    return Pairs(
        torch.tensor([query for query, _ in found], dtype=torch.int64),
        torch.tensor([row for _, row in found], dtype=torch.int64),
    )
