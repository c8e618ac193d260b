"""Distillation by one plain process, item by item: whole teachers, whole batch, no project code."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.parity.family_reference import (
    NEGATIVES,
    TEMPERATURE,
    PlainFamily,
    adapt_blocks,
    plain_loss,
)

EMA_DECAY = 0.6
WIDTHS = {"clip": 12, "colpali": 12, "colqwen2": 12, "composed": 12}
"""Of a family's embeddings, where it is not 16."""

Roles = Mapping[str, list[Any]]


@dataclass(frozen=True)
class Scenario:
    """A student, its teachers and how it follows them.

    Attributes:
        student: Its family.
        loss: Of ``distillation_loss_type``.
        teachers: Families; ``ema`` is the student's average.
        weights: Of the teachers.
        alpha: At the first and at the last of three steps.
        temperature: Of ``kl``.
        scale: Of ``rank``.
        mrl_dims: Matryoshka; none: off.
        lora: The student trains adapters.
        scored: Scores stand in the data, as the last teacher.
        teacher_config: Of DeepSpeed, for the teachers.
        precision: Of the teachers.
    """

    student: str
    loss: str
    teachers: tuple[str, ...] = ()
    weights: tuple[float, ...] = (1.0,)
    alpha: tuple[float, float] = (0.3, 0.3)
    temperature: float = 0.2
    scale: float = 5.0
    mrl_dims: tuple[int, ...] = ()
    lora: bool = False
    scored: bool = False
    teacher_config: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"

    @property
    def projected(self) -> list[int]:
        """Numbers of the teachers whose space is reached by a learned projection."""
        if self.loss != "regression":
            return []
        own = width_of(self.student)
        return [
            number
            for number, name in enumerate(self.teachers)
            if self.mrl_dims or (name != "ema" and width_of(name) != own)
        ]


def width_of(family: str) -> int:
    """Dimensions of a family's embeddings."""
    return WIDTHS.get(family, 16)


def projections(scenario: Scenario) -> dict[int, nn.Linear]:
    """The learned projections at their start."""
    torch.manual_seed(11)
    own = width_of(scenario.student)
    teachers = scenario.teachers
    return {
        number: nn.Linear(
            own, own if teachers[number] == "ema" else width_of(teachers[number]), bias=False
        )
        for number in scenario.projected
    }


def scores_of(step: int) -> tuple[Tensor, Tensor]:
    """Scores of the positives and of the negatives of a step, over all ranks."""
    generator = torch.Generator().manual_seed(100 + step)
    counts = NEGATIVES[step]
    return (
        torch.randn(len(counts), generator=generator) + 2,
        torch.randn(sum(counts), generator=generator),
    )


def train_plain(
    scenario: Scenario,
    folders: Mapping[str, Path],
    steps: Mapping[str, Sequence[Roles]],
    *,
    optimizer: Mapping[str, Any],
    heads: Mapping[str, Any],
) -> dict[str, Any]:
    """As ``family_reference.train_plain``.

    Args:
        scenario: Who follows whom.
        folders: By family.
        steps: By family, three steps of the same items as each family reads them.
        optimizer: Of SGD.
        heads: The student's, and its teachers', by family.
    """
    model = _family(scenario.student, folders, heads)
    if scenario.lora:
        adapt_blocks(model)
    learned = projections(scenario)
    model.projections = nn.ModuleDict({str(n): matrix for n, matrix in learned.items()})
    teachers = [
        copy.deepcopy(model) if name == "ema" else _family(name, folders, heads)
        for name in scenario.teachers
    ]
    for teacher in teachers:
        teacher.eval().requires_grad_(False)
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    stepper = torch.optim.SGD(trained.values(), lr=optimizer["lr"], momentum=optimizer["momentum"])
    losses, norms = [], []
    for step in range(3):
        start, end = scenario.alpha
        alpha = start + (end - start) * step / 2
        rows = _embed(model, steps[scenario.student][step])
        said = [
            _embed(teacher, steps[scenario.student if name == "ema" else name][step])
            for name, teacher in zip(scenario.teachers, teachers, strict=True)
        ]
        loss = alpha * _task(scenario, rows) + (1 - alpha) * _follow(
            scenario, model, rows, said, step
        )
        model.zero_grad()
        loss.backward()
        for parameter in trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norms.append(float(nn.utils.get_total_norm([p.grad for p in trained.values()])))
        stepper.step()
        losses.append(float(loss.detach()))
        _average(scenario, teachers, model)
    after = {name: p.detach().clone() for name, p in trained.items()}
    return {"losses": losses, "norms": norms, "before": before, "after": after}


def _family(name: str, folders: Mapping[str, Path], heads: Mapping[str, Any]) -> PlainFamily:
    model = PlainFamily(name, folders[name])
    model.add_heads(heads.get(name, {}))
    return model


def _embed(model: PlainFamily, roles: Roles) -> dict[str, list[Tensor]]:
    return {role: [model(item) for item in items] for role, items in roles.items()}


