"""What a frozen model gave for items, on the disk: memory-mapped, found by what the items hold.

A table is a folder: ``identity.json`` says what the vectors depend on, and each ``segment-*`` holds
some of them and never changes. A process writes segments of its own, which nobody opens until they
are whole; so ranks and runs extend one table without touching each other's files. (Machines that
map one file of a network disk for writing lose each other's pages.)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import weakref
from collections.abc import Mapping, Sequence
from hashlib import file_digest
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from vembed_ds.errors import DataError
from vembed_ds.similarity import Embeddings

IDENTITY_FILE = "identity.json"
SEGMENT = "segment-"
ROWS_FILE = "vectors.npy"  # [R, G]
KEYS_FILE = "keys.npy"  # [N], ascending, distinct
STARTS_FILE = "starts.npy"  # [N], the first row of each key
LENGTHS_FILE = "lengths.npy"  # [N], the number of its rows; only where items have several (tokens)
CHECKSUMS_FILE = "checksums.json"

KeyArray = npt.NDArray[np.int64]
RowArray = npt.NDArray[np.float32]


class VectorTable:
    """The finished segments of a table; pickles as their names, so processes share the pages.

    A key that is in two segments has the vectors of the older one.

    Args:
        folder: From :func:`ensure_table`.
        segments: Names of the segments; ``None``: all that are there now.

    Raises:
        DataError: There is no table, or a file is missing or cut short.
    """

    def __init__(self, folder: str | Path, segments: Sequence[str] | None = None) -> None:
        self.folder = Path(folder)
        self.identity = read_identity(self.folder)
        if not self.identity:
            raise DataError(
                f"{folder}: holds no table of vectors (no {IDENTITY_FILE}); give a folder that all "
                "machines share"
            )
        self.segments = list_segments(folder) if segments is None else list(segments)
        self._opened = [_Segment(self.folder / name) for name in self.segments]

    def __len__(self) -> int:
        """Items, those in two segments counted twice."""
        return sum(len(segment.keys) for segment in self._opened)

    @property
    def width(self) -> int:
        """G, the width of a vector; 0 while nothing is stored."""
        return int(self._opened[0].rows.shape[1]) if self._opened else 0

    @property
    def holds_tokens(self) -> bool:
        """Whether an item has a vector per token."""
        return any(segment.lengths is not None for segment in self._opened)

    def has(self, keys: KeyArray) -> npt.NDArray[np.bool_]:
        """``[n]``: which of ``[n]`` keys are stored."""
        owners, _ = self._locate(keys)
        return owners >= 0

    def lookup(self, keys: KeyArray) -> RowArray:
        """The vectors of some items that have one each.

        Args:
            keys: ``[n]``, any of the table's, any number of times.

        Returns:
            ``[n, G]`` float32, a copy.

        Raises:
            DataError: A key that is not in the table; says which place of ``keys``.
        """
        assert not self.holds_tokens, "an item of tokens has no single vector"
        owners, places = self._require(keys)
        rows = np.empty((len(keys), self.width), dtype=np.float32)
        for number, segment in enumerate(self._opened):
            wanted = owners == number
            rows[wanted] = segment.rows[segment.starts[places[wanted]]]
        return rows

    def embeddings(self, keys: KeyArray) -> Embeddings:
        """Some items as the frozen model gave them: a vector each, or their tokens.

        Args:
            keys: ``[n]``, any of the table's, any number of times.

        Returns:
            ``[n, G]``, or ``[n, L, G]`` with a mask, L the most tokens of these items; float32, on
            the host, zeros where the mask is false.

        Raises:
            DataError: As of :meth:`lookup`.
        """
        if not self.holds_tokens:
            return Embeddings(torch.from_numpy(self.lookup(keys)))
        owners, places = self._require(keys)
        items = [self._opened[o].tokens(p) for o, p in zip(owners, places, strict=True)]
        lengths = np.array([len(tokens) for tokens in items], dtype=np.int64)
        mask = np.arange(max(1, lengths.max(initial=0))) < lengths[:, None]
        values = np.zeros((*mask.shape, self.width), dtype=np.float32)
        for row, tokens in zip(values, items, strict=True):
            row[: len(tokens)] = tokens
        return Embeddings(torch.from_numpy(values), torch.from_numpy(mask))

    def verify(self, segments: Sequence[str] | None = None) -> None:
        """Read whole segments, and compare every file with its checksum.

        Args:
            segments: Some of the table's; ``None``: all.

        Raises:
            DataError: A file is not what was written; names it.
        """
        for name in self.segments if segments is None else segments:
            for path, stated in _checksums(self.folder / name).items():
                if _checksum(path) != stated:
                    raise _damaged(path, "differs from what was written")

    def _require(self, keys: KeyArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        owners, places = self._locate(keys)
        if (owners < 0).any():
            raise DataError(
                f"{self.folder}: has no vector for item {int(np.argmin(owners))}; the data has "
                "changed since it was written: start again, and if that does not help delete the "
                "folder, so that it is computed again"
            )
        return owners, places

    def _locate(self, keys: KeyArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Number of each key's segment, -1 for none, and the key's place in it."""
        owners, places = np.full(len(keys), -1), np.zeros(len(keys), dtype=np.int64)
        for number, segment in enumerate(self._opened):
            pending = np.flatnonzero(owners < 0)
            found = np.searchsorted(segment.keys, keys[pending])
            here = segment.keys[np.minimum(found, len(segment.keys) - 1)] == keys[pending]
            owners[pending[here]], places[pending[here]] = number, found[here]
        return owners, places

    def __reduce__(self) -> tuple[Any, ...]:
        """Reopens the same segments in the other process."""
        return (VectorTable, (self.folder, self.segments))


