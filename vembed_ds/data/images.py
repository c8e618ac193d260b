"""Opening images: always RGB, upright, fully read, or an error that names the record."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vembed_ds.data.cells import ImageSource
from vembed_ds.data.image_paths import file_problem
from vembed_ds.data.image_urls import ImageUrl, fetch_image
from vembed_ds.data.records import Item, Record
from vembed_ds.errors import DataError

# Others are never tried: some run programs (EPS) or are rarely looked at by anyone.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")

# What Pillow's decoders raise on damaged files, found by cutting and flipping bytes.
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def open_image(source: ImageSource, *, origin: str) -> Image.Image:
    """Opens one image.

    EXIF rotation is applied, transparency is laid on white, 16-bit grey is scaled to 8 bit,
    and an animation gives its first frame.

    Args:
        source: A path, an ``ImageUrl`` (which is fetched), encoded bytes, a PIL image or a dict with
            ``bytes`` and ``path``.
        origin: The record, for error messages.

    Returns:
        An RGB image, decoded into memory.

    Raises:
        DataError: When the file is missing or empty, or cannot be decoded whole.
    """
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path") or b""
    place = f"{origin}: image {source}" if isinstance(source, str) else f"{origin}: image"
    if isinstance(source, Image.Image):
        return _decoded(source, place=place)
    if isinstance(source, ImageUrl):
        source = fetch_image(source, place=f"{origin}: image")
    if isinstance(source, str) and (problem := file_problem(source)):
        raise DataError(f"{place} {problem}")
    if not source:
        raise DataError(f"{place} has no bytes; replace it or remove the record")
    return _decoded(source, place=place)


def first_missing_image(records: Iterable[Record]) -> DataError | None:
    """Looks for the first record whose image file is missing, without opening any image.

    Args:
        records: Records to look through; images that are not paths are passed over.

    Returns:
        The error to raise, naming record and path, or None when every file is there.
    """
    for record in records:
        for role, item in _items(record):
            if isinstance(item.image, str) and (problem := file_problem(item.image)):
                return DataError(f"record {record.index}, {role}: image {item.image} {problem}")
    return None


def _items(record: Record) -> Iterator[tuple[str, Item]]:
    yield "query", record.query
    yield "positive", record.positive
    for place, item in enumerate(record.negatives):
        yield f"negative {place}", item


def _decoded(source: str | bytes | Image.Image, *, place: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow only warns up to twice its pixel limit; both sides are refused here.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                return _to_rgb(ImageOps.exif_transpose(source))
            file = BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=FORMATS) as image:
                ImageOps.exif_transpose(image, in_place=True)  # else it makes a copy
                rgb = _to_rgb(image)
                return image.copy() if rgb is image else rgb
    except UnidentifiedImageError as error:
        raise DataError(
            f"{place} cannot be read: it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image, or "
            "a damaged one; replace the file or remove the record"
        ) from error
    except DECODER_ERRORS as error:
        raise DataError(
            f"{place} cannot be read ({type(error).__name__}: {error}); "
            "replace the file or remove the record"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise ValueError("float pixels have no defined range; convert the image to 8 bit")
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scales to 8 bit; Pillow's own ``convert`` cuts off everything above 255 in mode I."""
    pixels: np.ndarray[Any, Any] = np.asarray(image)
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        raise ValueError(f"pixel values {low} to {high} exceed 16 bit; convert the image to 8 bit")
    return Image.fromarray((pixels // 257).astype(np.uint8)).convert("RGB")
