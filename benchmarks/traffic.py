"""Bytes that a rank sends: counted from its collectives, and read from the network interface."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

# Times (N - 1) / N of the whole tensor that a rank of a ring sends (of a broadcast: on average).
UNITS = {
    "_allgather_base_": 1,
    "allgather_": 1,
    "allgather_into_tensor_coalesced_": 1,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "allreduce_": 2,
    "allreduce_coalesced_": 2,
    "broadcast_": 1,
    "reduce_": 1,
    "scatter_": 1,
    "barrier": 0,
}
SCATTERED = "input_tensors"  # what a scatter sends; only the rank that has it

# gloo has no reduce-scatter of its own: it reduces everything everywhere.
TWICE_OVER_GLOO = (
    "_reduce_scatter_base_",
    "reduce_scatter_",
    "reduce_scatter_tensor_coalesced_",
)


def sent_over_gloo(sent: Mapping[str, int]) -> int:
    """Bytes that a rank sends over gloo, from what it would send around a ring."""
    return sum(n * (2 if name in TWICE_OVER_GLOO else 1) for name, n in sent.items())


class CountedTraffic(TorchDispatchMode):
    """Counts the collectives of this rank inside ``with``.

    Attributes:
        sent: Bytes by collective, as a ring sends them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            names = [argument.name for argument in func._schema.arguments]
            self._count(func.overloadpacket.__name__, dict(zip(names, args, strict=False)))
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, arguments: dict[str, Any]) -> None:
        size = ProcessGroup.unbox(arguments["process_group"]).size()
        sources = [arguments[SCATTERED]] if name == "scatter_" else arguments.values()
        whole = max(sum(t.nbytes for t in _tensors(source)) for source in sources)
        self.sent[name] += UNITS[name] * whole * (size - 1) // size


def loopback_bytes() -> int | None:
    """Bytes that all ranks sent so far; ``None``: other programs send over this interface too.

    Only in a network of its own (``unshare -rn``), which has no interface but ``lo``.
    """
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    found = {name.strip(): numbers.split() for name, numbers in (x.split(":") for x in lines)}
    return int(found["lo"][8]) if list(found) == ["lo"] else None


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for part in argument:
            yield from _tensors(part)
