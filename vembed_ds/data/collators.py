"""Samples to a batch, without padding: chunks are cut, and padded, in the training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

from vembed_ds.data.dataset import NEGATIVE, Sample
from vembed_ds.data.processors import EncodedItem
from vembed_ds.errors import VembedError
from vembed_ds.similarity import Embeddings

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch of B records.

    Args:
        indices: Row numbers, in sampler order.
        roles: Role to encoded items: B queries and positives, in the order of ``indices``; the
            negatives of all records, one record behind the other.
        keys: Content of the same items as 64-bit numbers.
        negative_counts: How many negatives each record has; ``None`` when the data has none.
        labels: Class of each record; ``None`` when the data has no classes.
        scores: Graded similarity of each record; ``None`` when the data has none.
        teacher_scores: A teacher's score of each record's query and positive; ``None`` when the
            data has none, or they are not wanted.
        negative_scores: The same of each negative, in the order of ``roles``.
        member: Number of the data set, where every batch comes from one.
        teacher_roles: Teacher to role to the same items as in ``roles``, encoded for the teacher.
        vectors: Of frozen models, by their name and role: float32 on the host, a row per item.
        error: What went wrong in a worker; the batch is empty then, and the trainer must
            agree on the error over all ranks before it raises it.
    """

    indices: list[int]
    roles: dict[str, list[EncodedItem]] = field(default_factory=dict)
    keys: dict[str, list[int]] = field(default_factory=dict)
    negative_counts: list[int] | None = None
    labels: list[int] | None = None
    scores: list[float] | None = None
    teacher_scores: list[float] | None = None
    negative_scores: list[float] | None = None
    member: int = 0
    teacher_roles: dict[str, dict[str, list[EncodedItem]]] = field(default_factory=dict)
    vectors: dict[str, dict[str, Embeddings]] = field(default_factory=dict)
    error: VembedError | None = None


def join(parts: Sequence[Batch]) -> Batch:
    """Parts of one batch, in order; the first error, if any, replaces the whole batch."""
    for part in parts:
        if part.error is not None:
            return part
    if len(parts) == 1:
        return parts[0]
    return Batch(
        indices=_chained([part.indices for part in parts]),
        roles=_by_role([part.roles for part in parts]),
        keys=_by_role([part.keys for part in parts]),
        negative_counts=_all_or_none([part.negative_counts for part in parts]),
        labels=_all_or_none([part.labels for part in parts]),
        scores=_all_or_none([part.scores for part in parts]),
        teacher_scores=_all_or_none([part.teacher_scores for part in parts]),
        negative_scores=_all_or_none([part.negative_scores for part in parts]),
        member=parts[0].member,
        teacher_roles={
            name: _by_role([part.teacher_roles[name] for part in parts])
            for name in parts[0].teacher_roles
        },
    )


def collate(samples: Sequence[Sample | VembedError]) -> Batch:
    """Groups samples by role; the first error, if any, replaces the whole batch."""
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, VembedError):
            return Batch(indices=[], error=sample)
        good.append(sample)
    return join([_batch_of(sample) for sample in good]) if good else Batch(indices=[])


def _batch_of(sample: Sample) -> Batch:
    negatives = sample.roles.get(NEGATIVE)
    return Batch(
        indices=[sample.index],
        roles=sample.roles,
        keys=sample.keys,
        negative_counts=None if negatives is None else [len(negatives)],
        labels=None if sample.label is None else [sample.label],
        scores=None if sample.score is None else [sample.score],
        teacher_scores=None if sample.teacher_score is None else [sample.teacher_score],
        negative_scores=sample.negative_scores,
        member=sample.member,
        teacher_roles=sample.teacher_roles,
    )


def _by_role(parts: Sequence[Mapping[str, Sequence[T]]]) -> dict[str, list[T]]:
    return {role: _chained([part[role] for part in parts]) for role in parts[0]}


def _chained(lists: Sequence[Sequence[T]]) -> list[T]:
    return list(chain.from_iterable(lists))


def _all_or_none(lists: Sequence[list[T] | None]) -> list[T] | None:
    """Together; the reader gives a value to every record or to none."""
    found = [values for values in lists if values is not None]
    return _chained(found) if found else None