class _Segment:
    """The files of one segment, memory-mapped, their sizes compared."""

    def __init__(self, folder: Path) -> None:
        stated = _checksums(folder)
        for path, (size, _) in stated.items():
            if not path.is_file() or path.stat().st_size != size:
                raise _damaged(path, "is missing or cut short")
        self.keys, self.starts = _open(folder / KEYS_FILE), _open(folder / STARTS_FILE)
        self.rows = _open(folder / ROWS_FILE)
        lengths = folder / LENGTHS_FILE
        self.lengths = _open(lengths) if lengths in stated else None

    def tokens(self, place: int) -> RowArray:
        """``[L, G]`` of the key at a place."""
        assert self.lengths is not None
        start = self.starts[place]
        return np.asarray(self.rows[start : start + self.lengths[place]])


class SegmentWriter:
    """Writes one segment, in one process. What is not finished is removed with the writer.

    A killed process leaves its ``unfinished-*`` behind. Nobody reads that; it may be deleted.

    Args:
        folder: Of :func:`ensure_table`.
    """

    def __init__(self, folder: str | Path) -> None:
        # By time: the older segment comes first in a listing, and so in a search.
        self._name = f"{time.time_ns():020}-{uuid4().hex[:8]}"
        self.folder = Path(folder)
        self._unfinished = self.folder / f"unfinished-{self._name}"
        self._keys: list[KeyArray] = []
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._width, self._tokens = 0, False

    def append(self, keys: KeyArray, items: Embeddings) -> None:
        """Write some items.

        Args:
            keys: ``[n]``, none of them in this segment yet.
            items: n items on any device, all of one kind and width.

        Raises:
            DataError: A value is not finite.
            OSError: It cannot be written.
        """
        values = items.values.float()
        rows = values if items.mask is None else values[items.mask]
        if not torch.isfinite(rows).all():
            raise DataError(
                f"{self.folder}: the frozen model gives vectors that are not finite; use it in "
                "float32, or another model"
            )
        if not self._keys:
            self._begin(items)
        with (self._unfinished / ROWS_FILE).open("ab") as file:
            file.write(np.ascontiguousarray(rows.cpu().numpy()).data)
        ones = np.ones(len(keys), dtype=np.int64)
        self._lengths.append(ones if items.mask is None else items.mask.sum(dim=1).cpu().numpy())
        self._keys.append(keys)

    def finish(self) -> None:
        """Give the segment its name, once; where nothing was appended there is none.

        Raises:
            OSError: It cannot be written.
        """
        if not sum(map(len, self._keys)):
            return
        keys, lengths = np.concatenate(self._keys), np.concatenate(self._lengths)
        order = np.argsort(keys)
        assert bool((np.diff(keys[order]) != 0).all()), "keys are distinct"
        arrays = {KEYS_FILE: keys, STARTS_FILE: np.cumsum(lengths) - lengths}
        arrays |= {LENGTHS_FILE: lengths} if self._tokens else {}
        for name, array in arrays.items():
            np.save(self._unfinished / name, array[order])
        with (self._unfinished / ROWS_FILE).open("r+b") as file:
            _write_header(file, rows=int(lengths.sum()), width=self._width)
        written = {name: _checksum(self._unfinished / name) for name in (*arrays, ROWS_FILE)}
        _write_json(self._unfinished / CHECKSUMS_FILE, written)
        self._unfinished.rename(self.folder / f"{SEGMENT}{self._name}")

    def _begin(self, items: Embeddings) -> None:
        self._width, self._tokens = items.width, items.mask is not None
        weakref.finalize(self, shutil.rmtree, self._unfinished, ignore_errors=True)
        self._unfinished.mkdir()
        with (self._unfinished / ROWS_FILE).open("wb") as file:
            _write_header(file, rows=0, width=self._width)


