from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPProcessor

from vembed_ds.data.processor_loading import build_item_processor
from vembed_ds.data.records import Item
from vembed_ds.errors import ConfigError

Noise = Callable[..., Image.Image]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


@pytest.fixture
def tokenizer_folder(minilm: str, tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in TOKENIZER_FILES:
        shutil.copy(Path(minilm) / name, folder / name)
    return folder


def change_settings(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    write_json(path, json.loads(path.read_text()) | changes)


def num_tokens(folder: Path, **options: Any) -> int:
    processor = build_item_processor(str(folder), None, **({"max_length": None} | options))
    encoded = processor.encode(Item(text="dog"), origin="", augment_seed=None)
    return len(encoded.inputs["input_ids"])


def test_limit_is_the_tokenizers_own_or_the_given(minilm: str) -> None:
    assert build_item_processor(minilm, None, max_length=None).max_length == 512
    assert build_item_processor(minilm, None, max_length=7).max_length == 7


def test_tokenizer_without_limit_needs_max_seq_length(tokenizer_folder: Path) -> None:
    change_settings(tokenizer_folder, model_max_length=int(1e30))
    with pytest.raises(ConfigError, match="states no longest input; set max_seq_length"):
        build_item_processor(str(tokenizer_folder), None, max_length=None)
    assert num_tokens(tokenizer_folder, max_length=16) == 3


def test_siglip_is_recognised_by_its_files_and_padded(tokenizer_folder: Path) -> None:
    change_settings(tokenizer_folder, model_max_length=int(1e30))
    assert num_tokens(tokenizer_folder, text_model_type="siglip_text_model") == 64
    write_json(tokenizer_folder / "config.json", {"model_type": "siglip"})
    assert num_tokens(tokenizer_folder) == 64
    assert num_tokens(tokenizer_folder, max_length=16) == 16
    write_json(tokenizer_folder / "config.json", {"model_type": "bert"})
    write_json(tokenizer_folder / "processor_config.json", {"processor_class": "SiglipProcessor"})
    assert num_tokens(tokenizer_folder) == 64


def test_path_never_decides_about_padding(tokenizer_folder: Path) -> None:
    folder = tokenizer_folder.rename(tokenizer_folder.with_name("siglip-like-name"))
    assert num_tokens(folder) == 3


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{tmp_path}: no tokenizer can be loaded"):
        build_item_processor(str(tmp_path), None, max_length=8)


def test_folder_with_only_a_model_config_has_no_tokenizer(minilm: str, tmp_path: Path) -> None:
    shutil.copy(Path(minilm) / "config.json", tmp_path / "config.json")
    with pytest.raises(ConfigError, match=rf"{tmp_path}: no tokenizer files, only a configuration"):
        build_item_processor(str(tmp_path), None, max_length=8)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        build_item_processor(str(tmp_path / "none"), None, max_length=8)
    with pytest.raises(ConfigError, match="no image processor can be loaded"):
        build_item_processor(None, str(tmp_path / "none"), max_length=None)


def test_tokenizer_without_padding_token(tokenizer_folder: Path) -> None:
    change_settings(tokenizer_folder, pad_token=None, tokenizer_class="PreTrainedTokenizerFast")
    write_json(tokenizer_folder / "special_tokens_map.json", {})
    with pytest.raises(ConfigError, match="has no padding token; set pad_token"):
        build_item_processor(str(tokenizer_folder), None, max_length=8)


def test_nothing_named() -> None:
    with pytest.raises(ConfigError, match="neither a tokenizer nor an image processor is named"):
        build_item_processor(None, None, max_length=None)


@pytest.mark.parametrize(
    "kind",
    [
        "CLIPImageProcessor",
        "CLIPImageProcessorFast",
        "ViTImageProcessor",
        "BitImageProcessor",
        "SiglipImageProcessor",
        "ConvNextImageProcessor",
        "DINOv3ViTImageProcessor",
        "DINOv3ViTImageProcessorFast",
    ],
)
def test_image_processors_load_without_torchvision(kind: str, noise: Noise, tmp_path: Path) -> None:
    settings = {"image_processor_type": kind, "size": {"height": 32, "width": 32}}
    if kind.startswith(("CLIP", "Bit")):
        settings["crop_size"] = {"height": 32, "width": 32}
    if kind.startswith("ConvNext"):
        settings |= {"size": {"shortest_edge": 32}, "crop_pct": 0.875}
    processor = build_item_processor(None, settings, max_length=None)
    item = Item(image=noise())
    pixels = processor.encode(item, origin="", augment_seed=None).inputs["pixel_values"]
    assert pixels.shape == (3, 32, 32)
    processor.save_pretrained(tmp_path)
    again = build_item_processor(None, str(tmp_path), max_length=None)
    np.testing.assert_array_equal(
        again.encode(item, origin="", augment_seed=None).inputs["pixel_values"], pixels
    )


def test_dinov3_substitute_keeps_the_settings(noise: Noise) -> None:
    settings = {
        "image_processor_type": "DINOv3ViTImageProcessor",
        "size": {"height": 24, "width": 20},
        "do_resize": False,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
    }
    processor = build_item_processor(None, settings, max_length=None)
    image = noise()
    pixels = processor.encode(Item(image=image), origin="", augment_seed=None).inputs[
        "pixel_values"
    ]
    np.testing.assert_allclose(pixels, np.asarray(image).transpose(2, 0, 1) / 255, atol=1e-6)


def test_combined_processor_folder_gives_both(
    minilm: str, tmp_path: Path, image_settings: dict[str, Any], noise: Noise
) -> None:
    parts = CLIPImageProcessorPil(**image_settings), AutoTokenizer.from_pretrained(minilm)
    CLIPProcessor(*parts).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    processor = build_item_processor(str(tmp_path), str(tmp_path), max_length=None)
    assert not processor.pad_to_max_length
    image = processor.encode(Item(image=noise()), origin="", augment_seed=None)
    assert image.inputs["pixel_values"].shape == (3, 16, 16)
    assert processor.filler("text").inputs["input_ids"].shape == (3,)


def test_saved_folder_loads_again(
    minilm: str, tmp_path: Path, image_settings: dict[str, Any]
) -> None:
    build_item_processor(minilm, image_settings, max_length=8).save_pretrained(tmp_path)
    again = build_item_processor(str(tmp_path), str(tmp_path), max_length=8)
    assert again.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(minilm).get_vocab()
    assert again.image_processor.crop_size["height"] == 16


def test_settings_without_a_type() -> None:
    with pytest.raises(ConfigError, match="image_processor_type is missing; add it"):
        build_item_processor(None, {"size": {"height": 4, "width": 4}}, max_length=None)


def test_settings_of_an_unknown_type() -> None:
    with pytest.raises(ConfigError, match=r"no image processor can be loaded .*Unrecognized"):
        build_item_processor(None, {"image_processor_type": "NoSuchProcessor"}, max_length=None)


def test_misspelt_setting_names_the_nearest(image_settings: dict[str, Any]) -> None:
    message = r"processor image_maen=\[0, 0, 0\]: CLIPImageProcessor has no such setting; the nearest is image_mean"
    with pytest.raises(ConfigError, match=message):
        build_item_processor(None, image_settings | {"image_maen": [0, 0, 0]}, max_length=None)


def test_processors_with_more_outputs_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"gives pixel_values, .*only one \[C, H, W\] array"):
        build_item_processor(
            None, {"image_processor_type": "Qwen2VLImageProcessor"}, max_length=None
        )


def test_naflex_images_have_a_mask_and_a_shape(noise: Noise) -> None:
    settings = {
        "image_processor_type": "Siglip2ImageProcessor",
        "patch_size": 8,
        "max_num_patches": 12,
    }
    processor = build_item_processor(None, settings, max_length=None)
    items = [
        processor.encode(Item(image=image), origin="", augment_seed=None)
        for image in (noise(), Image.new("RGB", (64, 16)))
    ]
    joined = processor.pad("image", items)
    assert joined["pixel_values"].shape == (2, 12, 3 * 8 * 8)
    patches = joined["spatial_shapes"].prod(dim=1)
    assert joined["pixel_attention_mask"].sum(dim=1).tolist() == patches.tolist()
    assert joined["spatial_shapes"][1, 0] < joined["spatial_shapes"][1, 1]
