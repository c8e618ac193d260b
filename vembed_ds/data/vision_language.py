"""Items of vision-language models: one token sequence in which an image is a run of placeholders.

Built from a tokenizer and a plain image processor. transformers' combined processors of these
families cannot be loaded without torchvision, which they need for videos only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from vembed_ds.data.images import open_image
from vembed_ds.data.layouts import Layout, chat_layout, colpali_layout, colqwen2_layout
from vembed_ds.data.processors import Array, EncodedItem, ItemProcessor, stream_of
from vembed_ds.data.records import Item
from vembed_ds.errors import ConfigError, DataError

FILLER_EDGE = 32
PROCESSOR_FILES = ("processor_config.json", "video_preprocessor_config.json")


def _concatenated(rows: Sequence[Array]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(rows))


def _padded_patches(rows: Sequence[Array]) -> torch.Tensor:
    """``[n, P, C]``: ColQwen2 takes the patches of every image apart and cuts the padding off."""
    padded = np.zeros((len(rows), max(map(len, rows)), rows[0].shape[1]), dtype=np.float32)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(padded)


def _stacked(rows: Sequence[Array]) -> torch.Tensor:
    return torch.from_numpy(np.stack(rows))


class Family(NamedTuple):
    """How the items of a ``model_type`` are written.

    Attributes:
        layout: Makes its :class:`Layout` of tokenizer, image token and processor settings.
        join: Joins the pixels of a chunk's images.
        image_types: Argument that marks the image's tokens with 1, if the model takes one.
        all_types: Argument of zeros for every token, if the model takes one.
    """

    layout: Callable[[Any, str, Mapping[str, Any]], Layout]
    join: Callable[[Sequence[Array]], torch.Tensor]
    image_types: str | None = None
    all_types: str | None = None


_QWEN = Family(chat_layout, _concatenated, image_types="mm_token_type_ids")
FAMILIES = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "colqwen2": Family(colqwen2_layout, _padded_patches),
    # Zeros tell PaliGemma that all of the sequence sees all of it.
    "colpali": Family(colpali_layout, _stacked, all_types="token_type_ids"),
}
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@dataclass(eq=False)
class VisionLanguageProcessor(ItemProcessor):
    """Encodes texts, images, and items that are both, for one backbone.

    A text too long is cut; an image never is. What looks like a special token in a text is text.

    Args:
        family: How items are written.
        layout: Where their text stands.
        image_token_id: Number of the placeholder of an image.
        image_tokens: Placeholders of every image; ``None``: as many as its patches, merged.
        settings_files: Processor files of the model's folder that are saved with it.
        default_instruction: Of items that have none of their own; "": the layout's.
    """

    family: Family = _QWEN
    layout: Any = None
    image_token_id: int = -1
    image_tokens: int | None = None
    settings_files: dict[str, str] = field(default_factory=dict)
    default_instruction: str = ""

    def encode(self, item: Item, *, origin: str, augment_seed: int | None) -> EncodedItem:
        """Encodes one item.

        Args:
            item: A text, an image, or both.
            origin: The record, for error messages.
            augment_seed: Seed of the augmentation; None for none (evaluation).

        Returns:
            Stream ``text``, or ``image`` when there is an image: ``input_ids`` and
            ``attention_mask`` ``[L]`` int64, and for images ``pixel_values`` ``[P, C]`` float32 and
            ``image_grid_thw`` ``[1, 3]`` int64 (ColPali: ``[C, H, W]`` and no grid).

        Raises:
            DataError: The image cannot be read, or alone is longer than ``max_length``; an item is
                both and the model takes one at a time.
        """
        stream_of(item, origin=origin)  # refuses an item of neither
        image, text = item.image is not None, item.text
        if image and text is not None and not self.layout.mixes:
            raise DataError(
                f"{origin}: a text and an image in one item, but this model embeds one or the "
                "other; use a mode without m"
            )
        visual = self._encode_image(item, origin=origin, seed=augment_seed) if image else {}
        instruction = item.instruction or self.default_instruction
        before, glue, after = self._around(instruction, image, text is not None)
        head = self._with_image(before, visual)
        ids = self._fitted(head, glue, text, after, origin=origin, image=image)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        if image and self.family.image_types:
            inputs[self.family.image_types] = (ids == self.image_token_id).astype(np.int64)
        if self.family.all_types:
            inputs[self.family.all_types] = np.zeros_like(ids)
        return EncodedItem("image" if image else "text", inputs | visual)

    def pad(self, stream: str, items: Sequence[EncodedItem]) -> dict[str, torch.Tensor]:
        """Joins encoded items of one stream.

        Args:
            stream: ``text`` or ``image``.
            items: B items of that stream, at least one.

        Returns:
            Token inputs ``[B, L]``, padded on the right; ``image_grid_thw`` ``[B, 3]``;
            ``pixel_values`` of all images, ``[sum of P, C]``, ``[B, longest P, C]`` (ColQwen2) or
            ``[B, C, H, W]`` (ColPali).
        """
        columns = {name: [item.inputs[name] for item in items] for name in items[0].inputs}
        joined = {}
        for name, rows in columns.items():
            if name in PER_TOKEN:
                joined[name] = self._padded(name, rows)
            else:
                join = self.family.join if name == "pixel_values" else _concatenated
                joined[name] = join(rows)
        return joined

    def filler(self, stream: str) -> EncodedItem:
        """A valid item that means nothing, for ranks that have nothing to encode."""
        item = Item(text="a")
        if stream == "image":
            item = Item(image=Image.new("RGB", (FILLER_EDGE, FILLER_EDGE), "white"))
        return self.encode(item, origin="filler", augment_seed=None)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer, image processor and what the model's folder had besides."""
        super().save_pretrained(folder)
        for name, content in self.settings_files.items():
            (Path(folder) / name).write_text(content, encoding="utf-8")

    def _encode_image(self, item: Item, *, origin: str, seed: int | None) -> dict[str, Array]:
        if self.image_processor is None:
            raise ConfigError(f"{origin}: image, but the model has no image processor")
        assert item.image is not None
        image = open_image(item.image, origin=origin)
        if self.augmentation is not None and seed is not None:
            image = self._augmented(image, origin=origin, seed=seed)
        try:
            output = self.image_processor(
                np.asarray(image), input_data_format="channels_last", return_tensors="np"
            )
        except ValueError as error:  # Qwen's: a side more than 200 times the other
            raise DataError(
                f"{origin}: image of {image.width} x {image.height} pixels: {error}; "
                "remove the record or crop the image"
            ) from error
        pixels = output["pixel_values"].astype(np.float32, copy=False)
        if "image_grid_thw" not in output:
            return {"pixel_values": pixels[0]}
        grid = np.asarray(output["image_grid_thw"], dtype=np.int64)
        return {"pixel_values": pixels, "image_grid_thw": grid}

    def _around(
        self, instruction: str, image: bool, text: bool
    ) -> tuple[list[int], str, list[int]]:
        """Tokens before the text, characters that are tokenized with it, and tokens behind it."""
        key = (instruction, image, text)
        if key not in self._prompts:
            before, after = self.layout.around(instruction, image=image, text=text)
            # The tokenizer splits a string at special tokens first, so only what follows the last
            # of them can melt into the text.
            ends = [match.end() for match in self._added_tokens.finditer(before)]
            cut = max(ends, default=0) if text else len(before)
            self._prompts[key] = (self._ids(before[:cut]), before[cut:], self._ids(after))
        return self._prompts[key]

    @cached_property
    def _prompts(self) -> dict[tuple[str, bool, bool], tuple[list[int], str, list[int]]]:
        return {}

    @cached_property
    def _added_tokens(self) -> re.Pattern[str]:
        names = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")

    def _ids(self, text: str, *, plain: bool = False) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)[
            "input_ids"
        ]
        return ids

    def _with_image(self, before: list[int], visual: Mapping[str, Array]) -> list[int]:
        """The image's one placeholder repeated for each of its tokens."""
        if not visual:
            return before
        if before.count(self.image_token_id) != 1:
            raise ConfigError(
                f"the prompt of an image has {before.count(self.image_token_id)} image tokens "
                f"(number {self.image_token_id}) instead of one; give the tokenizer and processor "
                "that belong to the model"
            )
        number = self.image_tokens
        if number is None:
            merged = self.image_processor.merge_size**2
            number = math.prod(visual["image_grid_thw"][0].tolist()) // merged
        place = before.index(self.image_token_id)
        return [*before[:place], *[self.image_token_id] * number, *before[place + 1 :]]

    def _fitted(
        self,
        head: list[int],
        glue: str,
        text: str | None,
        after: list[int],
        *,
        origin: str,
        image: bool,
    ) -> Array:
        """The whole sequence, at most ``max_length`` long; only the text's end is cut."""
        middle = [] if text is None else self._ids(glue + text, plain=True)
        least = len(self._ids(glue, plain=True)) + 1 if text is not None else 0
        if self.max_length is not None:
            room = self.max_length - len(head) - len(after)
            if room < least:
                taken = head.count(self.image_token_id)
                what = f"the image takes {taken} tokens" if image else "the text has no room"
                raise DataError(
                    f"{origin}: {what}, the prompt around it {len(head) - taken + len(after)}, "
                    f"more than max_seq_length={self.max_length} allows; raise max_seq_length"
                    + (" or lower max_pixels of the image processor" if image else "")
                )
            middle = middle[:room]
        return np.asarray([*head, *middle, *after], dtype=np.int64)


