"""Equal items of a batch are embedded once, wherever that changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from vembed_ds.data.processors import EncodedItem
from vembed_ds.distributed import comm
from vembed_ds.distributed.phases import Kind, phase
from vembed_ds.steps.random_draws import drawing_streams
from vembed_ds.training.loop import TrainingLoop

logger = logging.getLogger(__name__)


def merge_duplicates(loop: TrainingLoop, items: Mapping[str, EncodedItem]) -> None:
    """Let the loop embed equal items once where the model draws no random numbers. Collective.

    Where it does (dropout), each copy of an item has a mask of its own, and two copies as query and
    positive may be all that is trained on (SimCSE). The model is in training mode afterwards, and
    random states are as they were.

    Args:
        loop: Before its first step.
        items: One of every stream that this rank has met, the larger the better; what no rank has
            met is left alone.
    """
    streams = loop.model.streams
    found = comm.all_max([int(stream in items) for stream in streams])
    met = [stream for stream, value in zip(streams, found, strict=True) if value]
    loop.model.train()
    with phase(Kind.EMBEDDING, "looking for random numbers"):
        drawing = drawing_streams(
            loop.engine,
            met,
            item=lambda stream: items.get(stream) or loop.processor.filler(stream),
            pad=loop.pad,
        )
    loop.merged = frozenset(met) - frozenset(drawing)
    for stream in met if comm.is_main() else ():
        words = "each, since the model draws random numbers for it" if stream in drawing else "once"
        logger.info("equal %s items of a batch are encoded %s", stream, words)
