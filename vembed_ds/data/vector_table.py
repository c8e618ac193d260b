"""What a frozen model gave for items, on the disk: memory-mapped, found by what the items hold."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vembed_ds.errors import DataError

ROWS_FILE = "vectors.npy"
KEYS_FILE = "keys.npy"
IDENTITY_FILE = "identity.json"

KeyArray = npt.NDArray[np.int64]
RowArray = npt.NDArray[np.float32]


class VectorTable:
    """A finished table; pickles as its path, so that processes share the pages of one file.

    Args:
        folder: From :func:`finish_table`.

    Raises:
        DataError: A file is missing, cut short, or does not belong to the others.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.identity = read_identity(self.folder)
        self._keys = _open(self.folder / KEYS_FILE, np.int64, dims=1)
        self._rows = _open(self.folder / ROWS_FILE, np.float32, dims=2)
        if len(self._keys) != len(self._rows):
            raise DataError(
                f"{folder}: {len(self._keys)} keys and {len(self._rows)} rows; delete the folder "
                "so that it is computed again"
            )

    def __len__(self) -> int:
        """N, the number of rows."""
        return len(self._rows)

    @property
    def width(self) -> int:
        """G, the width of a vector."""
        return int(self._rows.shape[1])

    def lookup(self, keys: KeyArray) -> RowArray:
        """The vectors of some items.

        Args:
            keys: ``[n]``, any of the table's, any number of times.

        Returns:
            ``[n, G]`` float32, a copy.

        Raises:
            DataError: A key that is not in the table; says which place of ``keys``.
        """
        places = np.searchsorted(self._keys, keys)
        found = self._keys[np.minimum(places, len(self._keys) - 1)] == keys
        if not found.all():
            raise DataError(
                f"{self.folder}: has no vector for item {int(np.argmin(found))}; the data has "
                "changed since it was written: delete the folder so that it is computed again"
            )
        return np.array(self._rows[places])

    def __reduce__(self) -> tuple[Any, ...]:
        """Reopens the files in the other process."""
        return (VectorTable, (self.folder,))


def create_table(folder: str | Path, *, keys: KeyArray, width: int) -> None:
    """Make an unfinished table, for :func:`write_rows` to fill. One process.

    Until :func:`finish_table` it lies beside ``folder``, under a name that nobody opens.

    Args:
        folder: Where the table will be.
        keys: ``[N]``, ascending, distinct.
        width: G.

    Raises:
        OSError: It cannot be written.
    """
    assert bool((keys[1:] > keys[:-1]).all()), "keys ascend and are distinct"
    unfinished = _unfinished(folder)
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    np.save(unfinished / KEYS_FILE, keys)
    shape = (len(keys), width)
    np.lib.format.open_memmap(
        unfinished / ROWS_FILE, mode="w+", dtype=np.float32, shape=shape
    ).flush()


def write_rows(folder: str | Path, *, places: npt.NDArray[np.intp], rows: RowArray) -> None:
    """Write some rows of an unfinished table; processes may share the work.

    Args:
        folder: Of :func:`create_table`.
        places: ``[n]`` row numbers, each in one process only.
        rows: ``[n, G]`` float32.

    Raises:
        OSError: They cannot be written.
    """
    array = np.load(_unfinished(folder) / ROWS_FILE, mmap_mode="r+", allow_pickle=False)
    array[places] = rows
    array.flush()


def finish_table(folder: str | Path, *, identity: Mapping[str, Any]) -> None:
    """Give a filled table its name. One process, after all have written.

    Args:
        folder: Of :func:`create_table`; a table that is there already is replaced.
        identity: What the vectors depend on, for :func:`read_identity`.

    Raises:
        OSError: It cannot be written.
    """
    unfinished, folder = _unfinished(folder), Path(folder)
    with (unfinished / IDENTITY_FILE).open("w", encoding="utf-8") as file:
        json.dump(dict(identity), file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)


def read_identity(folder: str | Path) -> dict[str, Any]:
    """What the vectors of a finished table depend on; empty where there is no table.

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


def _unfinished(folder: str | Path) -> Path:
    return Path(folder).with_name(Path(folder).name + ".unfinished")


def _open(path: Path, dtype: type, *, dims: int) -> Any:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); delete the folder so that it is computed again"
        ) from error
    if array.ndim != dims or array.dtype != dtype:
        raise DataError(
            f"{path}: {array.dtype} of shape {array.shape}, expected {np.dtype(dtype)} with {dims} "
            "dimensions; delete the folder so that it is computed again"
        )
    return array
