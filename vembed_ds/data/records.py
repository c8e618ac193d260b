"""What one row of a table means: which columns hold the query, its positive and its negatives.

The columns are chosen once, from their names and the retrieval mode. A value is never
inspected to guess its type, so a caption such as ``"and/or"`` stays a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from vembed_ds.data.cells import (
    ImageSource,
    as_list,
    checked_image,
    checked_text,
    is_absent,
    only_value,
)
from vembed_ds.data.columns import (
    IMAGE,
    REQUIRED,
    TEXT,
    ColumnChooser,
    Part,
    column_names,
    listed,
    read_mode,
    refuse_videos,
)
from vembed_ds.data.image_paths import resolve_image_path
from vembed_ds.data.scores import checked_score, find_teacher_columns, given_score_roles
from vembed_ds.errors import DataError

_LABEL_COLUMNS = ("label", "class_id")  # not `id`, which numbers records more often than classes
_SCORE_COLUMNS = ("score",)


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to embed: a text, an image, or both.

    Args:
        text: The text, not blank.
        image: A path, encoded bytes, a PIL image or a ``datasets`` dict with the keys
            ``bytes`` and ``path``.
        instruction: What the model is told to do with it: put before the text, or the system
            message of a vision-language model.
    """

    text: str | None = None
    image: ImageSource | None = None
    instruction: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """One training pair and its row number in the table.

    Args:
        index: Row number.
        query: What is searched with.
        positive: What answers it.
        negatives: What does not.
        label: Class of the pair; pairs of one class answer each other's queries.
        score: Graded similarity of query and positive.
        teacher_score: A teacher's score of query and positive, where the data has them and they
            are wanted.
        negative_scores: The same of query and each negative, where the data has negatives.
    """

    index: int
    query: Item
    positive: Item
    negatives: tuple[Item, ...] = ()
    label: int | None = None
    score: float | None = None
    teacher_score: float | None = None
    negative_scores: tuple[float, ...] | None = None

    @property
    def items(self) -> dict[str, Sequence[Item]]:
        """All items, by role."""
        return {"query": [self.query], "positive": [self.positive], "negative": self.negatives}


