"""Files written tensor by tensor are, byte for byte, those of the safetensors library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vembed_ds.checkpointing import tensor_files
from vembed_ds.checkpointing.tensor_files import TensorFile, write_tensors
from vembed_ds.errors import CheckpointError

FORMATS = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.float64,
    torch.int64,
]


def tensors() -> dict[str, torch.Tensor]:
    """Of every format, in the wrong order, with names that JSON escapes or not."""
    generator = torch.Generator().manual_seed(0)
    found = {
        f"{'zab'[i % 3]}.{i}": (torch.randn(3, i + 1, generator=generator) * 9).to(kind)
        for i, kind in enumerate(FORMATS)
    }
    return found | {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        'ä "quoted"\n\\': torch.ones(2),
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }


def test_the_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    found = tensors()
    save_file(
        {n: t.contiguous() for n, t in found.items()},
        tmp_path / "theirs",
        metadata={"format": "pt"},
    )
    write_tensors(tmp_path / "ours", found)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_may_come_in_any_order(tmp_path: Path) -> None:
    found = tensors()
    file = TensorFile(tmp_path / "file", {n: t.to("meta") for n, t in found.items()})
    file.create()
    assert (tmp_path / "file").stat().st_size == file.size
    for name in sorted(found, reverse=True):
        file.write(name, found[name])
    file.finish()
    read = load_file(tmp_path / "file")
    assert read.keys() == found.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in found.items())


def test_floating_values_are_rounded_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "_ROUNDED", 4)
    values = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    file = TensorFile(tmp_path / "some", {name: values.bfloat16() for name in ("a", "b")})
    file.create()
    assert [file.write("a", values), file.write("b", values.bfloat16())] == [42, 42]
    file.finish()
    for written in load_file(tmp_path / "some").values():
        assert torch.equal(written, values.bfloat16())


def test_what_counts_is_not_rounded(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "some", {"a": torch.arange(3)})
    file.create()
    with pytest.raises(AssertionError, match="a"):
        file.write("a", torch.arange(3).float())


def test_a_tensor_that_never_came(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "file", {"a": torch.ones(2), "b": torch.ones(2)})
    file.create()
    file.write("b", torch.zeros(2))
    with pytest.raises(CheckpointError, match="file: 1 tensors were not written, first: a"):
        file.finish()
