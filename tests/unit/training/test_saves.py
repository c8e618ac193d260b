"""When a checkpoint is due by the clock, and which step is on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from vembed_ds.errors import SaveError, StorageError
from vembed_ds.training import saves
from vembed_ds.training.saves import Saves


class Disk:
    """Writes, or fails to."""

    def __init__(self) -> None:
        self.failure: SaveError | None = None
        self.newest: Path | None = None

    def write(self, step: int) -> Path | None:
        if self.failure is None:
            self.newest = Path(f"out/checkpoint-step-{step}")
        return self.newest

    def saves(self, *, minutes: float | None = None) -> Saves:
        return Saves(
            write=self.write,
            finish=lambda: self.newest,
            failure=lambda: self.failure,
            minutes=minutes,
            newest=None,
        )


def test_a_failed_one_is_tried_again_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    disk, now = Disk(), 0.0
    monkeypatch.setattr(saves.time, "monotonic", lambda: now)
    found = disk.saves(minutes=10)
    due = {}
    for failure in (None, SaveError("full")):
        disk.failure = failure
        began = now
        found.write(1)
        while not found.is_late():
            now += 10
        due[failure is None] = now - began
    assert due == {True: 600, False: 60}
    assert not disk.saves().is_late()


def test_only_what_was_written_counts() -> None:
    disk = Disk()
    found = disk.saves()
    assert found.place_to_go_on(4) == "at step 4, which is not saved: start again"
    found.write(4)
    assert found.has(4)
    found.require(4)
    assert found.place_to_go_on(4).startswith("at step 4, checkpoint out/checkpoint-step-4: to go")
    disk.failure = StorageError("checkpoint-step-5 was not saved")
    found.write(5)
    assert not found.has(5)
    assert found.place_to_go_on(5) == (
        "at step 5, which could not be saved: to go on from out/checkpoint-step-4, start again with "
        "--resume auto"
    )
    with pytest.raises(
        StorageError, match="second try: checkpoint-step-5 was not saved; then start"
    ):
        found.require(5)
