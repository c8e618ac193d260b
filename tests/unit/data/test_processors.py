from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vembed_ds.data.augment import ImageAugmentation
from vembed_ds.data.processor_loading import build_item_processor
from vembed_ds.data.processors import EncodedItem, ItemProcessor, content_key, text_key
from vembed_ds.data.records import Item
from vembed_ds.data.vector_table import SegmentWriter, VectorTable, ensure_table
from vembed_ds.errors import ConfigError, DataError
from vembed_ds.similarity import Embeddings

Noise = Callable[..., Image.Image]
TEXTS = ["a dog", "the quick brown fox jumps over the lazy dog", "cat"]


@pytest.fixture
def processor(minilm: str, image_settings: dict[str, Any]) -> ItemProcessor:
    return build_item_processor(minilm, image_settings, max_length=12)


def encode(processor: ItemProcessor, item: Item, *, seed: int | None = None) -> EncodedItem:
    return processor.encode(item, origin="a.jsonl, record 3, query", augment_seed=seed)


def test_text_is_encoded_as_by_the_tokenizer(processor: ItemProcessor) -> None:
    for text in TEXTS:
        stream, inputs = encode(processor, Item(text=text))
        expected = processor.tokenizer(text, truncation=True, max_length=12)
        assert stream == "text"
        assert {name: array.tolist() for name, array in inputs.items()} == dict(expected)
        assert {array.dtype for array in inputs.values()} == {np.dtype(np.int64)}


def test_text_is_truncated_to_max_length(processor: ItemProcessor) -> None:
    inputs = encode(processor, Item(text="dog " * 50)).inputs
    assert inputs["input_ids"].shape == (12,)
    assert inputs["input_ids"][-1] == processor.tokenizer.sep_token_id


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_the_tokenizers_but_always_on_the_right(
    processor: ItemProcessor, side: str
) -> None:
    processor.tokenizer.padding_side = side
    padded = processor.pad("text", [encode(processor, Item(text=text)) for text in TEXTS])
    expected = processor.tokenizer(
        TEXTS,
        truncation=True,
        max_length=12,
        padding="longest",
        padding_side="right",
        return_tensors="pt",
    )
    assert padded.keys() == set(expected)
    for name, tensor in padded.items():
        assert tensor.dtype == torch.int64
        assert torch.equal(tensor, expected[name])


def test_padding_uses_the_padding_token(processor: ItemProcessor) -> None:
    processor.tokenizer.pad_token = "[MASK]"
    ids = processor.pad("text", [encode(processor, Item(text=text)) for text in TEXTS])["input_ids"]
    assert ids[0, -1] == processor.tokenizer.mask_token_id


def test_image_is_encoded_as_by_the_image_processor(processor: ItemProcessor, noise: Noise) -> None:
    stream, inputs = encode(processor, Item(image=noise()))
    expected = processor.image_processor(noise(), return_tensors="np")["pixel_values"][0]
    assert stream == "image"
    assert inputs["pixel_values"].dtype == np.float32
    np.testing.assert_array_equal(inputs["pixel_values"], expected)


@pytest.mark.parametrize(("width", "height"), [(40, 1), (40, 3), (1, 40), (3, 40), (3, 3), (1, 1)])
def test_thin_images_keep_their_layout(
    width: int, height: int, image_settings: dict[str, Any], noise: Noise
) -> None:
    image_settings |= {
        "size": {"height": height, "width": width},
        "do_center_crop": False,
        "do_normalize": False,
    }
    processor = build_item_processor(None, image_settings, max_length=None)
    image = noise(width=width, height=height)
    pixels = encode(processor, Item(image=image)).inputs["pixel_values"]
    np.testing.assert_allclose(pixels * 255, np.asarray(image).transpose(2, 0, 1), atol=1e-3)


