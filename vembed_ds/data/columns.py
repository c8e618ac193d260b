"""Which column of a table holds which part of which role, by the retrieval mode and the columns' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from vembed_ds.errors import ConfigError, DataError

Part = Literal["text", "image"]

TEXT: Part = "text"
IMAGE: Part = "image"

# What each letter of a retrieval mode asks of its side: parts that a record must have, and may.
REQUIRED: dict[str, tuple[Part, ...]] = {
    "t": (TEXT,),
    "i": (IMAGE,),
    "m": (TEXT, IMAGE),
    "x": (),
}
LETTERS = {"t": "a text", "i": "an image", "m": "a text and an image", "x": "either or both"}

# role, part -> (column_mapping key, default names), names in order of preference. What only one
# side of a mode can mean (`query` is an image in i2t) is added by `column_names`.
_COLUMNS: dict[tuple[str, Part], tuple[str, tuple[str, ...]]] = {
    ("query", TEXT): ("query", ("query", "caption")),
    ("query", IMAGE): ("query_image", ("query_image",)),
    ("positive", TEXT): ("positive", ("positive",)),
    ("positive", IMAGE): ("positive_image", ("positive_image", "image")),
    ("negative", TEXT): ("negatives", ("negatives",)),
    ("negative", IMAGE): ("negative_images", ("negative_images",)),
}


def read_mode(retrieval_mode: str) -> dict[str, str]:
    """The letters of a mode, by role.

    Raises:
        ConfigError: When it is not two of the letters around a 2.
    """
    first, _, last = retrieval_mode.partition("2")
    if first not in LETTERS or last not in LETTERS:
        known = ", ".join(f"{letter} ({meaning})" for letter, meaning in LETTERS.items())
        raise ConfigError(
            f"retrieval_mode={retrieval_mode!r}: not a known mode; write QUERY2POSITIVE with "
            f"{known}, for example t2i"
        )
    return {"query": first, "positive": last}


def refuse_videos(
    columns: Sequence[str], column_mapping: Mapping[str, str], *, origin: str
) -> None:
    """A record's video would be left out without a word."""
    for name in (*columns, *column_mapping):
        if name == "video" or name.endswith("_video"):
            raise DataError(
                f"{origin}: column {name!r}: video is not supported, only texts and images; remove "
                "or rename the column, or save frames as images"
            )


class ColumnChooser:
    """Finds the column of a role, by the mapping or by its default names.

    Args:
        columns: Of the table.
        column_mapping: Role to column.
        place: The data, for messages.
    """

    def __init__(
        self, columns: Sequence[str], column_mapping: Mapping[str, str], *, place: str
    ) -> None:
        self.columns, self.mapping, self.place = list(columns), column_mapping, place

    def find(self, keys: Sequence[str], names: Sequence[str]) -> str | None:
        """The column that one of the ``keys`` maps to, else the first of ``names`` that is there.

        Raises:
            DataError: A key maps to a column that is not there.
        """
        for key in keys:
            if key in self.mapping:
                return self._mapped(key)
        return next((name for name in names if name in self.columns), None)

    def _mapped(self, key: str) -> str:
        column = self.mapping[key]
        if column in self.columns:
            return column
        raise DataError(
            f"{self.place}: column_mapping {key}={column!r} names a missing column; "
            f"the columns are {listed(self.columns)}; correct column_mapping"
        )

    def missing(self, role: str, part: Part, letter: str) -> DataError:
        """The error for a part that no column holds."""
        keys, names = column_names(role, part, letter)
        what = "text or image" if letter == "x" else part
        return DataError(
            f"{self.place}: no column holds the {what} of the {role}: looked for "
            f"{listed(names)}, the columns are {listed(self.columns)}; "
            f"name the column with column_mapping: {{{keys[0]}: COLUMN}}"
        )


def column_names(role: str, part: Part, letter: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys and the default names of a column, in order of preference."""
    key, names = _COLUMNS[role, part]
    if part == IMAGE and letter == "i":
        # An image alone may also stand in the role's plain column (vembed-factory: `positive`).
        plain, _ = _COLUMNS[role, TEXT]
        return (key, plain), (*names, plain)
    return (key,), names


def listed(names: Sequence[str]) -> str:
    """Names for a message."""
    return ", ".join(repr(name) for name in names) or "none"
