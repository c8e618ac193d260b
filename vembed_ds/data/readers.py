"""Tables from files, folders and the hub, memory-mapped through the ``datasets`` library."""

from __future__ import annotations

import glob
import itertools
import logging
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import datasets
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from vembed_ds.data.file_checks import data_suffix, file_problem, first_json_problem, open_plain
from vembed_ds.distributed import comm
from vembed_ds.errors import DataError

logger = logging.getLogger(__name__)

BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".tar": "webdataset",
}
DELIMITERS = {".csv": ",", ".tsv": "\t"}

Table = TypeVar("Table", datasets.Dataset, datasets.IterableDataset)

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")

# Split names that each configuration key accepts, in order of preference.
SPLITS = {"data_path": ("train",), "val_data_path": ("validation", "test")}

LOADING_ERRORS = (
    datasets.exceptions.DatasetsError,
    pa.ArrowException,
    OSError,
    ValueError,
    TypeError,
    ImportError,
    tarfile.TarError,
)


def load_table(paths: Sequence[str], *, key: str) -> datasets.Dataset:
    """Opens the data of one configuration key as one table.

    Nothing is read into Python objects: files are converted once to Arrow (cached by
    ``datasets``) and memory-mapped. Images stay encoded.

    Args:
        paths: Files (.jsonl, .json, .csv, .tsv, also .gz; .parquet; .tar of WebDataset), patterns
            of files (``a-*.parquet``, ``a-{0000..0003}.tar``), folders (of ``save_to_disk`` or of
            data files) or hub names; several are concatenated in this order.
        key: ``data_path`` or ``val_data_path``; chooses the split and names errors.

    Returns:
        The table, at least one row.

    Raises:
        DataError: When a path is missing, broken or empty, a split is absent, or two paths
            have different columns.
    """
    if not paths:
        raise DataError(f"{key} names no data; give at least one file, folder or hub name")
    with quiet_datasets():
        tables = [undecoded(_flat(_load_one(path, key=key))) for path in paths]
        for path, table in zip(paths, tables, strict=True):
            if not table.num_rows:
                raise DataError(f"{key}={path}: holds no records; give data or remove it")
        return _concatenated(tables, paths=paths, key=key)


def _load_one(path: str, *, key: str) -> datasets.Dataset:
    place = f"{key}={path}"
    file = Path(path).expanduser()
    if file.is_dir():
        return _load_folder(file, place=place, key=key)
    if not file.exists() and (pattern := expanded(str(file))):
        return _load_pattern(pattern, place=place, key=key)
    if is_hub_name(file):
        return _load_hub(path, place=place, key=key)
    check_file(file, place=place, key=key)
    return _load_file(file, builder=BUILDERS[data_suffix(file)], place=place)


def is_hub_name(file: Path) -> bool:
    """Whether it can only be the name of a data set: no file, and no suffix of one."""
    return data_suffix(file) not in BUILDERS and not file.exists()


def check_file(file: Path, *, place: str, key: str) -> None:
    """Refuse what cannot be a data file, before anything opens it.

    Args:
        file: The file.
        place: Key and value, for messages.
        key: The key to correct.

    Raises:
        DataError: It is missing, empty, no regular file or of an unknown suffix.
    """
    if data_suffix(file) not in BUILDERS:
        raise DataError(
            f"{place}: suffix {data_suffix(file)!r} is not one of {', '.join(BUILDERS)}"
        )
    if not file.exists():
        raise DataError(f"{place}: file does not exist; correct {key}")
    if not file.is_file():
        raise DataError(f"{place}: is no regular file; give a file, a folder or a hub name")
    if not file.stat().st_size:
        raise DataError(f"{place}: holds no records (the file is empty); give data or remove it")


