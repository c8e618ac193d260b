"""How much a step embeds, and how much of it twice or for nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vembed_ds.data.batches import StepPlan
from vembed_ds.data.chunking import padded, size_of


class StepWork(NamedTuple):
    """Of one rank and step; equal items that share a row count once.

    Attributes:
        tokens: Of the texts, as the tokenizer gave them; a stored feature counts as one.
        padded_tokens: The same with the padding of the chunks, and of fillers.
        patches: Of the images.
        chunks: That were embedded.
        replayed: Of them those that were embedded a second time.
    """

    tokens: int = 0
    padded_tokens: int = 0
    patches: int = 0
    chunks: int = 0
    replayed: int = 0

    def plus(self, other: StepWork) -> StepWork:
        """The sums."""
        return StepWork(*(a + b for a, b in zip(self, other, strict=True)))


def work_of(plan: StepPlan, *, kept: int, trainable: Callable[[str], bool]) -> StepWork:
    """Count a step. Local.

    Args:
        plan: Of the step.
        kept: Of its last chunks, how many kept their graph.
        trainable: Whether a stream's embeddings need a gradient; others are not embedded again.
    """
    sizes = {name: [size_of(item) for item in items] for name, items in plan.streams.items()}
    real = {place for places in plan.roles.values() for place in places}
    found = [sizes[name][position] for name, position in real]
    chunks = plan.chunks
    again = chunks[: len(chunks) - kept]
    return StepWork(
        tokens=sum(size.tokens for size in found),
        padded_tokens=sum(
            padded(sizes[name][places]).tokens for chunk in chunks for name, places in chunk.items()
        ),
        patches=sum(size.patches for size in found),
        chunks=len(chunks),
        replayed=sum(any(trainable(name) for name in chunk) for chunk in again),
    )
