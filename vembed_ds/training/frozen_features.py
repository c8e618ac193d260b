"""A frozen tower is run once per distinct text or image; what it gave is kept on the disk."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from vembed_ds.config.schema import Config
from vembed_ds.data.dataset import PairDataset
from vembed_ds.data.processors import EncodedItem, ItemProcessor
from vembed_ds.data.vector_table import read_identity
from vembed_ds.distributed import comm
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.similarity import Embeddings
from vembed_ds.teachers.cache import ensure_cache
from vembed_ds.teachers.identity import identity_digest, tower_identity
from vembed_ds.teachers.precompute import Embed, fill_table
from vembed_ds.training.tower_items import missing_images, missing_texts

logger = logging.getLogger(__name__)

FOLDER = "frozen_features"  # in a run's folder, unless the configuration names another

Part = Literal["text", "image"]


def stored_parts(
    model: EmbeddingModel, config: Config, processor: ItemProcessor, *, used: Collection[str]
) -> list[Part]:
    """Kinds of items whose features are computed once: their tower is frozen, its input always the same.

    Args:
        model: Whole.
        config: The run's.
        processor: The run's.
        used: Kinds of items that the data has.
    """
    if not config.model.cache_frozen_encoder:
        return []
    parts: list[Part] = ["text", "image"]
    parts = [p for p in parts if p in used and p in model.parts]
    parts = [part for part in parts if model.encoder.has_fixed_features(part)]
    if "image" in parts and (reason := _changing_images(config, processor)):
        logger.info("the frozen image tower is run in every step: %s", reason)
        parts.remove("image")
    return parts


def _changing_images(config: Config, processor: ItemProcessor) -> str | None:
    """Why images have no features beforehand; with texts, streaming is refused."""
    if config.data.streaming:
        return "streaming does not read the images before training"
    if processor.augmentation is not None:
        return "image_augmentation gives it another image every time"
    return None


def features_folder(config: Config) -> Path:
    """Where the tables of all towers are."""
    return Path(config.model.frozen_features_dir or Path(config.run.output_dir) / FOLDER)


def store_features(
    model: EmbeddingModel,
    members: Sequence[PairDataset],
    part: Part,
    *,
    processor: ItemProcessor,
    root: Path,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    timeout_seconds: float,
) -> int:
    """Compute the features that a tower's table lacks, and let ``processor`` use them.

    Each tower has a table of its own below ``root``, named by what the features depend on; so
    other weights, another pooling or another processor have another table. Runs may share it, also
    at the same time. Collective, before the engine is built.

    Args:
        model: The tower of ``part`` is frozen; see :func:`stored_parts`.
        members: Training and validation data.
        part: Kind of items.
        processor: From then on gives features for texts, or images.
        root: From :func:`features_folder`; every rank must see it.
        device: Where to compute.
        batch_size: Items per rank in a forward pass.
        num_workers: Loader processes per rank, at most.
        timeout_seconds: Longest wait for a loader process.

    Returns:
        How many items the tower was run for.

    Raises:
        VembedError: On every rank: an item cannot be read or encoded, the tower gives something
            that is not finite, the table is damaged, or it cannot be written.
    """
    identity = comm.run_on_main(
        lambda: tower_identity(model, part, processor), doing=f"reading the {part} tower"
    )
    folder = root / f"{part}-{identity_digest(identity)}"
    comm.run_on_main(lambda: _tell_of_others(folder, identity, part), doing=f"reading {root}")
    table = ensure_cache(folder, identity=identity)
    if part == "text":
        # Tokenized in this process: loader processes would each get a copy of all texts.
        keys, items = comm.run_together(
            lambda: missing_texts(members, table, processor=processor), doing="reading the texts"
        )
        num_workers = 0
    else:
        keys, items = missing_images(members, table, processor=processor)
    if len(keys):
        modules = model.encoder.backbone_modules(part)
        for module in modules:
            module.to(device)
        table = fill_table(
            folder,
            keys,
            items,
            embed=_features_of(model, part, processor, device),
            batch_size=batch_size,
            num_workers=num_workers,
            timeout_seconds=timeout_seconds,
        )
        for module in modules:
            module.cpu()  # back beside the others; the engine moves the model as a whole
    logger.info(
        "frozen %s tower: ran once for %s new items; the features of %s are kept in %s",
        *(part, f"{len(keys):,}", f"{len(table):,}", folder),
    )
    processor.stored[part] = table
    return len(keys)


def _features_of(
    model: EmbeddingModel, part: Part, processor: ItemProcessor, device: torch.device
) -> Embed:
    def embed(items: Sequence[EncodedItem]) -> Embeddings:
        inputs = processor.pad(part, items)
        moved = {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
        return Embeddings(model.encoder.features(part, moved).float().cpu())

    return embed


def _tell_of_others(folder: Path, identity: Mapping[str, Any], part: Part) -> None:
    """Say why the features are computed anew although there are some. One process."""
    if folder.exists() or not folder.parent.is_dir():
        return
    others = sorted(folder.parent.glob(f"{part}-*"), key=lambda path: path.stat().st_mtime)
    for other in others[-1:]:
        found = read_identity(other)
        differing = [name for name in identity if found.get(name) != identity[name]]
        logger.info(
            "frozen %s tower: its features are computed anew, because those in %s are of %s",
            part,
            other,
            " and ".join(f"another {name}" for name in differing),
        )
