"""What a rank keeps of an EMA teacher in a checkpoint, and what it does not take back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vembed_ds.checkpointing.ema import load_average, save_average
from vembed_ds.distributed import comm
from vembed_ds.errors import CheckpointError

STATE = {"a": torch.tensor([0.1, 0.2]), "b": torch.empty(0)}
FILE = "ema_teacher_rank_0.safetensors"


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    save_average(tmp_path, STATE)
    found = load_average(tmp_path, like=STATE)
    assert all(torch.equal(found[name], shard) for name, shard in STATE.items())


def test_a_checkpoint_without_an_average(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{FILE}: missing, so the teacher_ema_decay of"):
        load_average(tmp_path, like=STATE)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 3), (3, 2), (4, 1), (3, 8)])
def test_another_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    whole = {"a": torch.rand(7), "b": torch.rand(12), "c": torch.rand(1)}

    def pieces(rank: int, of: int) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(comm, "rank", lambda: rank)
        monkeypatch.setattr(comm, "world_size", lambda: of)
        lengths = {name: -(-len(value) // of) for name, value in whole.items()}
        return {
            name: value[rank * (n := lengths[name]) : (rank + 1) * n]
            for name, value in whole.items()
        }

    for rank in range(before):
        save_average(tmp_path, pieces(rank, before))
    for rank in range(after):
        expected = pieces(rank, after)
        found = load_average(tmp_path, like=expected)
        assert all(torch.equal(found[name], shard) for name, shard in expected.items())
    (tmp_path / f"ema_teacher_rank_{before - 1}.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load_average(tmp_path, like=expected)


@pytest.mark.parametrize(
    ("like", "name"),
    [({**STATE, "a": torch.empty(3)}, "a"), ({"a": STATE["a"]}, "b")],
)
def test_another_model(tmp_path: Path, like: dict[str, torch.Tensor], name: str) -> None:
    save_average(tmp_path, STATE)
    with pytest.raises(CheckpointError, match=rf"average of another model \({name} differs\)"):
        load_average(tmp_path, like=like)


@pytest.mark.parametrize("length", [4, -1])
def test_a_damaged_file(tmp_path: Path, length: int) -> None:
    save_average(tmp_path, STATE)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=rf"{FILE}: damaged"):
        load_average(tmp_path, like=STATE)
