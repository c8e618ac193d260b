"""Each rank's share of the global batches, and of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.utils.data import Sampler

from vembed_ds.data.order import IndexArray, Order
from vembed_ds.errors import ConfigError, VembedError

T = TypeVar("T")

ROW_BITS = 40  # rows of one shard are fewer than 2**40


@dataclass(frozen=True, slots=True)
class SampleKey:
    """What the sampler hands to the dataset: a row, and the epoch that seeds augmentation."""

    index: int
    epoch: int


@dataclass(frozen=True, slots=True)
class StreamedRow:
    """What a stream hands to the dataset: the row itself.

    Args:
        shard: Number of its shard.
        number: Number in the shard, from 0.
        epoch: Epoch, which seeds augmentation.
        values: Column name to value; or why the stream ends here.
    """

    shard: int
    number: int
    epoch: int
    values: dict[str, Any] | VembedError

    @property
    def index(self) -> int:
        """A number that no other row has; in the first shard the row's own."""
        return (self.shard << ROW_BITS) + self.number


def rank_slice(indices: Sequence[T] | IndexArray, *, rank: int, world_size: int) -> Any:
    """One rank's contiguous part of a global batch, of the same type as ``indices``.

    Raises:
        ConfigError: When the ranks do not divide the global batch.
    """
    if len(indices) % world_size:
        raise ConfigError(
            f"global batch of {len(indices)} pairs: {world_size} ranks do not divide it; "
            "choose a multiple of the number of ranks"
        )
    share = len(indices) // world_size
    return indices[rank * share : (rank + 1) * share]


class GlobalBatchSampler(Sampler[list[SampleKey]]):
    """Yields this rank's share of each global batch.

    Args:
        order: Knows the global batches, whose size is a multiple of ``world_size``.
        rank: This rank.
        world_size: Number of ranks.
        num_steps: Steps of the whole run; the last step yielded is ``num_steps - 1``.
        start_step: First step yielded; a resumed run passes the steps already made.

    Raises:
        ConfigError: When the ranks do not divide the global batch.
    """

    def __init__(
        self, order: Order, *, rank: int, world_size: int, num_steps: int, start_step: int = 0
    ) -> None:
        rank_slice(range(order.global_batch_size), rank=rank, world_size=world_size)
        self.order = order
        self.rank = rank
        self.world_size = world_size
        self.steps = range(start_step, num_steps)

    def __len__(self) -> int:
        """Number of batches that are still to come from ``start_step`` on."""
        return len(self.steps)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Yields one list of keys per step."""
        for step in self.steps:
            epoch, indices = self.order.batch(step)
            share = rank_slice(indices, rank=self.rank, world_size=self.world_size)
            yield [SampleKey(int(index), epoch) for index in share]


def own_share(num_records: int, *, rank: int, world_size: int) -> range:
    """One rank's records where the ranks share work that each does alone; shares differ by one."""
    return range(num_records * rank // world_size, num_records * (rank + 1) // world_size)


def shard_indices(num_records: int, *, rank: int, world_size: int) -> list[int]:
    """One rank's contiguous shard for evaluation, equally long on every rank.

    The last shards wrap around to the first records: of all shards, one behind the other, the first
    ``num_records`` are the records in order.

    Args:
        num_records: Number of records, > 0.
        rank: This rank.
        world_size: Number of ranks.

    Returns:
        ``ceil(num_records / world_size)`` record numbers.
    """
    share = -(-num_records // world_size)
    return [index % num_records for index in range(rank * share, (rank + 1) * share)]
