"""Encoding of single items into small unpadded arrays, and padding of a chunk of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from vembed_ds.data.augment import ImageAugmentation
from vembed_ds.data.cells import ImageSource
from vembed_ds.data.image_paths import file_problem
from vembed_ds.data.image_urls import ImageUrl, fetch_image
from vembed_ds.data.images import open_image
from vembed_ds.data.records import Item, content_number
from vembed_ds.data.vector_table import VectorTable
from vembed_ds.errors import ConfigError, DataError
from vembed_ds.streams import FEATURES, IMAGE_INPUTS, JOINT

Array = np.ndarray[Any, Any]

FILLER_TEXT = "a"
FILLER_EDGE = 224


class EncodedItem(NamedTuple):
    """The model inputs of one item, without padding or batch dimension.

    Args:
        stream: ``text``, ``image``, or ``joint`` for an item that has both.
        inputs: ``input_ids``, ``attention_mask``, ``token_type_ids`` (what the tokenizer
            gives): ``[L]`` int64; ``pixel_values``: ``[C, H, W]`` float32; ``features``,
            ``image_features``: ``[H]`` float32, the stored output of a frozen tower, which replaces
            its inputs.
    """

    stream: str
    inputs: dict[str, Array]


@dataclass(eq=False)
class ItemProcessor:
    """Encodes items and pads chunks of them; picklable.

    Args:
        tokenizer: A Hugging Face tokenizer with a padding token; None without texts.
        image_processor: A Hugging Face image processor; None without images.
        max_length: Longest token sequence, in tokens; longer texts are truncated.
        pad_to_max_length: Pad every text to ``max_length`` already when it is encoded
            (SigLIP was trained that way).
        augmentation: Applied to images that are encoded with a seed.
        stored: Features of frozen towers, by kind of item: of texts by :func:`text_key`, of images
            by :func:`image_key`. They replace what the tower would be given.
        round_lengths: Pad the texts of a chunk to one of a few lengths, see :func:`rounded_length`.
    """

    tokenizer: Any = None
    image_processor: Any = None
    max_length: int | None = None
    pad_to_max_length: bool = False
    augmentation: ImageAugmentation | None = None
    stored: dict[str, VectorTable] = field(default_factory=dict)
    round_lengths: bool = False

    def encode(self, item: Item, *, origin: str, augment_seed: int | None) -> EncodedItem:
        """Encodes one item.

        Args:
            item: A text, an image, or both.
            origin: The record, for error messages.
            augment_seed: Seed of the augmentation; None for none (evaluation).

        Returns:
            The encoded item.

        Raises:
            DataError: When the image cannot be read, the text gives no token, or no features
                are stored for it.
            ConfigError: When there is no tokenizer or image processor for the item.
        """
        inputs: dict[str, Array] = {}
        if item.text is not None:
            inputs |= self._encode_text(item.instruction + item.text, origin=origin)
        if item.image is not None:
            inputs |= self._encode_image(item, origin=origin, seed=augment_seed)
        return EncodedItem(stream_of(item, origin=origin), inputs)

    def pad(self, stream: str, items: Sequence[EncodedItem]) -> dict[str, torch.Tensor]:
        """Joins encoded items of one stream.

        Args:
            stream: ``text``, ``image`` or ``joint``.
            items: B items of that stream, at least one.

        Returns:
            ``[B, L]`` int64 for token inputs, padded on the right to the longest or a little further;
            ``[B, C, H, W]`` or ``[B, H]`` float32 for images and features.

        Raises:
            DataError: When images have different shapes.
        """
        columns = {name: [item.inputs[name] for item in items] for name in items[0].inputs}
        return {
            name: _stacked(name, rows)
            if name in IMAGE_INPUTS or name in FEATURES.values()
            else self._padded(name, rows)
            for name, rows in columns.items()
        }

    def filler(self, stream: str) -> EncodedItem:
        """A valid item that means nothing, for ranks that have nothing to encode."""
        inputs: dict[str, Array] = {}
        for part in ("text", "image") if stream == JOINT else (stream,):
            if part in self.stored:
                width = self.stored[part].width
                inputs[FEATURES[part]] = np.zeros(width, dtype=np.float32)
            elif part == "text":
                inputs |= self._encode_text(FILLER_TEXT, origin="filler")
            else:
                blank = Image.new("RGB", (FILLER_EDGE, FILLER_EDGE), "white")
                inputs |= self._encode_image(Item(image=blank), origin="filler", seed=None)
        return EncodedItem(stream, inputs)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer and image processor files into a model folder."""
        for part in (self.tokenizer, self.image_processor):
            if part is not None:
                part.save_pretrained(str(folder))

    def _encode_text(self, text: str, *, origin: str) -> dict[str, Array]:
        if "text" in self.stored:
            return self._looked_up("text", text_key(text), origin=f"{origin}: {text[:80]!r}")
        if self.tokenizer is None:
            raise ConfigError(f"{origin}: text, but the model has no tokenizer; use an image mode")
        tokens = self.tokenizer(
            text,
            truncation=True,
            max_length=self.max_length,
            padding="max_length" if self.pad_to_max_length else False,
            padding_side="right",  # Gemma's tokenizer, SigLIP2's, says left; see `_padded`
        )
        if not tokens["input_ids"]:
            raise DataError(
                f"{origin}: the tokenizer gives no token for {text[:80]!r}; remove the record"
            )
        return {name: np.asarray(values, dtype=np.int64) for name, values in tokens.items()}

    def _looked_up(self, part: str, key: int, *, origin: str) -> dict[str, Array]:
        try:
            return {FEATURES[part]: self.stored[part].lookup(np.array([key]))[0]}
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error

    def _encode_image(self, item: Item, *, origin: str, seed: int | None) -> dict[str, Array]:
        if self.image_processor is None:
            raise ConfigError(
                f"{origin}: image, but the model has no image processor; use a text mode"
            )
        assert item.image is not None
        if "image" in self.stored:
            return self._looked_up("image", image_key(item.image), origin=origin)
        image = open_image(item.image, origin=origin)
        if self.augmentation is not None and seed is not None:
            image = self._augmented(image, origin=origin, seed=seed)
        self._refuse_stretching(image, origin=origin)
        # Numpy needs the layout said: it is guessed wrong for images 1 or 3 pixels high.
        output = self.image_processor(
            np.asarray(image), input_data_format="channels_last", return_tensors="np"
        )
        rows = {name: np.asarray(output[name][0]) for name in IMAGE_INPUTS if name in output}
        return rows | {"pixel_values": rows["pixel_values"].astype(np.float32, copy=False)}

    def _refuse_stretching(self, image: Image.Image, *, origin: str) -> None:
        """One row of 20,000 pixels, its shortest edge made 224, is a billion: the crop is too late."""
        size: Any = getattr(self.image_processor, "size", None) or {}
        edge, limit = size.get("shortest_edge"), Image.MAX_IMAGE_PIXELS
        if not edge or size.get("longest_edge") or limit is None:
            return
        ratio = max(image.size) / min(image.size)
        if self.image_processor.do_resize and edge**2 * ratio > limit:
            raise DataError(
                f"{origin}: image of {image.width} x {image.height} pixels: with its shortest edge "
                f"made {edge} it would have more than {limit} pixels; crop it or remove the record"
            )

    def _augmented(self, image: Image.Image, *, origin: str, seed: int) -> Image.Image:
        assert self.augmentation is not None
        try:
            return self.augmentation.apply(image, seed=seed)
        except Exception as error:  # kornia's own checks raise plain Exception
            raise DataError(
                f"{origin}: image_augmentation fails on this image of {image.width} x "
                f"{image.height} pixels ({error}); change image_augmentation"
            ) from error

    def _padded(self, name: str, rows: Sequence[Array]) -> torch.Tensor:
        """``tokenizer.pad`` without its detour over Python lists and its warnings."""
        fill = {
            "input_ids": self.tokenizer.pad_token_id,
            "token_type_ids": self.tokenizer.pad_token_type_id,
        }.get(name, 0)
        length = max(len(row) for row in rows)
        if self.round_lengths:
            length = rounded_length(length, limit=self.max_length)
        padded = np.full((len(rows), length), fill, dtype=np.int64)
        for target, row in zip(padded, rows, strict=True):
            # On the right whatever the tokenizer says: absolute positions count from the left, so
            # left padding would let a text's embedding depend on its neighbours' lengths.
            target[: len(row)] = row
        return torch.from_numpy(padded)


