"""Task and distillation: value and gradients against the formula, on one rank and on two."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from tests.distributed import distillation_reference
from tests.distributed.distillation_reference import make_scores, make_teacher
from tests.distributed.loss_reference import make_batch, reference
from tests.distributed.test_losses import (
    CASES,
    LABELLED,
    LAYERS,
    LEARNED,
    MRL,
    PLAIN,
    SIGLIP,
    TOKENS,
    K,
    M,
    S,
    T,
)
from tests.worlds import World

HALF = ("constant", 0.5, 0.5, 11)
RISING = ("linear", 0.2, 0.8, 11)
FALLING = ("cosine", 0.9, 0.1, 11)
KL = {"loss_type": "kl", "temperature": 0.3, "teacher_temperatures": (None,)}
RANK = {"loss_type": "rank", "scale": 5.0}
SUM = {"reduction": "sum"}
SCORES = "scores"


class Case(NamedTuple):
    """A task, its batch, what is followed, and the teachers: vectors of a kind, or scores."""

    task: str
    options: dict[str, Any]
    data: dict[str, Any]
    followed: dict[str, Any]
    teachers: list[dict[str, Any] | str]
    projected: tuple[int, ...] = ()


ONE: list[dict[str, Any] | str] = [{"width": 4}]
LATE: list[dict[str, Any] | str] = [{"width": 3, "tokens": True}]  # late interaction
DISTILLED: dict[str, Case] = {
    "kl": Case("infonce", T, LABELLED, {**KL, "teacher_temperatures": (0.7,)}, ONE),
    "kl without negatives": Case("infonce", T, PLAIN, KL, ONE),
    "kl of scores": Case("triplet", M, {}, KL, [SCORES]),
    "kl of tokens": Case(
        "colbert",
        {**T, "maxsim_reduction": "sum"},
        TOKENS,
        KL | SUM,
        LATE,
    ),
    "mse": Case("sigmoid", {}, SIGLIP, {"loss_type": "mse", "alpha": RISING}, ONE),
    "mse of tokens, pooled teacher": Case("colbert", T, TOKENS, {"loss_type": "mse"}, ONE),
    "mse of vectors, teacher of tokens": Case("cosent", S, {}, {"loss_type": "mse"}, LATE),
    "margin_mse": Case("triplet", M, {}, {"loss_type": "margin_mse", "alpha": FALLING}, ONE),
    "margin_mse of scores": Case("infonce", T, {}, {"loss_type": "margin_mse"}, [SCORES]),
    "margin_mse without negatives": Case("cosent", S, PLAIN, {"loss_type": "margin_mse"}, ONE),
    "rank": Case("in_batch_hard", K, LABELLED, RANK, ONE),
    "rank of scores": Case("infonce", T, LEARNED, RANK, [SCORES]),
    "rank of tokens": Case("colbert", T, TOKENS | PLAIN, RANK | SUM, LATE),
    "regression": Case("infonce", T, {}, {"loss_type": "regression"}, [{"width": 6}]),
    "regression through a projection": Case(
        "infonce", T, {}, {"loss_type": "regression"}, ONE, (0,)
    ),
    "regression, two teachers": Case(
        "in_batch_hard",
        K,
        PLAIN,
        {"loss_type": "regression", "weights": (2.0, 1.0)},
        [{"width": 6}, {"width": 9, "seed": 8}],
        (1,),
    ),
    "regression of prefixes": Case(
        "infonce", {**T, **MRL}, {}, {"loss_type": "regression"}, ONE, (0,)
    ),
    "rank of prefixes": Case("infonce", {**T, **MRL}, LABELLED, RANK, ONE),
    "kl of layers, two teachers": Case(
        "infonce",
        {**T, **LAYERS, "mrl_weights": (1.0, 0.5)},
        {},
        {**KL, "weights": (1.0, 3.0), "teacher_temperatures": (None, 0.5), "alpha": FALLING},
        [{"width": 9}, SCORES],
    ),
}


def batch_of(case: Case) -> dict[str, Any]:
    batch = make_batch(**case.data, step=3)
    batch["teachers"] = {
        str(number): make_scores(batch) if isinstance(kind, str) else make_teacher(batch, **kind)
        for number, kind in enumerate(case.teachers)
    }
    generator = torch.Generator().manual_seed(7)
    width = 6 // len(case.options.get("mrl_layers", (0,)))
    batch["projections"] = {
        number: torch.randn(
            len(batch["teachers"][str(number)]["query"][0]), width, generator=generator
        )
        for number in case.projected
    }
    return batch


def followed_by(case: Case) -> dict[str, Any]:
    return {"weights": (1.0,), "alpha": HALF, **case.followed}


@functools.cache
def expected_of(name: str) -> dict[str, Any]:
    """Once for both worlds."""
    case = DISTILLED[name]
    return reference(
        case.task,
        batch_of(case),
        case.options,
        combine=lambda task, batch: distillation_reference.combine(
            task, batch, case.options, followed_by(case)
        ),
    )


@pytest.mark.parametrize("name", DISTILLED)
@pytest.mark.parametrize("world_size", [1, 2])
def test_task_and_distillation_equal_their_formulas_on_the_whole_batch(
    world: Callable[[int], World], world_size: int, name: str
) -> None:
    case, expected = DISTILLED[name], expected_of(name)
    results = world(world_size).run(
        f"{CASES}:loss_and_gradients",
        loss_type=case.task,
        batch=batch_of(case),
        options=case.options,
        distillation=followed_by(case),
        tile_size=2 if world_size == 2 else None,
    )
    # Tolerances as in test_losses.py.
    assert results[0]["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
    for role in distillation_reference.ROLES:
        got = [grad for result in results for grad in result[role]]
        for grad, wanted in zip(got, expected[role], strict=True):
            torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=3e-6)
    for learned in ("logit_scale", "logit_bias"):
        if learned in case.data:
            assert results[0][learned] == pytest.approx(expected[learned], rel=1e-4, abs=1e-6)
    for number in case.projected:
        found, wanted = results[0]["projections"][number], expected["projections"][number]
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=3e-6)
        assert wanted.abs().sum() > 1e-2


@pytest.mark.parametrize("name", DISTILLED)
def test_the_teachers_above_say_something_else_than_the_task(name: str) -> None:
    case = DISTILLED[name]
    task = reference(case.task, batch_of(case), case.options)
    distances = [
        float((a - b).abs().sum())
        for role in ("query", "positive")
        for a, b in zip(expected_of(name)[role], task[role], strict=True)
    ]
    assert sum(distances) > 1e-2
