"""``vembed-ds doctor`` as typed: alone, and as a task of ``srun``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.launching import ROOT, free_port

SECONDS = 150
CHECKS = ["packages", "devices", "disk", "shared memory", "Hugging Face", "compiler", "extensions"]
TOGETHER = ["versions", "clocks", "shared folder", "all-reduce"]

pytestmark = pytest.mark.distributed(2)


def task_of_srun(number: int) -> dict[str, str]:
    """What ``srun -n 2`` sets for a task on one machine, as far as it is read."""
    return {
        "SLURM_JOB_ID": str(free_port()),  # another port for every test
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }


def doctor(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vembed_ds", "doctor", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def findings(printed: str) -> dict[str, Any]:
    """The findings, by check."""
    return {check: (finding, state) for check, finding, state, *_ in json.loads(printed)}


def test_two_tasks_of_srun_are_two_ranks(tmp_path: Path) -> None:
    first = task_of_srun(0)
    second = {**first, "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    arguments = ["--json", "--output_dir", str(tmp_path)]
    running = [doctor(*arguments, **environment) for environment in (first, second)]
    ended = [process.communicate(timeout=SECONDS) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    assert ended[1][0] == "", "rank 0 alone prints"
    found = findings(ended[0][0])
    assert list(found) == [*CHECKS, *TOGETHER]
    assert found["versions"] == ("the same on 2 ranks", "ok")
    assert found["all-reduce"][1] == "ok"


@pytest.mark.slow
def test_alone_it_starts_two_ranks(tmp_path: Path) -> None:
    running = doctor("--output_dir", str(tmp_path))
    printed, said = running.communicate(timeout=SECONDS)
    assert running.returncode == 0, printed + said
    names = re.findall(r"^(?:ok  |warn)  (.*?) (?: |\()", printed, re.MULTILINE)
    assert names == ["packages", "port", *CHECKS[1:], *TOGETHER], printed
    assert "all-reduce " in printed


@pytest.mark.slow
def test_ranks_that_fail_are_a_finding(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.99: no such')")
    running = doctor("--json", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}", DS_ACCELERATOR="cuda")
    printed, _ = running.communicate(timeout=SECONDS)
    assert running.returncode == 2
    found = findings(printed)
    assert found["devices"] == ("torch cannot be imported: libcudart.so.99: no such", "fail")
    running = doctor("--json", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}", DS_ACCELERATOR="cpu")
    printed, _ = running.communicate(timeout=SECONDS)
    assert running.returncode == 2
    [said, state] = findings(printed)["ranks"]
    assert state == "fail"
    assert "failed: ImportError: libcudart.so.99: no such" in said
