"""What ranks find together, when all is well and when one of them is different."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.doctor_cases import accelerators
from tests.worlds import World
from vembed_ds.preflight.findings import Finding

CASES = "tests.distributed.doctor_cases"

pytestmark = pytest.mark.distributed(2)


@pytest.fixture
def find(world: Callable[[int], World]) -> Callable[..., Finding]:
    """What all ranks find, which must be the same."""

    def run(case: str, **options: str) -> Finding:
        first, second = world(2).run(f"{CASES}:{case}", **options)
        assert first == second
        found: Finding = first
        return found

    return run


def test_all_is_well(world: Callable[[int], World], tmp_path: Path) -> None:
    findings, _ = world(2).run(f"{CASES}:all_well", folder=str(tmp_path / "not there yet"))
    assert [(found.check, found.state) for found in findings] == [
        ("versions", "ok"),
        ("clocks", "ok"),
        ("shared folder", "ok"),
        ("all-reduce", "ok"),
    ]
    assert "2 ranks, gloo: right; " in findings[-1].finding
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_clocks_that_differ(find: Callable[..., Finding]) -> None:
    found = find("on_rank_1", finding="clocks")
    assert (found.state, "60 s before" in found.finding) == ("warn", True)


def test_versions_that_differ(find: Callable[..., Finding]) -> None:
    found = find("on_rank_1", finding="alike")
    assert found.state == "fail"
    assert ".old and not " in found.finding


def test_a_wrong_sum(find: Callable[..., Finding]) -> None:
    found = find("on_rank_1", finding="exchange")
    assert found.state == "fail"
    assert "sums over 2 ranks are wrong" in found.finding


def test_a_folder_that_is_not_shared(find: Callable[..., Finding], tmp_path: Path) -> None:
    found = find("blind", folder=str(tmp_path))
    assert found.state == "fail"
    assert f"{tmp_path} is another folder on " in found.finding
    assert "node_local_output: true" in found.remedy


def test_a_folder_that_rank_0_cannot_write_to(find: Callable[..., Finding], tmp_path: Path) -> None:
    found = find("unwritable", folder=str(tmp_path))
    assert (found.state, found.finding) == (
        "fail",
        f"{tmp_path}: rank 0 cannot write there: no permission",
    )


def test_every_machine_speaks_once(world: Callable[[int], World]) -> None:
    wanted = ["of rank 0", "of rank 1", "of rank 0"]
    assert world(2).run(f"{CASES}:of_machines") == [wanted, wanted]


def test_accelerators() -> None:
    found = accelerators(kind="cuda", counted=8, seen=8)
    assert found.state == "ok"
    assert found.finding.startswith("8 x X200; CUDA ")
    assert found.finding.endswith(", NCCL 2.27")
    found = accelerators(kind="cpu", counted=1, seen=8)
    assert (found.state, "though torch sees 8 accelerators" in found.finding) == ("warn", True)
    assert accelerators(kind="cpu", counted=1, seen=0).state == "ok"
    assert accelerators(kind="cuda", counted=2, seen=1).state == "warn"


def test_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vembed_ds.preflight.world import extensions

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extensions().state == "ok"
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert extensions().state == "warn"
    old = time.time() - 3600
    os.utime(lock, (old, old))
    found = extensions()
    assert (found.state, found.finding) == ("fail", f"{lock} is 60 minutes old")
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    assert "cannot be made or written to" in extensions().finding
