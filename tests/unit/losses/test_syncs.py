"""No loss makes the host wait for the accelerator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.syncs import SyncWatch
from vembed_ds.losses import (
    DIRECTIONS,
    LOSSES,
    Distillation,
    Embeddings,
    Guide,
    LossInputs,
    TeacherScores,
    TeacherVectors,
    build_loss,
)
from vembed_ds.losses.combination import DISTILLATION_LOSSES

# Tensors of the host.
ALLOWED = {
    ("_local_scalar_dense", "losses.inputs.LossInputs.check"): "the counts are on the host",
    ("tolist", "losses.batch._gather_negatives"): "likewise",
}
COUNTS = torch.tensor([2, 0, 1])


def rows(number: int, *, tokens: bool = False) -> Embeddings:
    shape = (number, 4, 8) if tokens else (number, 8)
    mask = torch.arange(4) < torch.randint(1, 5, (number, 1)) if tokens else None
    return Embeddings(torch.randn(shape, requires_grad=True), mask)


def inputs(*, tokens: bool, learned: bool, **more: Any) -> LossInputs:
    return LossInputs(
        *(rows(3, tokens=tokens) for _ in range(3)),
        negative_counts=COUNTS,
        labels=torch.tensor([0, 1, 0]),
        query_keys=torch.arange(3),
        positive_keys=torch.arange(3),
        negative_keys=torch.arange(3),
        logit_scale=torch.tensor([1.0], requires_grad=True) if learned else None,
        logit_bias=torch.tensor([-2.0], requires_grad=True) if learned else None,
        **more,
    )


def waits(loss: Any, given: LossInputs) -> set[tuple[str, str]]:
    with SyncWatch() as watch:
        loss(given).backward()
    return {(what, ours) for what, _, ours in watch.found} - set(ALLOWED)


OPTIONS: dict[str, dict[str, Any]] = {
    "infonce": {"temperature": 0.1},
    "colbert": {"temperature": 0.1},
    "in_batch_hard": {"temperature": 0.1, "hard_mining_topk": 2},
    "hard_negative": {"temperature": 0.1, "use_all_negatives": True, "hard_mining_topk": 2},
    "triplet": {"triplet_margin": 0.5},
    "cosent": {"cosent_scale": 20.0},
    "sigmoid": {},
}


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"mask_duplicates": True, "label_mode": "ignore"},
        {"use_mrl": True, "mrl_dims": (8, 4)},
    ],
)
def test_losses(loss_type: str, more: dict[str, Any]) -> None:
    loss = build_loss(loss_type, tile_size=2, **OPTIONS[loss_type], **more)
    given = inputs(tokens=loss_type == "colbert", learned=loss_type == "sigmoid")
    assert waits(loss, given) == set()


@pytest.mark.parametrize("partition", ["joint", "per_direction"])
def test_a_guide_and_all_directions(partition: str) -> None:
    guide = Guide(*(torch.randn(3, 5) for _ in range(3)))
    options = {"loss_directions": DIRECTIONS, "loss_partition": partition, "guide_margin": 0.1}
    loss = build_loss("infonce", temperature=0.1, negatives_scope="own", tile_size=2, **options)
    assert waits(loss, inputs(tokens=False, learned=True, guide=guide)) == set()


def test_scores() -> None:
    loss = build_loss("cosent", cosent_scale=20.0)
    given = LossInputs(rows(3), rows(3), scores=torch.tensor([0.1, 0.5, 0.5]))
    assert waits(loss, given) == set()


@pytest.mark.parametrize("loss_type", DISTILLATION_LOSSES)
@pytest.mark.parametrize("stored", [False, True])
def test_teachers(loss_type: str, stored: bool) -> None:
    if stored and loss_type == "regression":
        pytest.skip("scores are no vectors")
    teacher = (
        TeacherScores(torch.randn(3), torch.randn(3))
        if stored
        else TeacherVectors(*(Embeddings(torch.randn(3, 8)) for _ in range(3)))
    )
    distillation = Distillation(loss_type, weights=(1.0,), alpha=lambda step: 0.5)
    loss = build_loss("infonce", temperature=0.1, distillation=distillation, tile_size=2)
    assert waits(loss, inputs(tokens=False, learned=False, teachers=(teacher,))) == set()
