"""What a rank holds of every trained parameter inside a DeepSpeed engine, to be written in place.

The float32 master and what the optimizer keeps for it (``exp_avg``, ...) are one range of the
flattened parameter per rank: all of it at ZeRO-0, a piece of the flat group at ZeRO-1 and 2, one
N-th of the parameter at ZeRO-3, each on the device or, offloaded, on the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn


class HeldRange(NamedTuple):
    """The range of one flattened parameter that this rank holds.

    Attributes:
        name: Of the parameter in the module.
        start: Place of its first value in the flattened parameter.
        length: Number of values.
        owner: The optimizer's own parameter that has the range, in float32.
        offset: Place of the range in the flattened ``owner``.
    """

    name: str
    start: int
    length: int
    owner: Tensor
    offset: int


class HeldState:
    """The masters and the optimizer's state of an engine, by the names of the parameters.

    Args:
        engine: Fresh or trained; parameters on NVMe are not supported.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine, self._wrapper = engine, engine.optimizer
        self._stage = int(engine.zero_optimization_stage())
        # DeepSpeed wraps the optimizer, but not at ZeRO-0 in float32.
        self._optimizer: torch.optim.Optimizer = getattr(self._wrapper, "optimizer", self._wrapper)
        module: nn.Module = engine.module
        self._names = {id(p): name for name, p in module.named_parameters()}

    @property
    def kinds(self) -> list[str]:
        """What the optimizer keeps of the shape of a parameter, from its first step on."""
        defaults = self._optimizer.defaults
        if isinstance(self._optimizer, torch.optim.SGD):
            return ["momentum_buffer"] if defaults["momentum"] else []
        assert "betas" in defaults, f"{type(self._optimizer).__name__} is no Adam"
        return ["exp_avg", "exp_avg_sq"]

    def ranges(self) -> Iterator[HeldRange]:
        """Everything that this rank holds; ranges of no value are left out."""
        if self._stage == 3:
            found = self._ranges_of_equal_parts()
        elif self._stage > 0:
            found = self._ranges_of_flat_groups()
        else:
            found = self._ranges_of_whole_parameters()
        return (held for held in found if held.length)

    @torch.no_grad()
    def write_master(self, held: HeldRange, values: Tensor) -> None:
        """Put ``[length]`` values into the master; :meth:`publish` must follow."""
        _write(held.owner, held.offset, values)

    @torch.no_grad()
    def write_state(self, held: HeldRange, kind: str, values: Tensor) -> None:
        """Put ``[length]`` values of one of :attr:`kinds` into the optimizer's state."""
        state = self._optimizer.state[held.owner]
        if kind not in state:
            state[kind] = torch.zeros_like(held.owner, memory_format=torch.preserve_format)
        _write(state[kind], held.offset, values)

    def finish_state(self, step: int) -> None:
        """Behind the last :meth:`write_state`: let the optimizer go on counting at ``step``."""
        for owner, state in self._optimizer.state.items():
            if isinstance(self._optimizer, torch.optim.SGD):
                continue
            if isinstance(state.get("step"), Tensor):
                state["step"].fill_(step)
            else:
                state["step"] = self._new_step(owner, step)
        if self._stage in (1, 2):
            # Else that would be done within the next step, before all groups have a state.
            self._wrapper._hp_optimizer_states_linked = False
            self._wrapper._lazy_init_hp_params_optimizer_state()

    def forget_state(self) -> None:
        """As before the optimizer's first step."""
        self._optimizer.state.clear()

    @torch.no_grad()
    def publish(self) -> None:
        """Let the parameters be what the masters say. Collective at ZeRO-1 to 3."""
        wrapper = self._wrapper
        if self._stage == 3:
            for group in range(len(wrapper.fp16_groups)):
                wrapper._reassign_or_swap_out_partitioned_parameters(group)
            wrapper.invalidate_secondary_tensor()
        elif self._stage > 0:
            wrapper.update_lp_params()
        elif isinstance(wrapper, FP16_UnfusedOptimizer):
            for masters, parameters in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
                for master, parameter in zip(masters, parameters, strict=True):
                    parameter.data.copy_(master)
        elif isinstance(wrapper, FP16_Optimizer):
            for master, flat in zip(
                wrapper.fp32_groups_flat, wrapper.fp16_groups_flat, strict=True
            ):
                flat.copy_(master)

    def _new_step(self, owner: Tensor, step: int) -> Tensor | int:
        """As the optimizer itself makes it: torch counts in float32, DeepSpeed in integers."""
        if not isinstance(self._optimizer, torch.optim.Adam):
            return step
        defaults = self._optimizer.defaults
        on_device = defaults["fused"] or defaults["capturable"]
        device = owner.device if on_device else torch.device("cpu")
        return torch.tensor(float(step), dtype=torch.float32, device=device)

    def _ranges_of_whole_parameters(self) -> Iterator[HeldRange]:
        wrapper = self._wrapper
        if isinstance(wrapper, FP16_Optimizer):
            for flat, parameters in zip(wrapper.fp32_groups_flat, wrapper.fp16_groups, strict=True):
                starts = accumulate((p.numel() for p in parameters), initial=0)
                for p, offset in zip(parameters, starts, strict=False):
                    yield HeldRange(self._names[id(p)], 0, p.numel(), flat, offset)
            return
        groups = [group["params"] for group in self._optimizer.param_groups]
        # In 16 bit the optimizer has the masters, and the wrapper the parameters.
        named = wrapper.fp16_groups if isinstance(wrapper, FP16_UnfusedOptimizer) else groups
        for owners, parameters in zip(groups, named, strict=True):
            for owner, p in zip(owners, parameters, strict=True):
                yield HeldRange(self._names[id(p)], 0, p.numel(), owner, 0)

    def _ranges_of_flat_groups(self) -> Iterator[HeldRange]:
        wrapper = self._wrapper
        flats = wrapper.single_partition_of_fp32_groups
        for flat, parameters in zip(flats, wrapper.bit16_groups, strict=True):
            for p in parameters:
                if p._hp_mapping is not None:  # a part of it lies in this rank's piece
                    own, place = p._hp_mapping.lp_fragment_address, p._hp_mapping
                    offset = place.hp_fragment_address.start
                    yield HeldRange(self._names[id(p)], own.start, own.numel, flat, offset)

    def _ranges_of_equal_parts(self) -> Iterator[HeldRange]:
        wrapper = self._wrapper
        flats = wrapper.fp32_partitioned_groups_flat
        for flat, parameters in zip(flats, wrapper.fp16_groups, strict=True):
            lengths = (p.partition_numel() for p in parameters)
            for p, offset in zip(parameters, accumulate(lengths, initial=0), strict=False):
                start, length = shard_range(p)
                yield HeldRange(self._names[id(p)], start, length, flat, offset)


