"""Data that is read row by row and never held, or converted, as a whole.

A *shard* is a file, or a part of a hub data set, that is read from its start. Files are read here and
not by the ``datasets`` library: lines are looked at before a parser sees them, an error
names its line, and no cell changes its type. What else the library can read comes from its own streams.
"""

from __future__ import annotations

import csv
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import xxhash

from vembed_ds.data.file_checks import BadLineError, data_suffix, file_problem
from vembed_ds.data.readers import (
    BUILDERS,
    DELIMITERS,
    LOADING_ERRORS,
    cause_of,
    check_file,
    chosen_split,
    expanded,
    is_hub_name,
    quiet_datasets,
    undecoded,
)
from vembed_ds.data.row_formats import ROWS, Row, csv_header, flat, parquet_columns
from vembed_ds.errors import DataError

HEADROWS = 1000  # of the first shard, read for its columns where nothing states them
EDGE_BYTES = 2**14  # of each end of a file, that tell it from another

READING_ERRORS = (*LOADING_ERRORS, csv.Error, EOFError)


@dataclass(frozen=True)
class Shard:
    """Rows that are read one behind the other.

    Attributes:
        name: In messages.
        rows: Starts reading; given the columns that are needed, for formats that can spare the
            others (``None``: all).
        identity: What tells it from a shard of other content, without reading it all.
        columns: The columns of all its rows; ``None``: only the rows themselves tell.
    """

    name: str
    rows: Callable[[Sequence[str] | None], Iterator[Row]]
    identity: Callable[[], str]
    columns: Callable[[], list[str]] | None = None


def open_shards(paths: Sequence[str], *, key: str) -> list[Shard]:
    """The shards of one configuration key. No row is read.

    Args:
        paths: As for :func:`load_table`.
        key: ``data_path``; chooses the split and names errors.

    Returns:
        The shards of all paths, in their order; at least one.

    Raises:
        DataError: A path is missing, no data, or without the split.
    """
    with quiet_datasets():
        shards = [shard for path in paths for shard in _shards_of(path, key=key)]
    if not shards:
        raise DataError(f"{key} names no data; give at least one file, folder or hub name")
    return shards


def first_columns(shards: Sequence[Shard]) -> list[str]:
    """The columns that the first shard states, or its first rows have.

    Raises:
        DataError: It cannot be read.
    """
    rows = numbered_rows(shards[0], columns=None, needed=None)
    head = [row for _, row in itertools.islice(rows, 1 if shards[0].columns else HEADROWS)]
    if shards[0].columns is not None:
        return shards[0].columns()
    return list(dict.fromkeys(name for row in head for name in row))


def numbered_rows(
    shard: Shard, *, columns: Sequence[str] | None, needed: Sequence[str] | None
) -> Iterator[tuple[int, Row]]:
    """Reads a shard.

    Args:
        shard: The shard.
        columns: The columns that there may be; ``None``: any.
        needed: Those that are wanted, given as None where a row lacks one; ``None``: all.

    Yields:
        Number, from 0, and values of each row.

    Raises:
        DataError: The shard cannot be read, has other columns, or no rows.
    """
    number = -1
    try:
        _check_columns(shard, columns)
        for number, row in enumerate(shard.rows(needed)):
            if columns is not None and (unknown := row.keys() - columns):
                raise DataError(
                    f"{shard.name}, record {number}: the column {min(unknown)!r} is not among those "
                    f"of the first records ({', '.join(columns)}); write it into the first record "
                    "too (null where it is empty), or remove it"
                )
            yield number, row if needed is None else {name: row.get(name) for name in needed}
    except BadLineError as error:
        raise DataError(f"{shard.name}: {error}") from error
    except READING_ERRORS as error:
        raise DataError(f"{shard.name}: {cause_of(error)}; correct the file") from error
    if number < 0:
        raise DataError(f"{shard.name}: holds no records; give data or remove it")


def identity_of(shards: Sequence[Shard]) -> str:
    """A hash of what can be known of the shards without reading them.

    Sizes and ends of files; names of what is on the hub, which hold its revision.

    Returns:
        32 hexadecimal digits; an edit between the ends of a file, of equal length, goes unseen.
    """
    return xxhash.xxh3_128("\n".join(shard.identity() for shard in shards).encode()).hexdigest()


def _check_columns(shard: Shard, columns: Sequence[str] | None) -> None:
    if columns is None or shard.columns is None:
        return
    own = shard.columns()
    if set(own) != set(columns):
        raise DataError(
            f"{shard.name}: has columns {', '.join(own)}, and the first shard {', '.join(columns)}; "
            "files that are read together need the same columns"
        )


