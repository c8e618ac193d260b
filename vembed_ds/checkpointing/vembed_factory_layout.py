"""The files with which vembed-factory's ``Predictor`` reads a converted folder, and what it cannot.

It takes the same weights, configs and tokenizers; what it wants besides are the projections in
torch's own format. They are written from the same tensors as ours, in every folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def write_vembed_factory(folder: Path, settings: Mapping[str, Any]) -> None:
    """Add ``<projection>.pt`` beside every ``<projection>.safetensors``. Not collective.

    Also where its ``Predictor`` has another number of layers: it then ends with an error, and
    without the file it would draw a random projection.

    Args:
        folder: Complete for :class:`Encoder`.
        settings: Content of its ``vembed_config.json``.
    """
    for name in settings["projections"]:
        tensors = load_file(folder / f"{name}.safetensors")
        # Its backbones are float32 too; heads of another precision would not fit them.
        torch.save({key: tensor.float() for key, tensor in tensors.items()}, folder / f"{name}.pt")


def predictor_call(folder: Path, settings: Mapping[str, Any]) -> str:
    """The expression that loads a converted folder in vembed-factory."""
    options = ""
    if settings["encoder_mode"] == "composed":
        names = {s: str(folder / f"{s}_encoder") for s in settings["streams"]}
        towers = "".join(f", {stream}_model_name={name!r}" for stream, name in names.items())
        options = f", encoder_mode='composed'{towers}"
    return f"Predictor({str(folder)!r}{options})"


def predictor_problems(settings: Mapping[str, Any]) -> list[str]:
    """Why vembed-factory's ``Predictor`` does not give a converted folder's embeddings.

    Args:
        settings: Content of its ``vembed_config.json``.

    Returns:
        Reasons, each a sentence without its full stop; none: it gives them.
    """
    streams, pooling = settings["streams"], settings["pooling"]
    composed = settings["encoder_mode"] == "composed"
    problems = []
    if pooling and len(pooling) < len(streams):
        problems.append("it does not put items of a vision-language model into their template")
    if "none" in pooling.values():
        problems.append("it takes token embeddings for one vector")
    dtype = settings.get("dtype", "float32")
    if dtype == "bfloat16" or (dtype != "float32" and settings["projections"]):
        problems.append(f"it computes {dtype} weights as they are and fails; convert to float32")
    if settings["image_inputs"] not in (None, ["pixel_values"]):
        problems.append("it passes on an image's pixels only, not its mask and shape")
    for key, backbone in settings["backbones"].items():
        pooler = backbone["own_pooler"]
        if pooling[key] not in ("pooler", "none") and pooler in ("vector", "map"):
            tower = f" of {key}s" if key else ""
            problems.append(f"it takes the backbone's own pooler{tower}, not {pooling[key]}")
        elif pooler == "map":
            problems.append("it gives a convolutional backbone's embedding as a map [n, D, 1, 1]")
    for name, head in settings["projections"].items():
        wanted, (rows, columns) = 2 if composed else 1, head["shape"]
        if head["layers"] != wanted:
            problems.append(f"its {name} has {wanted} layers, not {head['layers']}")
        elif rows == columns and not composed:
            problems.append("it leaves out a projection that keeps the width")
    return problems
