"""Whether a converted folder embeds as the trained model does.

The items are fixed and made here: no training data travels with a model. Texts of several lengths
and scripts and drawn pictures pass through every parameter that embeddings depend on, as any
other items do.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from vembed_ds.checkpointing.files import MODEL_FOLDER
from vembed_ds.checkpointing.planning import DTYPES, Options
from vembed_ds.checkpointing.shards import open_checkpoint
from vembed_ds.checkpointing.trained_model import merge_by_peft, rebuild_trained, round_to
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.data.records import Item
from vembed_ds.errors import CheckpointError
from vembed_ds.inference import Encoder, SavedModel, embed_items, load_processor
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.lora import ADAPTER_CONFIG
from vembed_ds.models.saved_folder import read_settings

# Absolute, on unit vectors. A merged adapter rounds every weight once more; in 16 bit a sum that lies
# near the middle of two numbers may become the other one (1.6e-4 was seen in bfloat16).
LIMIT = 1e-6
LIMIT_MERGED = 5e-6
LIMITS_MERGED_16_BIT = {"bfloat16": 1e-3, "float16": 1.25e-4}  # an eighth of a rounding step
TEXTS = (
    "a",
    "A dog runs along the beach.",
    "Wie wird das Wetter morgen in Köln?",
    "東京の天気",
    "def add(first, second):\n    return first + second",
    "The quick brown fox jumps over the lazy dog, and then it does so again, " * 4,
)
_SIZES = ((64, 64), (96, 48), (40, 120), (224, 224))

Array = np.ndarray[Any, Any]


class Comparison(NamedTuple):
    """What one reader of a converted folder gave.

    Attributes:
        reader: Its name.
        num_items: That were embedded.
        difference: Largest, of unit vectors, to the trained model (its weights in the format of
            the files).
        limit: Above which the conversion is wrong.
        rounding: By how much the format itself moves the embeddings; ``None``: not asked.
    """

    reader: str
    num_items: int
    difference: float
    limit: float
    rounding: float | None = None


def verify_export(checkpoint: Path, folder: Path, options: Options) -> list[Comparison]:
    """Compare embeddings of the trained model with those of the folder made from it.

    Args:
        checkpoint: ``checkpoint-step-<N>``.
        folder: What :func:`export_model` wrote.
        options: How.

    Returns:
        One for this package on plain transformers, and one for sentence-transformers where it is
        installed and the folder is made for it.

    Raises:
        CheckpointError: The trained model cannot be built.
        ConfigError: The folder cannot be loaded.
    """
    exact, expected, items = _embed_trained(checkpoint, options)
    limit = _limit(checkpoint / MODEL_FOLDER, options)
    found = Encoder(folder, device="cpu", trust_remote_code=options.trust_remote_code)
    rows = _embed(found.model, found.processor, items)
    rounding = None if options.dtype == "float32" else _difference(exact, expected)
    difference = _difference(rows, expected)
    comparisons = [Comparison("vembed_ds", len(items), difference, limit, rounding)]
    if (by_theirs := _by_sentence_transformers(folder, items, options)) is not None:
        theirs, places = by_theirs
        wanted = [expected[place] for place in places]
        comparisons.append(
            Comparison("sentence-transformers", len(places), _difference(theirs, wanted), limit)
        )
    return comparisons


def require_equal(comparisons: Sequence[Comparison], folder: Path) -> None:
    """See that no reader found a difference.

    Raises:
        CheckpointError: One did; the folder stays.
    """
    for found in comparisons:
        if not found.difference <= found.limit:  # NaN is none
            raise CheckpointError(
                f"{folder}: was written, but its embeddings by {found.reader} differ from the "
                f"trained model's by up to {found.difference:.1e} (limit {found.limit:.0e}); do not "
                "use it, and report this with the model's name"
            )


def sample_items(parts: Sequence[str], *, joint: bool) -> list[Item]:
    """The items that are embedded, of the kinds that a model has a tower for."""
    pictures = [_picture(number, size) for number, size in enumerate(_SIZES)]
    items = [Item(text=text) for text in TEXTS] if "text" in parts else []
    if "image" in parts:
        items += [Item(image=picture) for picture in pictures]
    if joint:
        items.append(Item(text=TEXTS[1], image=pictures[1]))
    return items


def _embed_trained(
    checkpoint: Path, options: Options
) -> tuple[list[Array], list[Array], list[Item]]:
    """Embeddings in float32, those with the weights that the files hold, and the items."""
    description, dtype = checkpoint / MODEL_FOLDER, DTYPES[options.dtype]
    model, spec = rebuild_trained(
        open_checkpoint(checkpoint), trust_remote_code=options.trust_remote_code
    )
    settings = read_settings(description)
    processor = load_processor(SavedModel(str(description), settings, spec), model)
    items = sample_items(model.parts, joint=len(model.streams) > len(model.parts))
    exact = _embed(model, processor, items)
    if options.dtype == "float32":
        return exact, exact, items
    if not options.adapter:
        merge_by_peft(model)
    round_to(model, dtype, adapters_alone=options.adapter)
    model.train().eval()  # what a model keeps of its weights in evaluation (LeViT) is of the others
    return exact, _embed(model, processor, items), items


def _embed(model: EmbeddingModel, processor: ItemProcessor, items: Sequence[Item]) -> list[Array]:
    """Unit rows ``[D]`` of every item, or ``[L, D]`` of its tokens."""
    encoded = [
        processor.encode(item, origin=f"sample {number}", augment_seed=None)
        for number, item in enumerate(items)
    ]
    rows = embed_items(model, processor, encoded)
    values = functional.normalize(rows.values, dim=-1)
    if rows.mask is None:
        return list(values.numpy())
    return [value[mask].numpy() for value, mask in zip(values, rows.mask, strict=True)]


def _difference(one: Sequence[Array], other: Sequence[Array]) -> float:
    if any(a.shape != b.shape for a, b in zip(one, other, strict=True)):
        return float("inf")
    return float(max(np.abs(a - b).max() for a, b in zip(one, other, strict=True)))


def _limit(description: Path, options: Options) -> float:
    if not any(description.rglob(ADAPTER_CONFIG)):
        return LIMIT
    return (
        LIMIT_MERGED if options.adapter else LIMITS_MERGED_16_BIT.get(options.dtype, LIMIT_MERGED)
    )


def _by_sentence_transformers(
    folder: Path, items: Sequence[Item], options: Options
) -> tuple[list[Array], list[int]] | None:
    """Its rows, and of which items; ``None``: it is not there, or the folder is not for it."""
    modules = folder / "modules.json"
    if not modules.is_file() or importlib.util.find_spec("sentence_transformers") is None:
        return None
    kinds = [entry["type"] for entry in json.loads(modules.read_text(encoding="utf-8"))]
    own = any(kind.startswith("vembed_ds.") for kind in kinds)
    late = "none" in read_settings(folder).get("pooling", {}).values()
    model = _load_by_sentence_transformers(
        folder, late=late and not own, trusted=own or options.trust_remote_code
    )
    given = {"output_value": "token_embeddings"} if late and own else {}
    rows: list[Array] = []
    places: list[int] = []
    for kind in ("text", "image"):
        chosen = [i for i, item in enumerate(items) if _only(item) == kind]
        if chosen:
            inputs = [getattr(items[place], kind) for place in chosen]
            found = model.encode(inputs, batch_size=len(inputs), **given)
            rows += [np.asarray(row) for row in found]
            places += chosen
    return rows, places


def _load_by_sentence_transformers(folder: Path, *, late: bool, trusted: bool) -> Any:
    import sentence_transformers

    kind = "MultiVectorEncoder" if late else "SentenceTransformer"
    load = getattr(sentence_transformers, kind)
    return load(str(folder), device="cpu", trust_remote_code=trusted)


def _only(item: Item) -> str | None:
    if item.text is not None and item.image is not None:
        return None
    return "image" if item.text is None else "text"


def _picture(number: int, size: tuple[int, int]) -> Image.Image:
    """Waves of colours, so that no two patches are alike."""
    down, right = torch.meshgrid(
        torch.linspace(0, 1, size[0]), torch.linspace(0, 1, size[1]), indexing="ij"
    )
    waves = [torch.sin(9 * down * (1 + number) + 7 * right * right + shift) for shift in range(3)]
    pixels = ((torch.stack(waves, dim=-1) + 1) * 127.5).to(torch.uint8).numpy()
    return Image.fromarray(pixels)
