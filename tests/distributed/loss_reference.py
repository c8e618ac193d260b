"""Every loss from its formula: float64, one process, item by item; nothing of the project's code.

A batch is a dictionary: ``query``, ``positive`` and ``negative`` are lists of items, each ``[D]``
or ``[L, D]`` (real tokens only); the others are lists of numbers, and ``guide`` holds three lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

Batch = dict[str, Any]
ALL = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")


class Column(NamedTuple):
    item: Tensor
    owner: int
    explicit: bool
    key: int
    guide: Tensor | None


def make_batch(
    *, tokens: bool = False, negatives: bool = True, width: int = 6, **more: Any
) -> Batch:
    """Six pairs; with negatives the last three have none, so that the second of two ranks has none."""
    generator = torch.Generator().manual_seed(3)
    counts = [2, 0, 1, 0, 0, 0] if negatives else [0] * 6

    def items(number: int, longest: int) -> list[Tensor]:
        # Lengths fall, so that the ranks pad to different lengths.
        shapes = [(max(1, longest - i), width) if tokens else (width,) for i in range(number)]
        return [torch.randn(shape, generator=generator) for shape in shapes]

    def guides(number: int) -> list[Tensor]:
        return [torch.randn(3, generator=generator) for _ in range(number)]

    batch = {
        "query": items(6, 4),
        "positive": items(6, 7),
        "negative": items(sum(counts), 9),
        "negative_counts": counts,
        "has_negatives": negatives,
        "query_keys": [1, 2, 3, 4, 5, 1],
        "positive_keys": [11, 12, 13, 14, 12, 16],
        "negative_keys": [21, 13, 12][: sum(counts)],
        "guide": {"query": guides(6), "positive": guides(6), "negative": guides(sum(counts))},
        "teachers": {},
        "projections": {},
        "step": 0,
    }
    return (
        {name: value for name, value in batch.items() if name != "guide"}
        | ({"guide": batch["guide"]} if more.pop("guided", False) else {})
        | more
    )


def reference(
    loss_type: str,
    batch: Batch,
    options: dict[str, Any],
    *,
    combine: Callable[[Tensor, Batch], Tensor] | None = None,
) -> dict[str, Any]:
    """Value, and gradient of every item and learned number, in float64; of what ``combine`` makes."""
    leaves = {
        role: [item.double().requires_grad_() for item in batch[role]]
        for role in ("query", "positive", "negative")
    }
    learned = {
        name: torch.tensor(batch[name], dtype=torch.float64, requires_grad=True)
        for name in ("logit_scale", "logit_bias")
        if name in batch
    }
    projections = {
        number: value.double().requires_grad_()
        for number, value in batch.get("projections", {}).items()
    }
    given = {**batch, **leaves, **learned, "projections": projections}
    loss = value_of(loss_type, given, options)
    if combine is not None:
        loss = combine(loss, given)
    if loss.requires_grad:  # not where nothing is a negative of anything
        loss.backward()
    return {
        "loss": float(loss.detach()),
        **{role: [_gradient(item) for item in items] for role, items in leaves.items()},
        **{name: float(value.grad) for name, value in learned.items()},
        "projections": {number: value.grad for number, value in projections.items()},
    }


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def value_of(loss_type: str, batch: Batch, options: dict[str, Any]) -> Tensor:
    """The loss of items and learned numbers that are tensors with a graph."""
    loss = REFERENCES[loss_type]
    if not options.get("use_mrl"):
        return loss(batch, options)
    dims = options["mrl_dims"]
    weights = options.get("mrl_weights") or [1.0] * len(dims)
    layers = len(options.get("mrl_layers") or [0])
    layer_weights = options.get("mrl_layer_weights") or [1.0] * layers
    width = batch["query"][0].shape[-1] // layers
    total = torch.zeros((), dtype=torch.float64)
    for layer, layer_weight in enumerate(layer_weights):
        for dim, weight in zip(dims, weights, strict=True):
            part = slice(layer * width, layer * width + dim)
            cut = {
                role: [item[..., part] for item in batch[role]]
                for role in ("query", "positive", "negative")
            }
            total = total + layer_weight * weight * loss({**batch, **cut}, options)
    return total


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.norm() * b.norm())


def sim(query: Tensor, document: Tensor, options: dict[str, Any]) -> Tensor:
    if query.dim() == 1:
        return cosine(query, document)
    best = [torch.stack([cosine(q, d) for d in document]).max() for q in query]
    total = torch.stack(best).sum()
    return total if options.get("maxsim_reduction") == "sum" else total / len(best)


def columns_of(batch: Batch, kind: str) -> list[Column]:
    """All queries, or all documents: positives, then negatives."""

    def columns(role: str, owners: list[int]) -> list[Column]:
        guides = batch["guide"][role] if "guide" in batch else [None] * len(owners)
        rows = zip(batch[role], owners, batch[f"{role}_keys"], guides, strict=True)
        return [Column(item, own, role == "negative", key, guide) for item, own, key, guide in rows]

    counts = batch["negative_counts"]
    if kind == "query":
        return columns("query", list(range(6)))
    owners = [i for i, count in enumerate(counts) for _ in range(count)]
    assert len(owners) == list(accumulate(counts))[-1]
    return columns("positive", list(range(6))) + columns("negative", owners)


def _relation(
    batch: Batch, o: dict[str, Any], direction: str, i: int, column: Column, default: str
) -> str | None:
    """``positive``, ``negative`` or ``None`` (left out)."""
    own, crossing = column.owner == i, direction in ("query_to_doc", "doc_to_query")
    if own and not crossing:
        return None
    if own and not column.explicit:
        return "positive"
    mode = o.get("label_mode") or default
    if "labels" in batch and mode != "ignore" and not column.explicit:
        labels = batch["labels"]
        if labels[column.owner] == labels[i]:
            return "positive" if mode == "multi_positive" and crossing else None
    if o.get("negatives_scope") == "own" and column.explicit and not own:
        return None
    partner = "query_keys" if direction.endswith("query") else "positive_keys"
    if o.get("mask_duplicates") and column.key == batch[partner][i]:
        return None
    if "guide" in batch:
        assert column.guide is not None
        query, positive = (batch["guide"][role][i] for role in ("query", "positive"))
        limit = cosine(query, positive)
        margin = o.get("guide_margin", 0.0)
        margin = margin * abs(limit) if o.get("guide_margin_type") == "relative" else margin
        row = query if direction.startswith("query") else positive
        if cosine(row, column.guide) > limit - margin:
            return None
    return "negative"


def _row(
    batch: Batch, o: dict[str, Any], direction: str, i: int, default: str
) -> tuple[list[Tensor], list[Tensor], list[Column]]:
    """Similarities of a row's positives, of its negatives, and the negatives themselves."""
    positives, negatives, columns = [], [], []
    for column in columns_of(batch, "query" if direction.endswith("query") else "document"):
        relation = _relation(batch, o, direction, i, column, default)
        if direction.startswith("query"):
            similarity = sim(batch["query"][i], column.item, o)
        else:
            similarity = sim(column.item, batch["positive"][i], o)
        if relation == "positive":
            positives.append(similarity)
        if relation == "negative":
            negatives.append(similarity)
            columns.append(column)
    return positives, negatives, columns


