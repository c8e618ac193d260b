"""Equal items are found by all of their inputs."""

from __future__ import annotations

import random

import numpy as np
import pytest

from vembed_ds.data.duplicates import merge_equal
from vembed_ds.data.processors import EncodedItem


def text(*ids: int, **more: np.ndarray) -> EncodedItem:
    return EncodedItem("text", {"input_ids": np.array(ids), **more})


def test_the_first_of_equal_items_is_kept() -> None:
    items = [text(1, 2), text(3), text(1, 2), text(2, 1), text(3), text(1, 2)]
    kept, places = merge_equal(items)
    assert [item is other for item, other in zip(kept, [items[0], items[1], items[3]], strict=True)]
    assert places == [0, 1, 0, 2, 1, 0]


def test_random_items() -> None:
    generator = random.Random(0)
    for _ in range(50):
        items = [text(*generator.choices(range(3), k=generator.randint(1, 3))) for _ in range(30)]
        kept, places = merge_equal(items)
        contents = [tuple(item.inputs["input_ids"]) for item in items]
        assert [tuple(kept[place].inputs["input_ids"]) for place in places] == contents
        assert len(kept) == len(set(contents))


@pytest.mark.parametrize(
    "other",
    [
        text(1, 2, 0),
        EncodedItem("text", {"token_type_ids": np.array([1, 2])}),
        text(1, 2, attention_mask=np.array([1, 0])),
        EncodedItem("text", {"input_ids": np.array([1, 2], dtype=np.int32)}),
        EncodedItem("text", {"input_ids": np.array([[1, 2]])}),
    ],
    ids=["longer", "another name", "one more input", "another type", "another shape"],
)
def test_what_differs_in_anything_is_kept_apart(other: EncodedItem) -> None:
    assert merge_equal([text(1, 2), other])[1] == [0, 1]


def test_an_image_that_differs_in_one_value_between_the_sampled_ones() -> None:
    image = np.zeros((3, 64, 64), np.float32)
    changed = image.copy()
    changed[1, 3, 7] = 1e-7
    items = [EncodedItem("image", {"pixel_values": pixels}) for pixels in (image, changed)]
    same = EncodedItem("image", {"pixel_values": image.copy()})
    assert merge_equal([*items, same])[1] == [0, 1, 0]


def test_arrays_that_are_views_of_others() -> None:
    whole = np.arange(20).reshape(4, 5)
    items = [text(1), EncodedItem("text", {"input_ids": whole[:, 1]}), text(1, 6, 11, 16)]
    assert merge_equal(items)[1] == [0, 1, 1]


def test_nothing() -> None:
    assert merge_equal([]) == ([], [])
