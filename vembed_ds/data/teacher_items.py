"""How a frozen model beside the one trained reads the items of a record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vembed_ds.data.processors import EncodedItem, ItemProcessor
from vembed_ds.data.records import Item, content_number
from vembed_ds.data.vector_table import KeyArray


@dataclass(frozen=True)
class Instructions:
    """What a frozen model reads before a text.

    Attributes:
        query: Before queries.
        document: Before positives and negatives.
    """

    query: str = ""
    document: str = ""

    def of(self, role: str) -> str:
        """The instruction of a role."""
        return self.query if role == "query" else self.document

    def keys(self, role: str, numbers: Iterable[int]) -> KeyArray:
        """Numbers of contents to keys of a table.

        One text has another vector behind another instruction, and so another key; where both
        instructions are equal, a text that is a query here and a document there is embedded once.
        """
        salt = np.int64(content_number(self.of(role).encode()))
        return np.fromiter(numbers, dtype=np.int64) ^ salt


@dataclass(frozen=True)
class TeacherItems:
    """Encodes the items of a record for a teacher.

    Attributes:
        processor: The teacher's.
        instructions: The teacher's, in place of the record's.
        shared: Its processor and instructions make of every item what the student's make, so that
            what is encoded for the student need not be encoded again.
        last_epoch: The last one in which it reads items; ``None``: it always does.
    """

    processor: ItemProcessor
    instructions: Instructions
    shared: bool = False
    last_epoch: int | None = None

    def reads_in(self, epoch: int | None) -> bool:
        """Whether it reads items in an epoch; ``None``: items that are looked at before training."""
        return self.last_epoch is None or epoch is None or epoch <= self.last_epoch

    def encode(
        self, items: Mapping[str, Sequence[Item]], *, origin: str
    ) -> dict[str, list[EncodedItem]]:
        """Encodes items, never augmented: a stored vector of the same item must equal a live one.

        Args:
            items: By role.
            origin: The record, for messages.

        Raises:
            VembedError: An item cannot be encoded.
        """
        return {
            role: [
                self.processor.encode(
                    replace(item, instruction=self.instructions.of(role)),
                    origin=f"{origin}, {role}",
                    augment_seed=None,
                )
                for item in found
            ]
            for role, found in items.items()
        }