def _scale(batch: Batch, o: dict[str, Any]) -> Any:
    return batch["logit_scale"].exp() if "logit_scale" in batch else 1 / o["temperature"]


def mean_of(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def _sum_exp(values: list[Tensor], scale: Any) -> Tensor:
    return torch.stack([torch.exp(value * scale) for value in values]).sum()


def _info_nce(batch: Batch, o: dict[str, Any], default: str) -> Tensor:
    scale = _scale(batch, o)
    directions = o.get("loss_directions", ("query_to_doc",))
    joint = o.get("loss_partition", "joint") == "joint"
    if o.get("loss_bidirectional"):
        directions, joint = ("query_to_doc", "doc_to_query"), False
    rows = []
    for i in range(6):
        found = {d: _row(batch, o, d, i, default) for d in directions}
        sums = {d: _sum_exp(p + n, scale) for d, (p, n, _) in found.items() if p + n}
        if joint:
            z = torch.stack(list(sums.values())).sum().log()
            rows.append(z - scale * mean_of(found["query_to_doc"][0]))
        else:
            rows.append(mean_of([sums[d].log() - scale * mean_of(found[d][0]) for d in directions]))
    return mean_of(rows)


def _in_batch_hard(batch: Batch, o: dict[str, Any]) -> Tensor:
    scale, rows = _scale(batch, o), []
    for i in range(6):
        (own,), negatives, _ = _row(batch, o, "query_to_doc", i, "mask")
        if not o.get("use_all_negatives"):
            negatives = sorted(negatives, key=lambda v: float(v.detach()), reverse=True)[
                : o["hard_mining_topk"]
            ]
        rows.append(_sum_exp([own, *negatives], scale).log() - own * scale)
    return mean_of(rows)


def _sigmoid(batch: Batch, o: dict[str, Any]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i in range(6):
        positives, negatives, _ = _row(batch, o, "query_to_doc", i, "multi_positive")
        for sign, values in ((1, positives), (-1, negatives)):
            for value in values:
                z = value * batch["logit_scale"].exp() + batch["logit_bias"]
                total = total + torch.log(1 + torch.exp(-sign * z))
    return total / 6


def _own_or_in_batch(batch: Batch, o: dict[str, Any], i: int) -> tuple[Tensor, list[Tensor]]:
    (own,), negatives, columns = _row(batch, o, "query_to_doc", i, "mask")
    pairs = list(zip(negatives, columns, strict=True))
    explicit = [value for value, column in pairs if column.explicit and column.owner == i]
    return own, explicit or [value for value, column in pairs if not column.explicit]


def _triplet(batch: Batch, o: dict[str, Any]) -> Tensor:
    rows = []
    for i in range(6):
        own, negatives = _own_or_in_batch(batch, o, i)
        if negatives:
            rows.append(torch.relu(torch.stack(negatives).max() - own + o["triplet_margin"]))
        else:
            rows.append(own * 0)
    return mean_of(rows)


def _cosent(batch: Batch, o: dict[str, Any]) -> Tensor:
    scale = o["cosent_scale"]
    total = torch.ones((), dtype=torch.float64)
    if "scores" in batch:
        pairs = [sim(q, p, o) for q, p in zip(batch["query"], batch["positive"], strict=True)]
        for i in range(6):
            for j in range(6):
                if batch["scores"][i] < batch["scores"][j]:
                    total = total + torch.exp(scale * (pairs[i] - pairs[j]))
        return total.log()
    for i in range(6):
        own, negatives = _own_or_in_batch(batch, o, i)
        for value in negatives:
            total = total + torch.exp(scale * (value - own))
    return total.log()


REFERENCES: dict[str, Callable[[Batch, dict[str, Any]], Tensor]] = {
    "infonce": lambda batch, o: _info_nce(batch, o, "multi_positive"),
    "colbert": lambda batch, o: _info_nce(batch, o, "mask"),
    "sigmoid": _sigmoid,
    "triplet": _triplet,
    "cosent": _cosent,
    "in_batch_hard": _in_batch_hard,
    "hard_negative": _in_batch_hard,
}

LOG_SCALE = math.log(12.0)
