"""The local gradient of one step: summed over chunks, defined for every trained parameter."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class LocalGradients:
    """Sums the gradients of several backward passes before they are reduced once.

    Float32 parameters sum in ``.grad`` as in plain PyTorch. 16-bit parameters would round after
    every chunk (2-3 times the error after 64 chunks), so their chunk gradients are summed in
    float32 here and rounded once. That costs four bytes per trained parameter, during the step.

    Args:
        parameters: The trained parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._in_16_bit = [p for p in self._parameters if p.dtype != torch.float32]
        self._sums: dict[nn.Parameter, Tensor] = {}

    def before_backward(self) -> None:
        """Move 16-bit gradients of the chunks so far into the float32 sums."""
        for parameter in self._in_16_bit:
            grad = parameter.grad
            if grad is None:
                continue
            if parameter in self._sums:
                self._sums[parameter].add_(grad)
            else:
                self._sums[parameter] = grad.float()
            parameter.grad = None

    def finish(self) -> None:
        """Leave the whole sum in ``.grad``; zero where no chunk used the parameter.

        Without a gradient ZeRO-3 would apply the *previous* step's to the parameter, and the
        ranks would disagree on what to reduce (a tower that only some ranks use).
        """
        if self._sums:
            self.before_backward()
        for parameter in self._parameters:
            if parameter in self._sums:
                _set_gradient(parameter, self._sums.pop(parameter).to(parameter.dtype))
            elif parameter.grad is None:
                zeros = torch.zeros(
                    _whole_shape(parameter), dtype=parameter.dtype, device=parameter.device
                )
                _set_gradient(parameter, zeros)

    def discard(self) -> None:
        """Forget every local gradient."""
        self._sums.clear()
        for parameter in self._parameters:
            parameter.grad = None


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape before ZeRO-3 partitioned the parameter."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _set_gradient(parameter: nn.Parameter, grad: Tensor) -> None:
    """Assign ``.grad`` of whole shape, also while ZeRO-3 keeps an empty placeholder as data."""
    if parameter.shape == grad.shape:
        parameter.grad = grad
        return
    placeholder = parameter.data
    parameter.data = grad  # PyTorch compares the shapes only when `.grad` is assigned
    parameter.grad = grad
    parameter.data = placeholder