def expanded(pattern: str) -> list[str]:
    """The names that a pattern means, ranges in braces counted out; empty for a plain name."""
    pieces = RANGE.split(pattern)  # text, from, to, text, from, to, ..., text
    ranges = [
        [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        for first, last in zip(pieces[1::3], pieces[2::3], strict=True)
    ]
    texts = pieces[0::3]
    names = [
        texts[0] + "".join(itertools.chain(*zip(numbers, texts[1:], strict=True)))
        for numbers in itertools.product(*ranges)
    ]
    if not glob.has_magic(pattern):
        return names if ranges else []
    return sorted(itertools.chain(*map(glob.glob, names))) or [pattern]


def files_of(paths: Sequence[str]) -> list[Path]:
    """The files that ``load_table`` reads, in its order; folders and hub names stay as they are."""
    found: list[Path] = []
    for path in paths:
        file = Path(path).expanduser()
        names = [] if file.exists() else expanded(str(file))
        found += map(Path, names or [str(file)])
    return found


def _load_pattern(names: Sequence[str], *, place: str, key: str) -> datasets.Dataset:
    for name in names:
        if not Path(name).is_file():
            raise DataError(f"{place}: {name}: file does not exist; correct {key}")
    tables = [_load_one(name, key=key) for name in names]
    return _concatenated(tables, paths=names, key=key)


def _load_file(file: Path, *, builder: str, place: str) -> datasets.Dataset:
    options = {}
    if builder in ("csv", "parquet"):
        options = (_csv_options if builder == "csv" else _parquet_options)(file, place=place)
    try:
        prepared = datasets.load_dataset_builder(builder, data_files=[str(file)], **options)
        if not Path(prepared.cache_dir).exists() and (problem := file_problem(file)):
            raise DataError(f"{place}: {problem}")
        prepared.download_and_prepare()
        table = prepared.as_dataset(split="train")
        if data_suffix(file) == ".tsv":
            _check_lines(file, num_rows=table.num_rows, place=place)
        return table
    except LOADING_ERRORS as error:
        if _holds_no_rows(file, builder=builder, error=error):
            raise DataError(f"{place}: holds no records; give data or remove it") from error
        cause = first_json_problem(file) if builder == "json" else None
        raise DataError(f"{place}: {cause or cause_of(error)}; correct the file") from error


def _flat(table: datasets.Dataset) -> datasets.Dataset:
    """The fields of a WebDataset's ``json`` files as columns: ``json.caption``."""
    is_webdataset = "__key__" in table.column_names
    return table.flatten() if is_webdataset and "json" in table.column_names else table


def _check_lines(file: Path, *, num_rows: int, place: str) -> None:
    """A cell that starts with a quote mark swallows the lines up to the next one."""
    with open_plain(file) as stream:
        num_lines = sum(1 for line in stream if line.strip()) - 1  # without the header
    if num_rows != num_lines:
        raise DataError(
            f"{place}: {num_lines} lines, but {num_rows} records: a text that starts with a quote "
            'mark goes on to the next one; write such a text as """so"" it is quoted", or save '
            "the data as JSONL"
        )


def _holds_no_rows(file: Path, *, builder: str, error: Exception) -> bool:
    """Tells an empty file, which ``datasets`` cannot load either, from a broken one."""
    if builder != "parquet":
        return "corresponds to no data" in str(error)
    try:
        return int(pq.read_metadata(file).num_rows) == 0
    except (pa.ArrowException, OSError):
        return False


def _load_folder(folder: Path, *, place: str, key: str) -> datasets.Dataset:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and (problem := file_problem(file)):
            raise DataError(f"{place}: {file}: {problem}")
        if file.is_file() and (odd := _odd_columns(file)):
            name, kind = next(iter(odd.items()))
            raise DataError(
                f"{place}: {file}: column {name!r} is of type {kind}, which cannot be read; remove it, "
                f"or give the files, {key}: {folder}/*.parquet, of which such columns are left out"
            )
    saved = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
    load = datasets.load_from_disk if saved else datasets.load_dataset
    try:
        loaded = load(str(folder))
    except LOADING_ERRORS as error:
        raise DataError(f"{place}: folder cannot be read as data: {cause_of(error)}") from error
    return cast(datasets.Dataset, chosen_split(loaded, place=place, key=key))


def _load_hub(name: str, *, place: str, key: str) -> datasets.Dataset:
    try:
        loaded = datasets.load_dataset(name)
    except LOADING_ERRORS as error:
        raise DataError(
            f"{place}: neither a file, a folder nor a data set that the hub gives: {cause_of(error)}"
        ) from error
    return cast(datasets.Dataset, chosen_split(loaded, place=place, key=key))


def chosen_split(loaded: Any, *, place: str, key: str) -> Any:
    """The split that ``key`` means, of what is kept by split; what has no splits as it is.

    Raises:
        DataError: There is no such split.
    """
    if isinstance(loaded, datasets.Dataset):
        return loaded
    for split in SPLITS[key]:
        if split in loaded:
            return loaded[split]
    raise DataError(
        f"{place}: no split {' or '.join(SPLITS[key])}; it has {', '.join(map(str, loaded)) or 'none'}; "
        f"give {key} a folder or file that holds one split"
    )


def _csv_options(file: Path, *, place: str) -> dict[str, Any]:
    """Reads every cell as text: ``NA`` and ``007`` are captions, not a gap and a number."""
    options = {"sep": DELIMITERS[data_suffix(file)], "keep_default_na": False}
    try:  # as rows without header: else a longer first row would make pandas shift the columns
        header = list(pd.read_csv(file, header=None, nrows=2, dtype=str, **options).iloc[0])
    except ValueError as error:  # ParserError, EmptyDataError, UnicodeDecodeError
        raise DataError(
            f"{place}: {cause_of(error)}; save as UTF-8 and quote texts that hold the separator"
        ) from error
    if len(set(header)) != len(header):
        raise DataError(f"{place}: a column name occurs twice in {header}; rename one")
    return options | {
        "features": datasets.Features({name: datasets.Value("string") for name in header})
    }


def _parquet_options(file: Path, *, place: str) -> dict[str, Any]:
    """Leaves out the columns that ``datasets`` has no type for; no role can be one of them."""
    odd = _odd_columns(file)
    if not odd:
        return {}
    named = ", ".join(f"{name!r} ({kind})" for name, kind in odd.items())
    schema = pq.read_schema(file)
    fields = [field for field in schema if field.name not in odd]
    if not fields:
        raise DataError(f"{place}: no column can be read: {named}; save texts, numbers or lists")
    logger.warning("%s: left out, as no type that can be read: %s", place, named)
    features = datasets.Features.from_arrow_schema(pa.schema(fields, metadata=schema.metadata))
    return {"columns": [field.name for field in fields], "features": features}


def _odd_columns(file: Path) -> dict[str, str]:
    """Name and type of the columns of a Parquet file that ``datasets`` cannot hold, such as maps."""
    if file.suffix.lower() != ".parquet":
        return {}
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError):
        return {}  # no Parquet file: reading it says so
    return {field.name: str(field.type) for field in schema if not _has_type(field)}


