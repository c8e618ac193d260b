"""Results for people: tables, a JSON file, a Markdown file, a picture."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from vembed_ds.errors import ConfigError, DataError
from vembed_ds.evaluation.comparison import Interval
from vembed_ds.evaluation.plots import check_matplotlib
from vembed_ds.evaluation.scoring import Values

Picture = str | Image.Image

TITLES = {
    "recall": "Recall",
    "mrr": "MRR",
    "ndcg": "nDCG",
    "map": "MAP",
    "trec_recall": "Recall of all",
    "num_queries": "queries",
    "num_documents": "documents",
}
INTERVAL_NOTE = (
    "In brackets: where the difference lies with 95 % confidence, by a paired bootstrap over the "
    "queries; an interval without 0 leaves no doubt which is better on such queries."
)

# Layout of the grid, in inches.
CELL, GAP, MARGIN, HEADER = 0.95, 0.18, 0.35, 1.15
QUERY_WIDTH, QUERY_CHARACTERS, CELL_CHARACTERS = 2.2, 22, 14
RIGHT, WRONG, INK, FAINT = "#1a9850", "#d0d0d0", "#1f2328", "#6e7781"


@dataclass(frozen=True)
class GridRow:
    """One query and its best documents.

    Args:
        query: A text or an image.
        results: Documents, best first.
        relevant: For each of them, whether it is right.
    """

    query: Picture
    results: Sequence[Picture]
    relevant: Sequence[bool]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, as all reports tell it.

    Attributes:
        model: Reference of the model.
        data: The data.
        retrieval_mode: What searched what.
        metrics: Metric to value; recalls as fractions.
        before: The same of what it is compared with; ``None``: nothing.
        before_name: Its name.
        intervals: Metric to the interval of the difference, where both were measured on the same
            queries.
        notes: What was left out, and the like, one sentence each.
        fingerprint: Of queries, documents and answers.
        settings: What else decides the result.
        versions: Package to version.
        per_query: Metric to the value of every query, to be stored; ``None``: not asked for.
    """

    model: str
    data: Sequence[str]
    retrieval_mode: str
    metrics: Mapping[str, float]
    before: Mapping[str, float] | None = None
    before_name: str = "before"
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    notes: Sequence[str] = ()
    fingerprint: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    per_query: Values | None = None

    @property
    def table(self) -> str:
        """All metrics as a Markdown table, aligned for terminals."""
        if self.before is None:
            return metrics_table(self.metrics)
        return comparison_table(
            self.before, self.metrics, intervals=self.intervals, before_name=self.before_name
        )

    @property
    def markdown(self) -> str:
        """A document: the table, and how it came about."""
        facts = {"data": ", ".join(self.data), "retrieval_mode": self.retrieval_mode}
        facts |= {name: str(value) for name, value in {**self.settings, **self.versions}.items()}
        parts = [f"# Retrieval evaluation of {self.model}", self.table]
        if self.intervals:
            parts.append(INTERVAL_NOTE)
        parts += [f"> {note}" for note in self.notes]
        parts.append(_markdown([("setting", "value"), *facts.items()]))
        return "\n\n".join(parts) + "\n"

    @property
    def payload(self) -> dict[str, Any]:
        """What the JSON file holds."""
        found: dict[str, Any] = {
            "model": self.model,
            "data_path": list(self.data),
            "retrieval_mode": self.retrieval_mode,
            "metrics": dict(self.metrics),
        }
        if self.before is not None:
            found |= {"before": dict(self.before), "before_name": self.before_name}
        if self.intervals:
            found["intervals"] = {name: list(value) for name, value in self.intervals.items()}
        found |= {
            "notes": list(self.notes),
            "fingerprint": self.fingerprint,
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }
        if self.per_query is not None:
            found["per_query"] = {name: v.tolist() for name, v in self.per_query.items()}
        return found


