"""Every distillation loss from its formula, item by item in float64; nothing of the project's code.

Beside what `loss_reference` describes a batch holds ``teachers``: by name, three lists of items, or
of positives and negatives their scores; and ``projections`` by the teacher's number.

Distillation is a dictionary with the names of ``Distillation``; ``alpha`` is (kind, start, end,
number of steps).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.distributed.loss_reference import Batch, columns_of, cosine, mean_of, sim

ROLES = ("query", "positive", "negative")
Followed = dict[str, Any]


class Entry(NamedTuple):
    """A document that the teacher knows, seen from a query."""

    student: Tensor
    teacher: Tensor
    own: bool
    explicit: bool


def make_teacher(
    batch: Batch, *, width: int = 4, tokens: bool = False, seed: int = 5
) -> dict[str, list[Tensor]]:
    """Vectors of a batch's items; the documents 1 and 4 are alike to it."""
    generator = torch.Generator().manual_seed(seed)

    def items(role: str) -> list[Tensor]:
        shapes = [(1 + i % 3, width) if tokens else (width,) for i in range(len(batch[role]))]
        return [torch.randn(shape, generator=generator) for shape in shapes]

    found = {role: items(role) for role in ROLES}
    found["positive"][4] = found["positive"][1].clone()
    return found


def make_scores(batch: Batch) -> dict[str, list[float]]:
    """A teacher's scores in the data; the first negative is as good as the positive, the second not."""
    negative = [0.7, 0.6999995, 0.6][: len(batch["negative"])]
    return {"positive": [0.7, 0.9, 0.2, 0.5, 0.4, 0.8], "negative": negative}


def combine(task: Tensor, batch: Batch, options: dict[str, Any], followed: Followed) -> Tensor:
    """``alpha task + (1 - alpha) distillation`` of items with a graph."""
    terms = [
        weight / sum(followed["weights"]) * _of_teacher(number, teacher, batch, options, followed)
        for number, (weight, teacher) in enumerate(
            zip(followed["weights"], batch["teachers"].values(), strict=True)
        )
    ]
    alpha = alpha_at(batch["step"], *followed["alpha"])
    return alpha * task + (1 - alpha) * torch.stack(terms).sum()


def alpha_at(step: int, kind: str, start: float, end: float, num_steps: int) -> float:
    done = step / (num_steps - 1)
    if kind == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
    return start if kind == "constant" else (1 - done) * start + done * end


def _of_teacher(
    number: int, teacher: dict[str, Any], batch: Batch, options: dict[str, Any], followed: Followed
) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for weight, part in _parts(batch, options):
        cut = {role: [item[..., part] for item in batch[role]] for role in ROLES}
        if followed["loss_type"] == "regression":
            value = _regression(cut, teacher, batch["projections"].get(number))
        else:
            rows = [_row(i, {**batch, **cut}, teacher, followed) for i in range(6)]
            value = mean_of([_row_loss(row, number, followed) for row in rows])
        total = total + weight * value
    return total


def _parts(batch: Batch, o: dict[str, Any]) -> list[tuple[float, slice]]:
    """Weights of the prefixes of every layer."""
    width = batch["query"][0].shape[-1]
    if not o.get("use_mrl"):
        return [(1.0, slice(0, width))]
    layers = o.get("mrl_layer_weights", [1.0])
    own = width // len(layers)
    return [
        (layer_weight * weight, slice(layer * own, layer * own + dim))
        for layer, layer_weight in enumerate(layers)
        for dim, weight in zip(o["mrl_dims"], o["mrl_weights"], strict=True)
    ]


def _row(i: int, batch: Batch, teacher: dict[str, Any], followed: Followed) -> list[Entry]:
    columns = columns_of(batch, "document")
    said = [*teacher["positive"], *teacher["negative"]]
    reduction = {"maxsim_reduction": followed.get("reduction")}
    row = []
    for column, found in zip(columns, said, strict=True):
        own = column.owner == i
        if "query" in teacher:
            judged = sim(teacher["query"][i].double(), found.double(), reduction)
        elif own:
            judged = torch.tensor(found, dtype=torch.float64)
        else:
            continue
        student = sim(batch["query"][i], column.item, reduction)
        row.append(Entry(student, judged, own and not column.explicit, own and column.explicit))
    return row


def _row_loss(row: list[Entry], number: int, followed: Followed) -> Tensor:
    name = followed["loss_type"]
    if name == "kl":
        temperature = followed["temperature"]
        return _kl(row, temperature, followed["teacher_temperatures"][number] or temperature)
    if name == "rank":
        return _rank(row, followed["scale"])
    return _mse(row) if name == "mse" else _margin_mse(row)


def _softmax(values: list[Tensor], temperature: float) -> list[Tensor]:
    powers = [(value / temperature).exp() for value in values]
    return [power / torch.stack(powers).sum() for power in powers]


def _kl(row: list[Entry], temperature: float, teacher_temperature: float) -> Tensor:
    q = _softmax([entry.student for entry in row], temperature)
    p = _softmax([entry.teacher for entry in row], teacher_temperature)
    terms = [a * (a / b).log() for a, b in zip(p, q, strict=True)]
    return temperature**2 * torch.stack(terms).sum()


def _mse(row: list[Entry]) -> Tensor:
    return mean_of([(entry.student - entry.teacher) ** 2 for entry in row])


def _margin_mse(row: list[Entry]) -> Tensor:
    (own,) = [entry for entry in row if entry.own]
    negatives = [entry for entry in row if entry.explicit]
    negatives = negatives or [entry for entry in row if not entry.own]
    terms = [
        ((own.student - other.student) - (own.teacher - other.teacher)) ** 2 for other in negatives
    ]
    return mean_of(terms) if terms else own.student * 0


def _rank(row: list[Entry], scale: float) -> Tensor:
    total = torch.ones((), dtype=torch.float64)
    for a in row:
        for b in row:
            if a.teacher < b.teacher:
                total = total + torch.exp(scale * (a.student - b.student))
    return total.log()


def _regression(batch: Batch, teacher: dict[str, Any], projection: Tensor | None) -> Tensor:
    pairs = [pair for role in ROLES for pair in zip(batch[role], teacher[role], strict=True)]
    distances = []
    for item, target in pairs:
        if projection is not None:
            item = projection[:, : len(item)] @ item
        distances.append(2 - 2 * cosine(item, target.double()))
    return mean_of(distances)
