"""What the graph of a forward pass holds, and how much memory is left for such graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vembed_ds.distributed.host_memory import free_host_bytes

T = TypeVar("T")

# Of an accelerator's memory, left free: an allocator that keeps blocks cannot use all of it.
DEVICE_MARGIN = 0.1
# Of the host's free memory, what graphs may take: others want some of it too, and a Linux that has
# none left does not say so but kills.
HOST_SHARE = 0.5


class Meter(Protocol):
    """Measures on this rank, without waiting for a device."""

    def begin(self) -> None:
        """A step begins that keeps one graph at a time."""

    def weigh(self, forward: Callable[[], T]) -> tuple[T, int]:
        """What a forward pass with gradient gives, and the bytes that its graph holds."""

    def spare(self) -> int:
        """Bytes that the step, which is over, would have left for further graphs."""


def build_meter(device: torch.device, *, local_ranks: int) -> Meter:
    """The meter of the memory in which graphs lie.

    Args:
        device: Of the engine.
        local_ranks: Ranks that share the host.
    """
    return HostMeter(local_ranks) if device.type == "cpu" else DeviceMeter(device)


class DeviceMeter:
    """Reads the counters of an accelerator's allocator, which are kept on the host.

    Args:
        device: The accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Any = torch.get_device_module(device)

    def begin(self) -> None:
        """Forget the peak."""
        self._memory.reset_peak_memory_stats(self._device)

    def weigh(self, forward: Callable[[], T]) -> tuple[T, int]:
        """By how much the allocated memory has grown."""
        before = self._memory.memory_allocated(self._device)
        result = forward()
        return result, self._memory.memory_allocated(self._device) - before

    def spare(self) -> int:
        """What the device has free and the allocator holds, without the step's peak and a margin."""
        free, total = self._memory.mem_get_info(self._device)
        held = self._memory.memory_reserved(self._device)
        peak = self._memory.max_memory_allocated(self._device)
        return int(free + held - peak - DEVICE_MARGIN * total)


class HostMeter:
    """Counts the storages that a forward pass makes and that are still there when it is over.

    Args:
        local_ranks: Ranks that share the host.
    """

    def __init__(self, local_ranks: int) -> None:
        self._local_ranks = local_ranks
        self._spare: int | None = None

    def begin(self) -> None:
        """Nothing: what the host has free is asked afterwards."""

    def weigh(self, forward: Callable[[], T]) -> tuple[T, int]:
        """The storages of what all operations gave, as far as something holds them."""
        storages = _NewStorages()
        with storages:
            result = forward()
        return result, storages.living_bytes()

    def spare(self) -> int:
        """This rank's share of what was free at the first time.

        Later the process still has what it freed of earlier graphs, which counts as used.
        """
        if self._spare is None:
            self._spare = int(HOST_SHARE * (free_host_bytes() or 0) / self._local_ranks)
        return self._spare


class _NewStorages(TorchDispatchMode):
    """Notes every storage that an operation makes, without holding it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        given = {_storage(value).data_ptr() for value in tree_leaves((args, kwargs)) if _has(value)}
        for storage in (_storage(value) for value in tree_leaves(outputs) if _has(value)):
            if storage.data_ptr() not in given:  # else a view, such as a weight's transpose
                seen = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._found[storage._cdata] = (seen, storage.nbytes())
        return outputs

    def living_bytes(self) -> int:
        """Of those that something else holds."""
        return sum(size for seen, size in self._found.values() if not seen.expired())


def _has(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
