"""Which of the documents that a query finds are its negatives; pure functions of scores.

Shapes: c queries, k candidates of each, n negatives wanted of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vembed_ds.data.dataset import NEGATIVE, item_seed
from vembed_ds.errors import ConfigError

Sampling = Literal["top", "random"]

# In the order in which they are applied; a candidate counts for the first that drops it.
NAMES = ("margin", "relative_margin", "max_score", "min_score", "guide_margin", "range_min")
SPARE = 10  # candidates that are looked at per negative, where a rule may drop some


@dataclass(frozen=True)
class Rules:
    """The rules, as of sentence-transformers' ``mine_hard_negatives`` (6.2) and NV-Retriever.

    Attributes:
        num_negatives: n, at most.
        range_min: Of the candidates that the other rules leave, the first ones that are skipped.
        range_max: k, the closest documents that are candidates, positives not counted; ``None``: 10 per
            negative beside those that are skipped, or 1 where no rule can drop any.
        margin: A negative's score is at most the positive's minus this.
        relative_margin: ... minus this share of the positive's magnitude (Moreira et al. 2024, arXiv
            2407.15831, TopK-PercPos: ``1 - relative_margin`` of the positive's score).
        max_score: A negative's largest score.
        min_score: A negative's smallest score.
        guide_margin: By the scores of a guide model, a negative is at most the positive minus this;
            ``None``: there is no guide.
        sampling: The ``top`` of what is left, or ``random`` ones.
        seed: Of random ones.

    Raises:
        ConfigError: A value makes no sense, alone or with the others.
    """

    num_negatives: int = 5
    range_min: int = 0
    range_max: int | None = None
    margin: float | None = None
    relative_margin: float | None = 0.05
    max_score: float | None = None
    min_score: float | None = None
    guide_margin: float | None = None
    sampling: Sampling = "top"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_negatives < 1:
            raise ConfigError(f"--num_negatives {self.num_negatives}: give at least 1")
        if self.range_min < 0:
            raise ConfigError(f"--range_min {self.range_min}: give 0 or more")
        room = self.num_candidates - self.range_min
        if self.num_negatives > room:
            raise ConfigError(
                f"--range_max {self.range_max}: leaves {max(0, room)} candidates behind --range_min "
                f"{self.range_min}, fewer than --num_negatives {self.num_negatives}; give at least "
                f"{self.range_min + self.num_negatives}"
            )
        for name in (*NAMES[:2], "max_score", "min_score", "guide_margin"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ConfigError(
                    f"--{name} {value}: is no number that scores can be compared with"
                )
        if self.relative_margin is not None and not 0 <= self.relative_margin < 1:
            raise ConfigError(
                f"--relative_margin {self.relative_margin}: is a share of the positive's score; give 0 "
                "or more and less than 1"
            )
        low, high = self.min_score, self.max_score
        if low is not None and high is not None and low > high:
            raise ConfigError(
                f"--min_score {low}: is above --max_score {high}, so that nothing is left"
            )

    @property
    def num_candidates(self) -> int:
        """How many documents are looked at for a query: k."""
        if self.range_max is not None:
            return self.range_max
        told = (
            self.margin,
            self.relative_margin,
            self.max_score,
            self.min_score,
            self.guide_margin,
        )
        spare = SPARE if any(value is not None for value in told) else 1
        return self.range_min + self.num_negatives * spare

    def described(self) -> str:
        """The rules that apply, for people."""
        values = {name: getattr(self, name) for name in (*NAMES[:-1], "sampling")}
        told = [f"{name} {value}" for name, value in values.items() if value is not None]
        window = f"candidates {self.range_min + 1} to {self.num_candidates}"
        return ", ".join([f"{self.num_negatives} negatives", window, *told])


class Scored(NamedTuple):
    """What one model says of some queries.

    Attributes:
        candidates: ``[c, k]`` float32.
        positive: ``[c]``: of each query's least similar positive.
    """

    candidates: Tensor
    positive: Tensor


class Chosen(NamedTuple):
    """The negatives of some queries.

    Attributes:
        places: ``[c, n]`` int64: columns of the candidates, best first; -1 where there are fewer.
        dropped: ``[c, len(NAMES)]`` int64: how many candidates each rule dropped.
    """

    places: Tensor
    dropped: Tensor


def choose(
    scored: Scored, *, rules: Rules, queries: Sequence[int], guide: Scored | None = None
) -> Chosen:
    """Apply the rules.

    A query with several positives is compared with the least similar of them.

    Args:
        scored: By the model; candidates best first, minus infinity where there is none.
        rules: What applies.
        queries: Numbers of the c queries, which random negatives depend on.
        guide: The same candidates by the guide; together with ``rules.guide_margin``.
    """
    scores, best = scored.candidates, scored.positive[:, None]
    left = scores > -torch.inf
    limits: dict[str, Tensor] = {}
    if rules.margin is not None:
        limits["margin"] = scores + rules.margin > best
    if rules.relative_margin is not None:
        # Not best * (1 - margin), which is above a negative best.
        limits["relative_margin"] = scores > best - best.abs() * rules.relative_margin
    if rules.max_score is not None:
        limits["max_score"] = scores > rules.max_score
    if rules.min_score is not None:
        limits["min_score"] = scores < rules.min_score
    if guide is not None:
        assert rules.guide_margin is not None, "a guide has a margin"
        limits["guide_margin"] = guide.candidates > guide.positive[:, None] - rules.guide_margin
    dropped = torch.zeros(len(scores), len(NAMES), dtype=torch.int64)
    for name, broken in limits.items():
        dropped[:, NAMES.index(name)] = (left & broken).sum(dim=1)
        left = left & ~broken
    skipped = left & (left.cumsum(dim=1) <= rules.range_min)
    dropped[:, -1] = skipped.sum(dim=1)
    left = left & ~skipped
    return Chosen(_taken(left, rules=rules, queries=queries), dropped)


def _taken(left: Tensor, *, rules: Rules, queries: Sequence[int]) -> Tensor:
    """``[c, n]``: columns of what is left, the first n, or n at random; ascending, -1 at the end."""
    turns = left.cumsum(dim=1) - 1
    if rules.sampling == "random":
        turns = torch.from_numpy(
            np.stack(
                [
                    _drawn(row, seed=rules.seed, query=q)
                    for row, q in zip(left.numpy(), queries, strict=True)
                ]
            )
        )
    taken = left & (turns < rules.num_negatives)
    places = torch.full((len(left), rules.num_negatives), -1, dtype=torch.int64)
    rows, columns = torch.nonzero(taken, as_tuple=True)
    places[rows, (taken.cumsum(dim=1) - 1)[rows, columns]] = columns
    return places


def _drawn(left: npt.NDArray[np.bool_], *, seed: int, query: int) -> npt.NDArray[np.int64]:
    """``[k]``: the turn of every column that is left, in an order of this query's own."""
    columns = np.flatnonzero(left)
    draws = np.random.PCG64(item_seed(seed, epoch=0, index=query, role=NEGATIVE)).random_raw(
        len(left)
    )
    turns = np.full(len(left), len(left))
    turns[columns[np.argsort(draws[: len(columns)], kind="stable")]] = np.arange(len(columns))
    return turns
