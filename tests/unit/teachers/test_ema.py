"""The copy that becomes an EMA teacher takes no memory for weights of its own."""

from __future__ import annotations

import torch
from torch import nn

from vembed_ds.teachers.ema import share_weights


def test_a_copy_in_the_memory_of_the_original() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.append(model[0])  # shared
    copied = share_weights(model)
    assert copied[0] is copied[2] is not model[0]
    for own, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        assert own is not theirs
        assert own.data_ptr() == theirs.data_ptr()
        assert not own.requires_grad
        assert theirs.requires_grad
    copied[1].running_mean.add_(1)
    assert torch.equal(model[1].running_mean, torch.zeros(2))
