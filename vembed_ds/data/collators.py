"""Samples to a batch, without padding: chunks are cut, and padded, in the training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vembed_ds.data.dataset import Sample
from vembed_ds.data.processors import EncodedItem
from vembed_ds.errors import VembedError


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    Args:
        indices: Row numbers, in sampler order.
        roles: Role to encoded items, in the order of ``indices``.
        error: What went wrong in a worker; the batch is empty then, and the trainer must
            agree on the error over all ranks before it raises it.
    """

    indices: list[int]
    roles: dict[str, list[EncodedItem]] = field(default_factory=dict)
    error: VembedError | None = None


def join(parts: Sequence[Batch]) -> Batch:
    """Parts of one batch, in order; the first error, if any, replaces the whole batch."""
    for part in parts:
        if part.error is not None:
            return part
    if len(parts) == 1:
        return parts[0]
    return Batch(
        indices=[index for part in parts for index in part.indices],
        roles={role: [i for part in parts for i in part.roles[role]] for role in parts[0].roles},
    )


def collate(samples: Sequence[Sample | VembedError]) -> Batch:
    """Groups samples by role; the first error, if any, replaces the whole batch."""
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, VembedError):
            return Batch(indices=[], error=sample)
        good.append(sample)
    roles = good[0].roles if good else {}
    return Batch(
        indices=[sample.index for sample in good],
        roles={role: [sample.roles[role] for sample in good] for role in roles},
    )
