"""What follows from the random numbers that a model draws: which items may share a row."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from vembed_ds.data.processors import EncodedItem
from vembed_ds.distributed import comm
from vembed_ds.distributed.phases import Kind, phase
from vembed_ds.engine.activation import repeat_all_draws
from vembed_ds.errors import ConfigError
from vembed_ds.steps.random_draws import Draws, find_draws
from vembed_ds.training.loop import TrainingLoop

logger = logging.getLogger(__name__)


def examine_draws(loop: TrainingLoop, items: Mapping[str, EncodedItem], *, merge: bool) -> None:
    """Let the loop embed equal items once where the model draws no random numbers. Collective.

    Where it does (dropout), each copy of an item has a mask of its own, and two copies as query and
    positive may be all that is trained on (SimCSE). The model is in training mode afterwards, and
    random states are as they were.

    Args:
        loop: Before its first step.
        items: One of every stream that this rank has met, the larger the better; what no rank has
            met is left alone.
        merge: Whether equal items may be embedded once at all.

    Raises:
        ConfigError: On every rank: the loop computes chunks twice, and the model would not compute
            the same.
    """
    streams = loop.model.streams
    found = comm.all_max([int(stream in items) for stream in streams])
    met = [stream for stream, value in zip(streams, found, strict=True) if value]
    loop.model.train()
    with phase(Kind.EMBEDDING, "looking for random numbers"):
        drawn = find_draws(
            loop.engine,
            met,
            item=lambda stream: items.get(stream) or loop.processor.filler(stream),
            pad=loop.pad,
        )
    hidden = [stream for stream, draws in drawn.items() if draws is Draws.HIDDEN]
    if hidden:
        _refuse_to_compute_twice(loop, hidden[0])
        loop.memory.may_cut = False
    if Draws.OTHERS in drawn.values():
        repeat_all_draws(loop.model)
    if merge:
        loop.merged = frozenset(s for s, draws in drawn.items() if draws is Draws.NOTHING)
    for stream in met if merge and comm.is_main() else ():
        drawing = "each time, because the model draws random numbers for them, as for dropout"
        words = "once" if stream in loop.merged else drawing
        logger.info("equal %s items of a batch are embedded %s", stream, words)


def _refuse_to_compute_twice(loop: TrainingLoop, stream: str) -> None:
    recomputes = any(getattr(m, "gradient_checkpointing", False) for m in loop.model.modules())
    for key, part, wanted in (
        ("use_gradient_cache", "a chunk", loop.budget.items is not None),
        ("gradient_checkpointing", "a layer", recomputes),
    ):
        if wanted:
            raise ConfigError(
                f"{key}=true: the model embeds one {stream} item in two ways from the same random states "
                "of torch, Python and NumPy (it has a generator of its own, or counts its calls), so "
                f"{part} cannot be computed twice; set {key}=false, or let the model draw from torch's "
                "generator"
            )
