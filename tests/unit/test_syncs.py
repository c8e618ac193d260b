"""The watch that the test of the training loop relies on sees what it should."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.syncs import SyncWatch

X = torch.tensor([1.0, 0.0, 3.0])
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("what", "action"),
    [
        ("_local_scalar_dense", lambda: X.sum().item()),
        ("_local_scalar_dense", lambda: float(X.sum())),
        ("_local_scalar_dense", lambda: int(X.sum())),
        ("_local_scalar_dense", lambda: bool(X.sum())),
        ("_local_scalar_dense", lambda: X.sum() > 1 and 1),
        ("tolist", X.tolist),
        ("numpy", X.numpy),
        ("cpu", X.cpu),
        ("nonzero", X.nonzero),
        ("index", lambda: X[X > 1]),
        ("masked_select", lambda: X.masked_select(X > 1)),
        ("repeat_interleave", lambda: X.repeat_interleave(torch.tensor([1, 2, 0]))),
        ("_unique2", lambda: X.unique()),
        ("equal", lambda: torch.equal(X, X)),
        ("to", lambda: X.to("cpu")),
        ("to", lambda: X.to(CPU, torch.float64)),
        ("to", lambda: X.to(device=CPU)),
        ("torch.tensor", lambda: torch.tensor([1], device=CPU)),
        ("torch.as_tensor", lambda: torch.as_tensor(1.0, device=CPU)),
    ],
)
def test_what_waits_is_seen(what: str, action: Callable[[], object]) -> None:
    with SyncWatch() as watch:
        action()
    assert what in {name for name, *_ in watch.found}


@pytest.mark.parametrize(
    "action",
    [
        lambda: X.to(CPU, non_blocking=True),
        lambda: X.to(torch.float64),
        lambda: torch.tensor([1]),
        lambda: X[torch.tensor([0, 1])],
        lambda: X.masked_fill(X > 1, 0.0),
        lambda: torch.where(X > 1, X, 0.0),
        lambda: torch.zeros(3, device=CPU),
        lambda: nn.functional.cross_entropy(X[None], torch.tensor([0])),
    ],
)
def test_what_does_not_wait_is_not_seen(action: Callable[[], Tensor]) -> None:
    with SyncWatch() as watch:
        action()
    assert not watch.found


def test_backward_passes_are_watched() -> None:
    class Curious(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, grad):
            return grad * grad.sum().item()

    x = X.clone().requires_grad_()
    with SyncWatch() as watch:
        Curious.apply(x).sum().backward()
    assert {name for name, *_ in watch.found} == {"_local_scalar_dense"}
