"""``metrics.csv``: what ``metrics.jsonl`` holds, as a table for spreadsheets."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vembed_ds.errors import VembedError

TABLE_FILE = "metrics.csv"
STEP = "step"


class MetricsTable:
    """A row per step and a column per metric; empty where a step has no such value.

    It follows from ``metrics.jsonl`` alone, and is made from it anew when a run begins or is resumed, when
    there is a metric for which it has no column, and after a row could not be written.

    Args:
        path: The table; replaced.
        source: ``metrics.jsonl``, which has every line before the table is given it.

    Raises:
        VembedError: It cannot be written.
    """

    def __init__(self, path: Path, *, source: Path) -> None:
        self.path, self._source = path, source
        self._columns: dict[str, None] = {STEP: None}
        self._row: dict[str, Any] = {}  # the last one, which more of the same step may follow
        self._row_starts = 0
        self._behind = False  # a row is missing
        try:
            self._rebuild()
        except OSError as error:
            raise VembedError(
                f"{path}: cannot be written ({error}); free space or choose another output_dir"
            ) from error

    def write(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Add to the row of the step, or begin it; a value that is no finite number stays empty.

        Raises:
            OSError: It cannot be written; the next call writes what is missing.
        """
        behind, self._behind = self._behind, True
        if behind or metrics.keys() - self._columns.keys():
            self._rebuild()
            self._behind = self._row.get(STEP) != step  # the source waits for room on the disk too
            return
        begun = self._row.get(STEP) == step
        row = {**(self._row if begun else {STEP: step}), **_finite(metrics)}
        with self.path.open("r+b") as file:
            place = file.seek(self._row_starts) if begun else file.seek(0, io.SEEK_END)
            file.write(self._line(row))
            file.truncate()
        self._row, self._row_starts, self._behind = row, place, False

    def close(self) -> None:
        """Write what could not be written."""
        if self._behind:
            self._rebuild()

    def _rebuild(self) -> None:
        self._columns = {STEP: None}
        for values in self._source_rows():
            self._columns.update(dict.fromkeys(values))
        partial = self.path.with_name(f".{self.path.name}.partial")
        self._row, self._row_starts = {}, 0
        with partial.open("wb") as file:
            file.write(_encoded(self._columns))
            for row in self._source_rows():
                self._row, self._row_starts = row, file.tell()
                file.write(self._line(row))
        partial.replace(self.path)

    def _source_rows(self) -> Iterator[dict[str, Any]]:
        """The values of every step, from one or several lines."""
        row: dict[str, Any] = {}
        with self._source.open(encoding="utf-8") as lines:
            for line in lines:
                values = {name: v for name, v in json.loads(line).items() if v is not None}
                if row and row[STEP] != values[STEP]:
                    yield row
                    row = {}
                row |= values
        if row:
            yield row

    def _line(self, row: Mapping[str, Any]) -> bytes:
        return _encoded(row.get(name, "") for name in self._columns)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _encoded(cells: Iterable[Any]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()