@pytest.mark.parametrize("size", [(30_000, 1), (1, 30_000)])
def test_a_line_of_pixels_does_not_fill_the_memory(
    size: tuple[int, int], image_settings: dict[str, Any]
) -> None:
    line = Item(image=Image.new("RGB", size))
    image_settings |= {"size": {"shortest_edge": 224}}
    processor = build_item_processor(None, image_settings, max_length=None)
    with pytest.raises(
        DataError, match=r"record 3, query: image of \d+ x \d+ pixels: .* made 224 .*; crop it"
    ):
        encode(processor, line)
    image_settings |= {"size": {"height": 16, "width": 16}}
    squeezed = build_item_processor(None, image_settings, max_length=None)
    assert encode(squeezed, line).inputs["pixel_values"].shape == (3, 16, 16)


def test_images_are_stacked(processor: ItemProcessor, noise: Noise) -> None:
    items = [encode(processor, Item(image=noise(seed))) for seed in range(3)]
    batch = processor.pad("image", items)["pixel_values"]
    assert batch.shape == (3, 3, 16, 16)
    assert batch.dtype == torch.float32
    np.testing.assert_array_equal(batch[1].numpy(), items[1].inputs["pixel_values"])


def test_images_of_different_shapes_are_refused(
    image_settings: dict[str, Any], noise: Noise
) -> None:
    processor = build_item_processor(
        None, image_settings | {"do_center_crop": False}, max_length=None
    )
    items = [encode(processor, Item(image=noise(width=width))) for width in (24, 48)]
    with pytest.raises(
        DataError, match=r"have the shapes \(3, 16, 16\), \(3, 16, 32\); set a fixed size"
    ):
        processor.pad("image", items)


def test_processor_survives_pickling(
    minilm: str, image_settings: dict[str, Any], noise: Noise
) -> None:
    pytest.importorskip("kornia")
    augmentation = ImageAugmentation([{"RandomAffine": {"degrees": 20, "p": 1.0}}])
    processor = build_item_processor(
        minilm, image_settings, max_length=12, augmentation=augmentation
    )
    twin = pickle.loads(pickle.dumps(processor))
    for item in (Item(text=TEXTS[1]), Item(image=noise())):
        first, second = (encode(one, item, seed=4).inputs for one in (processor, twin))
        assert all(np.array_equal(first[name], second[name]) for name in first)


def test_augmentation_only_with_a_seed(
    minilm: str, image_settings: dict[str, Any], noise: Noise
) -> None:
    pytest.importorskip("kornia")
    plain = build_item_processor(minilm, image_settings, max_length=12)
    augmented = copy.copy(plain)
    augmented.augmentation = ImageAugmentation([{"RandomAffine": {"degrees": 20, "p": 1.0}}])

    def pixels(processor: ItemProcessor, seed: int | None) -> list[float]:
        return (
            encode(processor, Item(image=noise()), seed=seed)
            .inputs["pixel_values"]
            .ravel()
            .tolist()
        )

    assert pixels(augmented, None) == pixels(plain, None) == pixels(plain, 1)
    assert pixels(augmented, 1) == pixels(augmented, 1) != pixels(plain, 1)
    assert pixels(augmented, 2) != pixels(augmented, 1)


def test_augmentation_that_fails_names_the_record(
    image_settings: dict[str, Any], noise: Noise
) -> None:
    pytest.importorskip("kornia")
    blur = ImageAugmentation(
        [{"RandomGaussianBlur": {"kernel_size": 31, "sigma": [1, 2], "p": 1.0}}]
    )
    processor = build_item_processor(None, image_settings, max_length=None, augmentation=blur)
    message = r"record 3, query: image_augmentation fails on this image of 5 x 5 pixels .*; change"
    with pytest.raises(DataError, match=message):
        encode(processor, Item(image=noise(width=5, height=5)), seed=0)


def test_filler_is_a_valid_item_of_the_same_shape(processor: ItemProcessor, noise: Noise) -> None:
    image = processor.pad(
        "image", [processor.filler("image"), encode(processor, Item(image=noise()))]
    )
    text = processor.pad("text", [processor.filler("text"), encode(processor, Item(text="dog"))])
    assert torch.isfinite(image["pixel_values"]).all()
    assert text["attention_mask"].sum(dim=1).tolist() == [3, 3]


