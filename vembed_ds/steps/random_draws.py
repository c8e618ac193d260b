"""Does a model draw random numbers for its items? Then two equal ones are not embedded alike."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch

from vembed_ds.data.batches import FillerFunction
from vembed_ds.distributed import comm
from vembed_ds.distributed.seeding import capture_rng, restore_rng
from vembed_ds.steps.gradient_cache import Embedder, PadFunction

# Of an embedding's norm. Two passes in 16 bit, on a device that adds in any order, differ by less.
SAME = 0.03


class Draws(IntEnum):
    """What the embedding of an item depends on beside weights and inputs."""

    NOTHING = 0
    WATCHED = 1  # torch's (host and accelerator), Python's or NumPy's generators
    HIDDEN = 2  # something else: a generator of the model's own, a count of its calls


def find_draws(
    engine: Embedder, streams: Sequence[str], *, item: FillerFunction, pad: PadFunction
) -> dict[str, Draws]:
    """For every stream, whether a forward pass draws random numbers for its items, on any rank.

    Found out by two forward passes for each, from the same random states and in the mode that the
    model is in, and not by what it is made of: dropout at a rate of zero draws nothing, and there
    are many ways to draw. The states are afterwards as they were. Collective.

    Args:
        engine: Embeds.
        streams: The same on every rank, in one order.
        item: Gives an item of a stream.
        pad: As of :func:`compute_gradient`.
    """
    before = capture_rng(engine.device)
    own = []
    for stream in streams:
        inputs = {k: v.to(engine.device) for k, v in pad(stream, [item(stream)]).items()}
        state = capture_rng(engine.device)
        with torch.no_grad():
            first = engine.embed({stream: inputs})[stream]
            watched = not state.equals(capture_rng(engine.device))
            restore_rng(state, engine.device)
            again = engine.embed({stream: inputs})[stream]
        hidden = bool((first - again).norm() > SAME * first.norm())
        own.append(Draws.HIDDEN if hidden else Draws(watched))
    restore_rng(before, engine.device)
    found = comm.all_max([int(draws) for draws in own])
    return {stream: Draws(value) for stream, value in zip(streams, found, strict=True)}
