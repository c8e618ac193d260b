"""What commands on ranks share."""

from __future__ import annotations

import pytest

from vembed_ds import command
from vembed_ds.command import Prepared, run_on_ranks


def test_a_rank_without_a_device_says_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert command._missing_device("cuda", 3) is None
    assert command._missing_device("cpu", 1) is None
    said = str(command._missing_device("cuda", 2))
    assert said.startswith("LOCAL_RANK=2 on ")
    assert "the rank sees 2 cuda devices and needs number 2; start at most 2 ranks on this" in said
    assert "--gpus-per-node instead of --gpus-per-task" in said


def test_a_launcher_that_does_not_say_enough_ends_the_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setattr(command, "_quiet", lambda: None)  # it changes the whole process
    assert run_on_ranks(lambda: Prepared(1, lambda: None)) == 2
    said = capsys.readouterr().err
    assert "DistributedError: OMPI_COMM_WORLD_RANK is not set, though mpirun started" in said
