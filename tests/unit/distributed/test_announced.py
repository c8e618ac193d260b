"""Ranks as srun and mpirun announce them."""

from __future__ import annotations

import os
import re

import pytest

from vembed_ds.distributed.announced import adopt_environment, other_launcher, translated
from vembed_ds.errors import DistributedError

# Task 9 of 3 machines with 4, 4 and 2 tasks, as `srun -n 10` sets it.
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "10",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2",
    "SLURM_STEP_NODELIST": "gpu[07-08],big1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}


def test_srun() -> None:
    assert other_launcher(SRUN) == "srun"
    found = translated("srun", SRUN)
    assert 12000 <= int(found.pop("MASTER_PORT")) < 32000
    assert found == {
        "RANK": "9",
        "WORLD_SIZE": "10",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "gpu07",
    }


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node3", "node3"),
        ("a1,a2", "a1"),
        ("gpu[07-09,12]", "gpu07"),
        ("gpu[7,9],x", "gpu7"),
        ("rack[1-2]-n", "rack1-n"),
        ("ip-10-0-0-1,ip-10-0-0-2", "ip-10-0-0-1"),
    ],
)
def test_the_first_host_of_slurms_list(hosts: str, first: str) -> None:
    assert translated("srun", {**SRUN, "SLURM_STEP_NODELIST": hosts})["MASTER_ADDR"] == first


def test_steps_of_a_job_that_share_a_machine_meet_at_ports_of_their_own() -> None:
    ports = {
        translated("srun", {**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})[
            "MASTER_PORT"
        ]
        for job in (1234, 1235)
        for step in range(4)
    }
    assert len(ports) == 8


def test_mpirun_on_one_machine_meets_there() -> None:
    assert other_launcher(OPEN_MPI) == "mpirun"
    assert translated("mpirun", OPEN_MPI) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "3",
        "LOCAL_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }


def test_mpirun_on_several_machines_must_be_told_where_rank_0_is() -> None:
    several = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    sentence = (
        "MASTER_ADDR is not set, and mpirun started 4 ranks, of which 2 on this machine: pass"
    )
    with pytest.raises(DistributedError, match=sentence):
        translated("mpirun", several)
    assert "MASTER_ADDR" not in translated("mpirun", {**several, "MASTER_ADDR": "a"})


def test_what_is_not_set_is_named() -> None:
    without = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_NODELIST"}
    sentence = re.escape(
        "SLURM_STEP_NODELIST is not set, though srun started this process: set RANK"
    )
    with pytest.raises(DistributedError, match=sentence):
        translated("srun", without)


def test_other_launchers_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SRUN, "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)  # torchrun, started by srun
    adopt_environment()

    assert os.environ["WORLD_SIZE"] == "1"
    assert other_launcher({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


def test_what_the_user_says_wins(monkeypatch: pytest.MonkeyPatch) -> None:

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "to be removed")  # so that it is again as before the test
        monkeypatch.delenv(name)
    for name, value in {**SRUN, "MASTER_ADDR": "10.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    adopt_environment()
    assert (os.environ["MASTER_ADDR"], os.environ["RANK"]) == ("10.0.0.1", "9")
