"""Distillation where there is little to follow, or nothing; and what it looks at."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.losses.matrices import GivenJudge, matrix
from vembed_ds.losses import (
    DISTILLATION_LOSSES,
    Distillation,
    Embeddings,
    LossInputs,
    TeacherScores,
    TeacherVectors,
    build_loss,
)
from vembed_ds.losses.distillation import kl, rank, regression
from vembed_ds.losses.judges import Judged, judge_by_vectors

SIMILARITY_LOSSES = [name for name in DISTILLATION_LOSSES if name != "regression"]


def draw(number: int, *shape: int, seed: int) -> Tensor:
    return torch.randn(number, *shape, generator=torch.Generator().manual_seed(seed))


def given(pairs: int, counts: list[int] | None, *, scores: bool = False, **more: Any) -> LossInputs:
    """A batch and its teacher; ``counts`` of explicit negatives, ``None``: the data has none."""
    sizes = [pairs, pairs, *([] if counts is None else [sum(counts)])]
    student = [Embeddings(draw(n, 6, seed=n).requires_grad_()) for n in sizes]
    teacher: TeacherVectors | TeacherScores = TeacherVectors(
        *(Embeddings(draw(n, 4, seed=10 + n)) for n in sizes)
    )
    if scores:
        teacher = TeacherScores(*(draw(n, seed=20 + n) for n in sizes[1:]))
    numbers = {} if counts is None else {"negative_counts": torch.tensor(counts)}
    return LossInputs(*student, **numbers, **{"teachers": (teacher,), **more})


def followed(name: str, **options: Any) -> Distillation:
    return Distillation(name, weights=(1.0,), alpha=lambda step: 0.0, **options)


def loss_of(inputs: LossInputs, distillation: Distillation, **options: Any) -> Tensor:
    return build_loss("infonce", temperature=0.1, distillation=distillation, **options)(inputs)


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("counts", [None, [0], [2]])
@pytest.mark.parametrize("name", SIMILARITY_LOSSES)
@pytest.mark.parametrize("temperature", [1e-3, 1.0])
def test_one_pair_gives_a_finite_gradient(
    name: str, counts: list[int] | None, scores: bool, temperature: float
) -> None:
    inputs = given(1, counts, scores=scores)
    value = loss_of(inputs, followed(name, temperature=temperature, scale=1e3))
    value.backward()
    query = inputs.query.values.grad
    assert query is not None
    assert torch.isfinite(query).all()
    if not sum(counts or []) and name != "mse":
        # There is no other document to compare with.
        assert value.item() == 0
        assert torch.equal(query, torch.zeros_like(query))
    elif name != "kl" or temperature == 1:
        assert query.abs().sum() > 0


@pytest.mark.parametrize("name", ["kl", "margin_mse", "rank"])
def test_a_query_whose_positive_alone_has_a_score_adds_0_to_the_mean(name: str) -> None:
    several = given(3, [2, 0, 0], scores=True)
    alone = given(3, [2, 0, 0], scores=True)
    teacher = alone.teachers[0]
    assert isinstance(teacher, TeacherScores)
    alone = LossInputs(
        alone.query.rows([0]),
        alone.positive.rows([0]),
        negative=alone.negative,
        negative_counts=torch.tensor([2]),
        teachers=(replace(teacher, positive=teacher.positive[:1]),),
    )
    whole, part = (loss_of(inputs, followed(name)) for inputs in (several, alone))
    assert whole.item() == pytest.approx(part.item() / 3, rel=1e-6)


def judged(teacher: list[float], *, tie: float) -> Judged:
    shape = (1, len(teacher))
    return Judged(
        torch.tensor([teacher]),
        known=torch.ones(shape, dtype=torch.bool),
        own=torch.tensor([0]),
        explicit=torch.zeros(shape, dtype=torch.bool),
        tie=torch.tensor([[tie]]),
    )


def test_rounding_makes_no_order_but_every_difference_of_scores_does() -> None:
    student = torch.tensor([[0.5, 0.1, 0.9]])
    alike, rounded = [0.3, 0.3, 0.1], [0.3, 0.3 + 2e-7, 0.1]
    values = [rank(student, judged(t, tie=1e-6), scale=5.0).item() for t in (alike, rounded)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    exact = rank(student, judged(rounded, tie=0.0), scale=5.0).item()
    pairs = [0.9 - 0.5, 0.9 - 0.1, 0.5 - 0.1]
    assert exact == pytest.approx(math.log(1 + sum(math.exp(5 * d) for d in pairs)), rel=1e-5)


def test_the_rounding_of_a_sum_over_tokens_grows_with_it() -> None:
    tokens = Embeddings(draw(2, 40, 6, seed=1), torch.ones(2, 40, dtype=torch.bool))
    teacher = TeacherVectors(tokens, tokens)
    sums, means = (
        judge_by_vectors(given(2, None), teacher, reduction=r).of_rows(slice(None))
        for r in ("sum", "mean")
    )
    torch.testing.assert_close(sums.tie, torch.full((2, 1), 40e-6))
    torch.testing.assert_close(means.tie, torch.full((2, 1), 1e-6))


def test_a_teacher_that_knows_the_positive_only_makes_kl_infonce_times_the_square_of_t() -> None:
    """Why a small temperature asks for a small alpha."""
    student = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    own = torch.arange(4)
    certain = Judged(
        torch.nn.functional.one_hot(own, 6).float(),
        known=torch.ones(4, 6, dtype=torch.bool),
        own=own,
        explicit=torch.zeros(4, 6, dtype=torch.bool),
        tie=torch.zeros(4, 1),
    )
    value = kl(matrix(student), GivenJudge(certain), temperature=0.05, teacher_temperature=1e-3)
    task = torch.nn.functional.cross_entropy(student / 0.05, own)
    assert value.item() == pytest.approx(0.05**2 * task.item(), rel=1e-5)


def test_kl_at_a_high_temperature_is_half_the_variance_of_the_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.rand(4, 6, generator=generator).double() for _ in range(2))
    found = replace(judged([0.0], tie=0.0), teacher=teacher, known=torch.ones(4, 6) > 0)
    expected = (student - teacher).var(dim=1, unbiased=False).mean() / 2
    value = kl(matrix(student), GivenJudge(found), temperature=100.0)
    assert value.item() == pytest.approx(expected.item(), rel=1e-2)


@pytest.mark.parametrize("name", SIMILARITY_LOSSES)
def test_what_the_task_leaves_out_is_followed_too(name: str) -> None:
    """The teacher's word on equal labels, duplicates and others' negatives is as good as any."""
    keys = {"query_keys": torch.arange(3), "positive_keys": torch.tensor([7, 7, 8])}
    keys |= {"negative_keys": torch.tensor([8, 9, 7])}
    inputs = given(3, [2, 1, 0], labels=torch.tensor([0, 0, 1]), **keys)
    plain = loss_of(inputs, followed(name), label_mode="ignore")
    options = {"label_mode": "mask", "mask_duplicates": True, "negatives_scope": "own"}
    assert loss_of(inputs, followed(name), **options).item() == plain.item()
    only_task = replace(followed(name), alpha=lambda step: 1.0)
    assert loss_of(inputs, only_task, **options).item() != pytest.approx(
        loss_of(inputs, only_task, label_mode="ignore").item(), abs=1e-3
    )


VECTORS = Embeddings(torch.ones(3, 4))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (
            TeacherVectors(VECTORS.rows([0]), VECTORS, VECTORS),
            "teacher 0 knows 1 items of role query, the batch has 3",
        ),
        (
            TeacherVectors(VECTORS, VECTORS),
            "teacher 0 knows 0 items of role negative, the batch has 3",
        ),
        (
            TeacherScores(torch.ones(2), torch.ones(3)),
            "teacher 0 knows 2 items of role positive, the batch has 3",
        ),
        (
            TeacherScores(torch.ones(3)),
            "teacher 0 knows 0 items of role negative, the batch has 3",
        ),
    ],
)
def test_a_teacher_of_other_items_is_named(
    teacher: TeacherVectors | TeacherScores, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loss_of(given(3, [2, 1, 0], teachers=(teacher,)), followed("mse"))


def test_regression_refuses_token_embeddings() -> None:
    tokens = Embeddings(torch.ones(2, 2, 6), torch.ones(2, 2, dtype=torch.bool))
    inputs = LossInputs(tokens, tokens)
    with pytest.raises(ValueError, match="compares one vector per item, not one per token"):
        regression(inputs, TeacherVectors(*[Embeddings(torch.ones(2, 6))] * 2), None)


def pairs_of(noise: float) -> list[Tensor]:
    """256 pairs around common centres."""
    centres = draw(256, 64, seed=0)
    return [centres + noise * draw(256, 64, seed=seed) for seed in (1, 2)]


def gradient_norm(distillation: Distillation) -> float:
    leaves = [values.requires_grad_() for values in pairs_of(1.0)]
    teacher = TeacherVectors(*map(Embeddings, pairs_of(0.5)))
    inputs = LossInputs(*map(Embeddings, leaves), teachers=(teacher,))
    loss = build_loss("infonce", temperature=0.05, distillation=distillation)(inputs)
    return torch.cat(torch.autograd.grad(loss, leaves)).norm().item()


@pytest.mark.parametrize(
    ("name", "temperature", "times"),
    [
        ("kl", 1.0, 1100),
        ("kl", 0.1, 145),
        ("kl", 0.05, 400),
        ("mse", 1.0, 600),
        ("margin_mse", 1.0, 14),
        ("rank", 1.0, 1.55),
        ("regression", 1.0, 24),
    ],
)
def test_how_much_larger_the_gradient_of_the_task_is(
    name: str, temperature: float, times: float
) -> None:
    """The figures of docs/losses.md, from which a user chooses alpha."""
    alone = followed(name, temperature=temperature)
    task = gradient_norm(replace(alone, alpha=lambda step: 1.0))
    assert task / gradient_norm(alone) == pytest.approx(times, rel=0.05)


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("name", SIMILARITY_LOSSES)
def test_a_teacher_that_says_nan_is_not_followed(name: str, scores: bool) -> None:
    """The loss is NaN, which ends the step: sorted, NaN would only be the largest of all."""
    inputs = given(4, [1, 2, 0, 3], scores=scores)
    (teacher,) = inputs.teachers
    values = teacher.positive if isinstance(teacher, TeacherScores) else teacher.query.values
    values[1] = math.nan
    assert loss_of(inputs, followed(name)).isnan()
