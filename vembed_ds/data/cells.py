"""What the value in one cell of a table may be."""

from __future__ import annotations

import re
from datetime import date
from typing import Any

from PIL import Image

from vembed_ds.errors import DataError

ImageSource = str | bytes | Image.Image | dict[str, Any]

# What JSON, Python and numpy write of a list of texts, as CSV and TSV keep it: one text.
_WRITTEN_LIST = re.compile(r"""\s*\[\s*(?:["'].*["']\s*)?\]\s*""", re.DOTALL)


def only_value(value: Any, role: str, *, place: str) -> Any:
    """The value of a role that has one, also out of a list, as FlagEmbedding writes positives.

    Raises:
        DataError: The list has several.
    """
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) > 1:
        raise DataError(
            f"{place}: {shortened(value)} is {len(value)} values, and a record has one {role}; "
            "write one record for each"
        )
    return value[0] if value else None


def as_list(value: Any, *, place: str) -> list[Any]:
    """The values of the negatives; one alone counts as a list.

    Raises:
        DataError: It is nothing of the kind, or a list that was written as text.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return []  # a CSV file has no other way to say that there is none
    if isinstance(value, str) and _WRITTEN_LIST.fullmatch(value):
        raise DataError(
            f"{place}: {shortened(value)} is a list written as one text; a CSV or TSV cell holds one "
            "negative or none, so save the data as JSONL or Parquet with a list there"
        )
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, (str, bytes, dict, Image.Image)):
        return [value]
    raise DataError(
        f"{place}: {shortened(value)} is {type(value).__name__}, not a list of negatives"
    )


def is_absent(value: Any) -> bool:
    """Whether a record leaves the cell empty."""
    if isinstance(value, dict):
        return not (value.get("bytes") or value.get("path"))
    return value is None or (isinstance(value, (str, bytes)) and not value.strip())


def checked_text(value: object, *, place: str) -> str:
    """A text that is not blank.

    Raises:
        DataError: It is none.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{place}: {value!r} is a blank text; remove the record or fill it in")
    if isinstance(value, date):
        raise DataError(
            f"{place}: {value!s} was read as a date, because JSON texts that are all dates are; "
            "save the data as CSV or Parquet, or name the text column with column_mapping"
        )
    if not isinstance(value, str):
        raise DataError(
            f"{place}: {shortened(value)} is {type(value).__name__}, not text; "
            "write it as a string, or name the text column with column_mapping"
        )
    return value


def checked_image(value: object, *, place: str) -> ImageSource:
    """What an image can be opened from; of a ``datasets`` dict, the bytes or the path in it.

    Raises:
        DataError: It is no such thing.
    """
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, (bytes, Image.Image)) and value:
        return value
    if value is None or isinstance(value, (str, bytes)):
        raise DataError(f"{place}: {value!r} is no image; remove the record or fill it in")
    raise DataError(
        f"{place}: {shortened(value)} is {type(value).__name__}, not an image; give a path, "
        "encoded bytes or an image column, or name the image column with column_mapping"
    )


def shortened(value: object, *, length: int = 80) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
