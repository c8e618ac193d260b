from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.memory import measure
from vembed_ds.data.image_paths import MAX_FILE_BYTES
from vembed_ds.data.images import first_missing_image, open_image
from vembed_ds.data.records import Item, Record
from vembed_ds.errors import DataError

Noise = Callable[..., Image.Image]


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(source: Any) -> Image.Image:
    return open_image(source, origin="a.jsonl, record 3")


def test_path_bytes_dict_and_pil_give_the_same_pixels(tmp_path: Path, noise: Noise) -> None:
    image = noise()
    data = encoded(image)
    (tmp_path / "a.png").write_bytes(data)
    path = str(tmp_path / "a.png")
    sources = [path, data, image, {"bytes": data, "path": None}, {"bytes": None, "path": path}]
    for source in sources:
        result = opened(source)
        assert result.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(result), np.asarray(image))


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("LA", (4, 4), (0, 128))
    palette = Image.new("P", (4, 4))
    palette.putpalette([10, 20, 30])
    assert opened(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert opened(encoded(half)).getpixel((0, 0)) == (127, 127, 127)
    assert opened(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert opened(encoded(palette)).getpixel((0, 0)) == (10, 20, 30)


def test_transparent_colour_of_an_rgb_png_becomes_white() -> None:
    data = encoded(Image.new("RGB", (4, 4), (9, 9, 9)), transparency=(9, 9, 9))
    assert opened(data).getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_is_converted() -> None:
    red, green, blue = opened(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG")).getpixel(
        (0, 0)
    )  # type: ignore[misc]
    assert red < 10
    assert min(green, blue) > 245


@pytest.mark.parametrize(
    ("kind", "dtype"), [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32)]
)
def test_16_bit_grey_is_scaled_not_clipped(kind: str, dtype: type) -> None:
    pixels = np.array([[0, 257, 32896, 65535]], dtype=dtype)
    result = np.asarray(opened(encoded(Image.fromarray(pixels), kind)))
    assert result[0, :, 0].tolist() == [0, 1, 128, 255]


def test_values_beyond_16_bit_and_floats_are_refused() -> None:
    wide = Image.fromarray(np.array([[0, 70000]], dtype=np.int32))
    with pytest.raises(DataError, match="pixel values 0 to 70000 exceed 16 bit"):
        opened(encoded(wide, "TIFF"))
    with pytest.raises(DataError, match="float pixels have no defined range"):
        opened(encoded(Image.fromarray(np.ones((2, 2), dtype=np.float32)), "TIFF"))


def test_one_bit_image_is_converted() -> None:
    assert opened(encoded(Image.new("1", (2, 2), 1))).getpixel((0, 0)) == (255, 255, 255)


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert opened(data).getpixel((0, 0)) == (255, 0, 0)


def test_exif_rotation_is_applied(noise: Noise) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 270 degrees
    result = opened(encoded(noise(width=20, height=10), exif=exif))
    assert result.size == (10, 20)


def test_missing_file_names_record_path_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "none.png"
    with pytest.raises(
        DataError, match=rf"a.jsonl, record 3: image {path} does not exist; correct"
    ):
        opened(str(path))


def test_directory_is_not_an_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a file; give the path of one image"):
        opened(str(tmp_path))


def test_empty_file_and_empty_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match=r"a.png is an empty file"):
        opened(str(tmp_path / "a.png"))
    for nothing in (b"", {"bytes": None, "path": None}):
        with pytest.raises(DataError, match="record 3: image has no bytes"):
            opened(nothing)


