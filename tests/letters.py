"""A frozen model without weights: what it gives can be told from the letters of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.processors import EncodedItem, ItemProcessor, content_key
from vembed_ds.data.readers import load_table
from vembed_ds.data.records import Item, RecordReader, content_number
from vembed_ds.data.teacher_items import Instructions
from vembed_ds.data.vector_table import KeyArray
from vembed_ds.similarity import Embeddings
from vembed_ds.teachers.precompute import Precomputed, precompute

INSTRUCTIONS = Instructions(query="", document="")


def vector_of(text: str) -> list[float]:
    """``[2]``."""
    return [float(len(text)), float(sum(map(ord, text)))]


def tokens_of(text: str) -> list[list[float]]:
    """``[L, 2]``, a token per letter."""
    return [[float(ord(letter)), float(place)] for place, letter in enumerate(text)]


def keys_of(texts: Sequence[str]) -> KeyArray:
    """``[n]``: where the vectors of texts are found."""
    numbers = [content_number(content_key(Item(text=text)).encode()) for text in texts]
    return INSTRUCTIONS.keys("query", numbers)


def letter_processor() -> ItemProcessor:
    """A token per letter."""

    def tokenize(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    return ItemProcessor(tokenizer=tokenize)


def letter_data(path: str) -> PairDataset:
    """Pairs of texts from a JSONL file."""
    table = load_table([path], key="data_path")
    reader = RecordReader(
        table.column_names, retrieval_mode="t2t", column_mapping={}, image_root="", origin=path
    )
    return PairDataset(table, reader=reader, processor=letter_processor(), seed=0)


@dataclass
class LetterTeacher:
    """Attributes: whether it gives tokens; what it has embedded, and in how many calls."""

    gives_tokens: bool = False
    embedded: list[str] = field(default_factory=list)
    calls: int = 0

    def embed(self, items: Sequence[EncodedItem]) -> Embeddings:
        """``[n, 2]``, or ``[n, L, 2]``."""
        assert not torch.is_grad_enabled()
        texts = ["".join(map(chr, item.inputs["input_ids"])) for item in items]
        self.calls += 1
        self.embedded += texts
        if not self.gives_tokens:
            return Embeddings(torch.tensor([vector_of(text) for text in texts]))
        rows = [torch.tensor(tokens_of(text)) for text in texts]
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.from_numpy(np.arange(int(lengths.max()))) < lengths[:, None]
        return Embeddings(pad_sequence(rows, batch_first=True, padding_value=torch.nan), mask)

    def precompute(self, *members: PairDataset, folder: Path) -> Precomputed:
        """Two items per call."""
        return precompute(
            members,
            folder=folder,
            identity={"weights": "none"},
            processor=letter_processor(),
            instructions=INSTRUCTIONS,
            embed=self.embed,
            batch_size=2,
            num_workers=0,
            timeout_seconds=60.0,
        )
