"""The reduced gradient as it lies in DeepSpeed, between the reduction and the step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

Piece = tuple[nn.Parameter, Tensor]


def reduced_pieces(
    optimizer: Any, *, zero_stage: int, trained: Iterable[nn.Parameter]
) -> list[Piece]:
    """What this rank holds of the reduced gradient: whole at stage 0, else its partition.

    Views, not copies, in the precision and (fp16) with the loss scale that the optimizer will find
    there. A rank may hold nothing of a parameter. Local.

    Args:
        optimizer: DeepSpeed's, or torch's own at stage 0 in float32.
        zero_stage: Of the engine.
        trained: The trained parameters.
    """
    if zero_stage == 0:
        return [(p, p.grad) for p in trained if p.grad is not None]
    return _stage_3(optimizer) if zero_stage == 3 else _stage_1_and_2(optimizer)


def norm_of(pieces: Iterable[Piece]) -> Tensor:
    """Their norm, float32, 0-dim, where they lie; NaN or infinite when any number in them is.

    Squares of numbers above 1e19 make it infinite too, as they do in DeepSpeed's.
    """
    tensors = [piece for _, piece in pieces if piece.numel()]
    if not tensors:
        return torch.zeros(())
    # In float32: the norm of a tensor in fp16 may be too large for fp16 where no number in it is.
    norm: Tensor = torch.linalg.vector_norm(
        torch.stack(torch._foreach_norm(tensors, 2, torch.float32))
    )
    return norm


def _stage_1_and_2(optimizer: Any) -> list[Piece]:
    pieces: list[Piece] = []
    if optimizer.cpu_offload:
        optimizer._wait_for_offload_copies()
    for group, parameters in enumerate(optimizer.params_in_partition):
        offloaded = optimizer.cpu_offload
        found = (optimizer.offload_gradient_dict if offloaded else optimizer.averaged_gradients)[
            group
        ]
        pieces += zip(parameters, found, strict=False)  # behind the last stands padding
    return pieces


def _stage_3(optimizer: Any) -> list[Piece]:
    if not optimizer.offload_optimizer:
        return [
            piece
            for group, found in optimizer.averaged_gradients.items()
            for piece in zip(optimizer.fp16_groups[group], found, strict=True)
        ]
    pieces: list[Piece] = []
    for parameter in (p for group in optimizer.fp16_groups for p in group):
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        whole = optimizer.fp32_partitioned_groups_flat[group].grad
        pieces.append((parameter, whole.narrow(0, offset, size)))
    return pieces
