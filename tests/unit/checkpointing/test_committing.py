"""What cannot be removed, renamed or pointed to while a checkpoint gets its name."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.checkpoints import verify
from vembed_ds.checkpointing import manifest, rotation, saving
from vembed_ds.checkpointing.disks import Disk
from vembed_ds.checkpointing.names import checkpoints, read_pointer
from vembed_ds.checkpointing.rotation import by_age, remove_leftovers, rotate
from vembed_ds.checkpointing.saving import Snapshot, commit
from vembed_ds.checkpointing.store import find_checkpoint
from vembed_ds.command import exit_code
from vembed_ds.engine.checkpoint_files import CheckpointFiles
from vembed_ds.errors import SaveError, StorageError


def begin(out: Path, step: int) -> Snapshot:
    """A checkpoint with one file, as :func:`take_snapshot` leaves it."""
    partial = out / f".checkpoint-step-{step}.partial"
    saving._make_folder(partial)
    (partial / "file").write_text(str(step))
    return Snapshot(
        folder=out / f"checkpoint-step-{step}",
        partial=partial,
        step=step,
        zero_stage=0,
        config_digest=None,
        disk=Disk(0, 0, 1),
        files=CheckpointFiles(deferred=False),
        error=None,
    )


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """``busy(folder)`` cannot be removed any more, as with a file that NFS keeps."""
    kept: list[Path] = []
    remove = shutil.rmtree

    def rmtree(path: Path, **options: Any) -> None:
        if path in kept:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        remove(path, **options)

    monkeypatch.setattr(rotation.shutil, "rmtree", rmtree)
    return kept.append


def test_what_cannot_be_removed_costs_no_checkpoint(
    tmp_path: Path, busy: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    for name in (".checkpoint-step-1.partial", ".checkpoint-step-2.deleted"):
        (tmp_path / name).mkdir()
    busy(tmp_path / ".checkpoint-step-1.partial")
    remove_leftovers(tmp_path)
    assert not (tmp_path / ".checkpoint-step-2.deleted").exists()
    assert ".checkpoint-step-1.partial: cannot be removed (" in caplog.text
    assert "Directory not empty), and is in nobody's way" in caplog.text
    verify(commit(begin(tmp_path, 2)))
    with pytest.raises(OSError, match="Directory not empty"):
        begin(tmp_path, 1)


def test_an_older_one_that_cannot_be_removed_costs_no_checkpoint(
    tmp_path: Path, busy: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    written = verify(commit(begin(tmp_path, 1))).written_at
    busy(tmp_path / ".checkpoint-step-1.replaced")
    assert verify(commit(begin(tmp_path, 1))).written_at > written
    assert (tmp_path / "latest").read_text() == "checkpoint-step-1"
    assert ".checkpoint-step-1.replaced: cannot be removed" in caplog.text


@pytest.mark.parametrize("place", ["rotation.sync_folder", "saving.move_pointer"])
@pytest.mark.parametrize(
    ("number", "kind", "code", "remedy"),
    [
        (errno.ENOSPC, SaveError, 2, "Make room, or mend the folder"),
        (errno.EIO, StorageError, 1, "It may pass: start again with --resume auto, or mend"),
        (errno.ESTALE, StorageError, 1, "It may pass: start again with --resume auto, or mend"),
    ],
)
def test_a_whole_checkpoint_that_is_not_the_latest(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    number: int,
    kind: type[SaveError],
    code: int,
    remedy: str,
) -> None:
    first = commit(begin(tmp_path, 1))
    snapshot = begin(tmp_path, 2)

    def fail(*_: Any) -> None:
        raise OSError(number, "failed", "the file")

    with monkeypatch.context() as broken:
        broken.setattr(f"vembed_ds.checkpointing.{place}", fail)
        with pytest.raises(SaveError) as raised:
            commit(snapshot)
    assert type(raised.value) is kind
    assert exit_code(raised.value) == code
    message = str(raised.value)
    assert "checkpoint-step-2 is whole, but could not be made the latest: rank 0: " in message
    assert f"name checkpoint-step-2 to go on from it. {remedy}" in message
    verify(snapshot.folder)
    assert find_checkpoint("auto", tmp_path) == first
    assert find_checkpoint(str(snapshot.folder), tmp_path) == snapshot.folder
    assert find_checkpoint("auto", commit(begin(tmp_path, 2)).parent) == snapshot.folder


def test_without_an_earlier_one_the_first_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(saving, "move_pointer", fail)
    with pytest.raises(StorageError):
        commit(begin(tmp_path, 1))
    assert find_checkpoint("auto", tmp_path) == tmp_path / "checkpoint-step-1"
    assert "latest: missing" in caplog.text


def test_a_clock_that_was_set_back_changes_no_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = iter((1000.0, 2000.0, 500.0, 600.0))
    monkeypatch.setattr(manifest, "time", SimpleNamespace(time=lambda: next(clocks)))
    for step in (1, 2, 3, 4):
        commit(begin(tmp_path, step))
    rotate(tmp_path, total_limit=2)
    assert [folder.name for folder in by_age(checkpoints(tmp_path))] == [
        "checkpoint-step-4",
        "checkpoint-step-3",
    ]


def test_of_a_checkpoint_on_another_disk_the_link_is_deleted(tmp_path: Path) -> None:
    out, disk = tmp_path / "out", tmp_path / "disk"
    for step in (1, 2, 3):
        folder = commit(begin(out, step))
        folder.rename(disk.with_name(f"disk-{step}"))
        folder.symlink_to(disk.with_name(f"disk-{step}"))
    verify(commit(begin(out, 3)))
    assert rotate(out, total_limit=1) == [out / "checkpoint-step-2", out / "checkpoint-step-1"]
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-step-3", "latest"]
    for step in (1, 2, 3):
        verify(disk.with_name(f"disk-{step}"))


def test_a_link_to_a_disk_that_is_gone_is_not_in_the_way(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint-step-1").symlink_to(tmp_path / "gone")
    verify(commit(begin(out, 1)))
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-step-1", "latest"]


def test_a_disk_that_fails_is_no_pointer_that_names_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotation would take what it names for a checkpoint that nobody needs."""
    commit(begin(tmp_path, 1))

    def fail(path: Path) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "is_dir", fail)
    with pytest.raises(OSError, match="Input/output error"):
        read_pointer(tmp_path, "latest")
