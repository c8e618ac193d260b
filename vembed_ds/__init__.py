"""Distributed training of embedding models on DeepSpeed, with the exact whole-batch gradient."""

from __future__ import annotations

__version__ = "0.1.0"
