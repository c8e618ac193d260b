"""I2: every loss works in the gradient-cache step, at every stage, exactly.

Texts with ragged explicit negatives, of which the second rank has none; classes, scores and equal
contents lie across the ranks. Against one process that embeds item by item and computes the loss
from its formula in float64 (`tests.distributed.loss_reference`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parity import loss_cases
from tests.parity.conftest import OPTIMIZER, ds_config
from tests.parity.test_step_matrix import check
from tests.worlds import World

CHUNK = 4  # of 13 texts on one rank and 6 on the other: an uneven last chunk, and one of filler
ALL = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
SCALE, BOTH = ("logit_scale",), ("logit_scale", "logit_bias")

# name: loss, its options, what data and model have besides.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "infonce": (
        "infonce",
        {"temperature": 0.2, "loss_bidirectional": True},
        {"labels": True},
    ),
    "infonce, all directions": (
        "infonce",
        {
            "temperature": 0.2,
            "loss_directions": ALL,
            "loss_partition": "joint",
            "negatives_scope": "own",
            "mask_duplicates": True,
        },
        {"learned": SCALE},
    ),
    "infonce with a guide": (
        "infonce",
        {"temperature": 0.2, "guide_margin": 0.1, "loss_directions": ALL},
        {"guide": True},
    ),
    "sigmoid": ("sigmoid", {"negatives_scope": "shared"}, {"learned": BOTH, "labels": True}),
    "triplet": ("triplet", {"triplet_margin": 0.5}, {"labels": True}),
    "triplet of tokens": ("triplet", {"triplet_margin": 0.5}, {"tokens": True}),
    "cosent": ("cosent", {"cosent_scale": 5.0}, {}),
    "cosent of scores": ("cosent", {"cosent_scale": 5.0}, {"scores": True}),
    "colbert": (
        "colbert",
        {"temperature": 0.2, "maxsim_reduction": "sum", "loss_bidirectional": True},
        {"tokens": True, "labels": True},
    ),
    "in_batch_hard": (
        "in_batch_hard",
        {"temperature": 0.2, "hard_mining_topk": 3},
        {"labels": True},
    ),
    "matryoshka": (
        "infonce",
        {"temperature": 0.2, "use_mrl": True, "mrl_dims": (6, 16), "mrl_weights": (0.3, 1.0)},
        {},
    ),
    "matryoshka of tokens": (
        "colbert",
        {"temperature": 0.2, "use_mrl": True, "mrl_dims": (16, 5)},
        {"tokens": True},
    ),
    "matryoshka over layers": (
        "sigmoid",
        {
            "use_mrl": True,
            "mrl_dims": (16, 4),
            "mrl_layers": (1, 2),
            "mrl_layer_weights": (0.5, 1.0),
        },
        {"layers": (1, 2), "learned": BOTH},
    ),
}

pytestmark = [pytest.mark.parity]


@pytest.fixture(scope="module")
def plain(folders: dict[float, Path]) -> Callable[[str], dict[str, Any]]:
    """``plain(name)``: three plain steps, computed once."""
    known: dict[str, dict[str, Any]] = {}

    def compute(name: str) -> dict[str, Any]:
        if name not in known:
            loss_type, options, case = CASES[name]
            known[name] = loss_cases.train_plain(
                folders[0.0], loss_type=loss_type, options=options, case=case, lr=OPTIMIZER["lr"]
            )
        return known[name]

    return compute


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.one_in(5)
def test_loss_in_the_step(
    world: Callable[[int], World],
    folders: dict[float, Path],
    plain: Callable[[str], dict[str, Any]],
    name: str,
    stage: int,
) -> None:
    loss_type, options, case = CASES[name]
    results = world(2).run(
        "tests.parity.loss_cases:train",
        folder=str(folders[0.0]),
        loss_type=loss_type,
        options=options,
        case=case,
        ds_config=ds_config(stage, 2),
        chunk_size=CHUNK,
    )
    check(plain(name), results)
