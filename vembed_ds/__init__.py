"""Distributed training of embedding models on DeepSpeed, with the exact whole-batch gradient."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vembed_ds.api.config import TrainConfig
    from vembed_ds.api.predictor import Predictor
    from vembed_ds.api.trainer import Trainer
    from vembed_ds.inference import Encoder

__version__ = "0.1.0"
__all__ = ["Encoder", "Predictor", "TrainConfig", "Trainer", "__version__"]

_HOMES = {
    "Encoder": "vembed_ds.inference",
    "Predictor": "vembed_ds.api.predictor",
    "TrainConfig": "vembed_ds.api.config",
    "Trainer": "vembed_ds.api.trainer",
}


def __getattr__(name: str) -> Any:
    """Import what needs PyTorch only when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
