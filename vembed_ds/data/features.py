"""Stored outputs of a frozen encoder, memory-mapped, found by what was encoded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vembed_ds.errors import DataError

FEATURES_FILE = "features.npy"
KEYS_FILE = "keys.json"

FloatArray = np.ndarray[Any, np.dtype[np.float32]]


class FeatureTable:
    """Maps texts to rows of a memory-mapped ``[N, H]`` float32 file.

    Pickles as its path, so that workers share the pages of one file.

    Args:
        path: The ``.npy`` file.
        keys: Text to row number.

    Raises:
        DataError: When the file is missing or is not a ``[N, H]`` float32 array.
    """

    def __init__(self, path: str | Path, *, keys: Mapping[str, int]) -> None:
        self.path = Path(path)
        self.keys = dict(keys)
        self.array = _open_array(self.path)

    @property
    def width(self) -> int:
        """H, the number of features per row."""
        return int(self.array.shape[1])

    def lookup(self, text: str) -> FloatArray:
        """The features of one text.

        Args:
            text: A key of the table.

        Returns:
            ``[H]`` float32, a copy.

        Raises:
            DataError: When the text is not in the table.
        """
        if text not in self.keys:
            raise DataError(
                f"{self.path}: no features are stored for {text[:80]!r}; "
                "delete the folder so that they are computed again"
            )
        return np.array(self.array[self.keys[text]])

    def __reduce__(self) -> tuple[Any, ...]:
        """Reopens the file in the other process."""
        return (_reopen, (self.path, self.keys))


def create_features(folder: str | Path, *, keys: Sequence[str], width: int) -> None:
    """Makes a table of zeros, for ``write_rows`` to fill and ``load_features`` to read.

    Args:
        folder: Where to; created when absent.
        keys: N distinct texts, one per row.
        width: H, features per row.

    Raises:
        DataError: When a key is given twice.
    """
    if len(set(keys)) != len(keys):
        raise DataError(f"{folder}: {len(keys)} keys, {len(set(keys))} distinct; give each once")
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / KEYS_FILE).write_text(json.dumps(list(keys)), encoding="utf-8")
    np.lib.format.open_memmap(
        Path(folder) / FEATURES_FILE, mode="w+", dtype=np.float32, shape=(len(keys), width)
    ).flush()


def write_rows(folder: str | Path, *, start: int, rows: FloatArray) -> None:
    """Writes rows of a table that ``create_features`` made; processes may share the work.

    Args:
        folder: The table's.
        start: Number of the first row.
        rows: ``[n, H]`` float32.

    Raises:
        DataError: When the rows do not fit the table.
    """
    path = Path(folder) / FEATURES_FILE
    array = np.load(path, mmap_mode="r+", allow_pickle=False)
    place = array[start : start + len(rows)]
    if rows.dtype != np.float32 or place.shape != rows.shape:
        raise DataError(
            f"{path}: rows {start} and following: {rows.dtype} of shape {rows.shape} do not fit "
            f"into {array.dtype} of shape {array.shape}"
        )
    place[:] = rows
    array.flush()


def load_features(folder: str | Path) -> FeatureTable:
    """Opens a table that ``create_features`` made and ``write_rows`` filled.

    Raises:
        DataError: When a file is missing or the number of keys and rows differ.
    """
    keys_file = Path(folder) / KEYS_FILE
    if not keys_file.is_file():
        raise DataError(f"{keys_file}: file is missing; delete the folder to compute it again")
    keys = json.loads(keys_file.read_text(encoding="utf-8"))
    table = FeatureTable(
        Path(folder) / FEATURES_FILE, keys={key: row for row, key in enumerate(keys)}
    )
    if len(table.keys) != len(table.array):
        raise DataError(
            f"{folder}: {len(table.keys)} keys, {len(table.array)} rows; "
            "delete the folder to compute it again"
        )
    return table


def _open_array(path: Path) -> FloatArray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); delete the folder to compute it again"
        ) from error
    if array.ndim != 2 or array.dtype != np.float32:
        raise DataError(
            f"{path}: {array.dtype} array of shape {array.shape}, expected [N, H] float32; "
            "delete the folder to compute it again"
        )
    return array  # type: ignore[no-any-return]


def _reopen(path: Path, keys: dict[str, int]) -> FeatureTable:
    return FeatureTable(path, keys=keys)
