"""Distributed training of embedding models on DeepSpeed, with the exact whole-batch gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vembed_ds.inference import Encoder

__version__ = "0.1.0"
__all__ = ["Encoder", "__version__"]


def __getattr__(name: str) -> Any:
    """Import what needs PyTorch only when it is asked for."""
    if name == "Encoder":
        from vembed_ds.inference import Encoder

        return Encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
