"""Vectors on the disk: what is written is found again, and nothing else."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from vembed_ds.data.vector_table import (
    KEYS_FILE,
    ROWS_FILE,
    VectorTable,
    create_table,
    finish_table,
    read_identity,
    write_rows,
)
from vembed_ds.errors import DataError

KEYS = np.array([-(2**63), -5, 7, 2**63 - 1], dtype=np.int64)
ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)


def write(folder: Path) -> VectorTable:
    create_table(folder, keys=KEYS, width=3)
    write_rows(folder, places=np.array([3, 1]), rows=ROWS[[3, 1]])
    write_rows(folder, places=np.array([0, 2]), rows=ROWS[[0, 2]])
    finish_table(folder, identity={"model": "a"})
    return VectorTable(folder)


def test_rows_are_found_by_key_in_any_order_and_number(tmp_path: Path) -> None:
    table = pickle.loads(pickle.dumps(write(tmp_path / "table")))
    assert (len(table), table.width, table.identity) == (4, 3, {"model": "a"})
    places = np.array([3, 0, 0, 2, 1])
    assert np.array_equal(table.lookup(KEYS[places]), ROWS[places])
    assert table.lookup(np.empty(0, np.int64)).shape == (0, 3)


@pytest.mark.parametrize("key", [8, 2**63 - 2, -6])
def test_an_item_without_a_vector_is_an_error(tmp_path: Path, key: int) -> None:
    table = write(tmp_path / "table")
    with pytest.raises(DataError, match="no vector for item 1; the data has changed"):
        table.lookup(np.array([7, key], dtype=np.int64))


def test_an_unfinished_table_is_none(tmp_path: Path) -> None:
    create_table(tmp_path / "table", keys=KEYS, width=3)
    write_rows(tmp_path / "table", places=np.arange(4), rows=ROWS)
    assert read_identity(tmp_path / "table") == {}
    with pytest.raises(DataError, match="cannot be read"):
        VectorTable(tmp_path / "table")
    write(tmp_path / "table")  # begins anew, whatever lies there
    finished = write(tmp_path / "table")  # and replaces a finished one
    assert np.array_equal(finished.lookup(KEYS), ROWS)
    assert [path.name for path in tmp_path.iterdir()] == ["table"]


@pytest.mark.parametrize("name", [KEYS_FILE, ROWS_FILE])
def test_a_damaged_table_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "table")
    path = tmp_path / "table" / name
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        VectorTable(tmp_path / "table")
    np.save(path, np.zeros((2, 2, 2)))
    with pytest.raises(DataError, match=r"float64 of shape \(2, 2, 2\), expected"):
        VectorTable(tmp_path / "table")
    np.save(path, ROWS[:2] if name == ROWS_FILE else KEYS[:2])
    with pytest.raises(DataError, match="keys and"):
        VectorTable(tmp_path / "table")
