"""Does a model draw random numbers for its items? Then two equal ones are not embedded alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import IntEnum

import torch

from vembed_ds.data.batches import FillerFunction
from vembed_ds.distributed import comm
from vembed_ds.distributed.seeding import RngState, capture_rng, restore_rng
from vembed_ds.steps.gradient_cache import Embedder, PadFunction

# Of an embedding's norm. Two passes in 16 bit, on a device that adds in any order, differ by less.
SAME = 0.03


class Draws(IntEnum):
    """What the embedding of an item depends on beside weights and inputs."""

    NOTHING = 0
    TORCH = 1  # its generators, host and accelerator
    OTHERS = 2  # Python's or NumPy's generators, and maybe torch's
    HIDDEN = 3  # something else: a generator of the model's own, a count of its calls


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
            draws = _drawn(state, capture_rng(engine.device))
            restore_rng(state, engine.device)
            again = engine.embed({stream: inputs})[stream]
        hidden = bool((first - again).norm() > SAME * first.norm())
        own.append(Draws.HIDDEN if hidden else draws)
    restore_rng(before, engine.device)
    found = comm.all_max([int(draws) for draws in own])
    return {stream: Draws(value) for stream, value in zip(streams, found, strict=True)}


def _drawn(before: RngState, after: RngState) -> Draws:
    """From which generators numbers were drawn between two states."""
    if before.equals(after):
        return Draws.NOTHING
    of_torch = replace(before, host=after.host, accelerator=after.accelerator)
    return Draws.TORCH if of_torch.equals(after) else Draws.OTHERS