def _shards_of(path: str, *, key: str) -> list[Shard]:
    place = f"{key}={path}"
    file = Path(path).expanduser()
    if file.is_dir():
        return _folder_shards(file, place=place, key=key)
    if not file.exists() and (names := expanded(str(file))):
        return [_file_shard(Path(name), place=f"{place}: {name}", key=key) for name in names]
    if is_hub_name(file):
        return _hub_shards(path, place=place, key=key)
    return [_file_shard(file, place=place, key=key)]


def _file_shard(file: Path, *, place: str, key: str) -> Shard:
    check_file(file, place=place, key=key)
    suffix = data_suffix(file)
    if suffix in DELIMITERS:
        columns: Callable[[], list[str]] | None = functools.partial(csv_header, file)
    else:
        columns = functools.partial(parquet_columns, file) if suffix == ".parquet" else None
    rows = functools.partial(ROWS[suffix], file)
    return Shard(str(file), rows, functools.partial(_file_identity, file), columns)


def _folder_shards(folder: Path, *, place: str, key: str) -> list[Shard]:
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        return _saved_shards(folder, place=place, key=key)
    builder = _builder(str(folder), place=place, problem="folder cannot be read as data")
    files = chosen_split(builder.config.data_files or {}, place=place, key=key)
    if all(data_suffix(Path(file)) in BUILDERS for file in files):
        return [_file_shard(Path(file), place=place, key=key) for file in files]
    for file in sorted(folder.rglob("*")):  # beside images, for example; the library reads it
        if file.is_file() and (problem := file_problem(file)):
            raise DataError(f"{place}: {file}: {problem}")
    return _library_shards(builder, str(folder), files, place=place, key=key)


def _saved_shards(folder: Path, *, place: str, key: str) -> list[Shard]:
    """A folder of ``save_to_disk``: Arrow already, so it is memory-mapped and read in order."""
    try:
        loaded = datasets.load_from_disk(str(folder))
    except LOADING_ERRORS as error:
        raise DataError(f"{place}: folder cannot be read as data: {cause_of(error)}") from error
    table = chosen_split(loaded, place=place, key=key)
    files = [Path(entry["filename"]) for entry in table.cache_files]
    return [
        _library_shard(
            str(folder), table.to_iterable_dataset(), lambda: "".join(map(_file_identity, files))
        )
    ]


def _hub_shards(name: str, *, place: str, key: str) -> list[Shard]:
    builder = _builder(
        name, place=place, problem="neither a file, a folder nor a data set that the hub gives"
    )
    files = chosen_split(builder.config.data_files or {}, place=place, key=key)
    return _library_shards(builder, name, files, place=place, key=key)


def _builder(name: str, *, place: str, problem: str) -> Any:
    try:
        return datasets.load_dataset_builder(name)
    except LOADING_ERRORS as error:
        raise DataError(f"{place}: {problem}: {cause_of(error)}") from error


def _library_shards(
    builder: Any, name: str, files: Sequence[str], *, place: str, key: str
) -> list[Shard]:
    """What the ``datasets`` library streams; a name on the hub holds the revision."""
    try:
        stream = chosen_split(builder.as_streaming_dataset(), place=place, key=key)
    except LOADING_ERRORS as error:
        raise DataError(f"{place}: cannot be streamed: {cause_of(error)}") from error
    number = stream.num_shards
    # Where shards are not files, the first one answers for all of these.
    names = [f"{name}, shard {index}" for index in range(number)]
    owned: list[Sequence[str]] = [files, *[()] * (number - 1)]
    if number == len(files):
        names, owned = list(files), [[file] for file in files]
    identities = [functools.partial(_names_identity, own) for own in owned]
    return [
        _library_shard(
            names[index], stream.shard(num_shards=number, index=index), identities[index]
        )
        for index in range(number)
    ]


def _library_shard(
    name: str, stream: datasets.IterableDataset, identity: Callable[[], str]
) -> Shard:
    # A WebDataset's `json` becomes columns of its fields, which only the rows know.
    known = (
        stream.column_names if stream.column_names and "json" not in stream.column_names else None
    )
    columns = None if known is None else lambda: list(known)
    return Shard(name, lambda _: map(flat, undecoded(stream)), identity, columns)


def _names_identity(names: Sequence[str]) -> str:
    """Name and size of what is a file here; the name on the hub holds the revision."""
    files = [Path(name) for name in names]
    return "\n".join(
        f"{file.name} {file.stat().st_size}" if file.is_file() else name
        for file, name in zip(files, names, strict=True)
    )


def _file_identity(file: Path) -> str:
    size = file.stat().st_size
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        digest.update(stream.read(EDGE_BYTES))
        stream.seek(max(0, size - EDGE_BYTES))
        digest.update(stream.read(EDGE_BYTES))
    return f"{size} {digest.hexdigest()}"
