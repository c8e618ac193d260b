"""Every loss and option: value and gradients against the formula, on one rank and on two."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.loss_reference import ALL, LOG_SCALE, make_batch, reference
from tests.worlds import World

CASES = "tests.distributed.loss_cases"

LABELS = [0, 1, 0, 2, 1, 0]  # equal ones on both ranks
SCORES = [0.1, 0.9, 0.5, 0.5, 0.0, 1.0]
T = {"temperature": 0.1}
GTE = {**T, "loss_directions": ALL}

Kind = tuple[str, dict[str, Any], dict[str, Any]]
PLAIN: dict[str, Any] = {"negatives": False}
LABELLED: dict[str, Any] = {"labels": LABELS}
GUIDED: dict[str, Any] = {"guided": True}
TOKENS: dict[str, Any] = {"tokens": True}
LEARNED: dict[str, Any] = {"logit_scale": LOG_SCALE}
SIGLIP: dict[str, Any] = {"logit_scale": 1.5, "logit_bias": -2.0}
M = {"triplet_margin": 0.5}
S = {"cosent_scale": 20.0}
K = {**T, "hard_mining_topk": 2}
MRL = {"use_mrl": True, "mrl_dims": (2, 6, 4), "mrl_weights": (0.5, 1.0, 2.0)}
LAYERS = {
    "use_mrl": True,
    "mrl_dims": (2, 3),
    "mrl_layers": (2, 4),
    "mrl_layer_weights": (0.3, 1.0),
}

KINDS: list[Kind] = [
    ("infonce", T, PLAIN),
    ("infonce", T, {}),
    ("infonce", T, LEARNED),
    ("infonce", {**T, "negatives_scope": "own"}, {}),
    ("infonce", {**T, "loss_bidirectional": True}, PLAIN),
    ("infonce", {**T, "loss_bidirectional": True}, LABELLED | LEARNED),
    ("infonce", T, PLAIN | LABELLED),
    ("infonce", T, LABELLED),
    ("infonce", {**T, "label_mode": "mask"}, LABELLED),
    ("infonce", {**T, "label_mode": "ignore"}, LABELLED),
    ("infonce", {**T, "mask_duplicates": True}, {}),
    ("infonce", {**GTE, "mask_duplicates": True}, LABELLED),
    ("infonce", {**T, "loss_directions": ("query_to_doc", "doc_to_query")}, {}),
    ("infonce", {**T, "loss_directions": ("query_to_doc", "query_to_query")}, {}),
    ("infonce", {**T, "loss_directions": ("query_to_doc", "doc_to_doc")}, {}),
    ("infonce", GTE, PLAIN),
    ("infonce", GTE, LABELLED),
    ("infonce", {**GTE, "negatives_scope": "own", "label_mode": "mask"}, LABELLED),
    ("infonce", T, GUIDED),
    ("infonce", {**GTE, "guide_margin": 0.2}, GUIDED),
    ("infonce", {**T, "guide_margin": 0.3, "guide_margin_type": "relative"}, GUIDED | PLAIN),
    ("infonce", T, GUIDED | LABELLED),
    ("infonce", GTE, TOKENS),
    ("colbert", T, TOKENS | PLAIN),
    ("colbert", T, TOKENS | LABELLED),
    ("colbert", {**T, "maxsim_reduction": "sum"}, TOKENS | LEARNED),
    (
        "colbert",
        {**T, "loss_bidirectional": True, "label_mode": "multi_positive"},
        TOKENS | LABELLED,
    ),
    ("colbert", {**GTE, "negatives_scope": "own", "mask_duplicates": True}, TOKENS | GUIDED),
    ("sigmoid", {}, SIGLIP | PLAIN),
    ("sigmoid", {}, SIGLIP | LABELLED),
    ("sigmoid", {"label_mode": "mask", "negatives_scope": "own"}, SIGLIP | LABELLED),
    ("sigmoid", {"label_mode": "ignore", "mask_duplicates": True}, SIGLIP | LABELLED),
    ("sigmoid", {}, SIGLIP | TOKENS),
    ("triplet", M, PLAIN),
    ("triplet", M, {}),
    ("triplet", M, LABELLED),
    ("triplet", M, {"labels": [5] * 6} | PLAIN),
    ("triplet", {**M, "label_mode": "ignore", "mask_duplicates": True}, LABELLED),
    ("triplet", M, TOKENS),
    ("cosent", S, PLAIN),
    ("cosent", S, {}),
    ("cosent", S, LABELLED),
    ("cosent", S, {"labels": [5] * 6} | PLAIN),
    ("cosent", {**S, "label_mode": "ignore", "mask_duplicates": True}, LABELLED),
    ("cosent", S, {"scores": SCORES} | PLAIN),
    ("cosent", S, {"scores": [0.5] * 6} | PLAIN),
    ("cosent", S, {"scores": SCORES} | PLAIN | TOKENS),
    ("cosent", S, TOKENS),
    ("in_batch_hard", K, PLAIN),
    ("in_batch_hard", K, {}),
    ("hard_negative", {**K, "hard_mining_topk": 3}, LABELLED | LEARNED),
    ("in_batch_hard", {**K, "hard_mining_topk": 99}, LABELLED),
    ("in_batch_hard", K, {"labels": [5] * 6} | PLAIN),
    ("in_batch_hard", {**K, "use_all_negatives": True}, LABELLED),
    ("in_batch_hard", {**K, "label_mode": "ignore", "mask_duplicates": True}, LABELLED),
    ("in_batch_hard", {**K, "negatives_scope": "own"}, TOKENS),
    ("infonce", {**GTE, **MRL}, LABELLED),
    ("infonce", {**T, **LAYERS}, LEARNED),
    ("colbert", {**T, **MRL}, TOKENS),
    ("colbert", {**T, **LAYERS, "mrl_layer_weights": None}, TOKENS | LABELLED),
    ("sigmoid", MRL, SIGLIP),
    ("triplet", {**M, **MRL, "mrl_weights": None}, {}),
    ("cosent", {**S, **LAYERS}, {}),
    ("cosent", {**S, **MRL}, {"scores": SCORES} | PLAIN),
    ("in_batch_hard", {**K, **MRL}, LABELLED),
]


def name(kind: Kind) -> str:
    loss_type, options, data = kind
    return f"{loss_type} {json.dumps(options)} {json.dumps(data)}"


@functools.cache
def expected_of(place: int) -> dict[str, Any]:
    """Once for both worlds."""
    loss_type, options, data = KINDS[place]
    return reference(loss_type, make_batch(**data), options)


@pytest.mark.parametrize("kind", KINDS, ids=name)
@pytest.mark.parametrize(("world_size", "tile_size"), [(1, None), (1, 4), (2, 2)])
def test_a_loss_equals_its_formula_on_the_whole_batch(
    world: Callable[[int], World], world_size: int, tile_size: int | None, kind: Kind
) -> None:
    loss_type, options, data = kind
    batch = make_batch(**data)
    results = world(world_size).run(
        f"{CASES}:loss_and_gradients",
        loss_type=loss_type,
        batch=batch,
        options=options,
        tile_size=tile_size,
    )
    expected = expected_of(KINDS.index(kind))
    # float32 against float64: logits of size 10 to 40 are off by 1e-6 to 4e-6.
    assert results[0]["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
    for role in ("query", "positive", "negative"):
        got = [grad for result in results for grad in result[role]]
        assert len(got) == len(expected[role])
        for grad, wanted in zip(got, expected[role], strict=True):
            torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=3e-6)
    for learned in ("logit_scale", "logit_bias"):
        if learned in data:
            assert results[0][learned] == pytest.approx(expected[learned], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("option", "loss_type", "options", "data"),
    [
        ("negatives_scope", "infonce", {**T, "negatives_scope": "own"}, {}),
        ("label_mode", "infonce", {**T, "label_mode": "mask"}, LABELLED),
        ("mask_duplicates", "infonce", {**T, "mask_duplicates": True}, {}),
        ("guide_margin", "infonce", {**GTE, "guide_margin": 0.2}, GUIDED),
        ("guide_margin_type", "infonce", KINDS[20][1], GUIDED | PLAIN),
        ("loss_directions", "infonce", GTE, {}),
        ("loss_bidirectional", "infonce", {**T, "loss_bidirectional": True}, {}),
        ("maxsim_reduction", "colbert", {**T, "maxsim_reduction": "sum"}, TOKENS),
        ("use_all_negatives", "in_batch_hard", {**K, "use_all_negatives": True}, {}),
        ("mrl_weights", "infonce", {**T, **MRL}, {}),
        ("mrl_layer_weights", "infonce", {**T, **LAYERS}, {}),
        ("labels", "sigmoid", {}, SIGLIP | LABELLED),
        ("labels", "triplet", M, LABELLED),
        ("labels", "cosent", S, LABELLED),
        ("labels", "in_batch_hard", K, LABELLED),
        ("guided", "infonce", T, GUIDED),
        ("scores", "cosent", S, {"scores": SCORES} | PLAIN),
    ],
)
def test_the_batches_above_can_tell_an_option_from_its_absence(
    option: str, loss_type: str, options: dict[str, Any], data: dict[str, Any]
) -> None:
    def loss(options: dict[str, Any], data: dict[str, Any]) -> float:
        return float(reference(loss_type, make_batch(**data), options)["loss"])

    def without(values: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key != option}

    assert abs(loss(options, data) - loss(without(options), without(data))) > 1e-3


def test_the_gradient_of_gathered_rows_is_the_sum_over_ranks(world: Callable[[int], World]) -> None:
    rows, weights = torch.randn(2, 3, 4), torch.randn(2, 6, 4)
    results = world(2).run(f"{CASES}:gather", rows=rows, weights=weights)
    for rank, result in enumerate(results):
        assert torch.equal(result["gathered"], rows.reshape(6, 4))
        expected = weights[:, rank * 3 : rank * 3 + 3].sum(0)
        torch.testing.assert_close(result["grad"], expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_is_raised_on_both(world: Callable[[int], World], rank: int) -> None:
    messages = world(2).run(f"{CASES}:raise_on", rank=rank)
    assert messages[rank] == "DataError: row 7 is broken"
    assert messages[1 - rank] == f"DistributedError: rank {rank} failed: row 7 is broken"


def test_no_error_raises_nothing(world: Callable[[int], World]) -> None:
    assert world(2).run(f"{CASES}:raise_on", rank=None) == ["nothing", "nothing"]
