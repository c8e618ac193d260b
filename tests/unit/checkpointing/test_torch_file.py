"""Values by range, without the file in memory and without its code."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.memory import measure
from vembed_ds.checkpointing import torch_file
from vembed_ds.checkpointing.torch_file import TorchFile, read_plain
from vembed_ds.errors import CheckpointError

BASE = torch.arange(24.0).reshape(4, 6)
TENSORS = {
    "whole": BASE,
    "rows": BASE[1:3],
    "transposed": BASE.t(),
    "strided": BASE[::2, 1::3],
    "scalar": torch.tensor(7),
    "bf16": torch.arange(9).bfloat16(),
    "bool": torch.tensor([True, False, True]),
    "empty": torch.empty(0),
    "parameter": torch.nn.Parameter(torch.ones(2, 2)),
}


class Call:
    """Calls something when it is unpickled with code allowed."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.fixture(params=[True, False], ids=["meta", "fake"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Any) -> TorchFile:
    """As of this release of PyTorch, and as of those before ``map_location="meta"`` had places."""
    monkeypatch.setattr(torch_file, "_META_HAS_PLACES", request.param)
    torch.save(TENSORS, tmp_path / "file.pt")
    return TorchFile(tmp_path / "file.pt")


@pytest.mark.parametrize("name", TENSORS)
def test_every_range_is_as_saved(file: TorchFile, name: str) -> None:
    tensor, expected = file.content[name], TENSORS[name].detach().reshape(-1)
    assert tensor.shape == TENSORS[name].shape
    assert torch.equal(file.read(tensor), expected)
    for start in range(len(expected) + 1):
        for stop in range(start, len(expected) + 1):
            values = file.read(tensor, start, stop)
            assert values.dtype == expected.dtype
            assert torch.equal(values, expected[start:stop])


def test_what_shares_its_memory_shares_its_place(file: TorchFile) -> None:
    found = file.content
    assert file.place(found["whole"]) == file.place(found["transposed"])
    assert file.place(found["whole"]) != file.place(found["rows"])
    assert file.place(found["whole"])[0] != file.place(found["bf16"])[0]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 25)])
def test_a_range_that_is_not_there(file: TorchFile, start: int, stop: int) -> None:
    with pytest.raises(CheckpointError, match=r"file.pt: damaged: a tensor of 24 values has no"):
        file.read(file.content["whole"], start, stop)


def test_files_of_a_gpu_are_read_without_one(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    torch.save({"a": BASE}, tmp_path / "file.pt")
    file = TorchFile(tmp_path / "file.pt")
    assert torch.equal(file.read(file.content["a"], 5, 9), BASE.reshape(-1)[5:9])


@pytest.mark.parametrize("reading", [TorchFile, read_plain])
@pytest.mark.parametrize(
    ("function", "name"),
    [(Path.touch, "pathlib.Path"), (os.system, "posix.system"), (exec, "exec")],
)
def test_foreign_code_does_not_run(
    tmp_path: Path, reading: Callable[[Path], Any], function: Callable[..., Any], name: str
) -> None:
    trace = tmp_path / "ran"
    argument = {"pathlib.Path": trace, "posix.system": f"touch {trace}"}.get(
        name, f"open({str(trace)!r}, 'w')"
    )
    torch.save({"a": BASE, "b": Call(function, argument)}, tmp_path / "file.pt")
    seen = "getattr" if reading is read_plain and function is Path.touch else name
    with pytest.raises(CheckpointError, match=rf"file.pt: holds {seen}, which is not loaded"):
        reading(tmp_path / "file.pt")
    assert not trace.exists()


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"file.pt: missing; the checkpoint is incomplete"):
        TorchFile(tmp_path / "file.pt")


def test_the_old_format_has_no_places(tmp_path: Path) -> None:
    torch.save({"a": BASE}, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    file = TorchFile(tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"file.pt: damaged: it is in the format of PyTorch"):
        file.read(file.content["a"])


def test_wrong_bytes_in_the_structure_never_end_in_another_error(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": BASE, "b": {"c": [1, 2.0, "d"]}, "n": BASE[0]}, path)
    whole = path.read_bytes()
    begin = whole.index(b"data.pkl")
    for place in range(begin + 50, begin + 500, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            TorchFile(path)
        except CheckpointError as error:
            assert str(path) in str(error)  # noqa: PT017 (it may also be read: values hold no checks)


def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": BASE}, path)
    file = TorchFile(path)
    path.write_bytes(path.read_bytes()[: file.place(file.content["a"])[0] + 20])
    with pytest.raises(CheckpointError, match=r"file.pt: damaged: it ends too early"):
        file.read(file.content["a"])


def test_reading_takes_what_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(50_000_000), "b": torch.ones(3)}, tmp_path / "file.pt")
    megabytes, outcome = measure(
        "from pathlib import Path\nfrom vembed_ds.checkpointing.torch_file import TorchFile",
        "file = TorchFile(Path(sys.argv[1]))\n"
        "outcome = sum(float(file.read(file.content['a'], n, n + 10**6).sum())"
        " for n in range(0, 50 * 10**6, 10**6))",
        str(tmp_path / "file.pt"),
    )
    assert float(outcome) == 50_000_000
    assert megabytes < 60  # of 200; memory-mapped it takes 210
