"""The embeddings of a table as a folder of plain files, which ranks write together and a killed run leaves usable.

``manifest.json`` says what they depend on, and which blocks of rows are done; it is written behind the
data of a block, never before. ``embeddings.npy`` is ``[N, D]``, row i of the table in row i. Of a
late-interaction model it is ``[T, D]``, the tokens of all rows, and those of row i are
``offsets[i]:offsets[i + 1]`` by ``offsets.npy``, ``[N + 1]`` int64. ``ids.parquet`` names the rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from vembed_ds.data.vector_table import (
    KEYS_FILE,
    SegmentWriter,
    VectorTable,
    ensure_table,
    list_segments,
    remove_table,
)
from vembed_ds.durable import replace_text, sync_file, sync_folder
from vembed_ds.errors import ConfigError, DataError
from vembed_ds.run_lock import LOCK_FILE
from vembed_ds.similarity import Embeddings

MANIFEST_FILE = "manifest.json"
EMBEDDINGS_FILE = "embeddings.npy"
OFFSETS_FILE = "offsets.npy"
IDS_FILE = "ids.parquet"
TOKENS_FOLDER = "unfinished-tokens"
FORMAT_VERSION = 1
# Rows that are done or not done together. Rows of any width in 2 or 4 bytes then fill whole pages of
# the disk, so that two machines never write into one page of a network disk (they lose such writes).
BLOCK_ROWS = 2048
PAGE = 4096
_IDS_AT_A_TIME = 65536
_ROWS_AT_A_TIME = 256  # of tokens, padded to the longest

Vectors = npt.NDArray[Any]


@dataclass(frozen=True)
class Identity:
    """What the embeddings in a folder depend on.

    Attributes:
        model: Fingerprint of the model.
        data: Fingerprint of the columns that are read.
        count: N, rows of the table.
        dims: D, of an embedding.
        dtype: ``float32`` or ``float16``, of the files.
        tokens: Whether an item has a vector per token.
        settings: Everything else, plain values.
    """

    model: str
    data: str
    count: int
    dims: int
    dtype: str
    tokens: bool
    settings: dict[str, Any]


@dataclass
class Manifest:
    """What ``manifest.json`` says.

    Attributes:
        identity: What the embeddings depend on.
        names: What the model and the data are called; may differ when a run is gone on with.
        block_rows: Rows of a block.
        blocks_done: Numbers of the blocks that are on the disk.
        complete: Whether all files are whole.
    """

    identity: Identity
    names: dict[str, Any]
    block_rows: int = BLOCK_ROWS
    blocks_done: tuple[int, ...] = ()
    complete: bool = False

    @property
    def num_blocks(self) -> int:
        """Of the whole table."""
        return -(-self.identity.count // self.block_rows)

    def rows(self, block: int) -> range:
        """The rows of a block."""
        start = block * self.block_rows
        return range(start, min(start + self.block_rows, self.identity.count))

    def pending(self) -> list[int]:
        """The blocks that are not done."""
        done = set(self.blocks_done)
        return [block for block in range(self.num_blocks) if block not in done]

    def write(self, folder: Path) -> None:
        """Replace the file. One process.

        Raises:
            OSError: It cannot be written.
        """
        content = {
            "format_version": FORMAT_VERSION,
            "complete": self.complete,
            **self.names,
            **asdict(self.identity),
            "block_rows": self.block_rows,
            "blocks_done": _as_ranges(self.blocks_done),
        }
        replace_text(folder / MANIFEST_FILE, json.dumps(content, indent=2) + "\n")


def check_folder(folder: Path) -> None:
    """Refuse a folder in which this command has not written.

    Raises:
        ConfigError: It holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {folder}: is a file; give a new or empty folder")
    if not folder.is_dir() or (folder / MANIFEST_FILE).is_file():
        return
    names = {path.name for path in folder.iterdir()} - {LOCK_FILE}
    if any(not name.startswith(".") for name in names):
        raise ConfigError(
            f"--output {folder}: holds other files (no {MANIFEST_FILE}); give a new or empty folder"
        )


