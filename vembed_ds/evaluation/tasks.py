"""What is searched with what, and which documents are right: from pairs, labels, and more documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch

from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.processors import content_key
from vembed_ds.data.sampler import own_share
from vembed_ds.distributed import comm
from vembed_ds.errors import ConfigError, DataError
from vembed_ds.evaluation.items import ItemList
from vembed_ds.evaluation.ranks import Relevance
from vembed_ds.evaluation.search import Pairs

Array = np.ndarray[Any, Any]

SHOWN = 3  # of those that a message is about


@dataclass(frozen=True)
class RetrievalTask:
    """Queries, documents, and which answer which.

    Attributes:
        origin: Name of the data.
        retrieval_mode: What the queries and documents are.
        queries: Q queries.
        documents: C documents.
        relevance: Of these, in their order.
        fingerprint: Equal for equal queries, documents and answers in the same order, whatever the
            model.
        notes: What was left out, one sentence each.
    """

    origin: str
    retrieval_mode: str
    queries: ItemList
    documents: ItemList
    relevance: Relevance
    fingerprint: str
    notes: tuple[str, ...] = ()


def pairs_task(
    dataset: PairDataset,
    *,
    corpus: PairDataset | None = None,
    by_label: bool = False,
    leave_out_unanswered: bool = False,
) -> RetrievalTask:
    """Search all distinct positives, and further documents, with all distinct queries.

    Items are told apart by content, as in training. A document that holds the same as the query
    neither answers it nor competes.

    Collective: every rank reads a share of the records; the result is the same on every rank.

    Args:
        dataset: Pairs.
        corpus: Further documents, from :func:`vembed_ds.evaluation.items.open_items`.
        by_label: A query is answered by the documents of its class, not only by its positive.
        leave_out_unanswered: Leave out queries that nothing answers, which only ``by_label`` has.

    Raises:
        ConfigError: With ``by_label``, the pairs have no labels.
        DataError: When a record cannot be used, a query and its positive hold the same, or nothing
            answers a query.
        DistributedError: When a record of another rank cannot be used.
    """
    if by_label and dataset.reader.label_column is None:
        raise ConfigError(
            f"--by_label: {dataset.reader.origin} has no labels; name their column with "
            "column_mapping: {label: COLUMN}, or leave --by_label out"
        )
    pairs = _read(dataset, by_label=by_label)
    if not by_label:
        _refuse_same(pairs, dataset)
    more = None if corpus is None else _read(corpus, by_label=by_label)
    keys = list(pairs["document"]) + ([] if more is None else list(more["document"]))
    queries, query_records = _numbered(pairs["query"])
    documents, document_records = _numbered(keys)
    same = _places(pairs["query"].iloc[query_records], keys, documents)
    if by_label:
        labels = pairs["label"] if more is None else pd.concat([pairs["label"], more["label"]])
        found = _of_one_class(queries, pairs["label"], documents, labels)
        found = found[same[found["query"]] != found["document"]]
    else:
        found = pd.DataFrame({"query": queries, "document": documents[: len(queries)]})
    found = found.drop_duplicates().sort_values(["query", "document"], kind="stable")
    size = len(dataset)
    sources = [(dataset, [row for row in document_records if row < size])]
    if corpus is not None:
        sources.append((corpus, [row - size for row in document_records if row >= size]))
    relevance = _relevance(found, same, num_queries=len(query_records))
    task = RetrievalTask(
        dataset.reader.origin,
        dataset.reader.retrieval_mode,
        ItemList("query", [(dataset, query_records)]),
        ItemList("positive", sources),
        relevance,
        fingerprint(
            [*pairs["query"].iloc[query_records], *map(keys.__getitem__, document_records)],
            relevance,
        ),
    )
    what = "no other document of their class" if by_label else "no answer"
    return answered(task, leave_out=leave_out_unanswered, what=what)


def answered(task: RetrievalTask, *, leave_out: bool, what: str) -> RetrievalTask:
    """The task without the queries that nothing answers.

    Args:
        task: The task.
        leave_out: Whether they may be left out, with a note.
        what: What such a query has, for messages.

    Raises:
        DataError: There are such queries, and they may not be left out, or there are no others.
    """
    counts = task.relevance.counts
    bad = torch.nonzero(counts == 0).flatten().tolist()
    if not bad:
        return task
    shown = ", ".join(task.queries.place(number) for number in bad[:SHOWN])
    more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    if len(bad) == len(counts):
        raise DataError(
            f"{task.origin}: all of {len(bad)} queries have "
            f"{what} ({shown}{more}); nothing can be measured: give other data"
        )
    if not leave_out:
        raise DataError(
            f"{task.origin}: {len(bad)} of {len(counts)} queries have {what} ({shown}{more}): no model "
            "could find one; correct the data, or leave them out with "
            "--ignore_queries_without_answers"
        )
    kept = torch.nonzero(counts > 0).flatten()
    number = torch.full((len(counts),), -1)
    number[kept] = torch.arange(len(kept))
    pairs, ignored = task.relevance.pairs, task.relevance.ignored
    stays = number[ignored.queries] >= 0
    relevance = Relevance(
        Pairs(number[pairs.queries], pairs.rows),
        task.relevance.grades,
        Pairs(number[ignored.queries[stays]], ignored.rows[stays]),
        len(kept),
    )
    note = f"{len(bad)} of {len(counts)} queries are left out: they have {what} ({shown}{more})"
    queries = task.queries.select(kept.tolist())
    return replace(task, queries=queries, relevance=relevance, notes=(*task.notes, note))


def fingerprint(names: Sequence[str], relevance: Relevance) -> str:
    """32 hexadecimal digits of queries and documents by name, and of what answers what."""
    state = blake2b(digest_size=16)
    state.update("\n".join(names).encode("utf-8", "surrogatepass"))
    for numbers in (*relevance.pairs, relevance.grades, *relevance.ignored):
        state.update(numbers.numpy().tobytes())
    return state.hexdigest()


def _read(dataset: PairDataset, *, by_label: bool) -> Any:
    """Columns ``query``, ``document`` (content keys) and ``label`` of all records; collective."""

    def read() -> list[tuple[str, str, int | None]]:
        share = own_share(len(dataset), rank=comm.rank(), world_size=comm.world_size())
        records = map(dataset.record, share)
        return [
            (content_key(r.query), content_key(r.positive), r.label if by_label else None)
            for r in records
        ]

    shards = comm.all_gather_objects(comm.run_together(read, doing="reading the data"))
    rows = [row for shard in shards for row in shard]
    return pd.DataFrame(rows, columns=["query", "document", "label"], dtype=object)


def _refuse_same(pairs: Any, dataset: PairDataset) -> None:
    same = np.flatnonzero((pairs["query"] == pairs["document"]).to_numpy())
    if same.size:
        record = dataset.row_number(int(same[0]))
        raise DataError(
            f"{dataset.reader.origin}, record {record}: query and positive hold the same, so that "
            "every model finds it; evaluate on other pairs"
        )


def _numbered(keys: Any) -> tuple[Array, list[int]]:
    """The number of each distinct key, in order of appearance, and its first row."""
    numbers, distinct = pd.factorize(pd.Series(list(keys), dtype=object))
    first = np.full(len(distinct), len(numbers))
    np.minimum.at(first, numbers, np.arange(len(numbers)))
    return numbers, first.tolist()


def _places(wanted: Any, keys: Sequence[str], numbers: Array) -> Array:
    """The number of each wanted key, -1 where there is none."""
    known = dict(zip(keys, numbers.tolist(), strict=True))
    return np.array([known.get(key, -1) for key in wanted], dtype=np.int64)


def _of_one_class(queries: Array, query_labels: Any, documents: Array, labels: Any) -> Any:
    """Distinct queries with the documents that share a label with them."""
    left = pd.DataFrame({"query": queries, "label": query_labels.to_numpy()}).drop_duplicates()
    right = pd.DataFrame({"document": documents, "label": labels.to_numpy()}).drop_duplicates()
    right = right[right["label"].notna()]
    return left.merge(right, on="label")[["query", "document"]]


def _relevance(found: Any, same: Array, *, num_queries: int) -> Relevance:
    """Of pairs sorted by query; ``same``: for each query the document that holds the same, or -1."""
    pairs = Pairs(
        *(torch.from_numpy(found[name].to_numpy(np.int64).copy()) for name in ("query", "document"))
    )
    asking = np.flatnonzero(same >= 0)
    relevant = set(zip(pairs.queries.tolist(), pairs.rows.tolist(), strict=True))
    ignored = [(q, int(same[q])) for q in asking.tolist() if (q, int(same[q])) not in relevant]
    return Relevance(
        pairs,
        torch.ones(len(found), dtype=torch.int64),
        Pairs(
            torch.tensor([q for q, _ in ignored], dtype=torch.int64),
            torch.tensor([row for _, row in ignored], dtype=torch.int64),
        ),
        num_queries,
    )
