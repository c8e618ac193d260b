"""Every distillation loss and its gradient against its formula, entry by entry, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.unit.losses.matrices import GivenJudge, matrix
from vembed_ds.errors import ConfigError
from vembed_ds.losses import distillation
from vembed_ds.losses.batch import gather_batch
from vembed_ds.losses.combination import Distillation, alpha_schedule
from vembed_ds.losses.distillation import regression
from vembed_ds.losses.inputs import LossInputs, TeacherScores, TeacherVectors
from vembed_ds.losses.judges import Judged, judge_by_scores
from vembed_ds.losses.matryoshka import Prefixes
from vembed_ds.similarity import Embeddings

B, C = 4, 7
OWN = [0, 1, 2, 3]
EXPLICIT = {0: [4, 5], 2: [6]}  # columns of rows


def judged(*, whole: bool, seed: int = 0) -> tuple[Judged, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = (torch.rand(B, C, generator=generator, dtype=torch.float64) * 2 - 1).requires_grad_()
    teacher = torch.rand(B, C, generator=generator, dtype=torch.float64) * 2 - 1
    teacher[1, 3] = teacher[1, 5]  # a tie
    explicit = torch.zeros(B, C, dtype=torch.bool)
    for row, columns in EXPLICIT.items():
        explicit[row, columns] = True
    own = torch.tensor(OWN)
    known = torch.ones_like(explicit)
    if not whole:
        known = explicit | (torch.arange(C) == own.unsqueeze(1))
    tie = torch.full((B, 1), 1e-6, dtype=torch.float64)
    return Judged(teacher, known=known, own=own, explicit=explicit, tie=tie), student


def columns(found: Judged, row: int) -> list[int]:
    return [column for column in range(C) if found.known[row, column]]


def kl(student: Tensor, found: Judged) -> Tensor:
    rows = []
    for row in range(B):
        s = torch.stack([student[row, c] / 0.3 for c in columns(found, row)])
        t = torch.stack([found.teacher[row, c] / 0.7 for c in columns(found, row)])
        p = t.exp() / t.exp().sum()
        q = s.exp() / s.exp().sum()
        rows.append((p * (p / q).log()).sum() * 0.3**2)
    return torch.stack(rows).mean()


def mse(student: Tensor, found: Judged) -> Tensor:
    rows = []
    for row in range(B):
        squares = [(student[row, c] - found.teacher[row, c]) ** 2 for c in columns(found, row)]
        rows.append(torch.stack(squares).mean())
    return torch.stack(rows).mean()


def margin_mse(student: Tensor, found: Judged) -> Tensor:
    rows = []
    for row in range(B):
        negatives = EXPLICIT.get(row) or [c for c in columns(found, row) if c != OWN[row]]
        s, t = student[row], found.teacher[row]
        terms = [((s[OWN[row]] - s[n]) - (t[OWN[row]] - t[n])) ** 2 for n in negatives]
        rows.append(torch.stack(terms).mean() if terms else torch.zeros((), dtype=torch.float64))
    return torch.stack(rows).mean()


def rank(student: Tensor, found: Judged) -> Tensor:
    rows = []
    for row in range(B):
        total = torch.ones((), dtype=torch.float64)
        for a in columns(found, row):
            for b in columns(found, row):
                if found.teacher[row, a] < found.teacher[row, b]:
                    total = total + (5.0 * (student[row, a] - student[row, b])).exp()
        rows.append(total.log())
    return torch.stack(rows).mean()


CASES: dict[str, tuple[Callable[[Tensor, Judged], Tensor], dict[str, float]]] = {
    "kl": (kl, {"temperature": 0.3, "teacher_temperature": 0.7}),
    "mse": (mse, {}),
    "margin_mse": (margin_mse, {}),
    "rank": (rank, {"scale": 5.0}),
}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_formula(name: str, whole: bool) -> None:
    formula, options = CASES[name]
    found, student = judged(whole=whole)
    if name == "kl":
        value = distillation.kl(matrix(student), GivenJudge(found), **options)
    else:
        value = getattr(distillation, name)(student, found, **options).mean()
    (gradient,) = torch.autograd.grad(value, student)
    expected = formula(student, found)
    (wanted,) = torch.autograd.grad(expected, student)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(gradient, wanted, rtol=1e-10, atol=1e-14)
    assert gradient.abs().sum() > 0


def test_a_row_that_the_teacher_finds_all_alike_has_no_order() -> None:
    found, student = judged(whole=True)
    flat = replace(found, teacher=torch.zeros(B, C).double())
    value = distillation.rank(student, flat, scale=5.0).sum()
    assert value.item() == 0
    (gradient,) = torch.autograd.grad(value, student)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def inputs(*, width: int = 6, seed: int = 0) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)

    def rows(number: int) -> Embeddings:
        values = torch.randn(number, width, generator=generator, dtype=torch.float64)
        return Embeddings(values.requires_grad_())

    counts = torch.tensor([2, 0, 1])
    return LossInputs(rows(3), rows(3), negative=rows(3), negative_counts=counts)


def teacher(seed: int, width: int = 4) -> TeacherVectors:
    found = inputs(width=width, seed=seed)
    constant = [
        Embeddings(items.values.detach())
        for items in (found.query, found.positive, found.negative)
        if items is not None
    ]
    return TeacherVectors(*constant)


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def test_regression_goes_through_the_projection() -> None:
    student, wanted = inputs(), teacher(1)
    projection = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    value = regression(student, wanted, projection)
    terms = []
    for own, target in (
        (student.query, wanted.query),
        (student.positive, wanted.positive),
        (student.negative, wanted.negative),
    ):
        assert own is not None
        assert target is not None
        terms += [
            2 - 2 * (unit(projection @ e) * unit(t)).sum()
            for e, t in zip(own.values, target.values, strict=True)
        ]
    expected = torch.stack(terms).mean()
    leaves = (projection, student.query.values)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for found, formula in zip(
        torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert torch.allclose(found, formula, rtol=1e-10, atol=1e-14)


def test_other_widths_need_a_projection() -> None:
    with pytest.raises(ValueError, match="have 6 dimensions, the teacher's 4: regression needs a"):
        regression(inputs(), teacher(1), None)


def test_scores_of_the_data_go_to_the_own_columns() -> None:
    batch = gather_batch(inputs(), queries=False)
    scores = TeacherScores(
        torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([4.0, 5.0, 6.0]).double()
    )
    found = judge_by_scores(batch, scores).of_rows(slice(None))
    assert found.teacher.tolist() == [
        [1, 0, 0, 4, 5, 0],
        [0, 2, 0, 0, 0, 0],
        [0, 0, 3, 0, 0, 6],
    ]
    assert torch.equal(found.known, found.teacher != 0)
    assert found.own.tolist() == [0, 1, 2]


def test_two_teachers_prefixes_and_alpha_add_up() -> None:
    student, first, second = inputs(), teacher(1), teacher(2, width=9)
    given = LossInputs(
        student.query,
        student.positive,
        negative=student.negative,
        negative_counts=student.negative_counts,
        teachers=(first, second),
        step=3,
    )
    combined = Distillation(
        "mse",
        weights=(1.0, 3.0),
        alpha=lambda step: 0.1 * step,
        prefixes=Prefixes(dims=(6, 2), weights=(1.0, 0.5)),
    )
    batch = gather_batch(given, queries=False)
    value = combined.combine(torch.tensor(7.0), batch, given)

    def similarities(query: Tensor, documents: list[Tensor]) -> Tensor:
        return torch.stack(
            [torch.stack([(unit(q) * unit(d)).sum() for d in documents]) for q in query]
        )

    def of(items: LossInputs | TeacherVectors, width: int | None = None) -> Tensor:
        assert items.negative is not None
        documents = [*items.positive.values[:, :width], *items.negative.values[:, :width]]
        return similarities(items.query.values[:, :width], documents)

    expected = torch.tensor(0.0)
    for share, wanted in ((0.25, first), (0.75, second)):
        for weight, width in ((1.0, 6), (0.5, 2)):
            distance = (of(student, width) - of(wanted)).square().mean()
            expected = expected + share * weight * distance
    assert value.item() == pytest.approx(0.3 * 7.0 + 0.7 * expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.2, 0.2, 0.2]),
        ("linear", [0.2, 0.5, 0.8]),
        ("cosine", [0.2, 0.2 + 0.6 * (1 - math.cos(math.pi / 2)) / 2, 0.8]),
    ],
)
def test_alpha_goes_from_start_to_end(kind: str, expected: list[float]) -> None:
    alpha = alpha_schedule(kind, start=0.2, end=0.8, num_steps=11)
    assert [alpha(step) for step in (0, 5, 10)] == pytest.approx(expected)


def test_an_unknown_loss_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"distillation_loss_type='kld': no such loss; choose one"
    ):
        Distillation("kld", weights=(1.0,), alpha=lambda step: 0.5)
