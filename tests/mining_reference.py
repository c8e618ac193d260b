"""Hard negatives by plain loops over texts, without code of the project."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Score = Callable[[Any, Any], float]


def mine_plainly(
    records: Sequence[Mapping[str, Any]],
    more: Sequence[Any],
    score: Score,
    *,
    num_negatives: int,
    range_min: int = 0,
    range_max: int,
    margin: float | None = None,
    relative_margin: float | None = None,
    max_score: float | None = None,
    min_score: float | None = None,
    guide: Score | None = None,
    guide_margin: float = 0.0,
) -> list[list[Any]]:
    """The negatives of every record, the most similar first.

    Args:
        records: With ``query``, ``positive`` and, where there are classes, ``label``.
        more: Further documents.
        score: Similarity of a query and a document.
        num_negatives: Of each, at most.
        range_min: Of those that are left, how many are skipped.
        range_max: The closest documents that are looked at.
        margin: See the command.
        relative_margin: The same.
        max_score: The same.
        min_score: The same.
        guide: Similarity by the guide.
        guide_margin: The same.
    """
    documents = list(dict.fromkeys([*(r["positive"] for r in records), *more]))
    found = []
    for record in records:
        query = record["query"]
        own = [r["positive"] for r in records if r["query"] == query]
        labels = [r["label"] for r in records if r["query"] == query and "label" in r]
        answers = {*own, query, *(r["positive"] for r in records if r.get("label") in labels)}
        others = sorted((d for d in documents if d not in answers), key=lambda d: -score(query, d))
        best = min(score(query, d) for d in own)
        left = []
        for document in others[:range_max]:
            value = score(query, document)
            if margin is not None and value > best - margin:
                continue
            if relative_margin is not None and value > best - abs(best) * relative_margin:
                continue
            if max_score is not None and value > max_score:
                continue
            if min_score is not None and value < min_score:
                continue
            if guide is not None:
                limit = min(guide(query, d) for d in own) - guide_margin
                if guide(query, document) > limit:
                    continue
            left.append(document)
        found.append(left[range_min : range_min + num_negatives])
    return found


def scorer(rows: Mapping[Any, Any], columns: Mapping[Any, Any] | None = None) -> Score:
    """Cosine, or mean MaxSim, of embeddings by content, in float64.

    Args:
        rows: Of the queries: ``[D]``, or ``[L, D]``.
        columns: Of the documents; ``None``: the same.
    """
    known: dict[tuple[Any, Any], float] = {}

    def score(query: Any, document: Any) -> float:
        pair = (query, document)
        if pair not in known:
            a, b = (
                np.atleast_2d(side[key]).astype(float)
                for side, key in ((rows, query), (columns or rows, document))
            )
            a, b = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in (a, b))
            known[pair] = float((a @ b.T).max(axis=1).mean())
        return known[pair]

    return score
