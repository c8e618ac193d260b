"""What a run tells of itself in a checkpoint, for the card of the converted model."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vembed_ds
from vembed_ds.config.schema import Config
from vembed_ds.distributed import comm
from vembed_ds.training.data_setup import dataset_entries
from vembed_ds.training.resuming import BATCH

_LIBRARIES = ("torch", "deepspeed", "transformers")


def training_facts(
    config: Config,
    *,
    step: int,
    zero_stage: int,
    settings: Mapping[str, Any] | None = None,
    earlier: Sequence[Mapping[str, int]] = (),
) -> dict[str, Any]:
    """Plain values. Of local files only the last part of their path is told: cards are published.

    Args:
        config: Of the run.
        step: Optimizer steps done.
        zero_stage: DeepSpeed's.
        settings: From :func:`run_settings`; ``None``: the caller has its own data and loop.
        earlier: From :func:`earlier_parts`.
    """
    model, optimizer, known = config.model, config.optimizer, settings or {}
    bases = {"": model.model_name}
    if model.text_model_name or model.image_model_name:
        bases = {"text": model.text_model_name, "image": model.image_model_name}
    return {
        "base_models": {key: _base_name(name) for key, name in bases.items()},
        "data": [] if settings is None else _data_names(config),
        "num_records": known.get("num_records"),
        "data_fingerprint": known.get("data_fingerprint"),
        "loss": config.loss.loss_type,
        "step": step,
        "num_steps": known.get("num_steps"),
        "global_batch": known.get(BATCH, config.training.batch_size * comm.world_size()),
        "world_size": comm.world_size(),
        "zero_stage": zero_stage,
        "earlier_parts": list(earlier),
        "learning_rate": optimizer.lr,
        "schedule": optimizer.scheduler_type,
        "weight_decay": optimizer.weight_decay,
        "lora": _adapters(config),
        "versions": {
            "vembed_ds": vembed_ds.__version__,
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
            "Python": platform.python_version(),
        },
    }


def _base_name(reference: Any) -> str | None:
    """A hub name, or that it was a folder; ``None``: random weights."""
    if not isinstance(reference, str):
        return None
    return f"folder {Path(reference).name}" if Path(reference).is_dir() else reference


def _data_names(config: Config) -> list[str]:
    names = []
    for name, entry in dataset_entries(config.data).items():
        paths = [entry.data_path] if isinstance(entry.data_path, str) else entry.data_path
        shown = ", ".join(p.name if (p := Path(path)).exists() else str(path) for path in paths)
        names.append(f"{name}: {shown}" if name else shown)
    return names


def _adapters(config: Config) -> str | None:
    model = config.model
    if not model.use_lora:
        return None
    kind = "DoRA" if model.use_dora else "rsLoRA" if model.use_rslora else "LoRA"
    bits = ", base weights in 4 bit" if model.load_in_4bit else ""
    return f"{kind}, rank {model.lora_r}, alpha {model.lora_alpha:g}{bits}"
