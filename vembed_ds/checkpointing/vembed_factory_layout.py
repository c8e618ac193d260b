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

from vembed_ds.errors import counted


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


def predictor_errors(settings: Mapping[str, Any]) -> list[str]:
    """Why vembed-factory's ``Predictor`` ends with an error on a converted folder.

    Args:
        settings: Content of its ``vembed_config.json``.

    Returns:
        Reasons, as of :func:`predictor_problems`.
    """
    errors = []
    dtype = settings.get("dtype", "float32")
    if dtype == "bfloat16" or (dtype != "float32" and settings["projections"]):
        errors.append(f"it cannot compute {dtype} weights; convert to float32")
    wanted = _projection_layers(settings)
    for name, head in settings["projections"].items():
        if head["layers"] != wanted:
            errors.append(
                f"it wants {counted(wanted, 'layer')} in {name}, and this model has {head['layers']}"
            )
    return errors


def predictor_problems(settings: Mapping[str, Any]) -> list[str]:
    """Why vembed-factory's ``Predictor`` gives other embeddings than a converted folder's.

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
    if settings["image_inputs"] not in (None, ["pixel_values"]):
        problems.append("it passes on an image's pixels only, not its mask and shape")
    for key, backbone in settings["backbones"].items():
        pooler = backbone["own_pooler"]
        if pooling[key] not in ("pooler", "none") and pooler in ("vector", "map"):
            tower = f" of {key}s" if key else ""
            problems.append(f"it takes the backbone's own pooler{tower}, not {pooling[key]}")
        elif pooler == "map":
            problems.append("it gives a convolutional backbone's embedding as a map [n, D, 1, 1]")
    for head in settings["projections"].values():
        rows, columns = head["shape"]
        if head["layers"] == _projection_layers(settings) and rows == columns and not composed:
            problems.append("it leaves out a projection that keeps the width")
    return problems


def _projection_layers(settings: Mapping[str, Any]) -> int:
    return 2 if settings["encoder_mode"] == "composed" else 1