def _average(scenario: Scenario, teachers: Sequence[nn.Module], model: nn.Module) -> None:
    for name, teacher in zip(scenario.teachers, teachers, strict=True):
        if name == "ema":
            for average, weight in zip(teacher.parameters(), model.parameters(), strict=True):
                average.data = EMA_DECAY * average.data + (1 - EMA_DECAY) * weight.data


def _cut(rows: Mapping[str, list[Tensor]], width: int) -> dict[str, list[Tensor]]:
    return {r: [functional.normalize(e[..., :width], dim=-1) for e in i] for r, i in rows.items()}


def _task(scenario: Scenario, rows: Mapping[str, list[Tensor]]) -> Tensor:
    parts = [_cut(rows, dim) for dim in scenario.mrl_dims] or [rows]
    return sum(plain_loss(p["query"], p["positive"], p["negative"]) for p in parts)


def _follow(
    scenario: Scenario,
    model: PlainFamily,
    rows: Mapping[str, list[Tensor]],
    said: Sequence[Mapping[str, list[Tensor]]],
    step: int,
) -> Tensor:
    total = sum(scenario.weights)
    whole = width_of(scenario.student)
    found = torch.zeros(())
    for width in scenario.mrl_dims or (whole,):
        part = _cut(rows, width)
        for number, (weight, wanted) in enumerate(
            zip(scenario.weights, [*said, None], strict=False)
        ):
            if wanted is None and not scenario.scored:
                break
            if scenario.loss == "regression":
                assert wanted is not None
                matrix = model.projections[str(number)] if number in scenario.projected else None
                term = _regression(rows, wanted, matrix, width)
            else:
                term = _by_similarity(scenario, part, wanted, step)
            found = found + weight / total * term
    return found


def _by_similarity(
    scenario: Scenario, rows: Mapping[str, list[Tensor]], wanted: Any, step: int
) -> Tensor:
    student = _similarities(rows)
    terms = []
    for index, (own, row) in enumerate(zip(_own_columns(step), student, strict=True)):
        if wanted is None:
            positive, negative = scores_of(step)
            known = own
            target = torch.cat(
                [positive[index : index + 1], negative[[c - len(student) for c in own[1:]]]]
            )
        else:
            known = list(range(len(row)))
            target = _similarities(wanted, only=index)[0].detach()
        s, t = torch.stack([row[c] for c in known]), target
        place = known.index(own[0])
        negatives = [known.index(c) for c in own[1:]] or [
            n for n in range(len(known)) if n != place
        ]
        terms.append(_row(scenario, s, t, place, negatives))
    return torch.stack(terms).mean()


def _row(scenario: Scenario, s: Tensor, t: Tensor, place: int, negatives: list[int]) -> Tensor:
    if scenario.loss == "kl":
        p = torch.softmax(t / scenario.temperature, dim=0)
        q = torch.softmax(s / scenario.temperature, dim=0)
        return scenario.temperature**2 * (p * (p / q).log()).sum()
    if scenario.loss == "mse":
        return ((s - t) ** 2).mean()
    if scenario.loss == "margin_mse":
        terms = [((s[place] - s[n]) - (t[place] - t[n])) ** 2 for n in negatives]
        return torch.stack(terms).mean() if terms else torch.zeros(())
    total = torch.ones(())
    for a in range(len(s)):
        for b in range(len(s)):
            if t[a] < t[b] - 1e-6:
                total = total + (scenario.scale * (s[a] - s[b])).exp()
    return total.log()


def _own_columns(step: int) -> list[list[int]]:
    """For every query the column of its positive, and those of its explicit negatives."""
    counts = NEGATIVES[step]
    first, found = len(counts), []
    for index, count in enumerate(counts):
        found.append([index, *range(first, first + count)])
        first += count
    return found


def _similarities(rows: Mapping[str, list[Tensor]], only: int | None = None) -> list[Tensor]:
    """Cosines, or MaxSim of tokens, of every query with all positives and negatives."""
    documents = [*rows["positive"], *rows["negative"]]
    queries = rows["query"] if only is None else [rows["query"][only]]
    if queries[0].dim() == 1:
        return [torch.stack([(q * d).sum() for d in documents]) for q in queries]
    return [torch.stack([(q @ d.T).amax(dim=1).mean() for d in documents]) for q in queries]


def _regression(
    rows: Mapping[str, list[Tensor]],
    wanted: Mapping[str, list[Tensor]],
    matrix: nn.Linear | None,
    width: int,
) -> Tensor:
    """``2 - 2 cos`` over all items of all roles; the student's rows are of unit norm as a whole."""
    terms = []
    for role, items in rows.items():
        for own, target in zip(items, wanted[role], strict=True):
            reached = own[:width] if matrix is None else matrix.weight[:, :width] @ own[:width]
            terms.append(2 - 2 * functional.cosine_similarity(reached, target.detach(), dim=0))
    return torch.stack(terms).mean()


__all__ = ["EMA_DECAY", "TEMPERATURE", "Scenario", "projections", "scores_of", "train_plain"]
