"""What a frozen model's vectors depend on, as digests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from vembed_ds.data.processors import ItemProcessor
from vembed_ds.data.records import Item
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.encoder import TowerEncoder, TwoTowerEncoder

_LONG = "all work and no play makes Jack a dull boy "
_TEXTS = ("a", "Grey cats, 42 of them.\n\tÄÖÜ ß 猫 🐈", _LONG * 2000)
_SIZES = ((64, 48), (31, 200))
# Of how features are computed and keyed; to be raised with every change of either.
FEATURES_VERSION = 1
# What a config.json says of itself and not of the model.
_NAMES = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
)


def identity_digest(identity: Mapping[str, Any]) -> str:
    """12 hexadecimal digits of the SHA-256 of plain values, whatever their order."""
    return sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()[:12]


def weights_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, number formats, shapes and bytes of tensors, in whatever order."""
    return combined_digest({name: tensor_digest(tensor) for name, tensor in named})


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over number format, shape and bytes of one tensor of at least one dimension."""
    total = sha256(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    total.update(data.numpy().data)
    return total.hexdigest()


def combined_digest(digests: Mapping[str, str]) -> str:
    """The :func:`weights_digest` of tensors that were never in memory together.

    Args:
        digests: :func:`tensor_digest` by name.
    """
    return sha256(repr(sorted(digests.items())).encode()).hexdigest()


def model_digest(model: EmbeddingModel) -> str:
    """SHA-256 of what a model does with its weights: configurations, pooling, shapes of its heads.

    The same weights give other vectors with another number of heads, or pooled otherwise. Settings
    at their defaults do not count, nor names and versions.
    """
    modules = list(model.modules())
    configs = [_settings(m.config) for m in modules if isinstance(m, PreTrainedModel)]
    towers = [(m.pooling, m.topk_tokens) for m in modules if isinstance(m, TowerEncoder)]
    encoders = [m for m in modules if isinstance(m, TowerEncoder | TwoTowerEncoder)]
    heads = [str(encoder.projection) for encoder in encoders]
    return sha256(json.dumps([configs, towers, heads], sort_keys=True).encode()).hexdigest()


def tower_identity(model: EmbeddingModel, part: str, processor: ItemProcessor) -> dict[str, Any]:
    """What the features of a frozen tower depend on beside the items: plain values.

    Args:
        model: Whole, in float32; in that precision the features are computed.
        part: ``text`` or ``image``.
        processor: Encodes the items, with no stored features of that part yet.
    """
    encoder = model.encoder
    tower = encoder if isinstance(encoder, TwoTowerEncoder) else encoder.tower(part)
    backbone: Any = tower.backbone
    weights = {
        f"{number}.{name}": tensor
        for number, module in enumerate(encoder.backbone_modules(part))
        for name, tensor in module.state_dict().items()
    }
    return {
        "of": f"frozen {part} tower",
        "version": FEATURES_VERSION,
        "weights": weights_digest(weights.items()),
        "model": sha256(
            json.dumps(_settings(backbone.config), sort_keys=True).encode()
        ).hexdigest(),
        "pooling": model.pooling()[part],
        "precision": "float32",
        "processor": processor_digest(processor, [part]),
    }


def _settings(config: Any) -> Any:
    def without_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if key not in _NAMES}

    return json.loads(config.to_json_string(), object_pairs_hook=without_names)


def processor_digest(processor: ItemProcessor, parts: Iterable[str]) -> str:
    """SHA-256 of the vocabulary, and of what the processor makes of a few items.

    So it sees every setting that has an effect, and none that has not: names of folders, versions.

    Args:
        processor: Of the frozen model.
        parts: Of ``text`` and ``image``, what the model embeds.
    """
    parts = set(parts)
    probes = [Item(text=text) for text in _TEXTS] if "text" in parts else []
    if "image" in parts:
        probes += [Item(image=_picture(width, height)) for width, height in _SIZES]
    total = sha256()
    if processor.tokenizer is not None and "text" in parts:
        total.update(repr(sorted(processor.tokenizer.get_vocab().items())).encode())
    for probe in probes:
        encoded = processor.encode(probe, origin="probe", augment_seed=None)
        for name, array in sorted(encoded.inputs.items()):
            total.update(f"{name} {array.dtype} {array.shape};".encode())
            total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


def _picture(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))