def comparison_table(
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    intervals: Mapping[str, Interval] | None = None,
    before_name: str = "before",
) -> str:
    """A Markdown table of two evaluations, aligned for terminals.

    Args:
        before: Metric to value; recalls as fractions.
        after: The same; metrics that only one side has show a dash on the other.
        intervals: Of the differences.
        before_name: Of the first one.

    Returns:
        Lines without a newline at the end; recalls in percent, their change in points.
    """
    rows = [("metric", before_name, "after", "change [95 %]" if intervals else "change")]
    for name in dict.fromkeys([*after, *before]):
        old, new = before.get(name), after.get(name)
        change = shown_change(name, old, new)
        if name in (intervals or {}):
            change = f"{change} {shown_interval(name, (intervals or {})[name])}"
        rows.append((metric_title(name), shown_value(name, old), shown_value(name, new), change))
    return _markdown(rows)


def metrics_table(metrics: Mapping[str, float]) -> str:
    """A Markdown table of one evaluation; values as in ``comparison_table``."""
    return _markdown(
        [
            ("metric", "value"),
            *((metric_title(name), shown_value(name, value)) for name, value in metrics.items()),
        ]
    )


def check_writable(path: str | Path, *, flag: str) -> None:
    """Refuse before the work what could not be written after it.

    Args:
        path: Of the file.
        flag: That names it, for the message.

    Raises:
        ConfigError: It is a folder, or nothing can be written there.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: is a folder; give the name of a file")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"{flag} {path}: {parent} is no folder to write to; choose another path")


def write_report(path: str | Path, payload: Mapping[str, Any]) -> None:
    """Write results as JSON; the folder is made when it is missing.

    Raises:
        DataError: When the file cannot be written.
    """
    write_text(path, json.dumps(payload, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a report; the folder is made when it is missing.

    Raises:
        DataError: When the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); choose another path") from error


def retrieval_grid(
    path: str | Path, *, rows: Sequence[GridRow], headline: str, subtitle: str = ""
) -> None:
    """Draw queries and their best documents: right ones framed green, wrong ones thin grey.

    Args:
        path: Picture to write (.png, .svg, .pdf); the folder is made when it is missing.
        rows: At least one; the longest decides the number of columns.
        headline: For example ``Recall@10: 56.5 %``.
        subtitle: Smaller, below the headline.

    Raises:
        ConfigError: When matplotlib is not installed.
        DataError: When there is nothing to draw, or the file cannot be written.
    """
    check_matplotlib(str(path))
    from matplotlib.figure import Figure

    if not rows:
        raise DataError(f"{path}: there are no queries to draw; give at least one")
    figure = Figure(figsize=_grid_size(rows), dpi=160, facecolor="white")
    _draw_header(figure, headline=headline, subtitle=subtitle)
    _draw_places(figure, columns=max(len(row.results) for row in rows))
    for number, row in enumerate(rows):
        _draw_row(figure, row, top=HEADER + number * (CELL + GAP))
    _save(figure, Path(path))


def metric_title(name: str) -> str:
    """How people write the name of a metric."""
    if name in TITLES:
        return TITLES[name]
    whole, _, dim = name.rpartition("_d")
    if whole and dim.isdigit():
        return f"{metric_title(whole)} ({dim} dims)"
    kind, at, k = name.partition("@")
    return f"{TITLES.get(kind, kind)}{at}{k}"


def shown_value(name: str, value: float | None) -> str:
    """Recalls in percent."""
    if value is None:
        return "-"
    if "recall@" in name:
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if name.startswith("num_") else f"{value:.3f}"


def shown_change(name: str, before: float | None, after: float | None) -> str:
    """Of recalls in points."""
    if before is None or after is None:
        return "-"
    if "recall@" in name:
        return f"{100 * (after - before):+.1f} points"
    if name.startswith("num_"):
        return f"{after - before:+.0f}" if after != before else ""
    return f"{after - before:+.3f}"


def shown_interval(name: str, interval: Interval) -> str:
    """In the unit of the change."""
    if "recall@" in name:
        return f"[{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
    return f"[{interval.low:+.3f}, {interval.high:+.3f}]"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """First row is the header; the first column is left-aligned, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    aligned = [
        [row[0].ljust(widths[0])]
        + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [aligned[0], rule, *aligned[1:]])


