"""The rows of one file, read from its start in bounded memory.

Every reader takes the file and the columns that are needed (``None``: all), yields column name to
value, and raises ``BadLineError`` or the error of a library at what it cannot read.
"""

from __future__ import annotations

import csv
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]

from vembed_ds.data.file_checks import (
    MAX_LINE_BYTES,
    BadLineError,
    checked_lines,
    data_suffix,
    member_problem,
    starts_with_bracket,
)
from vembed_ds.data.readers import DELIMITERS

Row = dict[str, Any]

ROWS_PER_BATCH = 256  # of a Parquet file, decoded at a time
BOM = b"\xef\xbb\xbf"


def json_rows(file: Path, _needed: Sequence[str] | None) -> Iterator[Row]:
    """One JSON object a line; blank lines are passed over."""
    if starts_with_bracket(file):
        raise BadLineError("is one JSON array, which no parser streams; save it as JSON lines")
    for number, line in checked_lines(file, is_json=True):
        text = line.removeprefix(BOM) if number == 1 else line
        if text.strip():
            yield _json_object(text, number)


def _json_object(line: bytes, number: int) -> Row:
    try:
        value = json.loads(line, object_pairs_hook=_without_repeats)
        if b"\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadLineError(
            f"line {number} holds half of a surrogate pair; correct the file"
        ) from error
    except ValueError as error:
        raise BadLineError(
            f"line {number} is not valid JSON ({error}); correct the file"
        ) from error
    if not isinstance(value, dict):
        raise BadLineError(
            f"line {number} is {type(value).__name__}, not a JSON object; correct the file"
        )
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return found


def csv_rows(file: Path, _needed: Sequence[str] | None) -> Iterator[Row]:
    """Cells as texts, whatever they look like; a short row ends in empty ones."""
    lines = _csv_lines(file)
    _, header = next(lines, (0, []))
    if not header:
        raise BadLineError("has no header line with the column names")
    if len(set(header)) != len(header):
        raise BadLineError(f"a column name occurs twice in {header}; rename one")
    for number, cells in lines:
        if len(cells) > len(header):
            raise BadLineError(
                f"line {number} has {len(cells)} cells, and the header {len(header)}; quote texts "
                "that hold the separator"
            )
        yield dict(itertools.zip_longest(header, cells, fillvalue=""))


def _csv_lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The cells of every record, all of them text, and the number of its last line."""
    csv.field_size_limit(MAX_LINE_BYTES)  # bounds what a quote that is never closed can swallow
    lines = (
        (line.removeprefix(BOM) if number == 1 else line).decode()
        for number, line in checked_lines(file, is_json=False)
    )
    suffix = data_suffix(file)
    reader = csv.reader(lines, delimiter=DELIMITERS[suffix], strict=True)
    while True:
        before = reader.line_num
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise BadLineError(
                f"line {before + 1}: {error}; write a text that starts with a quote mark as "
                '"""so"" it is quoted"'
            ) from error
        if cells is None:
            return
        if suffix == ".tsv" and reader.line_num > before + 1:
            raise BadLineError(
                f"line {before + 1}: a text that starts with a quote mark goes on to the next one; "
                'write such a text as """so"" it is quoted", or save the data as JSONL'
            )
        if len(cells) > 1 or "".join(cells).strip():
            yield reader.line_num, cells


def csv_header(file: Path) -> list[str]:
    """The column names."""
    return next(_csv_lines(file), (0, []))[1]


def parquet_rows(file: Path, needed: Sequence[str] | None) -> Iterator[Row]:
    """Rows of the columns that are needed; the others are not read."""
    with pq.ParquetFile(file) as table:
        names = [name for name in table.schema_arrow.names if needed is None or name in needed]
        for batch in table.iter_batches(batch_size=ROWS_PER_BATCH, columns=names):
            yield from batch.to_pylist()


def parquet_columns(file: Path) -> list[str]:
    """The column names."""
    return list(pq.read_schema(file).names)


def tar_rows(file: Path, _needed: Sequence[str] | None) -> Iterator[Row]:
    """A WebDataset's samples: neighbouring members that are alike up to the first dot."""
    row: Row = {}
    with tarfile.open(file, "r:") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # else every name is kept
            if problem := member_problem(member):
                raise BadLineError(problem)
            folder, slash, name = member.name.rpartition("/")
            stem, _, field = name.partition(".")
            if not (member.isreg() and stem and field):
                continue
            sample = f"{folder}{slash}{stem}"
            if row and row["__key__"] != sample:
                yield flat(row)
                row = {}
            if field in row:
                raise BadLineError(f"member {member.name!r} stands there twice; remove one")
            content = archive.extractfile(member)
            assert content is not None  # a regular file
            row |= {"__key__": sample, field: _member_value(content.read(), member.name)}
    if row:
        yield flat(row)


def _member_value(content: bytes, name: str) -> Any:
    """Texts, whole numbers and JSON by their suffix; all else is bytes, such as images."""
    suffix = name.rpartition(".")[2].lower()
    try:
        if suffix in ("txt", "text", "transcript"):
            return content.decode()
        if suffix in ("cls", "cls2", "index", "inx", "id"):
            return int(content)
        return json.loads(content) if suffix in ("json", "jsn") else content
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"member {name!r}: {error}; correct the file") from error


def flat(row: Row) -> Row:
    """The fields of a WebDataset's ``json`` files as columns: ``json.caption``."""
    fields = row.get("json") if "__key__" in row else None
    if not isinstance(fields, dict):
        return row
    others = {name: value for name, value in row.items() if name != "json"}
    return others | {f"json.{name}": value for name, value in fields.items()}


ROWS: dict[str, Callable[[Path, Sequence[str] | None], Iterator[Row]]] = {
    ".jsonl": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
    ".tar": tar_rows,
}
