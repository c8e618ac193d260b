"""Files that a crash cannot halve."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from vembed_ds.durable import (
    HashedFile,
    describe_write_error,
    hash_file,
    replace_text,
    sync_folder,
    write_hashed,
)


def test_what_is_written_is_what_is_hashed(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(file: HashedFile) -> None:
        file.write(b"abc")
        file.write(memoryview(bytes(3_000_000)))

    record = write_hashed(path, write)
    assert record.num_bytes == 3_000_003
    assert record == hash_file(path)


def test_the_disk_gets_every_byte_ahead_of_the_flush_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges = []

    def refuse(descriptor: int, offset: int, length: int, advice: int) -> None:
        ranges.append((offset, length, os.fstat(descriptor).st_size))
        raise OSError(errno.EINVAL, "no advice is taken here")  # which harms nothing

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    blocks = [bytes([number]) * 5_000_000 for number in range(5)]

    def write(file: HashedFile) -> None:
        for block in blocks:
            file.write(block)

    record = write_hashed(tmp_path / "file", write)
    assert record == hash_file(tmp_path / "file")
    assert [(offset, length) for offset, length, _ in ranges] == [
        (0, 10_000_000),
        (10_000_000, 10_000_000),
    ]
    assert all(size >= offset + length for offset, length, size in ranges)


def test_the_cause_is_told_and_not_what_torch_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = HashedFile.write

    def full(self: HashedFile, data: Any) -> int:
        if self.num_bytes > 1000:
            self.error = OSError(errno.ENOSPC, "No space left on device")
            raise self.error
        return write(self, data)

    monkeypatch.setattr(HashedFile, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_hashed(tmp_path / "file", lambda file: torch.save(torch.zeros(10_000), file))  # type: ignore[arg-type]


def test_a_crash_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latest"
    replace_text(path, "old")

    def crash(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", crash)
        with pytest.raises(KeyboardInterrupt):
            replace_text(path, "new")
    assert path.read_text() == "old"
    replace_text(path, "new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["latest"]


def test_folders_that_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> None:
        def fsync(descriptor: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)

    fail(errno.EINVAL)
    sync_folder(tmp_path)
    fail(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)


def test_the_words_of_an_error(tmp_path: Path) -> None:
    error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x"))
    assert describe_write_error(error, tmp_path) == f"{tmp_path / 'x'}: Permission denied"
    gone = OSError(errno.ENOSPC, "No space left on device")
    assert describe_write_error(gone, tmp_path / "no" / "x", needed=1234).endswith(
        "x: no space left on device: 1,234 bytes were to be written, an unknown number is free"
    )