def test_text_file_is_not_an_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(
        DataError, match=r"a.png cannot be read: it is no PNG, JPEG, .* or PPM image, or"
    ):
        opened(str(tmp_path / "a.png"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF"])
def test_half_a_file_is_an_error(kind: str, noise: Noise) -> None:
    data = encoded(noise(width=64, height=64), kind)
    with pytest.raises(DataError, match=r"cannot be read.*; replace the file or remove the record"):
        opened(data[: len(data) // 2])


def test_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch, noise: Noise) -> None:
    data = encoded(noise(width=20, height=20))
    for limit, name in ((300, "DecompressionBombWarning"), (100, "DecompressionBombError")):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=name):
            opened(data)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about odd metadata
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF"])
def test_damaged_bytes_give_an_rgb_image_or_a_data_error(kind: str, noise: Noise) -> None:
    generator = np.random.default_rng(0)
    original = np.frombuffer(encoded(noise(), kind), dtype=np.uint8)
    outcomes = set()
    for _ in range(150):
        data = original[: generator.integers(1, len(original) + 1)].copy()
        places = generator.integers(0, len(data), size=4)
        data[places] = generator.integers(0, 256, size=4)
        try:
            outcomes.add(opened(data.tobytes()).mode)
        except DataError:
            outcomes.add("error")
    assert "error" in outcomes
    assert outcomes <= {"RGB", "error"}


def test_a_pipe_or_a_device_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer for ever
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(DataError, match=f"image {path} is not a file; give the path of one"):
            opened(str(path))


def test_a_huge_file_is_not_opened(tmp_path: Path) -> None:
    with (tmp_path / "a.webp").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(DataError, match=r"a\.webp is larger than 1 GiB; replace it"):
        opened(str(tmp_path / "a.webp"))


@pytest.mark.parametrize(
    "name", ["https://a.b/c.png", "file:///etc/passwd", "data:image/png;base64,"]
)
def test_a_url_is_never_fetched(name: str) -> None:
    kind = name.partition(":")[0]
    with pytest.raises(
        DataError, match=f"is a {kind}: URL, and nothing is fetched .*; download it"
    ):
        opened(name + "x" * 5000)


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(DataError, match=r"cannot be looked at .*File name too long.*; correct the"):
        opened("x" * 5000)


def test_formats_that_run_programs_are_not_tried() -> None:
    data = encoded(Image.new("RGB", (4, 4)), "EPS")  # Pillow would start Ghostscript
    with pytest.raises(
        DataError, match="it is no PNG, JPEG, WEBP, GIF, BMP, TIFF, AVIF, JPEG2000 or"
    ):
        opened(data)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, before: bytes = b"") -> bytes:
    """A white one-bit PNG, written row by row; 50,000 pixels square take 40 KB."""
    packer = zlib.compressobj(9)
    row = b"\0" + b"\xff" * (-(-width // 8))
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def bomb_text() -> bytes:
    return b"comment\0\0" + zlib.compress(b"x" * 300_000_000, 9)


def many_frames() -> bytes:
    frame = Image.new("P", (2000, 2000))
    return encoded(
        frame, "GIF", save_all=True, append_images=[frame, Image.new("P", (2000, 2000), 1)] * 40
    )


def wide_gif() -> bytes:
    """A screen of 65,535 pixels square around one small frame."""
    data = bytearray(encoded(Image.new("P", (4, 4)), "GIF"))
    data[6:10] = b"\xff\xff\xff\xff"
    return bytes(data)


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "png": (lambda: png(50_000, 50_000), "DecompressionBombError"),
    "text": (lambda: png(8, 8, before=chunk(b"zTXt", bomb_text())), "MAX_TEXT_CHUNK"),
    "profile": (lambda: png(8, 8, before=chunk(b"iCCP", bomb_text())), "MAX_TEXT_CHUNK"),
    "screen": (wide_gif, "DecompressionBombError"),
    "frames": (many_frames, ""),
    "exif": (
        lambda: encoded(Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\0\0" + b"II*\0" * 16_000),
        "",
    ),
}


def opened_in_a_process(path: Path) -> tuple[int, str]:
    """Megabytes, and the mode of the image or the error."""
    return measure(
        "from vembed_ds.data.images import open_image\nfrom vembed_ds.errors import DataError",
        """
try:
    outcome = open_image(sys.argv[1], origin="a").mode
except DataError as error:
    outcome = str(error)
""",
        str(path),
    )


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.one_in(2)
def test_bombs_are_refused_in_bounded_memory(tmp_path: Path, name: str) -> None:
    """The pixels of the PNG alone would be 2.5 GB."""
    make, message = BOMBS[name]
    (tmp_path / "bomb").write_bytes(make())
    megabytes, outcome = opened_in_a_process(tmp_path / "bomb")
    assert megabytes < 100
    assert (message in outcome and "cannot be read" in outcome) if message else outcome == "RGB"


def animation(size: tuple[int, int]) -> bytes:
    frames = [Image.new("P", size, index) for index in range(3)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


LARGEST = (9400, 9400)  # Pillow's limit is 89 million pixels


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        # On white: the image, the white, both together, and the RGB of it; four bytes a pixel.
        (lambda: encoded(Image.new("RGBA", LARGEST)), 1500),
        (lambda: encoded(Image.new("CMYK", LARGEST), "JPEG"), 800),
        (lambda: encoded(Image.fromarray(np.zeros(LARGEST, np.uint16))), 1100),
        (lambda: animation(LARGEST), 600),
    ],
    ids=["transparent", "CMYK", "16 bit", "animated"],
)
@pytest.mark.one_in(3)
def test_the_largest_image_takes_bounded_memory(
    tmp_path: Path, make: Callable[[], bytes], limit: int
) -> None:
    (tmp_path / "large").write_bytes(make())
    megabytes, outcome = opened_in_a_process(tmp_path / "large")
    assert outcome == "RGB"
    assert megabytes < limit


def test_16_bit_colour_keeps_its_high_byte() -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    pixel = chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">HHH", 0x12FF, 0x8000, 0xFFFF)))
    data = b"\x89PNG\r\n\x1a\n" + header + pixel + chunk(b"IEND", b"")
    assert opened(data).getpixel((0, 0)) == (0x12, 0x80, 0xFF)


def test_first_missing_image_only_looks_at_files(tmp_path: Path) -> None:
    (tmp_path / "there.png").write_text("not an image, but there")
    there, gone = Item(image=str(tmp_path / "there.png")), Item(image=str(tmp_path / "gone.png"))
    text = Item(text="gone.png")
    good = [Record(0, text, there), Record(1, there, Item(image=b"bytes"))]
    assert first_missing_image(good) is None
    error = first_missing_image([*good, Record(2, text, gone), Record(3, gone, text)])
    assert isinstance(error, DataError)
    assert str(error).startswith(f"record 2, positive: image {tmp_path}/gone.png does not exist")
