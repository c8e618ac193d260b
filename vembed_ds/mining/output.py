"""A data set with its negatives, as training reads it: the same columns, and lists of cells beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from vembed_ds.data.cells import as_list, is_absent, only_value
from vembed_ds.data.columns import Part, column_names
from vembed_ds.data.records import RecordReader
from vembed_ds.durable import sync_file, sync_folder
from vembed_ds.encoding.items import ItemTable
from vembed_ds.errors import ConfigError, DataError
from vembed_ds.mining.contents import CORPUS, NEGATIVE, Contents, IntArray

SUFFIXES = (".parquet", ".jsonl")
_ROWS = 1024  # written at a time
_ROWS_WITH_IMAGES = 64
_EMPTY_IMAGE = {"bytes": None, "path": None}


def negative_columns(reader: RecordReader, column_mapping: Mapping[str, str]) -> dict[Part, str]:
    """The columns in which training looks for the negatives, by what they hold.

    Args:
        reader: Of the data, which has the positives.
        column_mapping: As training will have it.
    """
    letter = reader.letters["positive"]
    found: dict[Part, str] = {}
    for part in reader.role_columns["positive"]:
        keys, names = column_names("negative", part, letter)
        found[part] = next((column_mapping[key] for key in keys if key in column_mapping), names[0])
    return found


def check_output(path: Path, table: datasets.Dataset, *, overwrite: bool) -> None:
    """Refuse what could not be written, before anything is embedded.

    Raises:
        ConfigError: The suffix is unknown, the file exists, or JSON cannot hold what the data has.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--output {path}: suffix {path.suffix!r} is not one of .parquet, .jsonl")
    if path.is_dir():
        raise ConfigError(f"--output {path}: is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise ConfigError(f"--output {path}: exists; give another name, or --overwrite")
    for name, feature in table.features.items():
        what = _not_in_json(table, name, feature) if path.suffix == ".jsonl" else None
        if what is not None:
            raise ConfigError(
                f"--output {path}: column {name!r} holds {what}, which JSON does not; give a name that "
                "ends in .parquet"
            )


def _not_in_json(table: datasets.Dataset, name: str, feature: Any) -> str | None:
    """What a column holds that would be refused when it is written, if it is plain to see."""
    if _holds_bytes(feature):
        return "bytes"
    kind = str(getattr(feature, "dtype", ""))
    if kind.startswith(("timestamp", "date", "time", "duration", "decimal")):
        return f"values of the type {kind}"
    if kind.startswith("float") and pc.any(pc.is_nan(table.data.column(name))).as_py():
        return "NaN"
    return None


class NegativeCells:
    """The cells of documents as they stand in the data, for a column of negatives.

    Args:
        table: The pairs' table, undecoded.
        reader: Of the pairs.
        corpus: Further documents.
        part: ``text`` or ``image``.

    Attributes:
        feature: The type of one cell: that of the positives' column; an image that is embedded is a
            mapping of ``bytes`` and ``path``.
    """

    def __init__(
        self, table: datasets.Dataset, reader: RecordReader, corpus: ItemTable | None, part: Part
    ) -> None:
        self._table, self._reader, self._corpus, self._part = table, reader, corpus, part
        found = table.features[reader.role_columns["positive"][part]]
        is_list = isinstance(found, (datasets.List, datasets.LargeList))
        self.feature = _plain(found.feature if is_list else found)

    def of(self, places: IntArray) -> list[Any]:
        """One cell for every place ``[n, 3]`` of :class:`Contents`.

        Raises:
            DataError: A cell of another form than the positives', which their column cannot hold.
        """
        found: list[Any] = [None] * len(places)
        for kind in np.unique(places[:, 0]).tolist():
            own = np.flatnonzero(places[:, 0] == kind)
            rows = np.unique(places[own, 1])
            cells = dict(zip(rows.tolist(), self._cells(kind, rows), strict=True))
            for number in own.tolist():
                _, row, place = places[number].tolist()
                cell = cells[row]
                cell = as_list(cell, place="")[place] if kind == NEGATIVE else cell
                found[number] = self._fitting(only_value(cell, "document", place=""), kind, row)
        return found

    def _cells(self, kind: int, rows: IntArray) -> list[Any]:
        table: datasets.Dataset = self._table
        if kind == CORPUS:
            assert self._corpus is not None, "it has the place"
            table, column = self._corpus.table, self._corpus.columns.parts.get(self._part)
        elif kind == NEGATIVE:
            column = self._reader.negative_columns.get(self._part)
        else:
            column = self._reader.role_columns["positive"].get(self._part)
        if column is None:
            return [None] * len(rows)
        return list(table.select_columns([column])[rows.tolist()][column])

    def _fitting(self, cell: Any, kind: int, row: int) -> Any:
        """The cell in the form of the positives' column."""
        if is_absent(cell):
            return None
        if isinstance(self.feature, dict):
            if isinstance(cell, dict):
                return cell
            return dict(_EMPTY_IMAGE, **{"bytes" if isinstance(cell, bytes) else "path": cell})
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell["path"]
        if isinstance(cell, bytes) != _holds_bytes(self.feature):
            reader, corpus = self._reader, self._corpus
            origin = corpus.origin if corpus is not None and kind == CORPUS else reader.origin
            raise DataError(
                f"{origin}, record {row}: the {self._part} is {_form(cell)}, but those of the positives "
                f"are not, and a column has one form; give all of them in one"
            )
        return cell


def written_rows(
    table: datasets.Dataset,
    rows: IntArray,
    places_of: Callable[[int], IntArray],
    *,
    columns: Mapping[str, NegativeCells],
    without: Sequence[str],
) -> Iterator[pa.Table]:
    """The records with their negatives, some at a time, all of one schema.

    Args:
        table: Of the pairs, all columns, undecoded.
        rows: The records that are kept.
        places_of: From a record to the places of its negatives.
        columns: Where the negatives' cells come from, by the name of their column.
        without: Columns that are left out.

    Raises:
        DataError: As of :meth:`NegativeCells.of`.
    """
    kept = [name for name in table.column_names if name not in {*without, *columns}]
    features = {name: _encoded(table.features[name]) for name in kept}
    features |= {name: datasets.List(cells.feature) for name, cells in columns.items()}
    schema = datasets.Features(features).arrow_schema
    arrow = table.select_columns(kept).with_format("arrow")
    large = any(_holds_bytes(feature) for feature in features.values())
    step = _ROWS_WITH_IMAGES if large else _ROWS
    for start in range(0, len(rows), step):
        own = rows[start : start + step].tolist()
        places = [places_of(row) for row in own]
        ends = np.cumsum([len(found) for found in places]).tolist()
        part = arrow[own]
        arrays = {name: part[name] for name in kept}
        for name, cells in columns.items():
            values = cells.of(np.concatenate(places))
            lists = [values[a:b] for a, b in zip([0, *ends], ends, strict=False)]
            arrays[name] = pa.array(lists, type=schema.field(name).type)
        yield pa.table(arrays).cast(schema)


def write_file(path: Path, parts: Iterator[pa.Table]) -> None:
    """Write a Parquet or JSONL file; it appears whole or not at all. One process.

    Raises:
        DataError: JSON does not hold a value.
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        (_write_parquet if path.suffix == ".parquet" else _write_jsonl)(partial, path, parts)
        sync_file(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_mined(
    path: Path,
    table: datasets.Dataset,
    kept: IntArray,
    *,
    contents: Contents,
    negatives: IntArray,
    reader: RecordReader,
    corpus: ItemTable | None,
    column_mapping: Mapping[str, str],
) -> None:
    """Write the data with its negatives. One process.

    Args:
        path: A ``.parquet`` or ``.jsonl`` file.
        table: Of the pairs, all columns, undecoded.
        kept: The records that are written.
        contents: Of the data.
        negatives: ``[Q, n]``, documents of every distinct query; -1 where there are fewer.
        reader: Of the pairs.
        corpus: Further documents.
        column_mapping: As training will have it.

    Raises:
        DataError: A value that the file cannot hold.
        OSError: It cannot be written.
    """

    def places_of(record: int) -> IntArray:
        found = negatives[contents.query_of[record]]
        places: IntArray = contents.documents[found[found >= 0]]
        return places

    names = negative_columns(reader, column_mapping)
    replaced = list(reader.negative_columns.values())
    scores = score_columns(table, column_mapping) if replaced else []
    parts = written_rows(
        table,
        kept,
        places_of,
        columns={name: NegativeCells(table, reader, corpus, part) for part, name in names.items()},
        without=[*replaced, *scores],
    )
    write_file(path, parts)


def score_columns(table: datasets.Dataset, column_mapping: Mapping[str, str]) -> list[str]:
    """Columns of a teacher's scores of the negatives: they belong to those that are replaced."""
    name = column_mapping.get("neg_scores", "neg_scores")
    return [name] if name in table.column_names else []


def _write_parquet(file: Path, path: Path, parts: Iterator[pa.Table]) -> None:
    writer: Any = None
    try:
        for part in parts:
            writer = writer or pq.ParquetWriter(file, part.schema)
            writer.write_table(part)
    finally:
        if writer is not None:
            writer.close()


def _write_jsonl(file: Path, path: Path, parts: Iterator[pa.Table]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        for part in parts:
            for row in part.to_pylist():
                try:
                    stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                except (TypeError, ValueError) as error:
                    raise DataError(
                        f"--output {path}: JSON does not hold {row} ({error}); give a name that ends in "
                        ".parquet"
                    ) from error


def _form(cell: Any) -> str:
    return "embedded" if isinstance(cell, bytes) else "a path"


def _plain(feature: Any) -> Any:
    """Images as what is stored of them: a list of ``Image`` would be decoded whenever a row is read."""
    if isinstance(feature, datasets.Image):
        return {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    return feature


def _encoded(feature: Any) -> Any:
    """The type as others will read it: images that decode."""
    return datasets.Image() if isinstance(feature, datasets.Image) else feature


def _holds_bytes(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(_holds_bytes(inner) for inner in feature.values())
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return _holds_bytes(feature.feature)
    return isinstance(feature, datasets.Image) or "binary" in str(getattr(feature, "dtype", ""))