def build_vision_language_processor(
    tokenizer: Any, image_processor: Any, *, config: Any, files: Mapping[str, str], source: str
) -> VisionLanguageProcessor:
    """The processor of a vision-language model.

    Args:
        tokenizer: The model's; with a padding token.
        image_processor: The model's.
        config: The model's Hugging Face config, of a type in :data:`FAMILIES`.
        files: Content of the model folder's files of :data:`PROCESSOR_FILES`, where it has them.
        source: The folder, for messages.

    Raises:
        ConfigError: Tokenizer, image processor and model do not belong together.
    """
    inner = getattr(config, "vlm_config", None) or config
    number = int(inner.image_token_id)
    token = tokenizer.convert_ids_to_tokens(number) if number < len(tokenizer) else None
    if token is None or token not in tokenizer.get_added_vocab():
        raise ConfigError(
            f"{source}: token {number}, the model's image_token_id, is {token!r} in the tokenizer, "
            "which is no special token; give the tokenizer that belongs to the model"
        )
    _check_patches(image_processor, inner.vision_config, source=source)
    settings = json.loads(files.get("processor_config.json", "{}"))
    family = FAMILIES[config.model_type]
    return VisionLanguageProcessor(
        tokenizer=tokenizer,
        image_processor=image_processor,
        family=family,
        layout=family.layout(tokenizer, token, settings),
        image_token_id=number,
        image_tokens=None if hasattr(image_processor, "merge_size") else _num_patches(inner),
        settings_files={name: _without_image_processor(text) for name, text in files.items()},
    )


def _num_patches(config: Any) -> int:
    vision = config.vision_config
    return (int(vision.image_size) // int(vision.patch_size)) ** 2


def _check_patches(image_processor: Any, vision: Any, *, source: str) -> None:
    """Patches of another size would fail in the model's first layer, with no word of the cause."""
    names = {
        "patch_size": "patch_size",
        "temporal_patch_size": "temporal_patch_size",
        "merge_size": "spatial_merge_size",
    }
    for name, of_model in names.items():
        found, wanted = getattr(image_processor, name, None), getattr(vision, of_model, None)
        if found is not None and wanted is not None and found != wanted:
            raise ConfigError(
                f"{source}: {name}={found} in the image processor, but {of_model}={wanted} in the "
                f"model; set {name}: {wanted}"
            )


def _without_image_processor(text: str) -> str:
    """The image processor is saved in a file of its own, as it was used."""
    content = json.loads(text)
    content.pop("image_processor", None)
    return json.dumps(content, indent=2) + "\n"
