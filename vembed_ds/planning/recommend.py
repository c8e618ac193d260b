"""Which of the ways to train that fit costs least, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from vembed_ds.planning.states import Setting

SMALL_CHUNK = 8
"""Items below which a chunk does not fill an accelerator: rather compute activations again."""
GIB = 2**30


@dataclass(frozen=True)
class Way:
    """One way to run the same step.

    Attributes:
        setting: Where the model's state lies.
        chunk_size: Items of each stream in a chunk.
        checkpointing: Whether activations are computed again.
    """

    setting: Setting
    chunk_size: int
    checkpointing: bool


@dataclass(frozen=True)
class Outcome:
    """What a way takes.

    Attributes:
        memory: Bytes on a rank's device, at most.
        sent: Bytes that a rank sends in a step.
    """

    memory: int
    sent: int


@dataclass(frozen=True)
class Advice:
    """The way to take, or why there is none.

    Attributes:
        way: ``None``: nothing fits.
        reason: One sentence.
    """

    way: Way | None
    reason: str


def settings_of(base: Setting, *, partitions: bool = True) -> list[Setting]:
    """Every placement of the model's state that can be chosen, in the order of their traffic.

    Args:
        base: What they have in common.
        partitions: Whether stage 3 can cut this model's parameters.
    """
    plain = replace(
        base, gather="once", reduction="once", offload_optimizer=False, offload_parameters=False
    )
    cut = replace(plain, zero_stage=3)
    lean = replace(cut, gather="per_module", reduction="per_chunk")
    found = [
        *(replace(plain, zero_stage=stage) for stage in (0, 2, 3)),
        replace(cut, gather="per_module"),
        replace(plain, zero_stage=2, reduction="per_chunk"),
        lean,
        replace(plain, zero_stage=2, offload_optimizer=True),
        replace(cut, offload_optimizer=True, offload_parameters=True),
        replace(lean, offload_optimizer=True, offload_parameters=True),
    ]
    return [
        setting
        for setting in found
        if (partitions or setting.zero_stage < 3)
        and not (base.precision == "fp16" and setting.zero_stage == 0)
    ]


def recommend(
    settings: Sequence[Setting],
    *,
    largest: int,
    memory: int,
    take: Callable[[Way], Outcome],
    checkpointing: bool,
) -> Advice:
    """The cheapest way within a device's memory.

    In this order: chunks of at least :data:`SMALL_CHUNK` items; nothing on the host; no activation
    computed twice; the least bytes sent; the largest chunk. The update is the same in all of them.

    Args:
        settings: From :func:`settings_of`.
        largest: Items of the largest stream.
        memory: Bytes of a device that may be used.
        take: What a way takes.
        checkpointing: Whether the model's layers can be computed again.
    """
    ways = [
        way
        for setting in settings
        for recompute in ([False, True] if checkpointing else [False])
        if (way := largest_chunk(setting, recompute, largest=largest, memory=memory, take=take))
    ]
    if not ways:
        least = min(
            take(Way(setting, 1, checkpointing)).memory for setting in settings
        )  # the smallest chunk, activations computed again
        return Advice(
            None,
            f"nothing fits: the leanest way takes {least / GIB:.1f} GiB of {memory / GIB:.1f}; use more "
            "GPUs, a smaller batch_size (fewer negatives), use_lora, or a smaller model",
        )
    small = min(SMALL_CHUNK, largest)

    def cost(way: Way) -> tuple[int, ...]:
        setting = way.setting
        return (
            way.chunk_size < small,
            setting.offload_optimizer + setting.offload_parameters,
            way.checkpointing,
            take(way).sent,
            -way.chunk_size,
        )

    best = min(ways, key=cost)
    cheapest = Way(settings[0], small, False)
    fits = take(cheapest).memory <= memory
    return Advice(best, "; ".join(_reasons(best, cheapest, fits, largest, take)))


def largest_chunk(
    setting: Setting,
    checkpointing: bool,
    *,
    largest: int,
    memory: int,
    take: Callable[[Way], Outcome],
) -> Way | None:
    """The way with the largest chunk that fits: all items, or a power of two; ``None``: none does.

    Args:
        setting: Of the way.
        checkpointing: Of the way.
        largest: All items.
        memory: Bytes of a device that may be used.
        take: What a way takes.
    """
    for size in chunk_sizes(largest):
        way = Way(setting, size, checkpointing)
        if take(way).memory <= memory:
            return way
    return None


def chunk_sizes(largest: int) -> Iterator[int]:
    """All items, and the powers of two below, downwards."""
    yield largest
    power = 1 << max(0, largest - 1).bit_length()
    while power > 1:
        power //= 2
        if power < largest:
            yield power


def _reasons(
    best: Way, cheapest: Way, fits: bool, largest: int, take: Callable[[Way], Outcome]
) -> Iterator[str]:
    """Why this one, and not ``cheapest``, the first setting with the smallest chunks worth having."""
    small, name = cheapest.chunk_size, cheapest.setting.name
    if best.setting == cheapest.setting:
        yield f"{name} sends least and fits"
    elif fits:
        yield f"{best.setting.name} sends no more than {name}, and larger chunks fit"
    else:
        needs = take(cheapest).memory
        yield f"{name} would send less, but takes {needs / GIB:.1f} GiB with chunks of {small}"
    if best.checkpointing:
        needs = take(replace(cheapest, setting=best.setting)).memory
        yield f"without checkpointing a chunk of {small} takes {needs / GIB:.1f} GiB"
    if best.chunk_size == largest:
        yield "the whole batch fits at once"
    else:
        yield f"{best.chunk_size} is the largest power of two that fits"
