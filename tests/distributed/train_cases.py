"""What a rank of a test world runs of the training package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.worlds import set_fp16_support
from vembed_ds.config.loading import load_config
from vembed_ds.engine.ds_config import load_ds_config
from vembed_ds.errors import VembedError
from vembed_ds.training.run import train


def run_train(
    *,
    config: str | None,
    ds_config: str,
    overrides: Sequence[str] = (),
    resume: str | None = None,
    fp16_supported: bool | None = None,
) -> dict[str, Any]:
    """As the command does: the last metrics, or the error that this rank would print.

    ``fp16_supported`` is what the accelerator says of itself; ``None``: what this machine can.
    """
    if fp16_supported is not None:
        set_fp16_support(fp16_supported)
    try:
        loaded = load_config(None if config is None else Path(config), overrides)
        raw = load_ds_config(Path(ds_config))
        return {"metrics": train(loaded, raw, ds_origin=Path(ds_config).name, resume=resume)}
    except VembedError as error:
        return {"error": f"{type(error).__name__}: {error}"}
