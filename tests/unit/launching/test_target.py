"""Which machines a launch means, and the port."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
        found = target_of(one)
    assert not found.by_ssh
    assert "one machine is left, a: its ranks start on this one" in caplog.text
    # Told nothing, the launcher would ask the machine by ssh whether it is there, and where.
    assert (found.flags["master_addr"], found.flags["no_ssh_check"]) == ("127.0.0.1", True)
    assert target_of({**one, "master_addr": "a"}).flags["master_addr"] == "a"
    assert target_of({**one, "force_multi": True}).by_ssh


@pytest.mark.parametrize("number", [-1, 2])
def test_by_hand_this_machine_is_one_of_the_files(hostfile: str, number: int) -> None:
    flags = {"hostfile": hostfile, "no_ssh": True, "node_rank": number, "master_addr": "a"}
    with pytest.raises(
        ConfigError, match=f"--node_rank={number}: the host file has 2 machines; give .* 0 to 1"
    ):
        target_of(flags)


def test_intel_mpi_wants_machines_alike(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=4\n")
    flags = {"hostfile": str(tmp_path / "hosts"), "launcher": "impi"}
    with pytest.raises(ConfigError, match=r"--launcher=impi: .* a slots=2, b slots=4; make them"):
        target_of(flags)
    found = target_of({**flags, "launcher": "OpenMPI"})
    assert (found.by_ssh, found.flags["master_addr"]) == (True, "a")
    assert (
        target_of({**flags, "launcher": "openmpi", "master_addr": "x"}).flags["master_addr"] == "x"
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"include": "a:0"}, "--include=a:0: needs --hostfile, which names the machines; devices"),
        ({"exclude": "localhost@b"}, "--exclude=localhost@b: needs --hostfile"),
        ({"include": ""}, "--include=: needs --hostfile"),
        ({"include": "localhost:x"}, "--include=localhost:x: 'x' is no number of a device"),
        ({"include": "localhost:0,"}, "--include=localhost:0,: '' is no number of a device"),
    ],
)
def test_devices_of_this_machine_are_those_of_localhost(
    flags: dict[str, str], sentence: str
) -> None:
    with pytest.raises(ConfigError) as error:
        target_of(flags)
    assert sentence in str(error.value)
    assert not target_of({"include": "localhost:0,1"}).by_ssh


def test_several_machines_need_a_host_file() -> None:
    with pytest.raises(ConfigError, match="--num_nodes=2: needs --hostfile, which names them"):
        target_of({"num_nodes": 2})


@pytest.mark.parametrize(
    ("visible", "flags", "found"),
    [
        ("2, 5,7", {"num_gpus": 2}, {"include": "localhost:2,5"}),
        ("2,5", {"num_gpus": 1, "num_nodes": 1}, {"include": "localhost:2"}),
        ("2,5", {}, {}),  # the launcher itself takes them
        ("2,5", {"include": "localhost:1"}, {"include": "localhost:1"}),
        ("", {"num_gpus": 2}, {"num_gpus": 2}),
    ],
)
def test_visible_devices_are_used_and_no_others(
    monkeypatch: pytest.MonkeyPatch, visible: str, flags: dict[str, Any], found: dict[str, Any]
) -> None:
    monkeypatch.setattr(target, "local_devices", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    flags = target_of(flags).flags
    assert {key: value for key, value in flags.items() if key != "master_port"} == found


def test_visible_devices_that_cannot_be_used_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "local_devices", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    with pytest.raises(
        ConfigError, match="--num_gpus=3: CUDA_VISIBLE_DEVICES=2,5 leaves 2 devices"
    ):
        target_of({"num_gpus": 3})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1a")
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES=GPU-1a: .* numbers, not 'GPU-1a'"):
        target_of({})
    monkeypatch.setattr(target, "local_devices", lambda: 0)
    assert target_of({"num_gpus": 3}).flags["num_gpus"] == 3, "CPU ranks"


def test_accelerators_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    assert local_devices() == 0, "DS_ACCELERATOR=cpu"
    monkeypatch.delenv("DS_ACCELERATOR")
    assert local_devices() == 3