def test_stored_features_replace_the_tokens(
    processor: ItemProcessor, tmp_path: Path, noise: Noise
) -> None:
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    keys = np.array([text_key(text) for text in TEXTS])
    ensure_table(tmp_path / "table", identity={"of": "test"})
    writer = SegmentWriter(tmp_path / "table")
    writer.append(keys, Embeddings(torch.from_numpy(rows)))
    writer.finish()
    processor.stored["text"] = VectorTable(tmp_path / "table")
    items = [encode(processor, Item(text=text), seed=1) for text in TEXTS[::-1]]
    batch = processor.pad("text", [*items, processor.filler("text")])
    assert list(batch) == ["features"]
    assert batch["features"].tolist() == [*rows[::-1].tolist(), [0.0] * 4]
    assert "pixel_values" in encode(processor, Item(image=noise())).inputs
    with pytest.raises(DataError, match=r"'mouse': .*has no vector for item 0"):
        encode(processor, Item(text="mouse"))


def test_items_without_a_processor_are_refused(
    minilm: str, image_settings: dict[str, Any], noise: Noise
) -> None:
    text_only = build_item_processor(minilm, None, max_length=8)
    image_only = build_item_processor(None, image_settings, max_length=None)
    with pytest.raises(ConfigError, match="image, but the model has no image processor"):
        encode(text_only, Item(image=noise()))
    with pytest.raises(ConfigError, match="text, but the model has no tokenizer"):
        encode(image_only, Item(text="dog"))


def test_an_item_holds_something(processor: ItemProcessor) -> None:
    with pytest.raises(DataError, match="the item has neither text nor image"):
        encode(processor, Item())


def test_an_item_of_both_has_the_inputs_of_both(processor: ItemProcessor, noise: Noise) -> None:
    text, image = Item(text="a small dog"), Item(image=noise())
    both = [encode(processor, Item(text=text.text, image=image.image)), processor.filler("joint")]
    assert [item.stream for item in both] == ["joint", "joint"]
    parts = encode(processor, text).inputs | encode(processor, image).inputs
    assert {n: v.tolist() for n, v in both[0].inputs.items()} == {
        n: v.tolist() for n, v in parts.items()
    }
    padded = processor.pad("joint", both)
    assert padded["input_ids"].shape[0] == padded["pixel_values"].shape[0] == 2
    assert padded["attention_mask"].sum(dim=1).tolist() == [len(parts["input_ids"]), 3]


def test_the_instruction_stands_before_the_text(processor: ItemProcessor) -> None:
    told = encode(processor, Item(text="dog", instruction="small "))
    assert told.inputs["input_ids"].tolist() == (
        encode(processor, Item(text="small dog")).inputs["input_ids"].tolist()
    )


def test_text_without_tokens_is_an_error(processor: ItemProcessor) -> None:
    processor.tokenizer = copy.deepcopy(processor.tokenizer)
    processor.tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(DataError, match="the tokenizer gives no token for"):
        encode(processor, Item(text="\u200b"))


def test_content_keys_tell_contents_apart(noise: Noise) -> None:
    buffer = BytesIO()
    noise().save(buffer, "PNG")
    data = buffer.getvalue()
    items = [
        Item(text="a.png"),
        Item(text="b"),
        Item(image="a.png"),
        Item(image=data),
        Item(image=noise()),
        Item(image=noise(1)),
    ]
    assert len({content_key(item) for item in items}) == len(items)
    assert content_key(Item(image={"bytes": data, "path": "x"})) == content_key(Item(image=data))
    assert content_key(Item(image={"bytes": None, "path": "a.png"})) == content_key(
        Item(image="a.png")
    )
    assert content_key(Item(text="b")) == "text:96172b4c53372cd10faddc821bfe0318"
