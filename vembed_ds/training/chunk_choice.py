"""``gradient_cache_chunk_size: auto``: the largest chunks that fit into the memory of every rank."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vembed_ds.config.schema import Config
from vembed_ds.data.dataset import Sample
from vembed_ds.distributed import comm
from vembed_ds.distributed.host_memory import free_host_bytes
from vembed_ds.distributed.seeding import capture_rng, restore_rng
from vembed_ds.engine.memory import rank_bytes
from vembed_ds.errors import VembedError
from vembed_ds.planning.recommend import chunk_sizes
from vembed_ds.planning.states import states_of
from vembed_ds.steps.meters import DEVICE_MARGIN, HOST_SHARE
from vembed_ds.steps.shortage import MemoryShortage, emptied, may_run_out
from vembed_ds.training.loop import TrainingLoop
from vembed_ds.training.placement import placement
from vembed_ds.training.plan import RunPlan
from vembed_ds.training.step_costs import StepCosts
from vembed_ds.training.step_items import SAMPLED, StepItems, items_of
from vembed_ds.training.stream_setup import some_samples

logger = logging.getLogger(__name__)


class Need(NamedTuple):
    """What a step with chunks of some size takes beyond what is allocated before the first one.

    Attributes:
        size: Items of each stream per chunk.
        chunk: Bytes of the passes over one chunk, with the parameters that they gather.
        rest: Bytes of all else.
    """

    size: int
    chunk: int
    rest: int


def choose_chunks(loop: TrainingLoop, plan: RunPlan) -> None:
    """Let the loop cut its batches into the largest chunks that fit. Collective.

    Rank 0 counts what chunks take; every rank says what it has free; the least counts. On an
    accelerator one chunk of the longest samples is then measured; what it takes more than was counted
    makes the chunks smaller, and so does memory that runs out there.

    Args:
        loop: Before its first step.
        plan: Of the run.

    Raises:
        VembedError: On every rank, when a sample cannot be used.
    """
    device = loop.engine.device
    before = capture_rng(device)  # the first step draws what it draws where a number is configured
    found = some_samples(plan.data, number=SAMPLED)
    comm.raise_together(next((s for s in found if isinstance(s, VembedError)), None))
    samples = [sample for sample in found if isinstance(sample, Sample)]
    mixed = plan.config.data.batching == "mixed"
    items = items_of(samples, loop.processor, mixed=mixed)
    accelerator = device.type != "cpu"

    def count() -> list[Need]:
        costs = StepCosts(plan.config, plan.spec, plan.losses, items, fused=accelerator)
        return needs_of(costs, plan.config, plan.ds_config, accelerator=accelerator)

    size = choose_size(
        comm.run_on_main(count, doing="counting what chunks take"),
        room=free_bytes(device, local_ranks=comm.local_world_size()),
        measure=_Measured(loop, items, plan.config.training.batch_size) if accelerator else None,
    )
    loop.budget = replace(loop.budget, items=size)
    restore_rng(before, device)


def needs_of(
    costs: StepCosts, config: Config, ds_config: Mapping[str, Any], *, accelerator: bool
) -> list[Need]:
    """What every chunk size takes, the largest first."""
    setting = placement(
        config,
        costs.size,
        ds_config,
        ranks=comm.world_size(),
        memory=rank_bytes(),
        accelerator=accelerator,
    )
    states = states_of(costs.size, setting)
    gathered = states.gathered_again if setting.gather == "per_module" else 0
    checkpointing = config.model.gradient_checkpointing
    found = []
    for size in chunk_sizes(costs.largest):
        passes = costs.chunk(size, checkpointing=checkpointing)
        chunk = gathered + (passes.peak if setting.reduction == "per_chunk" else passes.first_peak)
        peak = costs.peak(setting, chunk_size=size, checkpointing=checkpointing)
        found.append(Need(size, chunk, peak.total - states.allocated - chunk))
    return found


def choose_size(
    needs: Sequence[Need], *, room: int, measure: Callable[[int], int | None] | None = None
) -> int:
    """The largest size that fits on every rank. Collective.

    Args:
        needs: The same on every rank, the largest size first.
        room: Bytes that this rank has free.
        measure: Of a size, the bytes of the passes over one chunk; ``None`` on every rank where
            memory ran out on any; collective. ``None``: not measured.
    """
    most, size, worse = needs[0].size, _agreed(needs, room, worse=1.0), 1.0
    if measure is not None:
        taken = measure(size)
        while taken is None and (smaller := [need for need in needs if need.size < size]):
            needs, size = smaller, smaller[0].size
            taken = measure(size)
        worse = max(1.0, (taken or 0) / max(1, _of(size, needs).chunk))
        size = _agreed(needs, room, worse=worse)
    if comm.is_main():
        _tell(_of(size, needs), most, room=room, worse=worse)
    return size


def _of(size: int, needs: Sequence[Need]) -> Need:
    return next(need for need in needs if need.size == size)


def _tell(need: Need, most: int, *, room: int, worse: float) -> None:
    takes = need.rest + worse * need.chunk
    logger.log(
        logging.INFO if takes <= room else logging.WARNING,
        "gradient_cache_chunk_size: %d of %d items (a step takes %s more, of %s that are free%s)",
        *(need.size, most, _megabytes(takes), _megabytes(room)),
        f"; a chunk takes {worse:.2f} times what was counted" if worse > 1 else "",
    )


def free_bytes(device: torch.device, *, local_ranks: int) -> int:
    """Bytes that this rank may take besides what it has. Local.

    Args:
        device: Of the engine.
        local_ranks: Ranks that share the host.
    """
    if device.type == "cpu":
        return int(HOST_SHARE * (free_host_bytes() or 0) / local_ranks)
    memory: Any = torch.get_device_module(device)
    free, total = memory.mem_get_info(device)
    unused = memory.memory_reserved(device) - memory.memory_allocated(device)
    return int(free + unused - DEVICE_MARGIN * total)


def _agreed(needs: Sequence[Need], room: int, *, worse: float) -> int:
    """Of the sizes that fit on this rank if a chunk takes ``worse`` times as much, what all take."""
    fitting = (need.size for need in needs if need.rest + math.ceil(worse * need.chunk) <= room)
    (least,) = comm.all_max([-next(fitting, 1)])
    return -least


class _Measured:
    """Runs a chunk of the longest samples forward and backward, on an accelerator.

    Args:
        loop: Before its first step.
        items: Of this rank.
        batch_size: Pairs of this rank.
    """

    def __init__(self, loop: TrainingLoop, items: StepItems, batch_size: int) -> None:
        self._loop, self._items = loop, items
        self._most = items.count(batch_size)

    def __call__(self, size: int) -> int | None:
        """Bytes at most beyond what was allocated before; collective.

        Returns:
            ``None`` on every rank where memory ran out on any; unless passes need the other ranks,
            where it raises.
        """
        engine = self._loop.engine
        memory: Any = torch.get_device_module(engine.device)
        streams = self._streams()
        taken: int | None = None
        try:
            with (
                engine.parameters_held(),
                engine.reduce_once(),
                may_run_out(self._agree if engine.chunks_are_local else None),
            ):
                memory.reset_peak_memory_stats(engine.device)
                before = memory.memory_allocated(engine.device)
                self._pass({stream: self._inputs(stream, size) for stream in streams})
                taken = int(memory.max_memory_allocated(engine.device) - before)
        except MemoryShortage as error:
            emptied(error)
        engine.discard_gradients()
        if taken is None:
            memory.empty_cache()
        return taken

    def _pass(self, inputs: dict[str, dict[str, Tensor]]) -> None:
        """Forward and backward."""
        outputs = self._loop.engine.embed(inputs)
        terms = [out.float().sum() for out in outputs.values() if out.requires_grad]
        self._loop.engine.backward(torch.stack(terms).sum())

    def _agree(self, cause: BaseException | None) -> None:
        if comm.all_max([int(cause is not None)])[0]:
            raise MemoryShortage(cause, kept=False, largest=1)

    def _streams(self) -> list[str]:
        """Those that any rank has; collective."""
        streams = self._loop.model.streams
        met = comm.all_max([int(stream in self._items.longest) for stream in streams])
        return [stream for stream, known in zip(streams, met, strict=True) if known]

    def _inputs(self, stream: str, size: int) -> dict[str, Tensor]:
        """So many of the longest item, but no more than a step has of that stream."""
        item = self._items.longest.get(stream) or self._loop.processor.filler(stream)
        number = max(1, min(size, self._most.get(stream, 1)))
        padded = self._loop.pad(stream, [item] * number)
        return {k: v.to(self._loop.engine.device, non_blocking=True) for k, v in padded.items()}


def _megabytes(number: float) -> str:
    return f"{number / 2**20:,.0f} MB"
