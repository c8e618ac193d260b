"""Which machines a launch means, and whether the launcher reaches them from here."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from typing import Any, NamedTuple

from vembed_ds.distributed.announced import DEFAULT_PORT
from vembed_ds.errors import ConfigError, counted
from vembed_ds.launching.flags import require_consistent
from vembed_ds.launching.hostfile import hostfile_of, read_hostfile, used_hosts

logger = logging.getLogger(__name__)

_VISIBLE = "CUDA_VISIBLE_DEVICES"


class Target(NamedTuple):
    """Ranks of every machine, in order (empty: this machine, without a host file), and flags to reach them.

    ``by_ssh``: the launcher starts them from here, through pdsh or mpirun.
    """

    hosts: dict[str, int]
    flags: dict[str, Any]
    by_ssh: bool


def target_of(flags: Mapping[str, Any]) -> Target:
    """What the flags of the launcher mean, with a port that is free where it can be known.

    Raises:
        ConfigError: They contradict each other or the host file, or the port is taken.
    """
    require_consistent(flags)
    hosts = _hosts(flags)
    if "no_ssh" in flags:
        _require_place(flags["node_rank"], hosts)
        return Target(hosts, dict(flags), by_ssh=False)
    if len(hosts) > 1 or (hosts and "force_multi" in flags):
        launcher = flags.get("launcher", "pdsh").lower()
        _require_equal(hosts, launcher)
        # Open MPI tells ranks where they are, and not where they meet.
        place = {"master_addr": next(iter(hosts))} if launcher == "openmpi" else {}
        return Target(hosts, {**place, **flags}, by_ssh=True)
    port = free_port(flags.get("master_port"))
    local: dict[str, Any] = {**(flags if hosts else _visible(flags)), "master_port": port}
    if hosts:
        logger.warning(
            "one machine is left, %s: its ranks start on this one; --force_multi reaches it by ssh",
            *hosts,
        )
        # Otherwise the launcher asks it by ssh for its address, and it may have no sshd.
        local = {"master_addr": "127.0.0.1", "no_ssh_check": True, **local}
    return Target(hosts, local, by_ssh=False)


def local_devices() -> int:
    """Accelerators that a run on this machine would use; 0: it would be on the CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch  # here: it takes seconds

    return torch.accelerator.device_count()


def free_port(wanted: int | None) -> int:
    """The port for ranks on this machine: the one that is asked for, else the default, else a free one.

    Raises:
        ConfigError: The one that is asked for is taken.
    """
    try:
        return _bound(wanted or DEFAULT_PORT)
    except OSError as error:
        if wanted is not None:
            raise ConfigError(
                f"--master_port={wanted}: cannot be used on this machine ({error.strerror}); leave it "
                "out to get a free one, or end the job that has it"
            ) from error
    port = _bound(0)
    logger.warning("port %d is taken; the ranks meet at %d", DEFAULT_PORT, port)
    return port


def _bound(port: int) -> int:
    """The port, if nobody listens there; 0: any."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as rank 0 will
        probe.bind(("", port))
        number: int = probe.getsockname()[1]
        return number


def _hosts(flags: Mapping[str, Any]) -> dict[str, int]:
    path = hostfile_of(flags)
    if path is not None:
        return used_hosts(read_hostfile(path), flags)
    if flags.get("num_nodes", 1) > 1:
        raise ConfigError(f"--num_nodes={flags['num_nodes']}: needs --hostfile, which names them")
    _require_local(flags)
    return {}


def _require_place(node_rank: int, hosts: Mapping[str, int]) -> None:
    """With --no_ssh this machine must be one of the host file's."""
    if not 0 <= node_rank < len(hosts):
        raise ConfigError(
            f"--node_rank={node_rank}: the host file has {counted(len(hosts), 'machine')}; give the "
            f"place of this one in it, 0 to {len(hosts) - 1}"
        )


def _require_equal(hosts: Mapping[str, int], launcher: str) -> None:
    """Intel MPI starts as many ranks on every machine."""
    if launcher == "impi" and len(set(hosts.values())) > 1:
        found = ", ".join(f"{host} slots={slots}" for host, slots in hosts.items())
        raise ConfigError(
            f"--launcher=impi: needs the same number of slots on every machine, and the host file has "
            f"{found}; make them alike, or use pdsh"
        )


def _visible(flags: Mapping[str, Any]) -> Mapping[str, Any]:
    """Flags that start on the devices that CUDA_VISIBLE_DEVICES leaves.

    The launcher would ignore it with --num_gpus, and start on the first ones, somebody else's maybe.

    Raises:
        ConfigError: They are fewer, or have no numbers.
    """
    visible = os.environ.get(_VISIBLE, "")
    if not visible or {"include", "exclude"} & flags.keys() or local_devices() == 0:
        return flags
    names = visible.split(",")
    if wrong := [name for name in names if not name.strip().isdecimal()]:
        raise ConfigError(
            f"{_VISIBLE}={visible}: DeepSpeed's launcher takes numbers, not {wrong[0]!r}; write those "
            "that `nvidia-smi -L` says, or start by torchrun"
        )
    number = flags.get("num_gpus", len(names))
    if number > len(names):
        raise ConfigError(
            f"--num_gpus={number}: {_VISIBLE}={visible} leaves {counted(len(names), 'device')}; lower "
            "one, or give the other more"
        )
    if "num_gpus" not in flags:
        return flags
    chosen = {"include": f"localhost:{','.join(name.strip() for name in names[:number])}"}
    return {
        key: value for key, value in flags.items() if key not in ("num_gpus", "num_nodes")
    } | chosen


def _require_local(flags: Mapping[str, Any]) -> None:
    """Without a host file the launcher knows this machine only, as `localhost`."""
    for key in ("include", "exclude"):
        names = {part.partition(":")[0] for part in flags.get(key, "").split("@")}
        if key in flags and names != {"localhost"}:
            raise ConfigError(
                f"--{key}={flags[key]}: needs --hostfile, which names the machines; devices of this "
                "one alone are localhost:0,1"
            )
        numbers = flags.get(key, "").partition(":")[2]
        if wrong := [word for word in numbers.split(",") if numbers and not word.isdecimal()]:
            raise ConfigError(f"--{key}={flags[key]}: {wrong[0]!r} is no number of a device")
