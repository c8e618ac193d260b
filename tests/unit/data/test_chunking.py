"""Cutting streams: every item once, no chunk above the budget, as many chunks on every rank."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from vembed_ds.data.chunking import ChunkBudget, Size, cut, halved, order_of, padded, size_of, split
from vembed_ds.data.processors import EncodedItem

BUDGETS = [
    ChunkBudget(items, tokens=tokens, sort=sort)
    for items in (1, 3, 8)
    for tokens in ("auto", None, 20)
    for sort in (True, False)
]


def drawn_sizes() -> Iterator[list[Size]]:
    """Texts, images of one size, and items that are both, of any lengths."""
    generator = random.Random(0)
    for trial in range(300):
        number = generator.randint(0, 40)
        texts = [int(generator.lognormvariate(2, 1)) + 1 for _ in range(number)]
        patches = [generator.randint(1, 9) for _ in range(number)]
        yield [
            Size(0 if trial % 3 == 1 else tokens, 0 if trial % 3 == 0 else count)
            for tokens, count in zip(texts, patches, strict=True)
        ]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_every_item_is_in_one_chunk_within_the_budget(budget: ChunkBudget) -> None:
    assert budget.items is not None
    for drawn in drawn_sizes():
        order = order_of(drawn, budget)
        assert sorted(order) == list(range(len(drawn)))
        sizes = [drawn[place] for place in order]
        chunks = cut(sizes, budget)
        assert [place for c in chunks for place in range(c.start, c.stop)] == list(
            range(len(sizes))
        )
        assert chunks == cut(sizes, budget)
        most = [budget.items * max(axis) for axis in zip(*sizes, strict=True)]
        for chunk in chunks:
            number, size = chunk.stop - chunk.start, padded(sizes[chunk])
            if budget.tokens is None:
                assert number == budget.items or chunk is chunks[-1]
                continue
            tokens = most[0] if budget.tokens == "auto" else budget.tokens
            assert number == 1 or (size.tokens <= tokens and size.patches <= most[1])


def test_sorting_and_a_token_budget_spare_padding_and_chunks() -> None:
    """Log-normal lengths, as those of documents: MEASURED found 2.0 to 2.3 times less padding."""
    generator = random.Random(1)
    sizes = [Size(min(512, int(generator.lognormvariate(4, 1)) + 1), 0) for _ in range(256)]
    plain, sorted_ = ChunkBudget(16, tokens=None, sort=False), ChunkBudget(16)
    cuts = [
        [padded([sizes[p] for p in order[c]]).units for c in cut([sizes[p] for p in order], b)]
        for b, order in ((b, order_of(sizes, b)) for b in (plain, sorted_))
    ]
    real = sum(size.units for size in sizes)
    assert sum(cuts[0]) / real > 2.0
    assert sum(cuts[1]) / real < 1.3
    assert len(cuts[1]) <= len(cuts[0]) / 2
    assert max(cuts[1]) <= 16 * 512


def test_no_rank_makes_more_chunks_than_without_a_token_budget() -> None:
    for drawn in drawn_sizes():
        sizes = sorted(drawn, reverse=True)
        assert len(cut(sizes, ChunkBudget(3))) <= len(cut(sizes, ChunkBudget(3, tokens=None)))


def test_equal_items_keep_their_order() -> None:
    sizes = [Size(2, 0), Size(5, 0), Size(2, 0), Size(5, 0), Size(7, 0)]
    assert order_of(sizes, ChunkBudget(2)) == [4, 1, 3, 0, 2]
    assert order_of(sizes, ChunkBudget(2, sort=False)) == [0, 1, 2, 3, 4]


def test_a_chunk_is_left_before_it_is_mostly_padding() -> None:
    sizes = [Size(n, 0) for n in (80, *[78] * 6, *[9] * 8, *[8] * 8)]
    assert cut(sizes, ChunkBudget(8)) == [slice(0, 7), slice(7, 23)]
    few = [Size(n, 0) for n in (80, 79, 9, 8)]  # one chunk of 8 items holds them all
    assert cut(few, ChunkBudget(8)) == [slice(0, 4)]


def test_without_a_number_of_items_all_is_one_chunk() -> None:
    assert cut([Size(3, 0)] * 5, ChunkBudget(None)) == [slice(0, 5)]
    assert cut([], ChunkBudget(None)) == cut([], ChunkBudget(4)) == []


def test_an_item_above_the_budget_has_a_chunk_of_its_own() -> None:
    sizes = [Size(n, 0) for n in (50, 9, 8, 3)]
    assert cut(sizes, ChunkBudget(8, tokens=20)) == [slice(0, 1), slice(1, 3), slice(3, 4)]


def test_images_of_one_size_are_counted_as_ever() -> None:
    """However short the texts beside them are: the image tower's memory is that of 2 images."""
    joint = [Size(tokens, 4) for tokens in (9, 9, 8, 8, 8)]
    assert cut(joint, ChunkBudget(2)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert cut(joint, ChunkBudget(2, tokens=10_000)) == cut(joint, ChunkBudget(2))


def test_splitting_ends_at_the_number_of_chunks_or_at_single_items() -> None:
    for drawn in drawn_sizes():
        sizes = sorted(drawn, reverse=True)
        chunks = cut(sizes, ChunkBudget(8))
        for number in (len(chunks), len(chunks) + 1, len(chunks) + 7, 99):
            found = split(chunks, sizes, number=number)
            assert len(found) == min(number, max(len(sizes), len(chunks)))
            assert [place for c in found for place in range(c.start, c.stop)] == list(
                range(len(sizes))
            )
            assert found == split(chunks, sizes, number=number)
            ends = {c.stop for c in found}
            assert {c.stop for c in chunks} <= ends, "chunks are cut, not joined"


def test_the_largest_chunk_is_split_first() -> None:
    sizes = [Size(n, 0) for n in (10, 10, 10, 10, 2, 2)]
    halves = [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert split([slice(0, 4), slice(4, 6)], sizes, number=3) == halves


def test_sizes() -> None:
    ids, image = np.zeros(7, np.int64), np.zeros((3, 224, 224), np.float32)

    def size(**inputs: np.ndarray) -> Size:
        return size_of(EncodedItem("any", dict(inputs)))

    assert size(input_ids=ids, attention_mask=ids) == Size(7, 0)
    assert size(pixel_values=image) == Size(0, 196)
    assert size(pixel_values=image[:, :8, :8]) == Size(0, 1)
    assert size(input_ids=ids, pixel_values=image) == Size(7, 196)
    assert size(pixel_values=np.zeros((2, 3, 32, 32), np.float32)) == Size(0, 8)
    patches = np.zeros((20, 1176), np.float32)  # as Qwen's processors give them
    grid = np.array([[1, 4, 5]])
    assert size(input_ids=ids, pixel_values=patches, image_grid_thw=grid) == Size(7, 20)
    assert size(features=np.zeros(384, np.float32)) == Size(1, 0)
    assert padded([Size(7, 2), Size(3, 9)]) == Size(14, 11)


@pytest.mark.parametrize(
    ("budget", "largest", "expected"),
    [
        (ChunkBudget(8), 8, ChunkBudget(4)),
        (ChunkBudget(5, sort=False), 9, ChunkBudget(2, sort=False)),
        (ChunkBudget(8), 3, ChunkBudget(1)),  # there are no more
        (ChunkBudget(None), 7, ChunkBudget(3)),
        (ChunkBudget(1), 5, None),  # short ones, together as large as the longest
        (ChunkBudget(8, tokens=None), 1, None),
        (ChunkBudget(8, tokens=101), 20, ChunkBudget(4, tokens=50)),
        (ChunkBudget(1, tokens=50), 4, ChunkBudget(1, tokens=25)),
        (ChunkBudget(1, tokens=50), 1, None),
        (ChunkBudget(1, tokens=1), 3, None),  # small images, together as large as the largest
        (ChunkBudget(2, tokens=1), 3, ChunkBudget(1, tokens=1)),
    ],
)
def test_half_a_budget(budget: ChunkBudget, largest: int, expected: ChunkBudget | None) -> None:
    assert halved(budget, largest=largest) == expected
