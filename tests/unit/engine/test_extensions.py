"""What is compiled before the ranks start, and stale locks."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from vembed_ds.engine.extensions import (
    needed_extensions,
    remove_stale_locks,
    wait_for_builds,
)

SHIPPED = Path(__file__).parent.parent.parent.parent / "ds_configs"


@pytest.mark.parametrize(
    ("name", "torch_adam", "builders"),
    [
        ("zero2", True, []),
        ("zero2_offload", False, ["CPUAdamBuilder"]),
        ("zero3_offload", False, ["CPUAdamBuilder"]),
        ("zero3_offload", True, []),
    ],
)
def test_what_a_configuration_needs(name: str, torch_adam: bool, builders: list[str]) -> None:
    config = json.loads((SHIPPED / f"{name}.json").read_text())
    config["optimizer"]["params"]["torch_adam"] = torch_adam
    assert needed_extensions(config) == builders


def test_a_stale_lock_is_removed_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    with caplog.at_level(logging.WARNING):
        assert remove_stale_locks(tmp_path) == [lock]
    assert not lock.exists()
    assert f"{lock} was left by a build that was killed; removed" in caplog.text


def test_a_lock_that_its_owner_removes_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = [tmp_path / "cpu_adam" / "lock"]
    monkeypatch.setattr(Path, "glob", lambda *_: iter(gone))
    wait_for_builds(tmp_path)
    assert remove_stale_locks(tmp_path) == gone
