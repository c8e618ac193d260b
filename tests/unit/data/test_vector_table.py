"""Vectors on the disk: what is written is found again, and nothing else."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from vembed_ds.data.vector_table import (
    CHECKSUMS_FILE,
    IDENTITY_FILE,
    KEYS_FILE,
    LENGTHS_FILE,
    ROWS_FILE,
    STARTS_FILE,
    SegmentWriter,
    VectorTable,
    ensure_table,
    read_identity,
    remove_table,
)
from vembed_ds.errors import DataError
from vembed_ds.similarity import Embeddings

KEYS = np.array([-(2**63), -5, 7, 2**63 - 1], dtype=np.int64)
ROWS = torch.arange(12, dtype=torch.float32).reshape(4, 3)
LENGTHS = [2, 0, 3, 1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A table without segments."""
    ensure_table(tmp_path / "table", identity={"model": "a"})
    return tmp_path / "table"


def write(folder: Path, *parts: list[int], rows: torch.Tensor = ROWS) -> None:
    """One segment; every part, places of ``KEYS``, is appended by itself."""
    writer = SegmentWriter(folder)
    for places in parts:
        writer.append(KEYS[places], Embeddings(rows[places]))
    writer.finish()


def tokens(lengths: list[int]) -> Embeddings:
    """Items of so many tokens, all values different, with nonsense in the padding."""
    values = torch.arange(len(lengths) * 4 * 2, dtype=torch.float32).reshape(-1, 4, 2)
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    return Embeddings(values.masked_fill(~mask.unsqueeze(-1), torch.nan), mask)


def test_rows_are_found_by_key_in_any_order_and_segment(folder: Path) -> None:
    assert (len(VectorTable(folder)), VectorTable(folder).width) == (0, 0)
    write(folder, [3], [1])
    first = VectorTable(folder)
    write(folder, [0, 2, 1], rows=-ROWS)
    table = pickle.loads(pickle.dumps(VectorTable(folder)))
    assert (len(table), table.width, table.identity) == (5, 3, {"model": "a"})
    assert not table.holds_tokens
    expected = ROWS * torch.tensor([[-1], [1], [-1], [1]])  # of two segments the older counts
    places = np.array([3, 0, 0, 2, 1])
    assert np.array_equal(table.lookup(KEYS[places]), expected[places].numpy())
    assert torch.equal(table.embeddings(KEYS).values, expected)
    assert table.lookup(KEYS[:0]).shape == (0, 3)
    # A table does not change under its reader, nor on the way to another process.
    assert pickle.loads(pickle.dumps(first)).has(KEYS).tolist() == [False, True, False, True]
    table.verify()


def test_items_may_have_a_vector_per_token(folder: Path) -> None:
    writer, items = SegmentWriter(folder), tokens(LENGTHS)
    writer.append(KEYS[[2, 0]], items.rows([2, 0]))
    writer.append(KEYS[[1, 3]], items.rows([1, 3]))
    writer.finish()
    table = pickle.loads(pickle.dumps(VectorTable(folder)))
    assert (table.width, table.holds_tokens) == (2, True)
    for places, longest in (([0, 2, 3, 0, 1], 3), ([3], 1), ([1], 1)):
        found, expected = table.embeddings(KEYS[places]), items.rows(places)
        assert found.values.shape == (len(places), longest, 2)
        assert torch.equal(found.mask, expected.mask[:, :longest])
        assert torch.equal(found.values, expected.values[:, :longest].nan_to_num(0.0))
    assert table.embeddings(KEYS[:0]).values.shape == (0, 1, 2)
    assert sorted(path.name for path in folder.glob("*/*")) == sorted(
        [CHECKSUMS_FILE, KEYS_FILE, LENGTHS_FILE, STARTS_FILE, ROWS_FILE]
    )


@pytest.mark.parametrize("key", [8, 2**63 - 2, -6])
def test_an_item_without_a_vector_is_an_error(folder: Path, key: int) -> None:
    write(folder, [0, 1, 2, 3])
    table, keys = VectorTable(folder), np.array([7, key], dtype=np.int64)
    assert table.has(keys).tolist() == [True, False]
    with pytest.raises(DataError, match="no vector for item 1; the data has changed"):
        table.lookup(keys)


def test_what_is_unfinished_is_not_seen_and_goes_with_its_writer(folder: Path) -> None:
    writer = SegmentWriter(folder)
    writer.append(KEYS, Embeddings(ROWS))
    with pytest.raises(DataError, match="gives vectors that are not finite; use it in float32"):
        writer.append(KEYS[:1], Embeddings(torch.tensor([[0.0, torch.inf, 0.0]])))
    assert VectorTable(folder).segments == []
    assert len(list(folder.iterdir())) == 2
    del writer
    gc.collect()
    write(folder, [])  # nothing at all: no segment
    assert [path.name for path in folder.iterdir()] == [IDENTITY_FILE]


@pytest.mark.parametrize("name", [KEYS_FILE, STARTS_FILE, ROWS_FILE, CHECKSUMS_FILE])
def test_a_damaged_table_is_refused(folder: Path, name: str) -> None:
    write(folder, [0, 1, 2, 3])
    (segment,) = folder.glob("segment-*")
    path, whole = segment / name, (segment / name).read_bytes()
    path.write_bytes(whole[:-4])
    problem = r"cannot be read \(.*\)" if name == CHECKSUMS_FILE else "is missing or cut short"
    remedy = f"; delete {segment}, so that what it holds is computed again"
    with pytest.raises(DataError, match=f"{name}: {problem}{remedy}"):
        VectorTable(folder)
    path.write_bytes(whole[:-30] + bytes([whole[-30] ^ 1]) + whole[-29:])
    with pytest.raises(DataError, match=r"(differs from what was written|cannot be r.*); delete"):
        VectorTable(folder).verify()
    path.unlink()
    with pytest.raises(DataError, match=f"{name}: (is missing|cannot be read)"):
        VectorTable(folder)


def test_a_header_that_is_no_header(folder: Path) -> None:
    write(folder, [0, 1, 2, 3])
    (path,) = folder.glob("segment-*/keys.npy")
    path.write_bytes(b"#" * path.stat().st_size)
    with pytest.raises(DataError, match=r"keys\.npy: cannot be read"):
        VectorTable(folder)


def test_of_two_runs_that_make_a_table_at_once_one_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:  # both have found that there is none
        patched.setattr(Path, "exists", lambda path: False)
        for model in ("a", "b"):
            ensure_table(tmp_path / "table", identity={"model": model})
    assert read_identity(tmp_path / "table") == {"model": "a"}
    assert [path.name for path in (tmp_path / "table").iterdir()] == [IDENTITY_FILE]


def test_a_table_knows_what_it_is_of(folder: Path) -> None:
    write(folder, [0])
    ensure_table(folder, identity={"model": "b"})  # it is there already
    assert read_identity(folder) == {"model": "a"}
    (folder / IDENTITY_FILE).write_text("{")
    with pytest.raises(DataError, match=r"identity\.json: cannot be read .* delete the folder"):
        read_identity(folder)
    (folder / IDENTITY_FILE).unlink()
    assert read_identity(folder) == {}
    with pytest.raises(
        DataError, match=r"no table of vectors \(no identity\.json\); give a folder"
    ):
        VectorTable(folder)
    with pytest.raises(DataError, match=r"has vectors but no identity\.json; delete the folder"):
        ensure_table(folder, identity={"model": "a"})
    remove_table(folder)
    remove_table(folder)
    assert not folder.exists()
