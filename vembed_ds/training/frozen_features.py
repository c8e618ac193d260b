"""A frozen text tower is run once per distinct text, before training."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset as Table
from datasets import Value
from torch import Tensor
from tqdm import tqdm

from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.processors import ItemProcessor, text_key
from vembed_ds.data.records import Item
from vembed_ds.data.vector_table import SegmentWriter, ensure_table, remove_table
from vembed_ds.distributed import comm
from vembed_ds.errors import DataError
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.encoder import TowerEncoder, TowersEncoder
from vembed_ds.models.vision_language import VisionLanguageEncoder
from vembed_ds.similarity import Embeddings
from vembed_ds.teachers.cache import open_table

STREAM = "text"


def has_frozen_text_tower(model: EmbeddingModel) -> bool:
    """Whether the text backbone's features of a text never change."""
    encoder = model.encoder
    return (
        isinstance(encoder, TowersEncoder)
        and not isinstance(encoder, VisionLanguageEncoder)
        and STREAM in encoder.parts
        and encoder.tower(STREAM).backbone_frozen
        and not encoder.tower(STREAM).gives_tokens
        and not encoder.tower(STREAM).layers
    )


def cache_text_features(
    model: EmbeddingModel,
    datasets: Iterable[PairDataset],
    *,
    processor: ItemProcessor,
    folder: Path,
    device: torch.device,
    batch_size: int,
) -> None:
    """Compute the features of every distinct text, share them, and let ``processor`` use them.

    Each rank computes its share. Collective, before the engine is built.

    Args:
        model: Its text backbone is frozen.
        datasets: Training and validation data.
        processor: From then on gives ``{"features": [H]}`` for texts.
        folder: Where the table is kept, memory-mapped; must be visible to every rank.
        device: Where to compute.
        batch_size: Texts per forward pass.

    Raises:
        DataError: On every rank, when two texts cannot be told apart by their hashes.
    """
    assert isinstance(model.encoder, TowersEncoder)
    tower = model.encoder.tower(STREAM)
    texts = _distinct_texts(datasets)
    keys = np.array([text_key(text) for text in texts], dtype=np.int64)
    _check_distinct(keys)
    share = -(-len(texts) // comm.world_size())
    start = comm.rank() * share
    tower.to(device).eval()

    def begin() -> None:
        remove_table(folder)
        ensure_table(folder, identity={"of": "frozen text tower"})

    def fill() -> None:
        mine = texts[start : start + share]
        if mine:
            rows = _embed(tower, mine, processor, device=device, batch_size=batch_size)
            writer = SegmentWriter(folder)
            writer.append(keys[start : start + share], Embeddings(rows))
            writer.finish()

    comm.run_on_main(begin, doing=f"writing {folder}")
    comm.run_together(fill, doing=f"writing {folder}")
    table = open_table(folder)
    tower.cpu()  # back beside the other towers; the engine moves the model as a whole
    processor.text_features = table


def _distinct_texts(datasets: Iterable[PairDataset]) -> list[str]:
    """Every text as it is encoded, behind its instruction; in the order of their keys."""
    found: set[str] = set()
    for dataset in datasets:
        for role, column in dataset.reader.columns_of("text"):
            instruction = dataset.reader.instruction(role)
            found.update(instruction + text for text in _texts(dataset.table, column))
    return sorted(found, key=text_key)


def _check_distinct(keys: npt.NDArray[np.int64]) -> None:
    if not (keys[1:] > keys[:-1]).all():
        raise DataError(
            "two different texts have the same hash, so one would get the other's features; set "
            "cache_frozen_encoder: false"
        )


def _texts(table: Table, column: str) -> set[str]:
    """The texts of a column; of negatives, lists of them."""
    if isinstance(table.features[column], Value):
        values = table.unique(column)
    else:
        values = chain.from_iterable(cell or () for cell in table[column])
    return {text for text in values if isinstance(text, str) and text.strip()}


def _embed(
    tower: TowerEncoder,
    texts: list[str],
    processor: ItemProcessor,
    *,
    device: torch.device,
    batch_size: int,
) -> Tensor:
    by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    starts = range(0, len(texts), batch_size)
    rows: dict[int, Tensor] = {}
    for start in tqdm(starts, desc="frozen text tower", disable=None if comm.is_main() else True):
        chosen = by_length[start : start + batch_size]
        items = [
            processor.encode(Item(text=texts[index]), origin="text", augment_seed=None)
            for index in chosen
        ]
        inputs = {key: value.to(device) for key, value in processor.pad(STREAM, items).items()}
        with torch.no_grad():
            rows.update(zip(chosen, tower.features(inputs).float().cpu(), strict=True))
    return torch.stack([rows[index] for index in range(len(texts))])
