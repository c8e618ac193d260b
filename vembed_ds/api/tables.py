"""Data that a script holds in memory, as the file that a run reads.

A run reads files, by which it can be repeated and resumed; so what is given as a table is written
to one, beside the run's results, under a name made of its content.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from vembed_ds.errors import ConfigError, DataError, one_line

if TYPE_CHECKING:
    import datasets

Paths: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"
Records: TypeAlias = "datasets.Dataset | Sequence[Mapping[str, Any]]"
TrainData: TypeAlias = "Paths | Records"

FOLDER = "data"
_DIGITS = 16  # of the content's hash, in a file's name


def is_paths(data: TrainData) -> bool:
    """Whether data are given by the names of files."""
    if isinstance(data, (str, os.PathLike)):
        return True
    return (
        isinstance(data, (list, tuple))
        and bool(data)
        and all(isinstance(one, (str, os.PathLike)) for one in data)
    )


def store_records(data: Records, folder: Path, *, name: str) -> str:
    """Write a table into a file whose name tells its content. One rank of a disk.

    PIL images are written with it, as PNG; of an image column, the bytes or the path that it has.

    Args:
        data: A ``datasets.Dataset``, or a list of dicts.
        folder: Made if need be.
        name: ``train_data`` or ``eval_data``.

    Returns:
        The file's name: the same content has the same name.

    Raises:
        ConfigError: It is nothing that can be a table.
        DataError: Its cells do not make one, or it has no row.
        OSError: It cannot be written.
    """
    from vembed_ds.data.readers import quiet_datasets
    from vembed_ds.durable import hash_file, sync_file, sync_folder

    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{name}.{os.getpid()}.partial"
    try:
        with quiet_datasets():
            table = as_table(data, name=name)
            table.to_parquet(str(partial))
        file = folder / f"{name}-{hash_file(partial).xxh3_128[:_DIGITS]}.parquet"
        sync_file(partial)
        partial.replace(file)
        sync_folder(folder)
    finally:
        partial.unlink(missing_ok=True)
    return file.name


def as_table(data: Records, *, name: str) -> datasets.Dataset:
    """The table that a script holds; the arguments are :func:`store_records`'s."""
    import datasets

    if isinstance(data, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        first = next(iter(data), "train")
        raise ConfigError(
            f"{name}: holds the splits {', '.join(data) or '(none)'}; give one, such as data[{first!r}]"
        )
    if isinstance(data, datasets.IterableDataset):
        raise ConfigError(
            f"{name}: an IterableDataset has no rows to go back to when a run is resumed; give a "
            "Dataset, or files by data_path with streaming=True"
        )
    if isinstance(data, datasets.Dataset):
        if data.format["type"] == "custom":
            raise ConfigError(
                f"{name}: has a transform (with_transform), and what is written are the rows behind it; "
                "apply it by data.with_format(None).map(...)"
            )
        table = data
    else:
        table = _from_rows(_rows(data, name=name), name=name)
    if not table.num_rows:
        raise DataError(f"{name}: holds no records; give data or leave it out")
    return table


def _rows(data: Any, *, name: str) -> list[Mapping[str, Any]]:
    expected = "expected a path, a list of paths, a datasets.Dataset or a list of dicts"
    if isinstance(data, (Mapping, bytes)) or not isinstance(data, Sequence):
        hint = "; of a DataFrame: data.to_dict('records')" if hasattr(data, "to_dict") else ""
        raise ConfigError(f"{name}: is a {type(data).__name__}; {expected}{hint}")
    for number, row in enumerate(data):
        if not isinstance(row, Mapping):
            raise ConfigError(f"{name}[{number}]: is a {type(row).__name__}; {expected}")
        if unnamed := [key for key in row if not isinstance(key, str)]:
            raise ConfigError(
                f"{name}[{number}]: the key {unnamed[0]!r} is no text; give columns names"
            )
    return list(data)


def _from_rows(rows: Sequence[Mapping[str, Any]], *, name: str) -> datasets.Dataset:
    """Columns from the keys of all rows; ``datasets`` itself looks at the first row only."""
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped]

    keys = dict.fromkeys(key for row in rows for key in row)
    columns = {key: [_cell(row.get(key)) for row in rows] for key in keys}
    try:
        return datasets.Dataset.from_dict(columns)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{name}: the records do not make a table ({one_line(error)}); give every key values of one "
            "type: texts, numbers, images, or lists of one of them"
        ) from error


def _cell(value: Any) -> Any:
    """Paths as text."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_cell(one) for one in value]
    return value
