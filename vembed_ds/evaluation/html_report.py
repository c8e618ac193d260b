"""One HTML file that shows an evaluation; it needs nothing from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vembed_ds.errors import ConfigError
from vembed_ds.evaluation import plots
from vembed_ds.evaluation.report import (
    INTERVAL_NOTE,
    Evaluation,
    metric_title,
    shown_change,
    shown_interval,
    shown_value,
    write_text,
)

Array = np.ndarray[Any, Any]

THUMBNAIL = 176  # pixels, of the longer edge: sharp on screens of twice the usual density
CURVE_K = 100  # furthest point of the recall curve
LONG_TEXT = 90  # characters; longer ones may be cut off, and show in full under the pointer


@dataclass(frozen=True)
class Content:
    """A query or document to show: a text, a picture, or both."""

    text: str | None = None
    image: Image.Image | None = None


@dataclass(frozen=True)
class Example:
    """A query with its best documents.

    Attributes:
        query: The query.
        results: Documents, best first.
        relevant: For each of them, whether it is right.
        rank: Of the first right document.
        answer: That document, to be shown besides; ``None``: it is not.
    """

    query: Content
    results: Sequence[Content]
    relevant: Sequence[bool]
    rank: int
    answer: Content | None = None


@dataclass(frozen=True)
class Charts:
    """What is plotted.

    Attributes:
        ranks: ``[Q]`` rank of each query's first right document.
        answers: ``[Q]`` number of right documents.
        num_documents: C.
        right_scores: ``[P]`` similarities of the right documents.
        wrong_scores: ``[Q]`` of the best wrong one.
        before_ranks: ``ranks`` of what it is compared with.
    """

    ranks: Array
    answers: Array
    num_documents: int
    right_scores: Array
    wrong_scores: Array
    before_ranks: Array | None = None


def check_html(flag: str) -> None:
    """Refuse early what :func:`write_html` could not do.

    Raises:
        ConfigError: A package is not installed.
    """
    plots.check_matplotlib(flag)
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{flag}: the page needs jinja2, which is not installed; "
            "run pip install 'vembed-ds[evaluate]'"
        ) from error


def write_html(
    path: str | Path,
    evaluation: Evaluation,
    charts: Charts,
    *,
    examples: Sequence[Example],
    failures: Sequence[Example],
) -> None:
    """Write the page; the folder is made when it is missing.

    Args:
        path: File to write.
        evaluation: The figures.
        charts: What is plotted.
        examples: Queries chosen without looking at results.
        failures: The worst ones.

    Raises:
        ConfigError: A package is not installed.
        DataError: The file cannot be written.
    """
    check_html(str(path))
    import jinja2

    source = resources.files("vembed_ds.evaluation") / "templates" / "report.html"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    rows = [*examples, *failures]
    text = environment.from_string(source.read_text(encoding="utf-8")).render(
        title=f"Retrieval evaluation of {evaluation.model}",
        subtitle=f"{', '.join(evaluation.data)} ({evaluation.retrieval_mode})",
        figures=_figures(evaluation),
        notes=evaluation.notes,
        plots=_plots(evaluation, charts),
        examples=[_row(row) for row in examples],
        failures=[_row(row) for row in failures],
        columns=max((len(row.results) for row in rows), default=1),
        table=_table(evaluation),
        facts=[*evaluation.settings.items(), *evaluation.versions.items()],
    )
    write_text(path, text)


def recall_points(ranks: Array, *, most: int) -> list[tuple[float, float]]:
    """Recall@k for k from 1 to ``most``."""
    return [(k, float((ranks <= k).mean())) for k in range(1, most + 1)]


def chance_points(answers: Array, *, num_documents: int, most: int) -> list[tuple[float, float]]:
    """Mean Recall@k of documents in random order.

    Of a query with R right documents of C, no one is among the first k with probability
    ``prod_{i<k} (C - R - i) / (C - i)``.

    Args:
        answers: ``[Q]`` R of each query.
        num_documents: C.
        most: Largest k.
    """
    counts, numbers = np.unique(answers, return_counts=True)
    places = np.arange(most)
    factors = (num_documents - counts[:, None] - places) / (num_documents - places)
    missed = np.cumprod(np.clip(factors, 0, 1), axis=1)
    found = 1 - numbers @ missed / numbers.sum()
    return [(k + 1, float(found[k])) for k in range(most)]


def _figures(evaluation: Evaluation) -> list[dict[str, str]]:
    names = [name for name in evaluation.metrics if name.startswith("recall@") and "_d" not in name]
    ndcg = [name for name in evaluation.metrics if name.startswith("ndcg@") and "_d" not in name]
    names = [*names[:3], "mrr", *ndcg[-1:]]
    found = []
    for name in names:
        before = (evaluation.before or {}).get(name)
        change = "" if before is None else shown_change(name, before, evaluation.metrics[name])
        found.append(
            {
                "name": metric_title(name),
                "value": shown_value(name, evaluation.metrics[name]),
                "before": shown_value(name, before),
                "change": change,
                "sense": _sense(evaluation, name),
            }
        )
    sizes = [name for name in ("num_queries", "num_documents") if name in evaluation.metrics]
    return found + [
        {"name": metric_title(name), "value": f"{evaluation.metrics[name]:,.0f}", "change": ""}
        for name in sizes
    ]


def _sense(evaluation: Evaluation, name: str) -> str:
    """Style of a change: better, worse, or undecided."""
    before, after = (evaluation.before or {}).get(name), evaluation.metrics.get(name)
    interval = evaluation.intervals.get(name)
    undecided = interval is not None and not interval.decided
    if before is None or after is None or before == after or undecided or name.startswith("num_"):
        return ""
    return "better" if after > before else "worse"


def _plots(evaluation: Evaluation, charts: Charts) -> list[dict[str, str]]:
    most = min(CURVE_K, charts.num_documents - 1)
    curves = {"this model": recall_points(charts.ranks, most=most)}
    if charts.before_ranks is not None:
        curves[evaluation.before_name] = recall_points(charts.before_ranks, most=most)
    elif points := _metric_points(evaluation.before or {}, most=most):
        curves[evaluation.before_name] = points
    chance = chance_points(charts.answers, num_documents=charts.num_documents, most=most)
    found = [
        {
            "title": "Recall@k",
            "caption": "Share of queries with a right document among the first k.",
            "svg": plots.recall_curve(curves, chance=chance),
        },
        {
            "title": "Ranks",
            "caption": "Where the first right document stands.",
            "svg": plots.rank_histogram(charts.ranks, most=charts.num_documents),
        },
        {
            "title": "Similarities",
            "caption": "The less the two overlap, the better right and wrong are told apart.",
            "svg": plots.similarity_histogram(charts.right_scores, charts.wrong_scores),
        },
    ]
    if dimensions := _dimension_curves(evaluation.metrics):
        found.append(
            {
                "title": "Fewer dimensions",
                "caption": "Of the first dimensions of the embeddings alone (Matryoshka).",
                "svg": plots.dimension_curve(dimensions),
            }
        )
    return found


def _metric_points(metrics: Mapping[str, float], *, most: int) -> list[tuple[float, float]]:
    named = {name.removeprefix("recall@"): value for name, value in metrics.items()}
    return [(int(k), v) for k, v in named.items() if k.isdigit() and int(k) <= most]


def _dimension_curves(metrics: Mapping[str, float]) -> dict[str, list[tuple[float, float]]]:
    """Up to three metrics over the dimensions; empty where no prefix was measured."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, value in metrics.items():
        kind, _, dim = name.rpartition("_d")
        if dim.isdigit() and (kind == "mrr" or kind.startswith(("recall@", "ndcg@"))):
            found.setdefault(metric_title(kind), []).append((int(dim), value))
    wanted = [name for name in found if name.startswith("Recall@")]
    chosen = dict.fromkeys([*wanted[:1], *wanted[-1:], *(n for n in found if n == "MRR")])
    return {name: found[name] for name in chosen}


