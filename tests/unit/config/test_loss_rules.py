"""Combinations of loss keys that make no sense, each by its whole message."""

from __future__ import annotations

from typing import Any

import pytest

from vembed_ds.config.loading import parse_config
from vembed_ds.errors import ConfigError

BASE: dict[str, Any] = {"model_name": "some/model", "data_path": "org/data"}
MRL: dict[str, Any] = {"use_mrl": True, "mrl_dims": [8, 4]}


def problems_of(**values: Any) -> list[str]:
    try:
        parse_config({**BASE, **values})
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    "values",
    [
        {"loss_directions": ["query_to_doc", "doc_to_doc"]},
        {"loss_directions": ["doc_to_query", "query_to_doc"], "loss_partition": "per_direction"},
        {"loss_type": "colbert", "maxsim_reduction": "sum", "loss_bidirectional": True},
        {"loss_type": "sigmoid", "label_mode": "multi_positive", "negatives_scope": "own"},
        {"loss_type": "sigmoid", "loss_bidirectional": True},
        {"loss_type": "triplet", "label_mode": "ignore", "temperature": 0.2},
        {"guide_model_name": "g", "guide_margin": 0.1, "guide_margin_type": "relative"},
        {"hard_topk": 4, "loss_type": "hard_negative"},
        {**MRL, "mrl_weights": [1, 0], "mrl_layers": [2, 4], "mrl_layer_weights": [0.5, 1]},
        {"mrl_weights": [1.0, 1.0, 1.0]},
    ],
)
def test_good_combinations(values: dict[str, Any]) -> None:
    assert problems_of(**values) == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"loss_type": "triplet", "loss_directions": ["query_to_doc", "doc_to_query"]},
            "loss_directions=['query_to_doc', 'doc_to_query']: loss_type=triplet does not use it; "
            "remove loss_directions, or set loss_type to infonce or colbert",
        ),
        (
            {"loss_type": "triplet", "loss_bidirectional": True},
            "loss_bidirectional=True: loss_type=triplet does not use it; "
            "remove loss_bidirectional, or set loss_type to infonce or colbert or sigmoid",
        ),
        (
            {"loss_type": "sigmoid", "learnable_temperature": True},
            "learnable_temperature=True: loss_type=sigmoid does not use it; remove "
            "learnable_temperature, or set loss_type to infonce or colbert or in_batch_hard or "
            "hard_negative",
        ),
        (
            {"loss_type": "cosent", "negatives_scope": "own"},
            "negatives_scope='own': loss_type=cosent does not use it; remove negatives_scope, or "
            "set loss_type to infonce or colbert or in_batch_hard or hard_negative or sigmoid",
        ),
        (
            {"loss_type": "cosent", "guide_model_name": "g"},
            "guide_model_name='g': loss_type=cosent does not use it; "
            "remove guide_model_name, or set loss_type to infonce or colbert",
        ),
        (
            {"maxsim_reduction": "sum"},
            "maxsim_reduction='sum': loss_type=infonce does not use it; "
            "remove maxsim_reduction, or set loss_type to colbert",
        ),
        (
            {"loss_directions": ["doc_to_query"]},
            "loss_directions=['doc_to_query']: only query_to_doc holds the positives; "
            "add query_to_doc",
        ),
        (
            {"loss_directions": ["query_to_doc", "query_to_doc"]},
            "loss_directions=['query_to_doc', 'query_to_doc']: query_to_doc stands there twice; "
            "keep one",
        ),
        (
            {
                "loss_directions": ["query_to_doc", "query_to_query"],
                "loss_partition": "per_direction",
            },
            "loss_partition=per_direction: query_to_query holds no positive, so that it has no "
            "softmax of its own; set loss_partition: joint, or remove query_to_query",
        ),
        (
            {"loss_bidirectional": True, "loss_partition": "per_direction"},
            "loss_partition: loss_bidirectional decides it already; remove one of the two",
        ),
        (
            {"loss_bidirectional": True, "loss_directions": ["query_to_doc", "doc_to_query"]},
            "loss_directions: loss_bidirectional decides it already; remove one of the two",
        ),
        (
            {"guide_margin": 0.1},
            "guide_margin=0.1: there is no guide; set guide_model_name, or remove guide_margin",
        ),
        (
            {"guide_margin_type": "relative"},
            "guide_margin_type='relative': there is no guide; set guide_model_name, "
            "or remove guide_margin_type",
        ),
        (
            {"loss_type": "triplet", "label_mode": "multi_positive"},
            "label_mode=multi_positive: loss_type=triplet has one positive per query; "
            "set label_mode to mask or ignore",
        ),
        (
            {"loss_type": "in_batch_hard", "use_all_negatives": True, "hard_topk": 4},
            "hard_mining_topk=4: has no effect with use_all_negatives; remove one of the two",
        ),
        (
            {"mrl_layers": [1, 2]},
            "mrl_layers=[1, 2]: needs Matryoshka; set use_mrl: true, or remove mrl_layers",
        ),
        (
            {**MRL, "mrl_dims": [8, 4, 8]},
            "mrl_dims=[8, 4, 8]: 8 stands there twice; keep one",
        ),
        (
            {**MRL, "mrl_weights": [1, 1, 1, 1]},
            "mrl_weights=[1.0, 1.0, 1.0, 1.0]: 4 weights for mrl_dims=[8, 4]; "
            "give one for each, in the same order",
        ),
        (
            {**MRL, "mrl_weights": [0, 0]},
            "mrl_weights=[0.0, 0.0]: nothing would be trained; give one a weight above 0",
        ),
        (
            {**MRL, "mrl_layers": [4, 2]},
            "mrl_layers=[4, 2]: must ascend, the last layer last; sort them",
        ),
        (
            {**MRL, "mrl_layer_weights": [1]},
            "mrl_layer_weights=[1.0]: 1 weights for mrl_layers=[]; "
            "give one for each, in the same order",
        ),
    ],
)
def test_each_problem_by_its_message(values: dict[str, Any], expected: str) -> None:
    assert problems_of(**values) == [expected]
