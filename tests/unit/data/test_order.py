"""The global batches of one or more data sets."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest

from vembed_ds.data.order import Order
from vembed_ds.errors import DataError


def epoch_of(order: Order, epoch: int) -> np.ndarray:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    found = [order.batch(step) for step in steps]
    assert {number for number, _ in found} == {epoch}
    return np.stack([indices for _, indices in found])


def test_one_data_set_keeps_the_order_it_had() -> None:
    # Written down once: a change would reorder every run that is resumed.
    batches = epoch_of(Order([10], global_batch_size=4, seed=42), 1)
    assert batches.tolist() == [[1, 2, 8, 5], [3, 9, 6, 0]]


def test_mixed_batches_hold_every_record_once() -> None:
    order = Order([10, 6], global_batch_size=4, seed=0)
    assert order.steps_per_epoch == 4
    assert sorted(epoch_of(order, 0).ravel().tolist()) == list(range(16))
    assert any(0 < (batch < 10).sum() < 4 for batch in epoch_of(order, 0))
    assert epoch_of(order, 0).tolist() != epoch_of(order, 1).tolist()


def test_homogeneous_batches_come_from_one_data_set() -> None:
    order = Order([10, 7], global_batch_size=3, seed=0, homogeneous=True)
    assert order.steps_per_epoch == 3 + 2
    for epoch in range(4):
        batches = epoch_of(order, epoch)
        members = [{int(record >= 10) for record in batch} for batch in batches]
        assert sorted(map(tuple, members)) == [(0,)] * 3 + [(1,)] * 2
        assert len(set(batches.ravel().tolist())) == 15
    turns = {tuple(int(batch[0] >= 10) for batch in epoch_of(order, e)) for e in range(8)}
    assert len(turns) > 1  # the data sets do not take turns in one fixed order


@pytest.mark.parametrize("homogeneous", [False, True])
def test_weights_are_passes_per_epoch(homogeneous: bool) -> None:
    order = Order(
        [10, 8, 12],
        weights=[2.0, 0.5, 1.25],
        global_batch_size=1,
        seed=3,
        homogeneous=homogeneous,
    )
    assert order.steps_per_epoch == 20 + 4 + 15
    seen: Counter[int] = Counter()
    for epoch in range(4):
        batches = epoch_of(order, epoch).ravel().tolist()
        counts = Counter(batches)
        assert sorted(counts[record] for record in range(10)) == [2] * 10
        seen += counts
    # Four epochs are 8, 2 and 5 whole passes: every record equally often.
    assert {seen[record] for record in range(10)} == {8}
    assert {seen[record] for record in range(10, 18)} == {2}
    assert {seen[record] for record in range(18, 30)} == {5}


@pytest.mark.parametrize("homogeneous", [False, True])
def test_a_step_is_a_pure_function(homogeneous: bool) -> None:
    def make() -> Order:
        return Order(
            [11, 13], weights=[1.5, 0.7], global_batch_size=3, seed=5, homogeneous=homogeneous
        )

    order = make()
    steps = [order.batch(step)[1].tolist() for step in range(30)]
    assert [make().batch(step)[1].tolist() for step in reversed(range(30))] == steps[::-1]
    assert pickle.loads(pickle.dumps(order)).batch(17)[1].tolist() == steps[17]


def test_a_data_set_that_fills_no_batch_is_named() -> None:
    with pytest.raises(DataError, match=r"b\.jsonl: 3 records do not fill one global batch of 4"):
        Order([8, 3], global_batch_size=4, seed=0, homogeneous=True, names=["a.jsonl", "b.jsonl"])
    assert Order([8, 3], global_batch_size=4, seed=0).steps_per_epoch == 2


KEYS = [(record % 5, 100 + record % 7) for record in range(30)]


def test_no_batch_holds_a_content_twice() -> None:
    order = Order([30], global_batch_size=4, seed=0, keys=KEYS)
    assert order.steps_per_epoch == 7
    plain = Order([30], global_batch_size=4, seed=0)
    for epoch in range(5):
        for batch in epoch_of(order, epoch):
            assert len({key for record in batch for key in KEYS[record]}) == 8
    assert any(
        len({key for record in batch for key in KEYS[record]}) < 8 for batch in epoch_of(plain, 0)
    )


def test_records_that_clash_come_later_in_the_epoch() -> None:
    keys = [(record // 2,) for record in range(16)]  # pairs of equal records
    batches = epoch_of(Order([16], global_batch_size=4, seed=1, keys=keys), 0)
    assert sorted(batches.ravel().tolist()) == list(range(16))


def test_too_few_different_records_are_an_error() -> None:
    order = Order([12], global_batch_size=6, seed=0, keys=[(record % 5,) for record in range(12)])
    with pytest.raises(DataError, match=r"no_duplicates: at most 5 records share no query"):
        order.batch(0)
