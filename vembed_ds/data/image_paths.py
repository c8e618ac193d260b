"""Which files a record may name as its image: those below ``image_root``, and a URL only where allowed.

Records often come from other people; none may make the training process read a file of the
machine, wait for a pipe or, unasked, talk to a server.
"""

from __future__ import annotations

import re
from pathlib import Path

from vembed_ds.data.image_urls import ImageUrl, is_http_url
from vembed_ds.errors import DataError

MAX_FILE_BYTES = 2**30
_URL = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*://|(?:data|file|blob|javascript):)", re.IGNORECASE)


def resolve_image_path(
    path: str,
    *,
    image_root: str,
    place: str,
    allow_outside: bool = False,
    allow_urls: bool = False,
) -> str:
    """Where an image lies.

    Args:
        path: As the record has it.
        image_root: Folder that relative paths start from, and that no path may leave; empty:
            the working folder, and any path.
        place: The record, for messages.
        allow_outside: Whether paths may leave ``image_root``.
        allow_urls: Whether it may be an http or https URL.

    Returns:
        The path, joined with ``image_root``; links are left as they are. A URL that is allowed: an
        ``ImageUrl``, not fetched.

    Raises:
        DataError: For a URL that is not allowed, and a path that leaves ``image_root`` by ``..``, by a link or by
            being absolute.
    """
    if is_http_url(path):
        if allow_urls:
            return ImageUrl(path)
        raise DataError(
            f"{place}: image {path[:200]!r} {name_problem(path)}, or set allow_image_urls: true "
            "when you trust the data"
        )
    if problem := name_problem(path):
        raise DataError(f"{place}: image {path[:200]!r} {problem}")
    joined = Path(image_root) / path
    if allow_outside or _is_inside(joined, image_root, path, place=place):
        return str(joined)
    raise DataError(
        f"{place}: image {path[:200]!r} lies outside image_root={image_root!r}; move it there, set image_root to a folder "
        "above all images, or allow_images_outside_root: true when you trust the data"
    )


def name_problem(path: str) -> str | None:
    """Why a text cannot be the name of an image file, or None."""
    if _URL.match(path):
        kind = path.partition(":")[0].lower()
        return f"is a {kind}: URL, and nothing is fetched while training; download it first"
    if "\0" in path:
        return "holds a NUL byte; write the file again"
    return None


def file_problem(path: str) -> str | None:
    """Why a file cannot be an image, by its name and directory entry alone, or None.

    Of an ``ImageUrl`` nothing is known before it is fetched.
    """
    if isinstance(path, ImageUrl):
        return None
    if problem := name_problem(path):
        return problem
    file = Path(path)
    try:
        if not file.exists():
            return "does not exist; correct the path, or image_root where one is set"
        if not file.is_file():  # opening a pipe would wait for ever, a device never end
            return "is not a file; give the path of one image"
        size = file.stat().st_size
    except OSError as error:
        return f"cannot be looked at ({error.strerror}); correct the path, or image_root where one is set"
    if size == 0:
        return "is an empty file; replace it or remove the record"
    if size > MAX_FILE_BYTES:
        return f"is larger than {MAX_FILE_BYTES >> 30} GiB; replace it or remove the record"
    return None


def _is_inside(joined: Path, image_root: str, path: str, *, place: str) -> bool:
    if not image_root:  # the working folder is where a user happens to be, and keeps nothing in
        return True
    try:
        return joined.resolve().is_relative_to(Path(image_root).resolve())
    except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long
        raise DataError(
            f"{place}: image {path[:200]!r} cannot be looked at ({error}); correct the path"
        ) from error
