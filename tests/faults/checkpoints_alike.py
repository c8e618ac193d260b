"""Whether two checkpoints hold the same, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def require_same_checkpoints(one: Path, other: Path) -> None:
    """Weights, optimizer and random states of all ranks."""
    files = sorted(path.name for path in one.glob("*.pt"))
    assert files == sorted(path.name for path in other.glob("*.pt"))
    assert len(files) >= 3
    for name in files:
        first, second = (
            _tensors(torch.load(folder / name, weights_only=False)) for folder in (one, other)
        )
        assert first.keys() == second.keys()
        for place, tensor in first.items():
            assert torch.equal(tensor, second[place]), f"{name}{place}"


def _tensors(value: Any, place: str = "") -> dict[str, torch.Tensor]:
    """All tensors inside something, by where they are."""
    if isinstance(value, torch.Tensor):
        return {place: value}
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {}
    return {k: v for key, item in items for k, v in _tensors(item, f"{place}/{key}").items()}
