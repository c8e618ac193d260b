from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from vembed_ds.data.features import FeatureTable, load_features, write_features
from vembed_ds.errors import DataError

ARRAY = np.arange(6, dtype=np.float32).reshape(3, 2)


def test_round_trip_is_memory_mapped_and_picklable(tmp_path: Path) -> None:
    write_features(tmp_path / "new", keys=["a", "b/ü", "c"], array=ARRAY)
    table = load_features(tmp_path / "new")
    assert isinstance(table.array, np.memmap)
    assert table.width == 2
    for copy in (table, pickle.loads(pickle.dumps(table))):
        assert copy.lookup("b/ü").tolist() == [2.0, 3.0]
        assert copy.lookup("c").dtype == np.float32
    assert len(pickle.dumps(table)) < 1000


def test_lookup_gives_a_writable_copy(tmp_path: Path) -> None:
    write_features(tmp_path, keys=["a", "b", "c"], array=ARRAY)
    table = load_features(tmp_path)
    table.lookup("a")[:] = 9
    assert table.lookup("a").tolist() == [0.0, 1.0]


def test_unknown_text(tmp_path: Path) -> None:
    write_features(tmp_path, keys=["a", "b", "c"], array=ARRAY)
    with pytest.raises(DataError, match=r"features.npy: no features are stored for 'dog'; delete"):
        load_features(tmp_path).lookup("dog")


def test_shapes_and_keys_are_checked_when_written(tmp_path: Path) -> None:
    for keys, array in (
        (["a"], ARRAY),
        (["a", "b", "c"], ARRAY.astype(np.float64)),
        (["a"], ARRAY[:1, 0]),
    ):
        with pytest.raises(DataError, match=r"give \[N, H\] float32 and N keys"):
            write_features(tmp_path, keys=keys, array=array)
    with pytest.raises(DataError, match="3 keys, 2 distinct; give each once"):
        write_features(tmp_path, keys=["a", "b", "a"], array=ARRAY)


def test_damaged_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"keys.json: file is missing"):
        load_features(tmp_path)
    write_features(tmp_path, keys=["a", "b", "c"], array=ARRAY)
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
