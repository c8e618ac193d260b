"""Ranks, start-up, barriers, and failures that every rank learns of."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from vembed_ds.distributed import rendezvous
from vembed_ds.distributed.announced import adopt_environment, other_launcher
from vembed_ds.distributed.heartbeat import Heartbeat, is_exchange_error
from vembed_ds.distributed.phases import Kind, phase
from vembed_ds.errors import DistributedError, PeerError, VembedError, one_line

T = TypeVar("T")

# What a launcher says to a rank, or, without one, what a world of 1 says to itself.
WORLD_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_this_thread = threading.local()  # .group: where its collectives travel; None: the usual way
_heartbeat: Heartbeat | None = None  # from start-up to shutdown, where there are several ranks
_timeout = timedelta(minutes=30)


def init_distributed(*, device_type: str, timeout_minutes: float) -> None:
    """Join the process group that the launcher describes; a world of 1 without a launcher.

    Launchers are ``deepspeed``, torchrun, srun and mpirun (:mod:`vembed_ds.distributed.announced`).

    Collective: every rank calls it once. Host tensors always travel over gloo, so that
    control messages never wait for the accelerator. From here on the ranks watch each other
    (:mod:`vembed_ds.distributed.heartbeat`): one that is silent for too long ends the job.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.
        timeout_minutes: A collective that waits longer than this fails; so does this start.

    Raises:
        DistributedError: The launcher does not tell its processes who they are; the port is
            taken; or the ranks cannot reach each other.
        PeerError: A rank did not come.
    """
    global _heartbeat, _timeout
    if dist.is_initialized():
        return
    adopt_environment()
    if "RANK" not in os.environ:
        _describe_world_of_one()
    backend = "gloo" if device_type == "cpu" else f"cpu:gloo,{device_type}:nccl"
    _timeout = timedelta(minutes=timeout_minutes)
    store = rendezvous.open_store(timeout=_timeout)
    names = rendezvous.join(store, timeout=_timeout)
    rendezvous.connect(backend, store, timeout=_timeout)
    if len(names) > 1:
        own = rendezvous.open_store(timeout=_timeout)
        limit = _timeout.total_seconds()
        _heartbeat = Heartbeat(own, rank=rank(), names=names, limit=limit)
        _heartbeat.start()


def is_joined() -> bool:
    """Whether this process is in a process group."""
    return bool(dist.is_initialized())


def is_launched() -> bool:
    """Whether a launcher has started this process, and said which rank it is."""
    return "RANK" in os.environ or other_launcher(os.environ) is not None


def require_host_exchange() -> None:
    """See that a process group which somebody else made carries host tensors.

    Raises:
        DistributedError: It does not.
    """
    backends = str(dist.get_backend_config())
    if "cpu:" not in backends:
        raise DistributedError(
            f"torch.distributed was started before, with the backend {backends!r}, which exchanges nothing "
            "between hosts; train before it is started, or start it with backend "
            "'cpu:gloo,cuda:nccl'"
        )


def subgroup(ranks: Sequence[int]) -> dist.ProcessGroup:
    """A group of these ranks, with the timeout of the first group. Collective, of all ranks.

    torch's own default is 10 minutes with NCCL and 30 with gloo, whatever the first group has.
    """
    group: dist.ProcessGroup = dist.new_group(list(ranks), timeout=_timeout)
    return group


def explain(error: BaseException) -> DistributedError | None:
    """Which rank broke the exchange that ``error`` comes from; it takes some seconds.

    Not collective, and for a rank that ends with it.

    Returns:
        ``None`` when the error is none of an exchange between ranks.
    """
    if _heartbeat is None or not is_exchange_error(error):
        return None
    return _heartbeat.explain(error)


def say_last_words(error: BaseException, *, code: int) -> None:
    """Tell the other ranks by which error, and with which exit code, this rank ends."""
    if _heartbeat is not None:
        words = f"{type(error).__name__}: {one_line(error, length=1000)}"
        _heartbeat.say_last_words(words, code=code, by_peer=isinstance(error, PeerError))


def new_group(*, timeout_minutes: float) -> Any:
    """A second way to all ranks on the host, for :func:`on_group`. Collective.

    Args:
        timeout_minutes: A collective on it that waits longer than this fails.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))


@contextmanager
def on_group(group: Any) -> Iterator[None]:
    """Let this thread's host collectives inside travel on a group of their own.

    Two threads that share a group would answer each other's questions.

    Args:
        group: From :func:`new_group`; the same on every rank.
    """
    _this_thread.group = group
    try:
        yield
    finally:
        _this_thread.group = None


@contextmanager
def pretend(size: int) -> Iterator[None]:
    """Let this thread take itself for rank 0 of ranks that all hold the same; nothing is sent inside.

    To count what a step takes in another world than this one.

    Args:
        size: Ranks of that world.
    """
    _this_thread.pretended = size
    try:
        yield
    finally:
        _this_thread.pretended = None


def pretended() -> int | None:
    """Size of the world that :func:`pretend` gave this thread; ``None``: it is in none."""
    size: int | None = getattr(_this_thread, "pretended", None)
    return size


def shutdown(timeout_seconds: float | None = None) -> bool:
    """Leave the process group; a rank that exits without this aborts the others.

    Args:
        timeout_seconds: Longest wait; a group whose other ranks are in a collective may never
            let go. ``None``: wait for as long as it takes.

    Returns:
        Whether the group was left.
    """
    global _heartbeat
    if not dist.is_initialized():
        return True
    alone = False
    leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
    leaving.start()
    if _heartbeat is not None:
        _heartbeat.leave()
        alone = _heartbeat.ends_by_peer
        _heartbeat = None
    if alone:  # nobody to leave with; with broken groups even the end of Python took 8 s
        return False
    leaving.join(timeout_seconds)
    return not leaving.is_alive()


