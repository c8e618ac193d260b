"""Several data sets as one: records are numbered through, one data set behind the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
from torch.utils.data import Dataset

from vembed_ds.data.columns import Part
from vembed_ds.data.dataset import PairDataset, Sample
from vembed_ds.data.processors import content_key
from vembed_ds.data.records import Record, content_number
from vembed_ds.data.sampler import SampleKey, own_share
from vembed_ds.distributed import comm
from vembed_ds.distributed.progress import watched
from vembed_ds.errors import DataError, VembedError


class Mixture(Dataset[Sample | VembedError]):
    """The training data: one data set, or several.

    Args:
        members: The data sets, at least one.
        mixed: Whether a batch may hold records of several. They then all give negatives (perhaps
            none), and labels, as soon as one does.

    Raises:
        DataError: Mixed, and only some have scores.
    """

    def __init__(self, members: Sequence[PairDataset], *, mixed: bool = False) -> None:
        self.members = list(members)
        self._starts = [0, *accumulate(len(member) for member in self.members)]
        self._mixed = mixed and len(self.members) > 1
        readers = [member.reader for member in self.members]
        self._give_negatives = any(reader.has_negatives for reader in readers)
        self._give_labels = any(reader.label_column is not None for reader in readers)
        scored = [reader.score_column is not None for reader in readers]
        if self._mixed and any(scored) and not all(scored):
            raise DataError(
                f"{readers[scored.index(False)].origin}: has no scores, but another data set has; "
                "set batching: homogeneous, or map the column `score` away"
            )

    @property
    def parts(self) -> set[Part]:
        """Whether any record may hold a text, an image, or both."""
        return {part for member in self.members for part in member.reader.parts}

    def __len__(self) -> int:
        """Number of records of all data sets."""
        return self._starts[-1]

    def place(self, index: int) -> tuple[int, int]:
        """Data set and row of a record."""
        member = bisect_right(self._starts, index) - 1
        return member, index - self._starts[member]

    def locate(self, index: int) -> tuple[str, int]:
        """Name of the data set, and number of the row in it, of a record."""
        member, row = self.place(index)
        dataset = self.members[member]
        return dataset.reader.origin, dataset.row_number(row)

    def record(self, index: int) -> Record:
        """The record, not decoded.

        Raises:
            DataError: When a value of the row is unusable.
        """
        member, row = self.place(index)
        return self.members[member].record(row)

    def __getitem__(self, key: SampleKey | int) -> Sample | VembedError:
        """Encodes one record, as :class:`PairDataset` does."""
        index = key.index if isinstance(key, SampleKey) else key
        member, row = self.place(index)
        sample = self.members[member][
            SampleKey(row, key.epoch) if isinstance(key, SampleKey) else row
        ]
        return sample if isinstance(sample, VembedError) else self._joined(sample, index, member)

    def _joined(self, sample: Sample, index: int, member: int) -> Sample:
        sample = replace(sample, index=index, member=member)
        if not self._mixed:
            return sample
        if self._give_negatives and "negative" not in sample.roles:
            sample = _with_no_negatives(sample)
        if self._give_labels:
            # Classes of two data sets have nothing to do with each other; a record without is alone.
            own = f"{member}:{sample.label}" if sample.label is not None else f"record {index}"
            sample = replace(sample, label=content_number(own.encode()))
        return sample

    def content_keys(self) -> list[tuple[int, ...]]:
        """For every record, a number for each of its contents. Collective: ranks share the work.

        Raises:
            DataError: On every rank, when a record cannot be used.
        """
        mine = own_share(len(self), rank=comm.rank(), world_size=comm.world_size())
        keys = comm.run_together(
            lambda: [
                _keys(self.record(index)) for index in watched(mine, what="looking for duplicates")
            ],
            doing="reading the records",
        )
        flat = np.fromiter((key for found in keys for key in found), dtype=np.int64)
        counts = np.array([len(found) for found in keys], dtype=np.int64)
        shards = comm.all_gather_objects((flat, counts))
        whole = np.concatenate([shard[0] for shard in shards]).tolist()
        ends = np.cumsum(np.concatenate([shard[1] for shard in shards])).tolist()
        return [tuple(whole[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _with_no_negatives(sample: Sample) -> Sample:
    """A sample of data without negatives, for a batch that may have some."""
    return replace(
        sample,
        roles={**sample.roles, "negative": []},
        keys={**sample.keys, "negative": []},
        negative_scores=None if sample.teacher_score is None else [],
        teacher_roles={
            name: {**roles, "negative": []} for name, roles in sample.teacher_roles.items()
        },
    )


def _keys(record: Record) -> tuple[int, ...]:
    items = (record.query, record.positive, *record.negatives)
    return tuple({content_number(content_key(item).encode()) for item in items})
