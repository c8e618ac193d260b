"""The benchmark command: what it measures of whom, and in which processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True, timeout=500)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny comparison of plain PyTorch, of a wrong gradient and of ours."""
    folder = tmp_path_factory.mktemp("smoke")
    run("tests.integration.benchmark_smoke", str(folder))
    return folder


@pytest.fixture(scope="module")
def rows(smoke: Path) -> dict[str, Any]:
    found = json.loads((smoke / "results.json").read_text())["workloads"]["W1"]["rows"]
    return {row["variant"]: row for row in found}


def test_equal_gradients_are_timed(rows: dict[str, Any]) -> None:
    for name in ("plain torch", "ours, cached"):
        row = rows[name]
        assert row["status"] == "measured"
        assert row["error"] < 1e-5
        assert row["cpu_seconds"] > 0
        assert row["peak_mb"] > 0
        assert row["rows"] == 32  # every item once, however often it is embedded


def test_a_wrong_gradient_gets_no_speed(rows: dict[str, Any], smoke: Path) -> None:
    row = rows["half a gradient"]
    assert row["status"] == "wrong"
    assert row["loss"] == pytest.approx(rows["plain torch"]["loss"])
    assert row["norm"] < 0.9 * rows["plain torch"]["norm"]
    assert "cpu_seconds" not in row
    assert (
        f"half a gradient **WRONG** | - | - | {row['loss']:.6f} | {row['norm']:.6f}"
        in (smoke / "report.md").read_text()
    )


def test_who_is_not_there_is_left_out(rows: dict[str, Any], smoke: Path) -> None:
    assert "somebody else" not in rows
    assert "add it with --gradcache PATH" in (smoke / "report.md").read_text()


def test_who_is_told_to_stop_says_so(rows: dict[str, Any]) -> None:
    assert rows["stopped"]["status"] == "failed"
    reason = rows["stopped"]["reason"]
    assert "StoppedError: stopped by SIGTERM on rank 0 at step 1, checkpoint" in reason


def test_every_process_has_one_thread_that_does_not_spin(smoke: Path) -> None:
    found = json.loads((smoke / "world.json").read_text())
    assert len(found["environments"]) == 2
    for environment in found["environments"]:
        assert environment["OMP_NUM_THREADS"] == "1"
        assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
        assert environment["GOMP_SPINCOUNT"] == "0"


def test_a_rank_that_fails_ends_its_world(smoke: Path) -> None:
    failure = json.loads((smoke / "world.json").read_text())["failure"]
    assert failure.startswith("rank 1: ValueError: no more")


@pytest.mark.slow
def test_the_command_writes_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    run("benchmarks.run", "W1", "W5", "W8", "--quick", "--output", str(tmp_path / "found"))
    report = (tmp_path / "found" / "report.md").read_text()
    for heading in ("## W1: one process", "## W5: the loss alone", "## W8: on a GPU"):
        assert heading in report
    assert "WRONG" not in report
    assert (tmp_path / "found" / "W1.png").stat().st_size > 0


@pytest.mark.slow
def test_counted_bytes_are_those_on_the_wire(tmp_path: Path) -> None:
    peers = "ours,ddp,fsdp2"
    run("benchmarks.run", "W2", "--quick", "--peers", peers, "--output", str(tmp_path))
    found = json.loads((tmp_path / "results.json").read_text())["workloads"]["W2"]["rows"]
    measured = [row for row in found if row["status"] == "measured"]
    assert len(measured) >= 6
    if os.environ.get("BENCHMARKS_IN_OWN_NETWORK") or "wire_mb" in measured[0]:
        for row in measured:  # headers and small messages count for more in a tiny step
            assert row["counted_mb"] <= row["wire_mb"] <= 1.3 * row["counted_mb"] + 0.1
