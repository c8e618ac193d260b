"""The checkpoint engine that DeepSpeed writes through: what it copies, and which errors it keeps."""

from __future__ import annotations

import errno
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vembed_ds.durable import hash_file
from vembed_ds.engine import checkpoint_files
from vembed_ds.engine.checkpoint_files import CheckpointFiles, copy_to_host, count_bytes
from vembed_ds.errors import CheckpointError


class Counter:
    def __init__(self) -> None:
        self.steps = 1


def test_a_copy_has_everything_and_shares_nothing() -> None:
    model = nn.Linear(2, 3)
    tied = model.weight.detach()
    original = {
        "module": model.state_dict(),
        "again": (tied, [tied]),
        "empty": torch.empty(0),
        "scaler": Counter(),
        "names": ["a", ("b", 1)],
    }
    copied = copy_to_host(original)
    weight = tied.clone()
    tied += 1
    original["scaler"].steps = 2  # type: ignore[attr-defined]
    assert type(copied["module"]) is OrderedDict
    assert copied["module"]._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    assert torch.equal(copied["module"]["weight"], weight)
    assert copied["again"][0] is copied["again"][1][0] is copied["module"]["weight"]
    assert copied["scaler"].steps == 1
    assert copied["names"] == ["a", ("b", 1)]
    assert copied["empty"].numel() == 0
    assert count_bytes(copied) == (3 * 6 + 3) * 4


@pytest.mark.parametrize("deferred", [False, True])
def test_files_are_recorded_as_they_are(tmp_path: Path, deferred: bool) -> None:
    files = CheckpointFiles(deferred=deferred)
    state = {"weight": torch.arange(5.0)}
    path = tmp_path / "new" / "model.pt"
    files.makedirs(str(path.parent))
    files.save(state, str(path))
    assert path.exists() != deferred
    state["weight"] += 1
    files.write_deferred()
    assert files.error is None
    assert files.records == {path: hash_file(path)}
    loaded = torch.load(path, weights_only=True)["weight"]
    assert torch.equal(loaded, torch.arange(5.0))
    assert torch.serialization.get_crc32_options()


def test_the_first_error_is_kept_and_nothing_more_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, write: Any) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    files = CheckpointFiles(deferred=False)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "write_hashed", full)
        files.save({"weight": torch.zeros(5)}, str(tmp_path / "a.pt"))
    files.save({}, str(tmp_path / "b.pt"))
    assert not list(tmp_path.iterdir())
    message = str(files.error)
    assert message.startswith(
        f"{tmp_path / 'a.pt'}: disk quota exceeded: 20 bytes were to be writt"
    )
    assert message.endswith(" are free")


def test_deepspeeds_own_loading_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="DeepSpeed's own loading runs code from files"):
        CheckpointFiles(deferred=False).load(str(tmp_path / "a.pt"))