def read_manifest(folder: Path) -> Manifest | None:
    """What a folder holds; ``None``: nothing yet.

    Raises:
        ConfigError: The file cannot be read.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version is {found['format_version']}, not {FORMAT_VERSION}")
        identity = Identity(**{name: found[name] for name in Identity.__annotations__})
        blocks = [n for first, end in found["blocks_done"] for n in range(first, end)]
        return Manifest(
            identity,
            {name: found[name] for name in ("model_name", "data_paths")},
            int(found["block_rows"]),
            tuple(blocks),
            bool(found["complete"]),
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); give another --output, or "
            "--overwrite to begin again"
        ) from error


def require_same(folder: Path, found: Identity, wanted: Identity) -> None:
    """Refuse to mix embeddings of different origin in one folder.

    Raises:
        ConfigError: Names everything that differs.
    """
    there, here = _flat(found), _flat(wanted)
    differing = [
        f"{name} was {there.get(name)!r}, is {here.get(name)!r}"
        for name in dict.fromkeys((*there, *here))
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise ConfigError(
            f"--output {folder}: holds other embeddings: {'; '.join(differing)}; give another "
            "folder, or --overwrite to replace them"
        )


def remove_files(folder: Path) -> None:
    """Delete what this command writes, and nothing else. One process.

    Raises:
        OSError: It cannot be deleted.
    """
    for name in (MANIFEST_FILE, EMBEDDINGS_FILE, OFFSETS_FILE, IDS_FILE):
        (folder / name).unlink(missing_ok=True)
    remove_table(folder / TOKENS_FOLDER)


class VectorFile:
    """``embeddings.npy`` of single vectors; its blocks are written in their places, by any rank.

    Args:
        folder: Of the output.
        identity: Of the output.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        self._path = folder / EMBEDDINGS_FILE
        self._shape = (identity.count, identity.dims)
        self._dtype = np.dtype(identity.dtype)

    @property
    def num_bytes(self) -> int:
        """Length of the file."""
        return PAGE + self._shape[0] * self._shape[1] * self._dtype.itemsize

    def begin(self, *, anew: bool) -> None:
        """Make the file, or see that it is the one that was begun. One process.

        Raises:
            DataError: It is not, and ``anew`` is false.
            OSError: It cannot be written.
        """
        if anew:
            with self._path.open("wb") as file:
                _write_header(file, self._shape, self._dtype)
                file.truncate(self.num_bytes)
                os.fsync(file.fileno())
        else:
            self.check()

    def check(self) -> None:
        """See that the file has its length. One process.

        Raises:
            DataError: It is missing, or of another length.
        """
        _require_length(self._path, self.num_bytes)

    def write(self, start: int, rows: Embeddings) -> None:
        """Put rows into their place, and onto the disk.

        Raises:
            OSError: It cannot be written.
        """
        values = np.ascontiguousarray(rows.values.numpy().astype(self._dtype))
        with self._path.open("r+b") as file:
            file.seek(PAGE + start * self._shape[1] * self._dtype.itemsize)
            file.write(values.data)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """The file is whole once all blocks are."""

    def clean(self) -> None:
        """Nothing else was written."""


