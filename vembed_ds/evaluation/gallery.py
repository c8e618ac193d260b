"""Queries with what was found, to be looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from vembed_ds.data.images import open_image
from vembed_ds.data.records import Item
from vembed_ds.evaluation.html_report import Charts, Content, Example
from vembed_ds.evaluation.measuring import Measured, Neighbours
from vembed_ds.evaluation.report import GridRow, Picture, retrieval_grid
from vembed_ds.evaluation.tasks import RetrievalTask

ROWS, COLUMNS = 8, 5  # examples, or failures, with their best documents


class Gallery:
    """Queries of a measured task with what was found, to be shown.

    Args:
        task: The task.
        measured: A model on it.
        near: From :func:`vembed_ds.evaluation.measuring.neighbours`.
    """

    def __init__(self, task: RetrievalTask, measured: Measured, near: Neighbours) -> None:
        self.task, self.measured, self.near = task, measured, near
        self.ranks = _first_ranks(measured)
        counts = task.relevance.counts
        self._ends = counts.cumsum(dim=0).tolist()
        self._starts = [end - count for end, count in zip(self._ends, counts.tolist(), strict=True)]

    def spread(self, number: int) -> list[int]:
        """Queries spread evenly over the data, chosen without looking at their results."""
        size = len(self.task.queries)
        found: list[int] = torch.linspace(0, size - 1, min(number, size)).long().tolist()
        return found

    def worst(self, number: int) -> list[int]:
        """Queries whose first right document stands furthest down, and not first."""
        order = np.argsort(-self.ranks, kind="stable")[:number]
        return [int(query) for query in order if self.ranks[query] > 1]

    def found(self, query: int) -> tuple[list[int], list[bool]]:
        """The best documents of a query, and whether they are right."""
        rows = [row for row in self.near.rows[query].tolist() if row >= 0]
        right = self.task.relevance.pairs.rows[self._starts[query] : self._ends[query]].tolist()
        return rows, [row in right for row in rows]

    def example(self, query: int, *, with_answer: bool = False) -> Example:
        """A query for the page."""
        rows, right = self.found(query)
        own = slice(self._starts[query], self._ends[query])
        best = int(self.measured.ranked.ranks[own].argmin())
        answer = int(self.task.relevance.pairs.rows[own][best])
        documents = self.task.documents
        return Example(
            query=_content(self.task.queries.item(query)),
            results=[_content(documents.item(row)) for row in rows],
            relevant=right,
            rank=int(self.ranks[query]),
            answer=_content(documents.item(answer)) if with_answer else None,
        )

    def charts(self, *, before: Measured | None) -> Charts:
        """What the page plots."""
        return Charts(
            ranks=self.ranks,
            answers=self.task.relevance.counts.numpy(),
            num_documents=len(self.task.documents),
            right_scores=self.measured.ranked.scores.numpy(),
            wrong_scores=self.near.wrong_scores.numpy(),
            before_ranks=None if before is None else _first_ranks(before),
        )


def _first_ranks(measured: Measured) -> Any:
    ranks: Any = np.rint(1 / measured.values["mrr"]).astype(np.int64)
    return ranks


def draw(path: str, gallery: Gallery, *, metrics: Mapping[str, float]) -> None:
    """Draw queries spread evenly over the data, chosen without looking at their results."""
    task = gallery.task
    rows = []
    for query in gallery.spread(ROWS):
        found, right = gallery.found(query)
        rows.append(
            GridRow(
                query=_picture(task.queries.item(query)),
                results=[_picture(task.documents.item(row)) for row in found],
                relevant=right,
            )
        )
    name = max(
        (key for key in metrics if key.removeprefix("recall@").isdigit()),
        key=lambda key: int(key[7:]),
    )
    columns = max(len(row.results) for row in rows)
    retrieval_grid(
        path,
        rows=rows,
        headline=f"{name.capitalize()}: {100 * metrics[name]:.1f} %",
        subtitle=f"{len(task.queries):,} queries, {len(task.documents):,} documents. "
        f"The {columns} best of each query, right ones framed green.",
    )


def _picture(item: Item) -> Picture:
    if item.text is not None:
        return item.text
    assert item.image is not None  # one of the two, by construction
    return open_image(item.image, origin="picture")


def _content(item: Item) -> Content:
    image = None if item.image is None else open_image(item.image, origin="picture")
    return Content(item.text, image)
