"""What every rank holds whole must be the same on all of them, bit for bit.

A synchronisation that was forgotten, or a bit that a faulty device turned over, leaves every loss
plausible and the ranks with different models. Compared are sums over the bits, made where the
tensors lie; one number per rank travels, and more only when two differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vembed_ds.distributed import comm
from vembed_ds.distributed.phases import Kind, phase
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.errors import ReplicaError

# Elements at a time, as 64-bit numbers. What fits a processor's cache is ten times as fast as 32 MB;
# an accelerator is kept busy by more.
CPU_BLOCK, BLOCK = 2**17, 2**24
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that no change is multiplied away
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaCheck:
    """Compares the ranks' copies from time to time, and before every checkpoint.

    Compared are, at ZeRO 0 to 2, all parameters and saved buffers; at stage 0 also the optimizer's
    moments and float32 weights, which above it are in parts, one of each. At stage 3 no parameter
    is held twice: the saved buffers are left. At every stage what counts steps is compared too.

    Args:
        engine: The engine of the run.
        every: Steps between comparisons; 0: only before checkpoints.
    """

    def __init__(self, engine: TrainEngine, *, every: int) -> None:
        self._engine, self._every = engine, every
        self._step: int | None = None  # of the last comparison

    def after_step(self, step: int) -> None:
        """Compare behind the first step and every so many; see :meth:`require_equal`."""
        if self._every and (self._step is None or step % self._every == 0):
            self.require_equal(step)

    def require_equal(self, step: int) -> None:
        """Compare, unless it was done behind this step already. Collective.

        Args:
            step: Steps done, for the message.

        Raises:
            ReplicaError: On every rank, naming the first tensor that differs, and where.
        """
        if step == self._step:
            return
        with phase(Kind.WAITING, "comparing the replicas"):
            self._compare(step)
        self._step = step

    def _compare(self, step: int) -> None:
        sums = _on_host({name: checksum(t) for name, t in _replicated(self._engine)})
        total = _fold(sums.values())
        highest, lowest = comm.all_max([total, ~total])
        if highest != ~lowest:
            raise ReplicaError(_describe(comm.all_gather_objects(sums), step))


def checksum(tensor: Tensor) -> Tensor:
    """A sum over the bits of a tensor, weighted by place; int64, 0-dim, on its device.

    Whatever changes a single element changes it, whatever else is equal.
    """
    numbers = tensor.detach().reshape(-1)
    numbers = numbers.view(_SAME_SIZE[numbers.element_size()])
    block = CPU_BLOCK if numbers.device.type == "cpu" else BLOCK
    weights = 2 * torch.arange(min(block, len(numbers)), device=numbers.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=numbers.device)
    for start in range(0, len(numbers), block):
        part = numbers[start : start + block]
        total = total * _signed(_FACTOR) + (part * weights[: len(part)]).sum()
    return total


def _signed(number: int) -> int:
    """The last 64 bits of a number, as int64 has them."""
    return (number + 2**63) % 2**64 - 2**63


def _fold(sums: Iterable[int]) -> int:
    """One number from several, in their order; it wraps around."""
    total = 0
    for found in sums:
        total = _signed(total * _FACTOR + found)
    return total


def _on_host(sums: Mapping[str, Tensor]) -> dict[str, int]:
    """Fetched at once from each device."""
    found: dict[str, int] = {}
    for device in {value.device for value in sums.values()}:
        names = [name for name, value in sums.items() if value.device == device]
        found |= zip(names, torch.stack([sums[n] for n in names]).tolist(), strict=True)
    return {name: found[name] for name in sums}


def _replicated(engine: TrainEngine) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that all ranks hold whole, by name, in the same order on all of them."""
    module = engine.module
    if engine.zero_stage < 3:
        yield from module.named_parameters()
    yield from _saved_buffers(module)
    optimizer = engine.engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    if engine.zero_stage == 0:
        masters = _masters(module, optimizer)
        yield from ((f"float32 weights of {name}", m) for m, name in masters.items())
        yield from _optimizer_state(inner, masters | {p: n for n, p in module.named_parameters()})
    for name, value in _counters(engine, inner).items():
        yield name, torch.tensor(value, dtype=torch.float64)


def _saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Others may depend on the last batch, such as a table of angles as long as its texts."""
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer


def _masters(module: nn.Module, optimizer: Any) -> dict[Tensor, str]:
    """The float32 weights behind 16-bit ones at stage 0, and whose they are."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    found: dict[Tensor, str] = {}
    if hasattr(optimizer, "fp32_groups"):
        for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            pairs = zip(masters, parameters, strict=True)
            found |= {master: names[parameter] for master, parameter in pairs}
    for number, flat in enumerate(getattr(optimizer, "fp32_groups_flat", ())):
        found[flat] = f"parameter group {number}"
    return found


def _optimizer_state(optimizer: Any, names: Mapping[Tensor, str]) -> Iterator[tuple[str, Tensor]]:
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"{key} of {names[parameter]}", value


def _counters(engine: TrainEngine, optimizer: Any) -> dict[str, float]:
    steps = [float(s["step"]) for s in optimizer.state.values() if "step" in s]
    return {
        "the learning rate": engine.learning_rate(),
        "the loss scale": engine.loss_scale,
        "the number of steps": float(engine.engine.global_steps),
        "the optimizer's number of steps": max(steps, default=0.0),
    }


def _describe(ranks: list[dict[str, int]], step: int) -> str:
    """What differs first, and on which ranks; ``ranks`` in rank order."""
    differing = [name for name in ranks[0] if len({found.get(name) for found in ranks}) > 1]
    if not differing:
        return f"step {step}: the ranks hold different tensors: {_unequal_names(ranks)}"
    first = differing[0]
    values = [found.get(first) for found in ranks]
    common, number = Counter(values).most_common(1)[0]
    if 2 * number <= len(values):
        common = values[0]
        than = "rank 0 (no majority says which is right)"
    else:
        than = f"the {number} others"
    odd = [rank for rank, value in enumerate(values) if value != common]
    more = f", and {len(differing) - 1} more of {len(ranks[0])}" if len(differing) > 1 else ""
    return (
        f"step {step}: the ranks no longer hold the same model: {first}{more}, on rank "
        f"{', '.join(map(str, odd))} other than on {than}. A device turned bits over, or this is a "
        "defect; checkpoints are compared before they are written, so resume from the last one "
        "(--resume auto), and if it happens again, on other hardware"
    )


def _unequal_names(ranks: list[dict[str, int]]) -> str:
    everywhere = set.intersection(*(set(found) for found in ranks))
    return ", ".join(sorted(set.union(*(set(found) for found in ranks)) - everywhere)[:3])
