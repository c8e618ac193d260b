"""Finding the records that cannot be used, before training, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tqdm import tqdm

from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.sampler import own_share
from vembed_ds.distributed import comm
from vembed_ds.errors import DataError, VembedError


class BadRecord(NamedTuple):
    """A record that cannot be used.

    Attributes:
        row: Its place in the data set.
        message: What is wrong with it.
    """

    row: int
    message: str


def find_bad_records(dataset: PairDataset, *, num_threads: int) -> list[BadRecord]:
    """Encode every record once and keep what fails. Collective: the ranks share the records.

    Which records remain is therefore known before the first step, and the order of the samples
    stays a function of data and seed.

    Args:
        dataset: The records.
        num_threads: Records read at a time; decoding of images does not hold Python's lock.

    Returns:
        In order, the same on every rank.
    """
    mine = own_share(len(dataset), rank=comm.rank(), world_size=comm.world_size())
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        samples = tqdm(
            pool.map(dataset.__getitem__, mine),
            total=len(mine),
            desc="looking for bad records",
            disable=None if comm.is_main() else True,
        )
        found = [
            BadRecord(row, str(sample))
            for row, sample in zip(mine, samples, strict=True)
            if isinstance(sample, VembedError)
        ]
    return [bad for share in comm.all_gather_objects(found) for bad in share]


def check_number(bad: Sequence[BadRecord], *, limit: int, origin: str, total: int) -> None:
    """Refuse data of which too much is unusable.

    Args:
        bad: From :func:`find_bad_records`.
        limit: Most that may be skipped.
        origin: Name of the data.
        total: Number of records.

    Raises:
        DataError: More than ``limit``, or all of them.
    """
    if len(bad) > limit or len(bad) == total:
        raise DataError(
            f"{origin}: {len(bad)} of {total} records cannot be used, and max_bad_records={limit}; "
            f"the first: {bad[0].message}. Mend the data, or raise max_bad_records"
        )