def _grid_size(rows: Sequence[GridRow]) -> tuple[float, float]:
    columns = max(len(row.results) for row in rows)
    width = 2 * MARGIN + QUERY_WIDTH + columns * (CELL + GAP)
    return width, HEADER + len(rows) * (CELL + GAP) - GAP + MARGIN


def _draw_header(figure: Any, *, headline: str, subtitle: str) -> None:
    width, height = figure.get_size_inches()
    left = MARGIN / width
    figure.text(left, 1 - 0.28 / height, headline, fontsize=15, weight="bold", color=INK, va="top")
    figure.text(left, 1 - 0.6 / height, subtitle, fontsize=9, color=FAINT, va="top")


def _draw_places(figure: Any, *, columns: int) -> None:
    """1, 2, 3, ... above the columns."""
    width, height = figure.get_size_inches()
    for column in range(columns):
        middle = (_column_left(column) + CELL / 2) / width
        place = str(column + 1)
        figure.text(
            middle, 1 - (HEADER - 0.1) / height, place, fontsize=9, color=FAINT, ha="center"
        )


def _column_left(column: int) -> float:
    return MARGIN + QUERY_WIDTH + GAP + column * (CELL + GAP)


def _draw_row(figure: Any, row: GridRow, *, top: float) -> None:
    if isinstance(row.query, str):
        _draw_query_text(figure, row.query, top=top)
    else:
        _draw_cell(figure, row.query, left=MARGIN, top=top, color="white", line_width=0.0)
    for column, (result, right) in enumerate(zip(row.results, row.relevant, strict=True)):
        _draw_cell(
            figure,
            result,
            left=_column_left(column),
            top=top,
            color=RIGHT if right else WRONG,
            line_width=3.0 if right else 0.8,
        )


def _draw_query_text(figure: Any, text: str, *, top: float) -> None:
    width, height = figure.get_size_inches()
    figure.text(
        MARGIN / width,
        1 - (top + CELL / 2) / height,
        _wrapped(text, QUERY_CHARACTERS),
        fontsize=11,
        color=INK,
        va="center",
        linespacing=1.25,
    )


def _draw_cell(
    figure: Any, content: Picture, *, left: float, top: float, color: str, line_width: float
) -> None:
    width, height = figure.get_size_inches()
    axes = figure.add_axes(
        (left / width, 1 - (top + CELL) / height, CELL / width, CELL / height), xticks=[], yticks=[]
    )
    for spine in axes.spines.values():
        spine.set(color=color, linewidth=line_width)
    if isinstance(content, str):
        text = _wrapped(content, CELL_CHARACTERS)
        axes.text(0.5, 0.5, text, fontsize=7, color=INK, ha="center", va="center")
        return
    edge = max(content.size)  # centred on a white square, so that every cell has one size
    square = Image.new("RGB", (edge, edge), "white")
    square.paste(
        content.convert("RGB"), ((edge - content.width) // 2, (edge - content.height) // 2)
    )
    axes.imshow(square, interpolation="antialiased", extent=(0.06, 0.94, 0.06, 0.94))
    axes.set(xlim=(0, 1), ylim=(0, 1))


def _wrapped(text: str, width: int) -> str:
    """At most four lines; ``$`` would start a formula."""
    lines = textwrap.wrap(text, width, max_lines=4, placeholder=" ...")
    return "\n".join(lines).replace("$", r"\$")


def _save(figure: Any, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white")
    except (OSError, ValueError) as error:  # ValueError: unknown suffix
        raise DataError(
            f"{path}: the picture cannot be written ({error}); choose another path"
        ) from error