def release_parameters(engine: DeepSpeedEngine) -> None:
    """Let ZeRO-3 put away every parameter that it has gathered; elsewhere nothing is to be done.

    Some small ones would stay gathered. DeepSpeed learns at a module's first forward pass what it
    reads of its children (CLIP's number of positions), and only of what is not gathered then;
    later such a read would meet a prefetch and get no data.
    """
    if engine.zero_optimization_partition_weights():
        engine.optimizer.checkpoint_event_prologue()


def whole_shape(parameter: Any) -> torch.Size:
    """Of a parameter, also while ZeRO-3 keeps an empty placeholder as its data."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def shard_range(parameter: Any) -> tuple[int, int]:
    """Start and length of what this rank holds of a flattened parameter, without padding."""
    if not hasattr(parameter, "ds_tensor"):
        return 0, math.prod(parameter.shape)
    length = parameter.partition_numel()
    start = length * parameter.ds_zero_partition_rank
    return start, max(0, min(length, parameter.ds_numel - start))


@torch.no_grad()
def write_shard(parameter: Any, values: Tensor) -> None:
    """Put ``[length]`` values of :func:`shard_range` into a parameter that nothing trains."""
    _write(getattr(parameter, "ds_tensor", parameter).data, 0, values)
    if hasattr(parameter, "ds_secondary_tensor"):
        parameter.ds_secondary_tensor = None  # of hpZ: its machine's copy of the old values


def _write(target: Tensor, offset: int, values: Tensor) -> None:
    if target.is_contiguous():
        target.detach().view(-1).narrow(0, offset, len(values)).copy_(values)
    else:  # a matrix in another order of memory, which no stage cuts
        target.detach().copy_(values.view(target.shape))