def rounded_length(length: int, *, limit: int | None) -> int:
    """The next of 16, 24, 32, 48, 64, 96, 128, ..., but no more than ``limit``."""
    power = 1 << max(4, (length - 1).bit_length())
    half = power * 3 // 4
    rounded = half if length <= half and power > 16 else power
    return rounded if limit is None else max(length, min(rounded, limit))


def stream_of(item: Item, *, origin: str) -> str:
    """The stream an item belongs to.

    Raises:
        DataError: When the item has neither text nor image.
    """
    if item.text is None and item.image is None:
        raise DataError(f"{origin}: the item has neither text nor image; give one")
    if item.text is not None and item.image is not None:
        return JOINT
    return "text" if item.text is not None else "image"


def text_key(text: str) -> int:
    """A text as the key of a :class:`VectorTable`, the same in every process."""
    return content_number(text.encode("utf-8", "surrogatepass"))


def image_key(source: ImageSource) -> int:
    """An image as the key of a :class:`VectorTable`: its bytes, wherever they lie.

    Raises:
        DataError: A file cannot be read.
    """
    return content_number(content_key(Item(image=source), read_files=True).encode())


def content_key(item: Item, *, read_files: bool = False) -> str:
    """A hash that is equal for equal texts, image bytes, or image paths.

    The instruction does not count.

    Args:
        item: A text, an image, or both.
        read_files: An image path or URL counts as the bytes behind it; otherwise two paths are two
            keys, whatever the files hold.

    Returns:
        The kind and 32 hexadecimal digits, stable over processes; for both, joined by ``+``.

    Raises:
        DataError: A file cannot be read.
    """
    found = []
    if item.text is not None:
        found.append(_digest("text", item.text.encode("utf-8", "surrogatepass")))
    if item.image is not None:
        found.append(_image_key(item.image, read_files=read_files))
    return "+".join(found)