def _has_type(field: pa.Field) -> bool:
    try:
        datasets.Features.from_arrow_schema(pa.schema([field]))
    except ValueError:
        return False
    return True


def undecoded(table: Table) -> Table:
    """Leaves images encoded, so that only the workers decode them."""
    for column, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Image) and feature.decode:
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _concatenated(
    tables: Sequence[datasets.Dataset], *, paths: Sequence[str], key: str
) -> datasets.Dataset:
    if len(tables) == 1:
        return tables[0]
    first = tables[0]
    for path, table in zip(paths, tables, strict=True):
        if _types(table) != _types(first):
            raise DataError(
                f"{key}: {paths[0]} has columns {_types(first)}, {path} has {_types(table)}; "
                "files that are read together need the same columns and types"
            )
    return datasets.concatenate_datasets(
        [
            table if table.features == first.features else table.cast(first.features)
            for table in tables
        ]
    )


def _types(table: datasets.Dataset) -> dict[str, str]:
    """Column types in name order; the two widths of strings and bytes count as one."""
    names = {
        name: getattr(feature, "dtype", str(feature)) for name, feature in table.features.items()
    }
    return {name: str(names[name]).removeprefix("large_") for name in sorted(names)}


def cause_of(error: BaseException) -> str:
    """What a library says went wrong, on one line."""
    cause = error.__cause__ or error
    return " ".join(str(cause).split()) or type(cause).__name__


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Hides log lines that repeat the error we raise, and bars but on rank 0's terminal."""
    bars_were_off = datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    if not (comm.is_main() and sys.stderr.isatty()):
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars_were_off:
            datasets.enable_progress_bars()
