"""F30: a lock that a killed build left in the extensions folder is found within 30 s, and named."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vembed_ds.engine import extensions
from vembed_ds.errors import VembedError

pytestmark = [pytest.mark.faults]

CONFIG = {
    "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
    "optimizer": {"type": "AdamW"},
}


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Torch's lock in a folder of our own; nothing is compiled, but a build sees no lock."""
    found = tmp_path / "cpu_adam" / "lock"
    found.parent.mkdir()
    found.touch()

    class Builder:
        def load(self, *, verbose: bool) -> None:
            assert not found.exists(), "torch would wait for ever"

    class Accelerator:
        def device_name(self) -> str:
            return "cpu"

        def create_op_builder(self, name: str) -> Builder:
            return Builder()

    monkeypatch.setenv(extensions.FOLDER, str(tmp_path))
    monkeypatch.setattr(extensions, "get_accelerator", Accelerator)
    monkeypatch.setattr(extensions, "_HELD", {})
    yield found
    for held in extensions._HELD.values():
        held.close()


@pytest.fixture
def other_job(tmp_path: Path) -> Iterator[None]:
    """Another run that holds the folder."""
    with (tmp_path / "vembed_ds.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def test_alone_it_is_removed_and_named(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    started = time.monotonic()
    extensions.prepare_extensions(CONFIG)
    assert time.monotonic() - started < 30
    assert f"{lock} was left by a build that was killed; removed" in caplog.text


@pytest.mark.usefixtures("other_job")
def test_beside_another_job_it_is_named_while_it_is_waited_for(
    lock: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert extensions.QUIET_SECONDS + extensions.POLL_SECONDS < 30
    monkeypatch.setattr(extensions, "QUIET_SECONDS", 0.2)
    monkeypatch.setattr(extensions, "POLL_SECONDS", 0.1)
    built = threading.Timer(1.0, lock.unlink)
    built.start()
    with caplog.at_level(logging.WARNING):
        extensions.prepare_extensions(CONFIG)
    assert caplog.text.count(f"{lock}: waiting until another job has built this") == 1
    built.join()


@pytest.mark.usefixtures("other_job")
def test_one_older_than_any_build_is_an_error(lock: Path) -> None:
    os.utime(lock, (time.time() - 3600,) * 2)
    with pytest.raises(VembedError, match=f"^{lock} is 60 minutes old: a build was killed"):
        extensions.prepare_extensions(CONFIG)
