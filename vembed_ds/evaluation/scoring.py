"""Retrieval metrics of every query, from the ranks of its relevant documents, by trec_eval.

trec_eval (NIST) is what the retrieval literature computes its figures with; ``pytrec_eval`` runs its
code. It is given, for every query, a list in which the relevant documents stand at their ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from vembed_ds.evaluation.ranks import Relevance

Values = dict[str, np.ndarray[Any, Any]]

MAP_DEPTH = 1000  # documents of a list that trec_eval is customarily given
CHUNK = 1000  # queries that trec_eval is given at a time: its lists are Python objects
# Ours: trec_eval's.
MEASURES = {"ndcg": "ndcg_cut", "map": "map_cut", "trec_recall": "recall"}


def has_trec_eval() -> bool:
    """Whether ``pytrec_eval`` is installed."""
    try:
        import pytrec_eval  # noqa: F401
    except ImportError:
        return False
    return True


def first_rank_values(ranks: Tensor, relevance: Relevance, *, ks: Sequence[int]) -> Values:
    """What follows from the best-ranked relevant document of every query.

    Args:
        ranks: ``[P]`` from :func:`vembed_ds.evaluation.ranks.relevant_ranks`.
        relevance: Of the same pairs.
        ks: Numbers of documents looked at.

    Returns:
        For every query, ``[Q]`` float64: ``recall@{k}``, 1 if there is a relevant document among the
        first k (trec_eval's ``success``); ``mrr``, 1 / its rank (``recip_rank``); ``mrr@{k}``, the
        same, but 0 behind rank k.
    """
    starts = (relevance.counts.cumsum(dim=0) - relevance.counts).numpy()
    first = np.minimum.reduceat(ranks.numpy(), starts)
    values = {f"recall@{k}": (first <= k).astype(float) for k in ks}
    values["mrr"] = 1 / first
    return values | {f"mrr@{k}": np.where(first <= k, 1 / first, 0.0) for k in ks}


def trec_values(ranks: Tensor, relevance: Relevance, *, ks: Sequence[int]) -> Values:
    """What trec_eval computes; arguments as of :func:`first_rank_values`.

    Returns:
        For every query, ``[Q]`` float64: ``ndcg@{k}`` (gain: the grade), ``map@{k}``,
        ``trec_recall@{k}``, the share of its relevant documents among the first k; and ``map``, of
        the first 1,000 documents.
    """
    import pytrec_eval

    cuts = ",".join(map(str, ks))
    measures = {f"{theirs}.{cuts}" for theirs in MEASURES.values()} | {
        f"map_cut.{cuts},{MAP_DEPTH}"
    }
    found: list[Mapping[str, float]] = []
    ends = relevance.counts.cumsum(dim=0)
    depth = max(*ks, MAP_DEPTH)
    for start in range(0, relevance.num_queries, CHUNK):
        last = min(start + CHUNK, relevance.num_queries)
        judged: dict[str, dict[str, int]] = {}
        lists: dict[str, dict[str, float]] = {}
        for query in range(start, last):
            pairs = slice(int(ends[query] - relevance.counts[query]), int(ends[query]))
            name = str(query)
            judged[name], lists[name] = _list(
                ranks[pairs].tolist(), relevance.grades[pairs].tolist(), depth=depth
            )
        results = pytrec_eval.RelevanceEvaluator(judged, measures).evaluate(lists)
        found += [results[str(query)] for query in range(start, last)]
    names = {f"{ours}@{k}": f"{theirs}_{k}" for ours, theirs in MEASURES.items() for k in ks}
    names["map"] = f"map_cut_{MAP_DEPTH}"
    return {ours: np.array([result[theirs] for result in found]) for ours, theirs in names.items()}


def _list(
    ranks: Sequence[int], grades: Sequence[int], *, depth: int
) -> tuple[dict[str, int], dict[str, float]]:
    """Grades, and scores that put the relevant documents at their ranks among nameless others."""
    judged = {f"relevant {number}": grade for number, grade in enumerate(grades)}
    listed = {f"relevant {n}": -float(rank) for n, rank in enumerate(ranks) if rank <= depth}
    last = -min(listed.values(), default=-1.0)
    others = set(range(1, int(last) + 1)) - set(ranks)
    return judged, listed | {f"other {place}": -float(place) for place in others}


def means(values: Values) -> dict[str, float]:
    """The mean of every metric over all queries."""
    return {name: float(found.mean()) for name, found in values.items()}