def ensure_table(folder: str | Path, *, identity: Mapping[str, Any]) -> None:
    """Make a table without segments where there is none; any that is there stays as it is.

    One process; of several runs at once, one makes it.

    Args:
        folder: Where the table shall be.
        identity: What the vectors depend on, not empty; kept as JSON.

    Raises:
        DataError: There are segments that nobody knows the identity of.
        OSError: It cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / IDENTITY_FILE).exists():
        return
    if list_segments(folder):
        raise DataError(f"{folder}: has vectors but no {IDENTITY_FILE}; delete the folder")
    written = folder / f"unfinished-{uuid4().hex}.json"
    _write_json(written, identity)
    with contextlib.suppress(FileExistsError):  # another run was first
        os.link(written, folder / IDENTITY_FILE)  # whole, or not at all
    written.unlink()


def remove_table(folder: str | Path) -> None:
    """Delete a table with all of its segments, where there is one. One process.

    Raises:
        OSError: It cannot be deleted.
    """
    if Path(folder).exists():
        shutil.rmtree(folder)


def read_identity(folder: str | Path) -> dict[str, Any]:
    """What the vectors of a table depend on; empty where there is no table.

    Raises:
        DataError: The file cannot be read.
    """
    path = Path(folder) / IDENTITY_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete the folder") from error
    return dict(found)


def list_segments(folder: str | Path) -> list[str]:
    """Names of the finished segments, the oldest first."""
    return sorted(path.name for path in Path(folder).glob(f"{SEGMENT}*"))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("x", encoding="utf-8") as file:
        json.dump(dict(content), file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _write_header(file: BinaryIO, *, rows: int, width: int) -> None:
    """Numpy leaves room for any number of rows, so the header can be written again in its place."""
    described = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(file, described)


def _checksums(segment: Path) -> dict[Path, tuple[int, str]]:
    """Size and checksum of every file of a segment, as they were written."""
    path = segment / CHECKSUMS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {segment / name: (int(size), str(digest)) for name, (size, digest) in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error


def _checksum(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return path.stat().st_size, file_digest(file, xxhash.xxh3_128).hexdigest()


def _open(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path}: {problem}; delete {path.parent}, so that what it holds is computed again"
    )