def rank() -> int:
    """Global rank; 0 in a plain process. Before start-up, what the launcher announced."""
    if pretended() is not None:
        return 0
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Rank on this machine, which is the index of the device to use."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of ranks on this machine, as the launcher announced it."""
    # The DeepSpeed launcher and torchrun have a name each.
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1")


def world_size() -> int:
    """Number of ranks; 1 in a plain process. Before start-up, what the launcher announced."""
    if (size := pretended()) is not None:
        return size
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is rank 0, which alone logs and writes."""
    return rank() == 0


def barrier() -> None:
    """Wait for every rank. Collective."""
    if world_size() > 1:
        # A host-side reduction: `dist.barrier` would allocate on the accelerator.
        with phase(Kind.WAITING):
            dist.all_reduce(torch.zeros(1), group=_group())


def all_gather_objects(value: Any) -> list[Any]:
    """Every rank's ``value`` (picklable, small), in rank order. Collective."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    with phase(Kind.WAITING):
        dist.all_gather_object(gathered, value, group=_group())
    return gathered


def all_max(values: Sequence[int]) -> list[int]:
    """Element-wise maximum of ``values`` over the ranks, on the host. Collective."""
    if world_size() == 1 or pretended():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.int64)
    with phase(Kind.WAITING):
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_group())
    return [int(value) for value in tensor]


def all_sum(values: Sequence[int]) -> list[int]:
    """Element-wise sum of ``values`` over the ranks, on the host. Collective."""
    if size := pretended():
        return [size * value for value in values]
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.int64)
    with phase(Kind.WAITING):
        dist.all_reduce(tensor, group=_group())
    return [int(value) for value in tensor]


def all_gather_ints(values: Sequence[int]) -> list[list[int]]:
    """Every rank's ``values``, equally many, in rank order, on the host. Collective."""
    if world_size() == 1 or pretended():
        return [list(values) for _ in range(world_size())]
    own = torch.tensor(values, dtype=torch.int64)
    gathered = [torch.empty_like(own) for _ in range(world_size())]
    with phase(Kind.WAITING):
        dist.all_gather(gathered, own, group=_group())
    return [found.tolist() for found in gathered]


def all_gather_floats(values: Sequence[float]) -> list[list[float]]:
    """Every rank's ``values``, equally many, in rank order, on the host, float64. Collective."""
    if world_size() == 1 or pretended():
        return [list(values) for _ in range(world_size())]
    own = torch.tensor(values, dtype=torch.float64)
    gathered = [torch.empty_like(own) for _ in range(world_size())]
    with phase(Kind.WAITING):
        dist.all_gather(gathered, own, group=_group())
    return [found.tolist() for found in gathered]


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Mean of ``value`` over the ranks, any shape, on its device. Collective."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    with phase(Kind.WAITING):
        dist.all_reduce(total)
    return total / world_size()


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Sum of ``value`` over the ranks, any shape, on its device. Collective."""
    total = value.detach().clone()
    if world_size() > 1:
        with phase(Kind.WAITING):
            dist.all_reduce(total)
    return total


def raise_together(error: VembedError | None) -> None:
    """Raise on every rank when any rank has an error, so that none waits for the other.

    Collective: every rank calls it at the same point, with its error or ``None``.

    Raises:
        VembedError: The rank's own error, or the first failing rank's, with its rank named.
    """
    if all_max([int(error is not None)])[0] == 0:
        return
    errors = all_gather_objects(error)
    if error is not None:
        raise error
    failed = next(rank for rank, found in enumerate(errors) if found is not None)
    raise DistributedError(f"rank {failed} failed: {errors[failed]}") from errors[failed]


def run_together(action: Callable[[], T], *, doing: str) -> T:
    """Run ``action`` on this rank; when it fails on any rank, every rank raises.

    Collective: for work in which one rank can fail alone (its files, its share of the data),
    and the others would wait for it. ``action`` itself must not be collective.

    Args:
        action: What to do.
        doing: Words for the message of a failing file operation, such as "writing x".

    Raises:
        VembedError: On every rank, when ``action`` raised it or an ``OSError`` on any.
    """
    error: VembedError | None = None
    result: Any = None
    try:
        result = action()
    except VembedError as found:
        error = found
    except OSError as found:
        error = VembedError(f"{doing}: {found}")
    raise_together(error)
    return cast(T, result)


def run_on_main(action: Callable[[], T], *, doing: str) -> T:
    """What ``action`` gives on rank 0, which alone runs it; every rank gets it, or raises.

    Collective: for what the ranks could see differently, such as files that another run writes.

    Args:
        action: What to do; gives something small that can be pickled. Not collective.
        doing: As of :func:`run_together`.

    Raises:
        VembedError: On every rank, as of :func:`run_together`.
    """
    result = run_together(lambda: action() if is_main() else None, doing=doing)
    return cast(T, all_gather_objects(result)[0])


def require_equal(value: Any, *, what: str) -> None:
    """Raise on every rank unless all have the same ``value``. Collective.

    Raises:
        DistributedError: Naming what differs, and two ranks with their values.
    """
    values = all_gather_objects(value)
    for other, found in enumerate(values):
        if found != values[0]:
            raise DistributedError(
                f"{what}: rank 0 has {values[0]!r}, rank {other} has {found!r}; "
                "every rank must see the same files"
            )


def _group() -> Any:
    return getattr(_this_thread, "group", None)


def _describe_world_of_one() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
