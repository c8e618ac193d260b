"""What a rank holds of the model, its gradient and its optimizer at every ZeRO stage.

As DeepSpeed 0.19.8 allocates it; tests/distributed/test_planning.py counts the tensors of real engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vembed_ds.planning.parameters import NF4_BYTES, ModelSize

FLOAT32 = 4
_ALLREDUCE_VALUES = 500_000_000  # that DeepSpeed reduces at once at stage 0


@dataclass(frozen=True)
class Setting:
    """What of a run decides which part of the model's state a rank holds.

    Attributes:
        ranks: Number of them.
        zero_stage: DeepSpeed's.
        gather: When stage 3 gathers parameters: ``once``, ``cache_pass`` or ``per_module``.
        reduction: When gradients are reduced: ``once`` or ``per_chunk``.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        offload_optimizer: Whether the optimizer's state lies on the host.
        offload_parameters: Whether a rank's share of the parameters does; stage 3.
        bucket: Values that are reduced at once.
        buckets: 1, or 2 where reduction and backward pass overlap.
        persistence: Stage 3 keeps parameters whole that have at most so many values.
        live_limit: Most values of parameters that stage 3 holds whole.
        reuse_distance: Stage 3 keeps a parameter whole that is used again within so many values.
        moments: Float32 values that the optimizer keeps of each parameter.
        accelerator: Whether memory is taken as soon as it is allocated, and the optimizer goes over all
            parameters at once; on a CPU neither is so.
    """

    ranks: int
    zero_stage: int
    gather: str = "once"
    reduction: str = "once"
    precision: str = "fp32"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = 500_000_000
    buckets: int = 1
    persistence: int = 100_000
    live_limit: int = 1_000_000_000
    reuse_distance: int = 1_000_000_000
    moments: int = 2
    accelerator: bool = True

    @property
    def width(self) -> int:
        """Bytes of a value of the model."""
        return 4 if self.precision == "fp32" else 2

    @property
    def name(self) -> str:
        """Short, for tables."""
        told = [f"ZeRO-{self.zero_stage}"]
        if self.zero_stage == 3:
            told.append(f"gather {self.gather}")
        if self.reduction != "once":
            told.append(f"reduce {self.reduction}")
        if self.offload_optimizer:
            told.append("all on the host" if self.offload_parameters else "optimizer on the host")
        return ", ".join(told)


@dataclass(frozen=True)
class States:
    """Bytes of a rank on its device.

    Attributes:
        parameters: Between steps.
        gathered: More of them until the loss is known.
        gathered_again: More of them while chunks are differentiated.
        masters: Float32 copies of the parameters, which the optimizer updates.
        moments: Of the optimizer.
        buffers: Of DeepSpeed, between steps.
        gradients: Summed over chunks.
        pending: A chunk's own gradients, where they are kept apart from the sum until the next chunk.
        adding: More of them while they are added.
        reducing: More while they are reduced.
        updating: Beside parameters and optimizer while these change.
        host: On the host, whatever of it.
    """

    parameters: int
    gathered: int
    gathered_again: int
    masters: int
    moments: int
    buffers: int
    gradients: int
    pending: int
    adding: int
    reducing: int
    updating: int
    host: int

    @property
    def optimizer(self) -> int:
        """All of its state."""
        return self.masters + self.moments

    @property
    def allocated(self) -> int:
        """What is there before the first step, which makes the moments."""
        return self.parameters + self.masters + self.buffers


def states_of(size: ModelSize, setting: Setting) -> States:
    """What a rank holds of a model."""
    if setting.zero_stage == 0:
        return _stage_0(size, setting)
    return _stage_3(size, setting) if setting.zero_stage == 3 else _stages_1_and_2(size, setting)


def _stage_0(size: ModelSize, setting: Setting) -> States:
    trained, width = size.trained, setting.width
    copies = 0 if setting.precision == "fp32" else 1  # float32 weights beside 16-bit ones
    flat = width * min(trained, _ALLREDUCE_VALUES) if setting.ranks > 1 else 0
    updated = FLOAT32 * trained if copies else 0  # the gradient once more
    return States(
        parameters=width * trained + _fixed(size, width),
        gathered=0,
        gathered_again=0,
        masters=FLOAT32 * copies * trained,
        moments=FLOAT32 * setting.moments * trained,
        buffers=0,
        gradients=FLOAT32 * trained,
        **_pending(size, setting),
        # Summed in float32, reduced in the model's own precision.
        reducing=(width - FLOAT32) * trained + flat,
        updating=width * trained + updated + _temporaries(size.largest, trained, setting),
        host=0,
    )


def _stages_1_and_2(size: ModelSize, setting: Setting) -> States:
    trained, width, ranks = size.trained, setting.width, setting.ranks
    whole = [_rounded_up(sum(group), 2 * ranks) for group in size.groups]
    share, largest = sum(whole) // ranks, max(whole) // ranks
    moments = FLOAT32 * setting.moments * share
    bucket = setting.buckets * _bucket(size, setting)
    per_chunk = setting.reduction == "per_chunk"
    # ZeRO-2 adds a chunk's share to the sum in float32; in float32 it takes it out of a bucket first.
    sums = FLOAT32 * share * (2 if width == FLOAT32 else 1)
    offload = setting.offload_optimizer
    return States(
        parameters=width * sum(whole) + _fixed(size, width),
        gathered=0,
        gathered_again=0,
        masters=0 if offload else FLOAT32 * share,
        moments=0 if offload else moments,
        buffers=width * size.largest if offload else 0,
        gradients=bucket + sums if per_chunk else FLOAT32 * trained,
        **_pending(size, setting),
        reducing=0
        if per_chunk
        else (width - FLOAT32) * trained + bucket + (0 if offload else width * share),
        # Gradients of all that the share has part of, those of one group in one piece, and in float32.
        updating=0
        if offload
        else width * (_touched(size.groups, ranks) + largest)
        + (0 if width == FLOAT32 else FLOAT32 * largest)
        + _temporaries(largest, largest, setting),
        # Float32 gradients beside weights and moments, and copies in the model's precision.
        host=moments + 2 * FLOAT32 * share + width * (share + size.largest) if offload else 0,
    )


def _stage_3(size: ModelSize, setting: Setting) -> States:
    width, ranks, offload = setting.width, setting.ranks, setting.offload_optimizer
    trained = [number for group in size.groups for number in group]
    share = sum(-(-number // ranks) for number in trained)
    frozen = sum(-(-number // ranks) for number in size.frozen)
    small = size.kept_whole(setting.persistence)
    whole = width * size.used(setting.persistence)
    live = min(whole, width * setting.live_limit)
    # DeepSpeed copies float32 weights too: it takes them for those of another device.
    masters, moments = FLOAT32 * share, FLOAT32 * setting.moments * share
    shares = width * (share + frozen)
    per_chunk = setting.reduction == "per_chunk"
    summed = (FLOAT32 if per_chunk else width) * share
    bucket = _bucket(size, setting)
    return States(
        parameters=(0 if setting.offload_parameters else shares)
        + width * small
        + size.buffer_bytes,
        gathered=live if setting.gather == "per_module" else whole,
        gathered_again=whole if setting.gather == "once" else live,
        masters=0 if offload else masters,
        moments=0 if offload else moments,
        buffers=bucket + (0 if offload else summed),
        gradients=bucket // ranks if per_chunk else FLOAT32 * sum(trained),
        **_pending(size, setting),
        reducing=0 if per_chunk else (width - FLOAT32) * sum(trained) + bucket // ranks,
        updating=0
        if offload
        else (summed if per_chunk or width == FLOAT32 else (width + FLOAT32) * share)
        + _temporaries(share, share, setting),
        host=(masters + moments + summed + FLOAT32 * share if offload else 0)
        + (shares if setting.offload_parameters else 0),
    )


def _touched(groups: Sequence[Sequence[int]], ranks: int) -> int:
    """Values of all parameters that the share of the fullest rank has a part of."""
    found = np.zeros(ranks, dtype=np.int64)
    for group in groups:
        share = _rounded_up(sum(group), 2 * ranks) // ranks
        ends = np.cumsum(group)
        for number, end in zip(group, ends.tolist(), strict=True):
            found[(end - number) // share : (end - 1) // share + 1] += number
    return int(found.max())


def _fixed(size: ModelSize, width: int) -> int:
    """What is the same on every rank, whatever the stage."""
    return width * sum(size.frozen) + round(NF4_BYTES * size.quantized) + size.buffer_bytes


def _pending(size: ModelSize, setting: Setting) -> dict[str, int]:
    """16-bit gradients beside their float32 sum; a CPU widens one before it adds it."""
    if setting.precision == "fp32" or setting.reduction == "per_chunk":
        return {"pending": 0, "adding": 0}
    widened = 0 if setting.accelerator else FLOAT32 * size.largest
    return {"pending": setting.width * size.trained, "adding": widened}


def _bucket(size: ModelSize, setting: Setting) -> int:
    filled = min(setting.bucket, size.trained)
    return setting.width * (setting.bucket if setting.accelerator else filled)


def _temporaries(largest: int, values: int, setting: Setting) -> int:
    """Of AdamW: roots of all second moments at once, or of one tensor's and their quotient."""
    if setting.moments < 2:
        return 0
    return FLOAT32 * values if setting.accelerator else 2 * FLOAT32 * largest


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
