from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch

from vembed_ds.data.order import Order, permutation
from vembed_ds.data.sampler import (
    GlobalBatchSampler,
    SampleKey,
    rank_slice,
    shard_indices,
)
from vembed_ds.errors import ConfigError, DataError


def sampler(
    num_records: int = 50, *, rank: int = 0, world_size: int = 1, **options: int
) -> GlobalBatchSampler:
    order = Order([num_records], global_batch_size=8, seed=3)
    settings = {"num_steps": 20} | options
    return GlobalBatchSampler(order, rank=rank, world_size=world_size, **settings)


def test_permutation_holds_every_record_once_and_is_read_only() -> None:
    order = permutation(1000, [0, 0])
    assert sorted(order.tolist()) == list(range(1000))
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 1


def test_permutation_is_fixed_for_ever() -> None:
    # Written down once: a change would reorder every run that is resumed.
    assert permutation(10, [42, 1]).tolist() == [1, 2, 8, 5, 3, 9, 6, 0, 4, 7]


def test_permutation_depends_on_seed_and_epoch() -> None:
    orders = {
        tuple(permutation(20, [seed, epoch]).tolist()) for seed in (0, 1, 2) for epoch in (0, 1, 2)
    }
    assert len(orders) == 9


def test_first_place_is_uniform() -> None:
    firsts = [int(permutation(10, [0, epoch])[0]) for epoch in range(2000)]
    counts = np.bincount(firsts, minlength=10)
    assert np.abs(counts - 200).max() < 4 * np.sqrt(200)  # four standard deviations


def test_global_batches_of_an_epoch_do_not_overlap_and_drop_the_rest() -> None:
    order = Order([50], global_batch_size=8, seed=3)
    batches = [order.batch(step) for step in range(12)]
    assert [epoch for epoch, _ in batches] == [0] * 6 + [1] * 6
    for epoch in (0, 1):
        seen = np.concatenate([indices for number, indices in batches if number == epoch])
        assert len(set(seen.tolist())) == 48


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_global_batches_do_not_depend_on_the_ranks(world_size: int) -> None:
    shares = [list(sampler(rank=rank, world_size=world_size)) for rank in range(world_size)]
    joined = [list(chain(*parts)) for parts in zip(*shares, strict=True)]
    assert joined == list(sampler())
    assert all(len(share) == 8 // world_size for share in shares[0])


def test_keys_carry_index_and_epoch() -> None:
    keys = [key for batch in sampler(16, num_steps=4) for key in batch]
    assert [key.epoch for key in keys] == [0] * 16 + [1] * 16
    assert isinstance(keys[0], SampleKey)
    assert {key.index for key in keys[:16]} == set(range(16))


def test_resumed_sampler_continues_the_same_sequence() -> None:
    rest = sampler(start_step=7)
    assert list(rest) == list(sampler())[7:]
    assert len(rest) == 13
    assert list(rest) == list(rest)


def test_sampler_leaves_random_states_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(sampler())
    assert torch.equal(torch.rand(1), expected)


def test_too_few_records_for_one_global_batch() -> None:
    message = (
        r"7 records do not fill one global batch of 8 \(batch_size x ranks\); lower batch_size"
    )
    with pytest.raises(DataError, match=message):
        sampler(7)
    assert Order([8], global_batch_size=8, seed=0).steps_per_epoch == 1


def test_ranks_must_divide_the_global_batch() -> None:
    with pytest.raises(ConfigError, match="global batch of 8 pairs: 3 ranks do not divide it"):
        sampler(world_size=3)
    assert rank_slice([1, 2, 3, 4], rank=1, world_size=2) == [3, 4]


@pytest.mark.parametrize(
    ("num_records", "world_size"), [(10, 1), (10, 3), (9, 3), (1, 4), (5, 4), (2, 8)]
)
def test_shards_are_equal_and_lose_nothing(num_records: int, world_size: int) -> None:
    shards = [
        shard_indices(num_records, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert len({len(shard) for shard in shards}) == 1
    gathered = list(chain(*shards))
    assert gathered[:num_records] == list(range(num_records))
