"""Random state: seeding, and recording it so that a chunk can be computed twice alike."""

from __future__ import annotations

import random
from dataclasses import dataclass

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
    """State of the generators that dropout draws from.

    Attributes:
        host: ``torch.get_rng_state()``.
        accelerator: The current accelerator device's state; ``None`` on CPU.
    """

    host: Tensor
    accelerator: Tensor | None


def capture_rng(device: torch.device) -> RngState:
    """Record the random state of the host and of ``device``."""
    if device.type == "cpu":
        return RngState(torch.get_rng_state(), None)
    state = torch.get_device_module(device).get_rng_state(device)
    return RngState(torch.get_rng_state(), state)


def restore_rng(state: RngState, device: torch.device) -> None:
    """Put the random state of the host and of ``device`` back."""
    torch.set_rng_state(state.host)
    if state.accelerator is not None:
        torch.get_device_module(device).set_rng_state(state.accelerator, device)
