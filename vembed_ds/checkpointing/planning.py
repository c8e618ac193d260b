"""What a conversion is going to write, found out before a weight is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from vembed_ds.checkpointing.adapters import read_adapter_config
from vembed_ds.checkpointing.describe import PROJECTIONS, SETTINGS, TRAINING_ONLY
from vembed_ds.checkpointing.files import (
    FACTS_FILE,
    MODEL_FOLDER,
    PARAMETERS_FILE,
    read_parameters,
    resolve_checkpoint,
)
from vembed_ds.checkpointing.frozen import FROZEN_FILE
from vembed_ds.checkpointing.parts import (
    Part,
    TrainedValues,
    adapter_part,
    backbone_part,
    plain_part,
)
from vembed_ds.checkpointing.shards import open_checkpoint
from vembed_ds.errors import CheckpointError
from vembed_ds.models.families import build_from_config, loading_problem
from vembed_ds.models.lora import ADAPTER_CONFIG
from vembed_ds.models.saved_folder import SETTINGS_FILE
from vembed_ds.streams import LOGIT_BIAS, LOGIT_SCALE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_SIZE = "5GB"
_CONFIG = "config.json"


@dataclass(frozen=True)
class Options:
    """How a checkpoint is written.

    Attributes:
        adapter: Write adapters as peft's files, not merged into the weights.
        dtype: ``float32``, ``bfloat16`` or ``float16``, of all weights.
        max_shard_size: Of one safetensors file of a backbone, as ``5GB``.
        trust_remote_code: Whether the model's own Python code, which lies in the checkpoint, may run.
        show_progress: Show a bar when it takes longer than some seconds.
    """

    adapter: bool = False
    dtype: str = "float32"
    max_shard_size: str = MAX_SHARD_SIZE
    trust_remote_code: bool = False
    show_progress: bool = False


@dataclass(frozen=True)
class Plan:
    """What a conversion writes.

    Attributes:
        checkpoint: The folder ``checkpoint-step-<N>``.
        parts: The weights.
        models: On the meta device, by component.
        values: Of the checkpoint.
        learned: Values that stand in ``vembed_config.json``, by their names there and in the
            trained module.
        options: How it is written.
    """

    checkpoint: Path
    parts: list[Part]
    models: dict[str, Any]
    values: TrainedValues
    learned: dict[str, str]
    options: Options

    @property
    def description(self) -> Path:
        """The folder ``model/`` of the checkpoint."""
        return self.checkpoint / MODEL_FOLDER

    def sizes(self) -> dict[str, int]:
        """Every file of weights, by its path in the new folder, with its bytes."""
        here = Path()
        files = [file for part in self.parts for file in part.files(here).values()]
        return {file.path.as_posix(): file.size for file in files}

    def copied(self) -> list[str]:
        """Every file that is taken over from the description, but for what the model rewrites."""
        left = left_out(self.description, self.options)
        paths = [path for path in self.description.rglob("*") if path.is_file()]
        return sorted(p.relative_to(self.description).as_posix() for p in paths if p not in left)


def plan_export(checkpoint: Path, options: Options) -> Plan:
    """Find out what a conversion writes; no weight is read. Not collective.

    Raises:
        CheckpointError: As :func:`export_model`.
    """
    checkpoint = resolve_checkpoint(checkpoint)
    parameters = read_parameters(checkpoint)
    read_settings(checkpoint / MODEL_FOLDER)
    if options.adapter:
        _check_adapter(checkpoint, parameters)
    reader = open_checkpoint(checkpoint)
    reader.check_whole()
    values = TrainedValues(
        reader.weight,
        reader.names(),
        parameters,
        origin=str(checkpoint),
        described_in=f"{MODEL_FOLDER}/{PARAMETERS_FILE}",
    )
    return _plan(checkpoint, values, options)


def read_settings(description: Path) -> dict[str, Any]:
    """What ``vembed_config.json`` says of a checkpoint's model.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    path = description / SETTINGS_FILE
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    return settings


def size_in_bytes(text: str) -> int:
    """What ``5GB`` says.

    Raises:
        CheckpointError: It says nothing, or no size that a file can have.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])B", text.strip().upper())
    size = 0 if found is None else int(float(found[1]) * 1000 ** (1 + "KMGT".index(found[2])))
    if not size:
        raise CheckpointError(
            f"max_shard_size={text!r}: expected a number and KB, MB, GB or TB, as 5GB"
        )
    return size


def _check_adapter(checkpoint: Path, parameters: Mapping[str, Mapping[str, Any]]) -> None:
    if not any((checkpoint / MODEL_FOLDER).rglob(ADAPTER_CONFIG)):
        raise CheckpointError(
            f"{checkpoint}: was trained without use_lora, so it has no adapter; leave out --adapter"
        )
    if any(entry.get("rounded_to_4_bit") for entry in parameters.values()):
        raise CheckpointError(
            f"{checkpoint}: was trained with load_in_4bit, and beside the base model's own weights "
            "its adapter is not the model that was trained; leave out --adapter"
        )


def _plan(checkpoint: Path, values: TrainedValues, options: Options) -> Plan:
    dtype, components = DTYPES[options.dtype], dict(values.components)
    components.pop(TRAINING_ONLY, None)
    learned = components.pop(SETTINGS, {})
    parts: list[Part] = []
    models: dict[str, Any] = {}
    for component, names in components.items():
        if component in PROJECTIONS:
            parts.append(plain_part(component, names, values, dtype=dtype))
            continue
        place = checkpoint / MODEL_FOLDER / component
        config = read_adapter_config(place)
        if config is not None and options.adapter:
            # What the loss learned has no place among an adapter's weights.
            scalars = {n: own for n, own in names.items() if n in (LOGIT_SCALE, LOGIT_BIAS)}
            learned |= {n: own for n, own in scalars.items() if n == own}
            rest = {n: own for n, own in names.items() if n not in scalars}
            parts.append(adapter_part(component, rest, values, config, dtype=dtype))
            continue
        model = models[component] = _skeleton(place, options)
        parts.append(
            backbone_part(
                component,
                names,
                values,
                model,
                config,
                dtype=dtype,
                max_shard_size=size_in_bytes(options.max_shard_size),
                origin=str(place),
            )
        )
    return Plan(checkpoint, parts, models, values, learned, options)


def _skeleton(place: Path, options: Options) -> Any:
    """The model on the meta device, in the format that is written, which its config then says."""
    if not (place / _CONFIG).is_file():
        raise CheckpointError(f"{place / _CONFIG}: missing; the checkpoint is incomplete")
    trusted = options.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=trusted)
        with torch.device("meta"):
            return build_from_config(config, dtype=DTYPES[options.dtype], trust_remote_code=trusted)
    except Exception as error:  # a model's own code may raise anything, and so may transformers
        problem = loading_problem(error)
        raise CheckpointError(f"{place}: the model cannot be built: {problem}") from error


def left_out(description: Path, options: Options) -> set[Path]:
    """Files of the description that the new folder does not get."""
    left = {description / name for name in (PARAMETERS_FILE, FROZEN_FILE, FACTS_FILE)}
    for config in description.rglob(ADAPTER_CONFIG):
        # Beside merged weights, transformers would apply an adapter a second time; without them,
        # a reader takes config.json for a model that lacks its weights.
        left.add(config.with_name(_CONFIG) if options.adapter else config)
    return left