def _image_key(source: Any, *, read_files: bool) -> str:
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, ImageUrl):
        if read_files:
            return _digest("bytes", fetch_image(source, place="image"))
        return _digest("url", source.encode("utf-8", "surrogatepass"))
    if isinstance(source, str) and read_files:
        return _file_key(source)
    if isinstance(source, str):
        return _digest("path", str(Path(source).absolute()).encode())
    if isinstance(source, bytes):
        return _digest("bytes", source)
    return _digest("pixels", f"{source.mode}{source.size}".encode() + source.tobytes())


def _file_key(path: str) -> str:
    """As if the bytes of the file stood in the record."""
    if problem := file_problem(path):
        raise DataError(f"image {path} {problem}")
    try:
        with Path(path).open("rb") as file:
            return f"bytes:{file_digest(file, _hasher).hexdigest()}"
    except OSError as error:
        raise DataError(f"image {path} cannot be read: {error}") from error


def _hasher(data: bytes = b"") -> blake2b:
    return blake2b(data, digest_size=16)


def _digest(kind: str, data: bytes) -> str:
    return f"{kind}:{_hasher(data).hexdigest()}"


def _stacked(name: str, rows: Sequence[Array]) -> torch.Tensor:
    shapes = sorted({row.shape for row in rows})
    if len(shapes) > 1:
        raise DataError(
            f"{name} of one chunk have the shapes {', '.join(map(str, shapes))}; set a fixed "
            "size (size and do_resize, or crop_size) in the image processor"
        )
    return torch.from_numpy(np.stack(rows))
