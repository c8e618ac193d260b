"""Does a model draw random numbers for its items? Then two equal ones are not embedded alike."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from vembed_ds.data.batches import FillerFunction
from vembed_ds.distributed import comm
from vembed_ds.distributed.seeding import capture_rng, restore_rng
from vembed_ds.steps.gradient_cache import Embedder, PadFunction


def drawing_streams(
    engine: Embedder, streams: Sequence[str], *, item: FillerFunction, pad: PadFunction
) -> Collection[str]:
    """The streams for whose items a forward pass draws random numbers, on any rank.

    Found out by a forward pass for each, in the mode that the model is in, and not by what it is
    made of: dropout at a rate of zero draws nothing, and there are many ways to draw. Generators of
    torch (host and accelerator), Python and NumPy are watched; they are afterwards as they were.
    Collective.

    Args:
        engine: Embeds.
        streams: The same on every rank, in one order.
        item: Gives an item of a stream.
        pad: As of :func:`compute_gradient`.
    """
    before = capture_rng(engine.device)
    drawn = []
    for stream in streams:
        inputs = {k: v.to(engine.device) for k, v in pad(stream, [item(stream)]).items()}
        state = capture_rng(engine.device)
        with torch.no_grad():
            engine.embed({stream: inputs})
        drawn.append(not state.equals(capture_rng(engine.device)))
    restore_rng(before, engine.device)
    found = comm.all_max([int(value) for value in drawn])
    return {stream for stream, value in zip(streams, found, strict=True) if value}