class RecordReader:
    """Turns table rows into records.

    Args:
        columns: Column names of the table.
        retrieval_mode: Two letters around a 2: what the query and what the positive is. ``t`` is
            a text, ``i`` an image, ``m`` both together, ``x`` whatever the record holds.
            Negatives are of the positive's kind.
        column_mapping: Role (``query``, ``query_image``, ``positive``, ``positive_image``,
            ``negatives``, ``negative_images``, ``label``, ``score``, ``pos_scores``,
            ``neg_scores``) to column name; beats the default names.
        image_root: Folder that relative image paths start from; empty for the working folder.
        origin: Name of the data in error messages, usually its path.
        instructions: Instruction of the ``query`` and the ``positive`` (and its negatives).
        allow_images_outside_root: Whether image paths may leave ``image_root``.
        allow_image_urls: Whether images may be http and https URLs.
        teacher_scores: Whether a teacher's scores are wanted; otherwise they are not read.

    Raises:
        ConfigError: When the retrieval mode is not known.
        DataError: When a column is missing, is one of videos, or has scores of no negatives.
    """

    def __init__(
        self,
        columns: Sequence[str],
        *,
        retrieval_mode: str,
        column_mapping: Mapping[str, str],
        image_root: str,
        origin: str,
        instructions: Mapping[str, str] | None = None,
        allow_images_outside_root: bool = False,
        allow_image_urls: bool = False,
        teacher_scores: bool = False,
    ) -> None:
        self.origin = origin
        self.image_root = image_root
        self.allow_images_outside_root = allow_images_outside_root
        self.allow_image_urls = allow_image_urls
        self.instructions = dict(instructions or {})
        self.retrieval_mode = retrieval_mode
        self.column_mapping = dict(column_mapping)
        self.letters = read_mode(retrieval_mode)
        refuse_videos(columns, column_mapping, origin=origin)
        chooser = ColumnChooser(
            columns, column_mapping, place=f"{origin} (retrieval_mode={retrieval_mode})"
        )
        self.role_columns = {role: self._choose(chooser, role) for role in ("query", "positive")}
        self.negative_columns = self._choose(chooser, "negative")
        self.label_column = chooser.find(["label"], _LABEL_COLUMNS)
        self.score_column = chooser.find(["score"], _SCORE_COLUMNS)
        self.teacher_columns = (
            find_teacher_columns(chooser, has_negatives=self.has_negatives)
            if teacher_scores
            else None
        )
        self.unread_scores = [] if teacher_scores else given_score_roles(columns, column_mapping)

    @property
    def columns(self) -> list[str]:
        """The columns that are read, each once; hand them to ``select_columns``."""
        roles = [*self.role_columns.values(), self.negative_columns]
        used = [column for parts in roles for column in parts.values()]
        used += [name for name in (self.label_column, self.score_column) if name is not None]
        used += self.teacher_columns.names if self.teacher_columns is not None else []
        return list(dict.fromkeys(used))

    @property
    def parts(self) -> set[Part]:
        """Whether any role may hold a text, an image, or both."""
        roles = [*self.role_columns.values(), self.negative_columns]
        return {part for columns in roles for part in columns}

    @property
    def has_negatives(self) -> bool:
        """Whether the table has explicit negatives (a row may have none)."""
        return bool(self.negative_columns)

    def columns_of(self, part: Part) -> list[tuple[str, str]]:
        """Role and column of every column that holds texts, or images."""
        roles = {**self.role_columns, "negative": self.negative_columns}
        return [(role, columns[part]) for role, columns in roles.items() if part in columns]

    def instruction(self, role: str) -> str:
        """The instruction of a role; negatives have that of the positive."""
        return self.instructions.get("positive" if role == "negative" else role, "")

    def read(self, row: Mapping[str, Any], index: int) -> Record:
        """Reads one row.

        Args:
            row: Column name to value.
            index: Row number in the table, from 0.

        Returns:
            The record; relative image paths are joined with ``image_root``.

        Raises:
            DataError: When a value is empty, blank or of the wrong type, the mode needs what the
                record lacks, an image is a URL that is not allowed or leaves ``image_root``, or
                there is not one score per document.
        """
        negatives = self._negatives(row, index)
        teacher_score, negative_scores = self._teacher_scores(row, index, len(negatives))
        return Record(
            index,
            query=self._item("query", row, index),
            positive=self._item("positive", row, index),
            negatives=negatives,
            label=None if self.label_column is None else self._label(row, index),
            score=self._score(row, index),
            teacher_score=teacher_score,
            negative_scores=negative_scores,
        )

    def _choose(self, chooser: ColumnChooser, role: str) -> dict[Part, str]:
        letter = self.letters["query" if role == "query" else "positive"]
        wanted: tuple[Part, ...] = REQUIRED[letter] or (TEXT, IMAGE)
        found = {part: chooser.find(*column_names(role, part, letter)) for part in wanted}
        present = {part: name for part, name in found.items() if name is not None}
        if role != "negative":
            for part in REQUIRED[letter]:
                if part not in present:
                    raise chooser.missing(role, part, letter)
            if not present:
                raise chooser.missing(role, TEXT, letter)
        return present

    def _place(self, index: int, column: str) -> str:
        return f"{self.origin}, record {index}, column {column!r}"

    def _item(self, role: str, row: Mapping[str, Any], index: int) -> Item:
        columns = self.role_columns[role]
        free = self.letters[role] == "x"
        given = {
            part: only_value(row[column], role, place=self._place(index, column))
            for part, column in columns.items()
        }
        values: dict[Part, Any] = {
            part: None
            if free and is_absent(value)
            else self._part(part, value, index, columns[part])
            for part, value in given.items()
        }
        if all(value is None for value in values.values()):
            raise DataError(
                f"{self.origin}, record {index}: the {role} has neither text nor image (columns "
                f"{listed(list(columns.values()))}); remove the record or fill one in"
            )
        return Item(values.get(TEXT), values.get(IMAGE), self.instruction(role))

    def _part(self, part: Part, value: Any, index: int, column: str) -> Any:
        return self._checked(part, value, place=self._place(index, column))

    def _checked(self, part: Part, value: Any, *, place: str) -> Any:
        if part == TEXT:
            return checked_text(value, place=place)
        value = checked_image(value, place=place)
        if not isinstance(value, str):
            return value
        return resolve_image_path(
            value,
            image_root=self.image_root,
            place=place,
            allow_outside=self.allow_images_outside_root,
            allow_urls=self.allow_image_urls,
        )

    def _negatives(self, row: Mapping[str, Any], index: int) -> tuple[Item, ...]:
        cells = {
            part: as_list(row[column], place=self._place(index, column))
            for part, column in self.negative_columns.items()
        }
        given = {
            part: cell for part, cell in cells.items() if cell or self.letters["positive"] == "m"
        }
        if len({len(cell) for cell in given.values()}) > 1:
            sizes = ", ".join(
                f"{self.negative_columns[p]!r} has {len(c)}" for p, c in given.items()
            )
            raise DataError(
                f"{self.origin}, record {index}: {sizes} values; texts and images of the negatives "
                "belong together one by one (null where one has none)"
            )
        number = max((len(cell) for cell in given.values()), default=0)
        return tuple(self._negative(given, place, index) for place in range(number))

    def _negative(self, cells: Mapping[Part, Sequence[Any]], place: int, index: int) -> Item:
        free = self.letters["positive"] == "x"
        values = {
            part: None
            if free and is_absent(cell[place])
            else self._checked(
                part,
                cell[place],
                place=f"{self._place(index, self.negative_columns[part])}, value {place}",
            )
            for part, cell in cells.items()
        }
        if all(value is None for value in values.values()):
            raise DataError(
                f"{self.origin}, record {index}: negative {place} has neither text nor image; "
                "remove it or fill one in"
            )
        return Item(values.get(TEXT), values.get(IMAGE), self.instruction("negative"))

    def _label(self, row: Mapping[str, Any], index: int) -> int:
        assert self.label_column is not None
        value = row[self.label_column]
        if isinstance(value, str) and value.strip():
            return content_number(value.encode("utf-8", "surrogatepass"))
        if isinstance(value, int) and not isinstance(value, bool):
            # Hashes as classes may be unsigned, and tensors hold signed numbers.
            return value if -(2**63) <= value < 2**63 else content_number(str(value).encode())
        raise DataError(
            f"{self._place(index, self.label_column)}: {value!r} is no label; give a whole number "
            "or a text, or name another column with column_mapping: {label: COLUMN}"
        )

    def _score(self, row: Mapping[str, Any], index: int) -> float | None:
        if self.score_column is None:
            return None
        place = self._place(index, self.score_column)
        return checked_score(row[self.score_column], "score", place=place)

    def _teacher_scores(
        self, row: Mapping[str, Any], index: int, num_negatives: int
    ) -> tuple[float | None, tuple[float, ...] | None]:
        if self.teacher_columns is None:
            return None, None
        return self.teacher_columns.read(
            row, num_negatives=num_negatives, place=lambda column: self._place(index, column)
        )


def content_number(data: bytes) -> int:
    """A stable signed 64-bit hash."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little", signed=True)