def _table(evaluation: Evaluation) -> dict[str, Any]:
    compared = evaluation.before is not None
    before = evaluation.before or {}
    rows = []
    for name in dict.fromkeys([*evaluation.metrics, *before]):
        old, new = before.get(name), evaluation.metrics.get(name)
        interval = evaluation.intervals.get(name)
        cells = [shown_value(name, old)] if compared else []
        rows.append(
            {
                "name": metric_title(name),
                "cells": [*cells, shown_value(name, new)],
                "change": shown_change(name, old, new) if compared else None,
                "range": "" if interval is None else shown_interval(name, interval),
                "sense": _sense(evaluation, name),
            }
        )
    head = (
        ["metric", evaluation.before_name, "after", "change"] if compared else ["metric", "value"]
    )
    return {"head": head, "rows": rows, "note": INTERVAL_NOTE if evaluation.intervals else ""}


def _row(example: Example) -> dict[str, Any]:
    return {
        "query": _shown(example.query),
        "rank": example.rank,
        "answer": None if example.answer is None else _shown(example.answer),
        "documents": any(result.image is None for result in example.results),
        "results": [
            {"picture": _shown(result), "right": right}
            for result, right in zip(example.results, example.relevant, strict=True)
        ],
    }


def _shown(content: Content) -> dict[str, Any]:
    text = content.text or ""
    found: dict[str, Any] = {"text": text, "cut": len(text) > LONG_TEXT, "image": ""}
    if content.image is not None:
        picture = content.image.convert("RGBA")
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture, mask=picture)
        found |= {"image": _data_uri(white), "width": white.width, "height": white.height}
    return found


def _data_uri(picture: Image.Image) -> str:
    """As PNG or JPEG, whichever is smaller: drawings or photographs."""
    files = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 82})):
        file = io.BytesIO()
        picture.save(file, kind, **options)
        files[kind] = file.getvalue()
    kind = min(files, key=lambda name: len(files[name]))
    return f"data:image/{kind};base64,{base64.b64encode(files[kind]).decode()}"
