from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from vembed_ds.data.features import FeatureTable, create_features, load_features, write_rows
from vembed_ds.errors import DataError

ARRAY = np.arange(6, dtype=np.float32).reshape(3, 2)


def test_round_trip_is_memory_mapped_and_picklable(tmp_path: Path) -> None:
    create_features(tmp_path / "new", keys=["a", "b/ü", "c"], width=2)
    for start, stop in ((2, 3), (0, 2)):  # as two ranks would
        write_rows(tmp_path / "new", start=start, rows=ARRAY[start:stop])
    table = load_features(tmp_path / "new")
    assert isinstance(table.array, np.memmap)
    assert table.width == 2
    for copy in (table, pickle.loads(pickle.dumps(table))):
        assert copy.lookup("b/ü").tolist() == [2.0, 3.0]
        assert copy.lookup("c").dtype == np.float32
    assert len(pickle.dumps(table)) < 1000


def test_lookup_gives_a_writable_copy(tmp_path: Path) -> None:
    create_features(tmp_path, keys=["a", "b", "c"], width=2)
    write_rows(tmp_path, start=0, rows=ARRAY)
    table = load_features(tmp_path)
    table.lookup("a")[:] = 9
    assert table.lookup("a").tolist() == [0.0, 1.0]


def test_unknown_text(tmp_path: Path) -> None:
    create_features(tmp_path, keys=["a", "b", "c"], width=2)
    with pytest.raises(DataError, match=r"features.npy: no features are stored for 'dog'; delete"):
        load_features(tmp_path).lookup("dog")


def test_shapes_and_keys_are_checked_when_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 keys, 2 distinct; give each once"):
        create_features(tmp_path, keys=["a", "b", "a"], width=2)
    create_features(tmp_path, keys=["a", "b", "c"], width=2)
    for start, rows in ((0, ARRAY.astype(np.float64)), (2, ARRAY[:2]), (0, ARRAY[:, :1])):
        with pytest.raises(DataError, match=r"do not fit into float32 of shape \(3, 2\)"):
            write_rows(tmp_path, start=start, rows=rows)


def test_damaged_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"keys.json: file is missing"):
        load_features(tmp_path)
    create_features(tmp_path, keys=["a", "b", "c"], width=2)
    (tmp_path / "keys.json").write_text(json.dumps(["a"]))
    with pytest.raises(DataError, match="1 keys, 3 rows"):
        load_features(tmp_path)
    np.save(tmp_path / "features.npy", ARRAY.astype(np.int64))
    with pytest.raises(
        DataError, match=r"int64 array of shape \(3, 2\), expected \[N, H\] float32"
    ):
        load_features(tmp_path)
    (tmp_path / "features.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"features.npy: cannot be read"):
        FeatureTable(tmp_path / "features.npy", keys={})
