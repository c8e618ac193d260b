"""The exponential moving average of a model in training, in the shards of its ZeRO-3 copy.

ZeRO-3 cuts a flattened parameter into N equal pieces, one per rank, whoever made the engine. So
the piece that a rank holds of the copy is, element by element, its piece of the student at
ZeRO-3, and a slice of the student's whole parameter at ZeRO-0 to 2: nothing has to travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vembed_ds.engine.teacher_engine import TeacherEngine


class ShardedAverage:
    """Averages what the student's forward pass uses, in float32, one shard per rank.

    The average starts at the copy's weights. It *is* the copy's shard in a float32 engine; beside
    16-bit shards it is kept apart, because steps of ``1 - decay`` would be lost in their rounding.

    Args:
        copy: Holds a copy of ``student``, parameter for parameter.
        student: The model in training, before or after its own engine is made; what is frozen in
            it stays as it was in the copy.
        decay: d, in ``[0, 1)``.
    """

    def __init__(self, copy: TeacherEngine, student: nn.Module, *, decay: float) -> None:
        self._copy, self._decay = copy, decay
        copied = dict(copy.module.named_parameters())
        self._pieces = {
            name: _piece(copied[name], parameter)
            for name, parameter in student.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self) -> None:
        """``average = d * average + (1 - d) * weight``; each rank its own shards, no collective."""
        for piece in self._pieces.values():
            weight = _own_part(piece).to(piece.average)
            # The same sum in a form that leaves a weight that did not move exactly where it is.
            piece.average.lerp_(weight, 1 - self._decay)
        self._publish()

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's piece of every averaged parameter, ``[n]`` float32, not copied."""
        return {name: piece.average for name, piece in self._pieces.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_dict` gave: same names, same shapes."""
        for name, piece in self._pieces.items():
            piece.average.copy_(state[name])
        self._publish()

    def _publish(self) -> None:
        """Let the next forward pass gather the new averages."""
        for piece in self._pieces.values():
            if piece.shard is not piece.average:
                piece.shard.copy_(piece.average)
        # Small parameters stay gathered between forward passes, with their old values.
        self._copy.engine.optimizer.partition_all_parameters()
        for piece in self._pieces.values():
            # hpZ would gather from its copies within a node; letting go has just renewed them.
            piece.copy.ds_secondary_tensor = None


class _Piece(NamedTuple):
    """This rank's piece of one parameter, without the padding at the end of the last.

    Attributes:
        copy: The copy's parameter.
        student: The same parameter of the model in training.
        start: Place of the piece in the flattened parameter.
        shard: ``[n]``, what the copy gathers, in its precision.
        average: ``[n]`` float32; ``shard`` itself where that is float32.
    """

    copy: Any
    student: nn.Parameter
    start: int
    shard: Tensor
    average: Tensor


def _piece(copy: Any, student: nn.Parameter) -> _Piece:
    length = copy.ds_tensor.numel()
    start = length * copy.ds_zero_partition_rank
    own = max(0, min(length, copy.ds_numel - start))
    shard = copy.ds_tensor.detach().narrow(0, 0, own)
    average = shard if shard.dtype == torch.float32 else shard.float()
    return _Piece(copy, student, start, shard, average)


def _own_part(piece: _Piece) -> Tensor:
    """``[n]``: the piece of the student's weights, as its forward pass uses them now."""
    own = len(piece.average)
    if hasattr(piece.student, "ds_tensor"):
        assert piece.student.ds_tensor.shape == piece.copy.ds_tensor.shape
        shard: Tensor = piece.student.ds_tensor
        return shard.narrow(0, 0, own)
    return piece.student.detach().reshape(-1).narrow(0, piece.start if own else 0, own)
