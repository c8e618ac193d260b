"""vembed-factory's way to call ``Trainer``: what its arguments are here."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vembed_ds.api.config import TrainConfig, plain
from vembed_ds.config.loading import Layer
from vembed_ds.errors import ConfigError

logger = logging.getLogger(__name__)

MODEL = "openai/clip-vit-base-patch32"
"""The model of its ``Trainer()``."""

POSITIONAL = (
    *("data_path", "val_data_path", "epochs", "batch_size", "learning_rate"),
    *("use_gradient_cache", "use_mrl", "mrl_dims", "retrieval_mode", "encoder_mode"),
    *("text_model_name", "image_model_name", "save_steps", "use_lora", "report_to"),
    *("attn_implementation", "torch_dtype", "gradient_checkpointing", "config_override"),
)
"""The arguments of its ``train``, in its order."""

DEFAULTS = {
    "epochs": 3,
    "batch_size": 64,
    "learning_rate": 5e-5,
    "use_gradient_cache": True,
    "retrieval_mode": "t2i",
    "report_to": "none",
}
"""Values that its ``train`` passed on when they were not given. It never read ``use_lora=True``."""

_MODES = ("auto", "clip", "siglip", "qwen", "custom")


@dataclass(frozen=True)
class FactoryModel:
    """The arguments of its ``Trainer``."""

    model_name: Any
    output_dir: str


def factory_model(
    model_name: Any, mode: str | None, output_dir: Any, use_gpu: bool | None
) -> FactoryModel:
    """The arguments of its ``Trainer``, with their defaults.

    Raises:
        ConfigError: One has a value that nothing here follows.
    """
    if mode not in (None, *_MODES):
        raise ConfigError(f"mode={mode!r}: expected one of {', '.join(_MODES)}, or leave it out")
    if mode not in (None, "auto"):
        logger.warning(
            "mode=%r: not used; the model's own config says what it is (vembed-factory passed it "
            "to a command that refused it)",
            mode,
        )
    if use_gpu is False:
        _require_cpu()
    return FactoryModel(
        model_name=MODEL if model_name is None else model_name,
        output_dir="output" if output_dir is None else os.fspath(output_dir),
    )


def _require_cpu() -> None:
    from deepspeed.accelerator import get_accelerator

    found = get_accelerator().device_name()
    if found != "cpu":
        raise ConfigError(
            f"use_gpu=False: DeepSpeed has chosen the device {found} in this process; start it with the "
            "environment variable DS_ACCELERATOR=cpu"
        )


def factory_config(
    model: FactoryModel, positional: Sequence[Any], keywords: Mapping[str, Any]
) -> TrainConfig:
    """The configuration that a call of its ``train`` means.

    Args:
        model: From :func:`factory_model`.
        positional: The call's arguments without names.
        keywords: Those with names; any key of a configuration is taken.

    Raises:
        ConfigError: Listing every problem.
        TypeError: More arguments than it had, or one twice.
    """
    given = _by_name(positional, keywords)
    override = given.pop("config_override", None) or ()
    tokens = override.split() if isinstance(override, str) else [str(token) for token in override]
    named = {"model_name": model.model_name, "output_dir": model.output_dir}
    layers = [
        Layer(DEFAULTS, "vembed-factory's default"),
        Layer(plain(named | _as_there(given)), "Trainer"),
    ]
    return TrainConfig.from_layers(layers, tokens)


def _as_there(given: Mapping[str, Any]) -> dict[str, Any]:
    """``None`` meant its own default, as did ``mrl_dims`` without ``use_mrl``."""
    left = () if given.get("use_mrl") else ("mrl_dims",)
    return {key: value for key, value in given.items() if value is not None and key not in left}


def _by_name(positional: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    if len(positional) > len(POSITIONAL):
        raise TypeError(f"train() takes at most {len(POSITIONAL)} arguments without names")
    given = dict(zip(POSITIONAL, positional, strict=False))
    if twice := sorted(set(given) & set(keywords)):
        raise TypeError(f"train() got several values for {twice[0]!r}")
    return {**given, **keywords}


def epoch_folder(config: TrainConfig) -> Path:
    """Where its scripts look for the trained model: ``output_dir/checkpoint-epoch-<epochs>``.

    Raises:
        ConfigError: The run starts from the model in that folder.
    """
    folder = Path(config["output_dir"]) / f"checkpoint-epoch-{config['epochs']}"
    started_from = config["model_name"]
    if isinstance(started_from, str) and Path(started_from).resolve() == folder.resolve():
        raise ConfigError(
            f"model_name={started_from!r}: is the folder that the trained model is written into; give "
            "another output_dir"
        )
    return folder
