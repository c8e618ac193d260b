"""What one row of a table means: which columns hold the query and its positive.

The columns are chosen once, from their names and the retrieval mode. A value is never
inspected to guess its type, so a caption such as ``"and/or"`` stays a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from vembed_ds.errors import ConfigError, DataError

Stream = Literal["text", "image"]
ImageSource = str | bytes | Image.Image | dict[str, Any]

STREAM_OF_LETTER: dict[str, Stream] = {"t": "text", "i": "image"}

# role, stream -> (column_mapping keys, default column names), each in order of preference.
COLUMN_CANDIDATES: dict[tuple[str, Stream], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("query", "text"): (("query",), ("query", "caption")),
    ("query", "image"): (("query_image", "query"), ("query_image", "query")),
    ("positive", "text"): (("positive",), ("positive",)),
    ("positive", "image"): (
        ("positive_image", "positive"),
        ("positive_image", "image", "positive"),
    ),
}


NEGATIVES = "negatives"


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to embed: a text or an image.

    Args:
        text: The text, not blank.
        image: A path, encoded bytes, a PIL image or a ``datasets`` dict with the keys
            ``bytes`` and ``path``.
    """

    text: str | None = None
    image: ImageSource | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One training pair and its row number in the table."""

    index: int
    query: Item
    positive: Item


class RecordReader:
    """Turns table rows into records.

    Args:
        columns: Column names of the table.
        retrieval_mode: ``t2t``, ``t2i``, ``i2t`` or ``i2i``; the first letter says what the
            query is, the last what the positive is.
        column_mapping: Role (``query``, ``query_image``, ``positive``, ``positive_image``) to
            column name; beats the default names.
        image_root: Folder that relative image paths start from; empty for the working folder.
        origin: Name of the data in error messages, usually its path.

    Raises:
        ConfigError: When the retrieval mode is not one of the four.
        DataError: When a column is missing, or one is there that would be ignored.
    """

    def __init__(
        self,
        columns: Sequence[str],
        *,
        retrieval_mode: str,
        column_mapping: Mapping[str, str],
        image_root: str,
        origin: str,
    ) -> None:
        if NEGATIVES in columns:
            raise DataError(
                f"{origin}: column {NEGATIVES!r}: explicit negatives are not trained on in this "
                "version, and nothing is dropped in silence; remove or rename the column"
            )
        self.origin = origin
        self.image_root = image_root
        self.streams = _streams(retrieval_mode)
        self.role_columns = {
            role: _choose_column(
                role,
                stream=stream,
                columns=columns,
                column_mapping=column_mapping,
                place=f"{origin} (retrieval_mode={retrieval_mode})",
            )
            for role, stream in self.streams.items()
        }

    @property
    def columns(self) -> list[str]:
        """The columns that are read, each once; hand them to ``select_columns``."""
        return list(dict.fromkeys(self.role_columns.values()))

    def read(self, row: Mapping[str, Any], index: int) -> Record:
        """Reads one row.

        Args:
            row: Column name to value.
            index: Row number in the table, from 0.

        Returns:
            The record; relative image paths are joined with ``image_root``.

        Raises:
            DataError: When a value is empty, blank or of the wrong type.
        """
        return Record(index, self._item("query", row, index), self._item("positive", row, index))

    def _item(self, role: str, row: Mapping[str, Any], index: int) -> Item:
        column = self.role_columns[role]
        place = f"{self.origin}, record {index}, column {column!r}"
        if self.streams[role] == "text":
            return Item(text=_checked_text(row[column], place=place))
        return Item(image=_checked_image(row[column], image_root=self.image_root, place=place))


def _streams(retrieval_mode: str) -> dict[str, Stream]:
    """The stream of each role, from the letters of the mode."""
    first, _, last = retrieval_mode.partition("2")
    if first not in STREAM_OF_LETTER or last not in STREAM_OF_LETTER:
        raise ConfigError(
            f"retrieval_mode={retrieval_mode!r}: not a known mode; use t2t, t2i, i2t or i2i"
        )
    return {"query": STREAM_OF_LETTER[first], "positive": STREAM_OF_LETTER[last]}


def _choose_column(
    role: str,
    *,
    stream: Stream,
    columns: Sequence[str],
    column_mapping: Mapping[str, str],
    place: str,
) -> str:
    keys, names = COLUMN_CANDIDATES[role, stream]
    for key in keys:
        if key in column_mapping:
            return _mapped_column(key, column_mapping[key], columns=columns, place=place)
    for name in names:
        if name in columns:
            return name
    raise DataError(
        f"{place}: no column holds the {stream} of the {role}: looked for "
        f"{_listed(names)}, the columns are {_listed(columns)}; "
        f"name the column with column_mapping: {{{keys[0]}: COLUMN}}"
    )


def _mapped_column(key: str, column: str, *, columns: Sequence[str], place: str) -> str:
    if column in columns:
        return column
    raise DataError(
        f"{place}: column_mapping {key}={column!r} names a missing column; "
        f"the columns are {_listed(columns)}; correct column_mapping"
    )


def _checked_text(value: object, *, place: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{place}: {value!r} is a blank text; remove the record or fill it in")
    if not isinstance(value, str):
        raise DataError(
            f"{place}: {_shortened(value)} is {type(value).__name__}, not text; "
            "write it as a string, or name the text column with column_mapping"
        )
    return value


def _checked_image(value: object, *, image_root: str, place: str) -> ImageSource:
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.strip():
        return str(Path(image_root) / value)
    if isinstance(value, (bytes, Image.Image)) and value:
        return value
    if value is None or isinstance(value, (str, bytes)):
        raise DataError(f"{place}: {value!r} is no image; remove the record or fill it in")
    raise DataError(
        f"{place}: {_shortened(value)} is {type(value).__name__}, not an image; give a path, "
        "encoded bytes or an image column, or name the image column with column_mapping"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"


def _shortened(value: object, *, length: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
