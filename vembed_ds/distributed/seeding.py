"""Random state: seeding, and recording it so that a chunk can be computed twice alike."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (host and accelerator)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class RngState:
    """State of every generator that code in a forward pass may draw from.

    Attributes:
        host: ``torch.get_rng_state()``.
        accelerator: The current accelerator device's state; ``None`` on CPU.
        python: ``random.getstate()``.
        numpy: ``np.random.get_state()``.
    """

    host: Tensor
    accelerator: Tensor | None
    python: Any
    numpy: Any

    def equals(self, other: RngState) -> bool:
        """Whether nothing was drawn between the two; of the same device."""
        pairs = [(self.host, other.host)]
        if self.accelerator is not None and other.accelerator is not None:
            pairs.append((self.accelerator, other.accelerator))
        return (
            all(torch.equal(one, another) for one, another in pairs)
            and self.python == other.python
            and all(np.array_equal(a, b) for a, b in zip(self.numpy, other.numpy, strict=True))
        )


def capture_rng(device: torch.device) -> RngState:
    """Record the random state of torch (host and ``device``), Python and NumPy."""
    accelerator = None
    if device.type != "cpu":
        accelerator = torch.get_device_module(device).get_rng_state(device)
    return RngState(torch.get_rng_state(), accelerator, random.getstate(), np.random.get_state())


def restore_rng(state: RngState, device: torch.device) -> None:
    """Put back what :func:`capture_rng` recorded."""
    torch.set_rng_state(state.host)
    if state.accelerator is not None:
        torch.get_device_module(device).set_rng_state(state.accelerator, device)
    random.setstate(state.python)
    np.random.set_state(state.numpy)