class TokenFiles:
    """``embeddings.npy`` and ``offsets.npy`` of a late-interaction model.

    How many tokens an item has is known once it is embedded, so a row has no place before all are.
    Until then the blocks lie in a table of vectors of their own, by the number of the row.

    Args:
        folder: Of the output.
        identity: Of the output.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        self._folder, self._identity = folder, identity
        self._table = folder / TOKENS_FOLDER

    def begin(self, *, anew: bool) -> None:
        """See :meth:`VectorFile.begin`."""
        if anew:
            remove_table(self._table)
            ensure_table(self._table, identity=asdict(self._identity))
        elif not self._table.is_dir():
            raise _not_whole(self._table)

    def check(self) -> None:
        """See that both files are whole, once they are made. One process.

        Raises:
            DataError: One is missing, or of another length.
        """
        path, identity = self._folder / OFFSETS_FILE, self._identity
        try:
            offsets = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise _not_whole(path) from error
        if offsets.shape != (identity.count + 1,):
            raise _not_whole(path)
        size = int(offsets[-1]) * identity.dims * np.dtype(identity.dtype).itemsize
        _require_length(self._folder / EMBEDDINGS_FILE, PAGE + size)

    def write(self, start: int, rows: Embeddings) -> None:
        """See :meth:`VectorFile.write`."""
        writer = SegmentWriter(self._table)
        writer.append(np.arange(start, start + len(rows), dtype=np.int64), rows)
        writer.finish()
        sync_folder(self._table)

    def finish(self) -> None:
        """Lay the blocks end to end. One process.

        Raises:
            DataError: A block is missing or damaged.
            OSError: It cannot be written.
        """
        VectorTable(self._table).verify()
        dims, dtype = self._identity.dims, np.dtype(self._identity.dtype)
        lengths = [np.zeros(1, dtype=np.int64)]
        partial = self._folder / f".{EMBEDDINGS_FILE}.partial"
        with partial.open("w+b") as file:
            _write_header(file, (0, dims), dtype)
            for found in self._in_order():
                assert found.mask is not None
                lengths.append(found.mask.sum(dim=1).numpy())
                tokens = found.values[found.mask].numpy().astype(dtype)
                file.write(np.ascontiguousarray(tokens).data)
            offsets = np.cumsum(np.concatenate(lengths))
            assert len(offsets) == self._identity.count + 1, "every row is in one block"
            file.seek(0)
            _write_header(file, (int(offsets[-1]), dims), dtype)
            file.flush()
            os.fsync(file.fileno())
        np.save(self._folder / OFFSETS_FILE, offsets)
        sync_file(self._folder / OFFSETS_FILE)
        partial.replace(self._folder / EMBEDDINGS_FILE)
        sync_folder(self._folder)

    def _in_order(self) -> Iterator[Embeddings]:
        """All rows, some at a time.

        A run that was killed between a block and its mark has written it; it counts once.
        """
        firsts: dict[int, tuple[str, int]] = {}
        for name in list_segments(self._table):
            keys = np.load(self._table / name / KEYS_FILE, mmap_mode="r")
            firsts.setdefault(int(keys[0]), (name, len(keys)))
        for first, (name, number) in sorted(firsts.items()):
            block = VectorTable(self._table, [name])
            for start in range(first, first + number, _ROWS_AT_A_TIME):
                end = min(start + _ROWS_AT_A_TIME, first + number)
                yield block.embeddings(np.arange(start, end, dtype=np.int64))

    def clean(self) -> None:
        """Delete the blocks, once everything that is made of them is on the disk. One process."""
        remove_table(self._table)


def open_files(folder: Path, identity: Identity) -> VectorFile | TokenFiles:
    """The files that hold embeddings of a kind."""
    return TokenFiles(folder, identity) if identity.tokens else VectorFile(folder, identity)


def write_ids(folder: Path, table: datasets.Dataset, column: str | None) -> None:
    """Write ``ids.parquet``: the number of every row, and what names it. One process.

    Raises:
        OSError: It cannot be written.
    """
    partial = folder / f".{IDS_FILE}.partial"
    arrow = table.select_columns([] if column is None else [column]).with_format("arrow")
    writer: Any = None
    try:
        for start in range(0, table.num_rows, _IDS_AT_A_TIME):
            end = min(start + _IDS_AT_A_TIME, table.num_rows)
            columns = {"row": pa.array(range(start, end), pa.int64())}
            if column is not None:
                columns["id"] = arrow[start:end][column]
            part = pa.table(columns)
            writer = writer or pq.ParquetWriter(partial, part.schema)
            writer.write_table(part)
    finally:
        if writer is not None:
            writer.close()
    sync_file(partial)
    partial.replace(folder / IDS_FILE)
    sync_folder(folder)


def check_complete(folder: Path, identity: Identity) -> None:
    """See that the files are there, of a folder whose manifest says so. One process.

    Raises:
        DataError: One is missing, or of another length.
    """
    open_files(folder, identity).check()
    if not (folder / IDS_FILE).is_file():
        raise _not_whole(folder / IDS_FILE)


def _require_length(path: Path, num_bytes: int) -> None:
    if not path.is_file() or path.stat().st_size != num_bytes:
        raise _not_whole(path)


def _not_whole(path: Path) -> DataError:
    return DataError(
        f"{path}: is missing or cut short, though {MANIFEST_FILE} says that it was written; begin "
        "again with --overwrite"
    )


def _write_header(file: BinaryIO, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
    """Numpy's own, version 1.0, filled up with spaces so that the values begin on a page of the disk."""
    described = repr({"descr": dtype.str, "fortran_order": False, "shape": shape})
    magic = np.lib.format.magic(1, 0)
    length = PAGE - len(magic) - 2
    text = described.encode("latin1").ljust(length - 1) + b"\n"
    file.write(magic + length.to_bytes(2, "little") + text)


def _flat(identity: Identity) -> dict[str, Any]:
    values = asdict(identity)
    return {**{k: v for k, v in values.items() if k != "settings"}, **values["settings"]}


def _as_ranges(numbers: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as ``[first, end)`` pairs."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number:
            found[-1][1] += 1
        else:
            found.append([number, number + 1])
    return found
