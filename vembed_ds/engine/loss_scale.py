"""fp16: the loss scale may grow only behind the step that was scaled with the old one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vembed_ds.errors import DivergedError


class LossScaleUpdates:
    """Holds back the growth of a dynamic loss scale until the step is done.

    DeepSpeed 0.19.8 (ZeRO-1 to 3) updates the scale before it divides the gradient by it: whenever
    the scale grows, every ``loss_scale_window`` (1000) steps, that step's gradient is halved.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer, in fp16.
    """

    def __init__(self, optimizer: Any) -> None:
        self._update = optimizer._update_scale
        self._step_was_good = False
        optimizer._update_scale = self._during_step

    def _during_step(self, has_overflow: bool = False) -> None:
        if not has_overflow:
            self._step_was_good = True
            return
        try:
            self._update(has_overflow)  # the step is skipped: nothing is divided
        except Exception as error:
            raise DivergedError(
                f"fp16: the gradient overflows at the smallest loss scale ({error}); lower lr, set "
                "max_grad_norm, or use precision bf16 or fp32"
            ) from error

    def after_step(self) -> None:
        """Count the step that was just applied; call it behind every ``step``."""
        if self._step_was_good:
            self._step_was_good = False
            self._update(False)


def restore_loss_scale(optimizer: Any, saved: Mapping[str, Any]) -> None:
    """Go on with the dynamic loss scale of a checkpoint.

    A fixed scale is the configuration's; so is the first one, where the checkpoint had none.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer, in fp16.
        saved: Fields of the scaler that was saved.
    """
    scaler = optimizer.loss_scaler
    if scaler.dynamic and saved.get("dynamic"):
        for name in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"):
            setattr(scaler, name, saved[name])
