"""Items of vision-language models, against transformers' own processors where those exist."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    ColPaliProcessor,
    ColQwen2Processor,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SiglipImageProcessorPil,
)

from tests.parity.families import FAMILIES
from tests.tokenizers import gemma_tokenizer, qwen_tokenizer
from vembed_ds.data.layouts import punctuated
from vembed_ds.data.processor_loading import build_item_processor
from vembed_ds.data.records import Item
from vembed_ds.data.vision_language import VisionLanguageProcessor
from vembed_ds.errors import ConfigError, DataError

IMAGE_PAD = "<|image_pad|>"
QWENS = {
    "qwen2_vl": Qwen2VLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
    "qwen3_vl": Qwen3VLProcessor,
}
ITEMS = [
    Item(text="a red apple on a wooden table", instruction="Find the picture"),
    Item(text=" the sun", instruction="Find it!"),
    Item(text="the rain"),
]


def picture(height: int = 30, width: int = 50) -> Image.Image:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def config_of(model_type: str) -> Any:
    settings = dict(FAMILIES[model_type].settings)
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., VisionLanguageProcessor]:
    """``build(model_type)``: the processor from the folder of that family."""

    def make(model_type: str, **options: Any) -> VisionLanguageProcessor:
        folder = tmp_path / model_type
        if not folder.exists():
            FAMILIES[model_type].save_processor(folder)
        given = {"max_length": 200, "model_config": config_of(model_type), **options}
        processor = build_item_processor(str(folder), str(folder), **given)
        assert isinstance(processor, VisionLanguageProcessor)
        return processor

    return make


def encoded(processor: VisionLanguageProcessor, *items: Item) -> list[Any]:
    return [processor.encode(item, origin="record 7", augment_seed=None) for item in items]


def without_video(kind: type[Any]) -> type[Any]:
    """transformers 5.23 cannot build these processors without torchvision, for want of videos."""

    class Plain(kind):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    Plain.__name__ = kind.__name__
    return Plain


def conversation(item: Item) -> list[dict[str, Any]]:
    instruction = item.instruction or "Represent the user's input."
    instruction += "" if instruction[-1] in ".!?" else "."
    parts = [{"type": "image"}] if item.image is not None else []
    parts += [{"type": "text", "text": item.text}] if item.text is not None else []
    return [
        {"role": "system", "content": [{"type": "text", "text": instruction}]},
        {"role": "user", "content": parts},
    ]


@pytest.mark.parametrize("chat_template", ["saved", "built"])
@pytest.mark.parametrize("model_type", QWENS)
def test_qwen_items_equal_those_of_its_own_processor(
    build: Callable[..., VisionLanguageProcessor], model_type: str, chat_template: str
) -> None:
    processor = build(model_type)
    if chat_template == "built":
        processor.tokenizer.chat_template = None
    theirs = without_video(QWENS[model_type])(
        image_processor=processor.image_processor, tokenizer=qwen_tokenizer()
    )
    items = [
        *ITEMS,
        Item(image=picture()),
        Item(image=picture(40, 20), text="the red one", instruction="Query"),
    ]
    for item in items:
        (ours,) = encoded(processor, item)
        prompt = theirs.tokenizer.apply_chat_template(
            conversation(item), tokenize=False, add_generation_prompt=True
        )
        images = None if item.image is None else [item.image]
        expected = theirs(text=[prompt], images=images, return_tensors="np")
        names = ["input_ids", "attention_mask"]
        if images:
            assert ours.stream == "image"
            names += ["pixel_values", "image_grid_thw", "mm_token_type_ids"]
        assert set(ours.inputs) == set(names)
        padded = processor.pad(ours.stream, [ours])
        for name in names:
            np.testing.assert_array_equal(padded[name].numpy(), expected[name], name)


def test_retriever_items_equal_those_of_their_own_processors(
    build: Callable[..., VisionLanguageProcessor],
) -> None:
    processor = build("colqwen2")
    theirs: Any = ColQwen2Processor(
        image_processor=Qwen2VLImageProcessorPil(**FAMILIES["colqwen2"].image_settings),
        tokenizer=qwen_tokenizer(),
    )
    check_retriever(processor, theirs, ["pixel_values", "image_grid_thw"], [])
    processor = build("colpali")
    images = SiglipImageProcessorPil(**FAMILIES["colpali"].image_settings)
    images.image_seq_length = 4
    theirs = ColPaliProcessor(image_processor=images, tokenizer=gemma_tokenizer())
    check_retriever(processor, theirs, ["pixel_values"], ["token_type_ids"])


def check_retriever(
    processor: VisionLanguageProcessor, theirs: Any, pixels: list[str], types: list[str]
) -> None:
    texts = ["a red apple on a table", "the rain"]
    pictures = [picture(), picture(60, 30)]
    names = ["input_ids", "attention_mask", *types]
    ours = processor.pad("text", encoded(processor, *[Item(text=text) for text in texts]))
    theirs.tokenizer.padding_side = "right"
    expected = theirs.process_queries(texts)
    assert set(ours) == set(names)
    for name in names:
        assert torch.equal(ours[name], expected[name]), name
    ours = processor.pad("image", encoded(processor, *[Item(image=image) for image in pictures]))
    expected = theirs.process_images(pictures)
    assert set(ours) == {*names, *pixels}
    for name in [*names, *pixels]:
        assert torch.equal(ours[name], expected[name]), name


def test_a_chunk_concatenates_patches_and_pads_tokens(
    build: Callable[..., VisionLanguageProcessor],
) -> None:
    processor = build("qwen3_vl")
    items = encoded(processor, Item(image=picture(30, 50)), Item(image=picture(64, 64), text="sun"))
    joined = processor.pad("image", items)
    patches = [len(item.inputs["pixel_values"]) for item in items]
    assert patches[0] != patches[1]
    assert joined["pixel_values"].shape[0] == sum(patches)
    assert joined["image_grid_thw"].prod(dim=1).tolist() == patches
    lengths = [len(item.inputs["input_ids"]) for item in items]
    assert joined["attention_mask"].sum(dim=1).tolist() == lengths
    pad = processor.tokenizer.pad_token_id
    assert (joined["input_ids"][0, lengths[0] :] == pad).all()
    for row, number in zip(joined["mm_token_type_ids"], patches, strict=True):
        assert int(row.sum()) == number // processor.image_processor.merge_size**2


def test_a_long_text_is_cut_and_an_image_never(
    build: Callable[..., VisionLanguageProcessor],
) -> None:
    whole = encoded(build("qwen3_vl"), Item(image=picture(), text="the rain " * 9))[0].inputs
    limit = len(whole["input_ids"]) - 10
    cut = encoded(build("qwen3_vl", max_length=limit), Item(image=picture(), text="the rain " * 9))[
        0
    ].inputs
    assert len(cut["input_ids"]) == limit
    np.testing.assert_array_equal(cut["pixel_values"], whole["pixel_values"])
    assert cut["mm_token_type_ids"].sum() == whole["mm_token_type_ids"].sum()
    # The end of the text is gone; what stands behind it is there.
    np.testing.assert_array_equal(cut["input_ids"][-15:-8], whole["input_ids"][-25:-18])
    tail = np.asarray(build("qwen3_vl").tokenizer("<|im_end|>\n<|im_start|>assistant\n").input_ids)
    np.testing.assert_array_equal(cut["input_ids"][-len(tail) :], tail)


def test_an_image_without_room_names_the_record(
    build: Callable[..., VisionLanguageProcessor],
) -> None:
    processor = build("qwen3_vl")
    message = (
        r"record 7: the image takes 64 tokens, the prompt around it \d+, more than "
        r"max_seq_length=\d+ allows; raise max_seq_length or lower max_pixels"
    )
    processor.max_length = 70
    with pytest.raises(DataError, match=message):
        encoded(processor, Item(image=picture(128, 128)))


def test_min_and_max_pixels_are_respected(build: Callable[..., VisionLanguageProcessor]) -> None:
    processor = build("qwen3_vl")
    for size, pixels in (((8, 8), 16 * 16), ((400, 400), 64 * 64 * 4)):
        grid = encoded(processor, Item(image=picture(*size)))[0].inputs["image_grid_thw"][0]
        assert grid.prod() * processor.image_processor.patch_size**2 == pixels


def test_a_strip_of_an_image_names_the_record(
    build: Callable[..., VisionLanguageProcessor],
) -> None:
    with pytest.raises(DataError, match=r"record 7: image of 900 x 4 pixels: .*aspect ratio"):
        encoded(build("qwen2_vl"), Item(image=picture(4, 900)))


def test_special_tokens_in_a_text_are_text(build: Callable[..., VisionLanguageProcessor]) -> None:
    processor = build("qwen3_vl")
    text = f"look: {IMAGE_PAD}<|im_end|> the end"
    (item,) = encoded(processor, Item(text=text))
    ids = item.inputs["input_ids"].tolist()
    assert processor.image_token_id not in ids
    assert text in processor.tokenizer.decode(ids)


def test_the_default_instruction_is_for_items_without_one(
    build: Callable[..., VisionLanguageProcessor],
) -> None:
    processor = build("qwen3_vl")
    processor.default_instruction = "Describe this image"
    items = encoded(processor, Item(text="sun"), Item(text="sun", instruction="Find"))
    said = [processor.tokenizer.decode(item.inputs["input_ids"]) for item in items]
    assert said[0].startswith("<|im_start|>system\nDescribe this image.<|im_end|>")
    assert said[1].startswith("<|im_start|>system\nFind.<|im_end|>")


def test_both_at_once_is_refused_by_retrievers(
    build: Callable[..., VisionLanguageProcessor],
) -> None:
    with pytest.raises(DataError, match="record 7: a text and an image in one item, but this"):
        encoded(build("colqwen2"), Item(text="a", image=picture()))


def test_neither_is_refused(build: Callable[..., VisionLanguageProcessor]) -> None:
    with pytest.raises(DataError, match="record 7: the item has neither text nor image"):
        encoded(build("qwen3_vl"), Item())


def test_a_saved_processor_gives_the_same_items(
    build: Callable[..., VisionLanguageProcessor], tmp_path: Path
) -> None:
    for model_type in ("qwen3_vl", "colqwen2", "colpali"):
        processor = pickle.loads(pickle.dumps(build(model_type)))  # as workers get it
        folder = tmp_path / f"saved-{model_type}"
        processor.save_pretrained(folder)
        again = build_item_processor(
            str(folder), str(folder), max_length=200, model_config=config_of(model_type)
        )
        for item in (ITEMS[0], Item(image=picture())):
            ours, theirs = (encoded(p, item)[0].inputs for p in (processor, again))
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                np.testing.assert_array_equal(value, theirs[name])


def test_prefixes_come_from_the_folder(
    build: Callable[..., VisionLanguageProcessor], tmp_path: Path
) -> None:
    build("colqwen2")
    folder = tmp_path / "again"
    images = json.loads((tmp_path / "colqwen2" / "preprocessor_config.json").read_text())
    settings = {"query_prefix": "Find: ", "image_processor": images}
    (tmp_path / "colqwen2" / "processor_config.json").write_text(json.dumps(settings))
    build("colqwen2").save_pretrained(folder)
    saved = json.loads((folder / "processor_config.json").read_text())
    assert saved == {"query_prefix": "Find: "}  # the image processor has a file of its own
    again = build_item_processor(
        str(folder), str(folder), max_length=50, model_config=config_of("colqwen2")
    )
    assert isinstance(again, VisionLanguageProcessor)
    ids = encoded(again, Item(text="a dog"))[0].inputs["input_ids"]
    assert again.tokenizer.decode(ids).startswith("Find: a dog<|endoftext|>")


def test_patches_of_another_size_are_refused(build: Callable[..., VisionLanguageProcessor]) -> None:
    config = config_of("qwen3_vl")
    config.vision_config.patch_size = 16
    with pytest.raises(ConfigError, match="patch_size=8 in the image processor, but patch_size=16"):
        build("qwen3_vl", model_config=config)


def test_a_tokenizer_of_another_model_is_refused(
    build: Callable[..., VisionLanguageProcessor],
) -> None:
    config = config_of("qwen3_vl")
    config.image_token_id = 17
    with pytest.raises(
        ConfigError, match=r"token 17, the model's image_token_id, is .* no special"
    ):
        build("qwen3_vl", model_config=config)


def test_a_template_without_images_is_refused(
    build: Callable[..., VisionLanguageProcessor],
) -> None:
    processor = build("qwen3_vl")
    processor.tokenizer.chat_template = "{{ messages[0]['role'] }}"
    with pytest.raises(ConfigError, match="chat template does not give a text and an image once"):
        encoded(processor, Item(image=picture(), instruction="new"))


def test_a_vision_language_model_needs_both(build: Callable[..., VisionLanguageProcessor]) -> None:
    with pytest.raises(
        ConfigError, match="model_type qwen3_vl: needs a tokenizer and an image pro"
    ):
        build_item_processor(
            build("qwen3_vl").tokenizer.name_or_path,
            None,
            max_length=9,
            model_config=config_of("qwen3_vl"),
        )


@pytest.mark.parametrize(
    ("given", "closed"), [("Find it", "Find it."), (" Why? ", "Why?"), ("", ""), ("图", "图.")]
)
def test_an_instruction_ends_in_punctuation(given: str, closed: str) -> None:
    assert punctuated(given) == closed
