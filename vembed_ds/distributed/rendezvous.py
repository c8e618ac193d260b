"""How the ranks of a job find each other, and what is said when they do not."""

from __future__ import annotations

import os
import platform
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError

from vembed_ds.errors import DistributedError, PeerError, one_line

# Rank 0 keeps the store: it gives up last, so that the others can still read who came.
_LONGER_ON_RANK_0 = timedelta(seconds=2)
_SHOWN = 16
_TRY_SECONDS = 5.0  # for one attempt to connect


def hosts_store() -> bool:
    """Whether this process keeps the store; torchrun keeps one itself."""
    return int(os.environ["RANK"]) == 0 and not launcher_hosts_store()


def launcher_hosts_store() -> bool:
    """Whether the store is not rank 0's, but torchrun's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def open_store(*, timeout: timedelta) -> Store:
    """A connection to the store of the job; rank 0 makes the store.

    Args:
        timeout: Longest wait for it.

    Raises:
        DistributedError: The port is taken, or the address cannot be used.
        PeerError: Rank 0 did not open it in time.
    """
    host, port = _address()
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        if not hosts_store():
            _await_server(host, port, deadline=deadline)
        return _connect(host, port, timeout=timeout, deadline=deadline)
    except (DistError, RuntimeError, OSError) as error:
        raise _no_store(error, host=host, port=port, timeout=timeout) from error


def _await_server(host: str, port: int, *, deadline: float) -> None:
    """Wait until somebody listens; torch would do so too, but prints a stack when nobody comes."""
    while True:
        try:
            with socket.create_connection((host, port), timeout=_TRY_SECONDS):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_TRY_SECONDS / 20)


def _connect(host: str, port: int, *, timeout: timedelta, deadline: float) -> Store:
    found: list[Store | Exception] = []

    def connect() -> None:
        try:
            store = TCPStore(
                host,
                port,
                int(os.environ["WORLD_SIZE"]),
                is_master=hosts_store(),
                timeout=timeout,
                wait_for_workers=False,
                multi_tenant=True,
            )
            found.append(store)
        except (DistError, RuntimeError) as error:
            found.append(error)

    # A stranger behind the port may take the connection and say nothing: torch waits for ever.
    connecting = threading.Thread(target=connect, daemon=True)
    connecting.start()
    connecting.join(max(deadline - time.monotonic(), _TRY_SECONDS))
    result = found[0] if found else TimeoutError("what listens there is no rank 0")
    if isinstance(result, Exception):
        raise result
    return result


def join(store: Store, *, timeout: timedelta) -> list[str]:
    """Wait for all ranks.

    Collective.

    Args:
        store: From :func:`open_store`.
        timeout: Longest wait.

    Returns:
        Of every rank its host and process, such as ``"host a, pid 12"``.

    Raises:
        DistributedError: Another job has the port.
        PeerError: Not all ranks came in time; names those that did not.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    seats = [f"seat/{number}" for number in range(world_size)]
    try:
        _take_seat(store, rank, world_size)
        longer = _LONGER_ON_RANK_0 if rank == 0 else timedelta()
        store.wait(seats, timeout + longer)
        return [seat.decode() for seat in store.multi_get(seats)]
    except (DistError, RuntimeError) as error:
        raise _not_met(error, store, seats, timeout=timeout) from error


def connect(backend: str, store: Store, *, timeout: timedelta) -> None:
    """Make the process group of all ranks. Collective, after :func:`join`.

    Raises:
        DistributedError: The ranks do not reach each other.
    """
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timeout,
        )
    except (DistError, RuntimeError) as error:
        raise PeerError(
            f"the ranks found each other at {os.environ['MASTER_ADDR']}, but this one cannot exchange "
            f"data with all others: {one_line(error)}; if the machines have several networks, name "
            "one by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from error


def _address() -> tuple[str, int]:
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise DistributedError(
            f"MASTER_ADDR={host!r}, MASTER_PORT={port!r}: must be the host of rank 0 and a port from "
            "1 to 65535; start with `deepspeed --module ...` or torchrun, which set both"
        )
    return host, int(port)


def _take_seat(store: Store, rank: int, world_size: int) -> None:
    """Two jobs on one port must not become one."""
    expected = store.compare_set("world_size", "", str(world_size)).decode()
    taken = store.add(f"taken/{rank}", 1) > 1
    if taken or expected != str(world_size):
        found = f"a rank {rank}" if taken else f"{expected} ranks"
        raise DistributedError(
            f"MASTER_PORT={os.environ['MASTER_PORT']}: belongs to another job (it has {found} "
            f"already, this one has {world_size} ranks); choose a free port by --master_port"
        )
    store.set(f"seat/{rank}", f"host {platform.node()}, pid {os.getpid()}")


def _no_store(error: Exception, *, host: str, port: int, timeout: timedelta) -> DistributedError:
    text = str(error)
    if "EADDRINUSE" in text or "already in use" in text:
        return DistributedError(
            f"MASTER_PORT={port}: taken by another process on {platform.node()}, so that rank 0 "
            "cannot wait there for the others; choose a free port by --master_port, or end the job "
            "that has it"
        )
    if hosts_store():
        return DistributedError(
            f"MASTER_ADDR={host!r}, MASTER_PORT={port}: rank 0 cannot wait there for the others: "
            f"{one_line(error)}; MASTER_ADDR must be a name of rank 0's own machine"
        )
    return PeerError(
        f"rank 0 was not found at {host}:{port} (MASTER_ADDR, MASTER_PORT) within "
        f"{_seconds(timeout)}: {one_line(error)}; look for rank 0's own error, and whether "
        "this machine reaches that port (name, firewall)"
    )


def _not_met(
    error: Exception, store: Store, seats: Sequence[str], *, timeout: timedelta
) -> DistributedError:
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        came = [store.check([seat]) for seat in seats]
    except (DistError, RuntimeError):
        return PeerError(
            f"the ranks' meeting place {where} is gone, while this rank waited there: "
            f"{one_line(error)}; look for rank 0's own error"
        )
    missing = [str(rank) for rank, is_here in enumerate(came) if not is_here]
    if not missing:
        return PeerError(f"the ranks did not meet at {where}: {one_line(error)}")
    names = ", ".join(missing[:_SHOWN]) + (" ..." if len(missing) > _SHOWN else "")
    return PeerError(
        f"{sum(came)} of {len(seats)} ranks came to {where} within {_seconds(timeout)} "
        f"(timeout_minutes); missing: {names}. Look for their own errors, whether their machines "
        "reach that port, and whether all were started with one WORLD_SIZE"
    )


def _seconds(timeout: timedelta) -> str:
    return f"{timeout.total_seconds():g} s"
