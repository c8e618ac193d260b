"""Who this process is among the ranks, as ``srun`` and ``mpirun`` say it. Needs no torch.

``deepspeed`` and ``torchrun`` set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; the
others have names of their own, and say nothing of where the ranks meet.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from vembed_ds.errors import DistributedError

DEFAULT_PORT = 29500
_FIRST_PORT, _NUM_PORTS = 12000, 20000  # below those that systems give to whoever asks for any

# Of every launcher: rank, ranks, rank on this machine, ranks on this machine.
_NAMES = {
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    "mpirun": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


def other_launcher(environment: Mapping[str, str]) -> str | None:
    """``"srun"``, ``"mpirun"`` (Open MPI) or ``"mpiexec"`` (MPICH, Intel), when it started several processes.

    ``None``: none of them did, or RANK is set already.
    """
    if "RANK" in environment:
        return None
    for launcher, (_, size, _, _) in _NAMES.items():
        if int(environment.get(size) or "1") > 1:
            return launcher
    return None


def adopt_environment() -> None:
    """Set RANK and the others by what srun or mpirun say; nothing under other launchers.

    What is set already, such as MASTER_ADDR, stays.

    Raises:
        DistributedError: They do not say enough.
    """
    launcher = other_launcher(os.environ)
    if launcher is not None:
        for name, value in translated(launcher, os.environ).items():
            os.environ.setdefault(name, value)


def translated(launcher: str, environment: Mapping[str, str]) -> dict[str, str]:
    """RANK and the others, from the variables of ``launcher``.

    Raises:
        DistributedError: A variable is missing; or there are several machines, and nothing says
            which is the first.
    """
    rank, size, local_rank, local_size = _NAMES[launcher]
    found = {
        "RANK": _read(environment, rank, launcher),
        "WORLD_SIZE": _read(environment, size, launcher),
        "LOCAL_RANK": _read(environment, local_rank, launcher),
    }
    if launcher == "srun":
        found["LOCAL_SIZE"] = _slurm_local_size(environment)
        found["MASTER_ADDR"] = _first_host(_read(environment, "SLURM_STEP_NODELIST", launcher))
        found["MASTER_PORT"] = _slurm_port(environment)
        return found
    found["LOCAL_SIZE"] = _read(environment, local_size, launcher)
    found["MASTER_PORT"] = str(DEFAULT_PORT)
    if "MASTER_ADDR" not in environment:
        if found["LOCAL_SIZE"] != found["WORLD_SIZE"]:
            raise DistributedError(
                f"MASTER_ADDR is not set, and {launcher} started {found['WORLD_SIZE']} ranks, of which "
                f"{found['LOCAL_SIZE']} on this machine: pass the name of rank 0's machine on "
                "(Open MPI: mpirun -x MASTER_ADDR=HOST, MPICH: mpiexec -genv MASTER_ADDR HOST)"
            )
        found["MASTER_ADDR"] = "127.0.0.1"
    return found


def _read(environment: Mapping[str, str], name: str, launcher: str) -> str:
    if not environment.get(name):
        raise DistributedError(
            f"{name} is not set, though {launcher} started this process: set RANK, WORLD_SIZE, "
            "LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or start with `vembed-ds`, `deepspeed "
            "--module` or torchrun"
        )
    return environment[name]


def _slurm_local_size(environment: Mapping[str, str]) -> str:
    """Of ``8(x2),4``, the tasks of each machine, the entry of this one."""
    counts = []
    for part in _read(environment, "SLURM_STEP_TASKS_PER_NODE", "srun").split(","):
        count, _, times = part.partition("(x")
        counts += [count] * int(times.rstrip(")") or "1")
    return counts[int(_read(environment, "SLURM_NODEID", "srun"))]


def _first_host(hosts: str) -> str:
    """Of ``gpu[07-09,12],login``, the first: ``gpu07``."""
    first = re.match(r"([^,\[]*)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", hosts)
    assert first is not None  # the pattern takes anything
    return "".join(part or "" for part in first.groups())


def _slurm_port(environment: Mapping[str, str]) -> str:
    """The same on all ranks, another one in every job and step, so that they may share a machine."""
    job = int(_read(environment, "SLURM_JOB_ID", "srun"))
    step = int(environment.get("SLURM_STEP_ID") or "0")
    return str(_FIRST_PORT + (job * 31 + step) % _NUM_PORTS)
