"""Scores that stand in the data: of a pair by people, of a record's documents by a teacher.

The teacher's have FlagEmbedding's columns: ``pos_scores`` and ``neg_scores``, one number for every document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vembed_ds.data.cells import shortened
from vembed_ds.data.columns import ColumnChooser, listed
from vembed_ds.errors import DataError

POSITIVE_SCORES, NEGATIVE_SCORES = "pos_scores", "neg_scores"


@dataclass(frozen=True)
class TeacherColumns:
    """The columns of a teacher's scores.

    Attributes:
        positive: Of query and positive.
        negative: Of query and each negative; ``None``: the data has no negatives.
    """

    positive: str
    negative: str | None

    @property
    def names(self) -> list[str]:
        """The columns that there are."""
        return [name for name in (self.positive, self.negative) if name is not None]

    def read(
        self, row: Mapping[str, Any], *, num_negatives: int, place: Callable[[str], str]
    ) -> tuple[float, tuple[float, ...] | None]:
        """The scores of one row.

        Args:
            row: Column name to value.
            num_negatives: Of the record.
            place: The record and a column, for messages.

        Returns:
            Score of the positive, and of every negative.

        Raises:
            DataError: A value is no finite number, or there are more or fewer scores than documents.
        """
        (positive,) = _scores(
            row[self.positive], POSITIVE_SCORES, number=1, place=place(self.positive)
        )
        if self.negative is None:
            return positive, None
        negatives = _scores(
            row[self.negative], NEGATIVE_SCORES, number=num_negatives, place=place(self.negative)
        )
        return positive, tuple(negatives)


def find_teacher_columns(chooser: ColumnChooser, *, has_negatives: bool) -> TeacherColumns:
    """The columns of a teacher's scores in a table.

    Raises:
        DataError: One is missing, or there are scores of negatives and no negatives.
    """
    positive = chooser.find([POSITIVE_SCORES], [POSITIVE_SCORES])
    negative = chooser.find([NEGATIVE_SCORES], [NEGATIVE_SCORES])
    if positive is None:
        raise _missing(chooser, "positives", POSITIVE_SCORES)
    if has_negatives and negative is None:
        raise _missing(chooser, "negatives", NEGATIVE_SCORES)
    if negative is not None and not has_negatives:
        raise DataError(
            f"{chooser.place}: column {negative!r} has scores of negatives, and no column holds "
            "negatives; name theirs with column_mapping: {negatives: COLUMN}, or remove the scores"
        )
    return TeacherColumns(positive, negative)


def given_score_roles(columns: Sequence[str], mapping: Mapping[str, str]) -> list[str]:
    """Which of a teacher's scores a table has, or ``column_mapping`` names."""
    roles = (POSITIVE_SCORES, NEGATIVE_SCORES)
    return [role for role in roles if role in mapping or role in columns]


def checked_score(value: object, role: str, *, place: str) -> float:
    """A finite number; texts of numbers count, because CSV has no others.

    Raises:
        DataError: It is none.
    """
    try:
        number = float("nan" if isinstance(value, bool) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if number - number != 0:  # NaN or infinite
        raise DataError(
            f"{place}: {shortened(value)} is no score; give a finite number, or name another column "
            f"with column_mapping: {{{role}: COLUMN}}"
        )
    return number


def _scores(value: Any, role: str, *, number: int, place: str) -> list[float]:
    if value is None or (isinstance(value, str) and not value.strip()):
        cells = []
    else:
        cells = list(value) if isinstance(value, (list, tuple)) else [value]
    if number and not cells:
        raise DataError(
            f"{place}: {shortened(value)} is no score; give one for each, or remove the record"
        )
    if len(cells) != number:
        what, remedy = "negatives", "give one score for each, in their order, or remove the record"
        if role == POSITIVE_SCORES:
            what, remedy = "positive", "write one record for each positive, with its score"
        raise DataError(
            f"{place}: {shortened(value)} is {len(cells)} scores, and the record has {number} {what}; "
            f"{remedy}"
        )
    return [
        checked_score(cell, role, place=f"{place}, value {at}") for at, cell in enumerate(cells)
    ]


def _missing(chooser: ColumnChooser, what: str, role: str) -> DataError:
    return DataError(
        f"{chooser.place}: teacher_scores: no column holds the scores of the {what}: looked for "
        f"{role!r}, the columns are {listed(chooser.columns)}; name it with "
        f"column_mapping: {{{role}: COLUMN}}, or leave teacher_scores out"
    )
