"""Which machines a launch means, and the port."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vembed_ds.errors import ConfigError
from vembed_ds.launching import target
from vembed_ds.launching.target import free_port, local_devices, target_of


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    return str(tmp_path / "hosts")


def test_a_port_that_is_asked_for_and_taken_is_an_error(taken: int) -> None:
    with pytest.raises(ConfigError, match=f"--master_port={taken}: cannot be used .*in use"):
        target_of({"num_gpus": 2, "master_port": taken})


def test_the_default_port_makes_room(
    taken: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(target, "DEFAULT_PORT", taken)
    with caplog.at_level(logging.WARNING):
        port = free_port(None)
    assert port != taken
    assert f"port {taken} is taken; the ranks meet at {port}" in caplog.text


def test_several_machines_are_reached_by_ssh(hostfile: str) -> None:
    found = target_of({"hostfile": hostfile})
    assert (found.hosts, found.by_ssh) == ({"a": 2, "b": 2}, True)
    assert "master_port" not in found.flags, "which are free there is not known here"


def test_by_hand_each_machine_starts_its_own(hostfile: str) -> None:
    flags = {"hostfile": hostfile, "no_ssh": True, "node_rank": 1, "master_addr": "a"}
    found = target_of(flags)
    assert not found.by_ssh
    assert found.flags == flags, "the port must be the same on all"


def test_one_machine_is_this_one_unless_forced(
    hostfile: str, caplog: pytest.LogCaptureFixture
) -> None:
    one = {"hostfile": hostfile, "num_nodes": 1}
    with caplog.at_level(logging.WARNING):
        assert not target_of(one).by_ssh
    assert "one machine is left, a: its ranks start on this one" in caplog.text
    assert target_of({**one, "force_multi": True}).by_ssh


def test_several_machines_need_a_host_file() -> None:
    with pytest.raises(ConfigError, match="--num_nodes=2: needs --hostfile, which names them"):
        target_of({"num_nodes": 2})


def test_accelerators_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    assert local_devices() == 0, "DS_ACCELERATOR=cpu"
    monkeypatch.delenv("DS_ACCELERATOR")
    assert local_devices() == 3
