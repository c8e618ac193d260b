"""Distillation in the cached step of two ranks equals one plain process with whole teachers.

The items are those of ``test_families``: the second rank has no explicit negative in the first step,
texts and images are mixed, the third step has no image at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parity.conftest import OPTIMIZER, ds_config
from tests.parity.distillation_reference import Scenario, train_plain
from tests.parity.families import FAMILIES
from tests.parity.family_cases import load_processor
from tests.parity.family_reference import COMPOSED
from tests.parity.test_families import encoded, make_items, random_heads
from tests.parity.test_step_matrix import check
from tests.worlds import World

pytestmark = [pytest.mark.parity]

OFFLOADED = {"zero_optimization": {"offload_param": {"device": "cpu"}}}
SCENARIOS = {
    "kl of another family and width": Scenario("clip", "kl", ("siglip2_fixed",)),
    "mse of a composed student": Scenario("composed", "mse", ("clip",), mrl_dims=(12, 5)),
    "margin_mse, teacher offloaded": Scenario(
        "bert", "margin_mse", ("qwen3",), teacher_config=OFFLOADED
    ),
    "rank, two teachers and scores": Scenario(
        "bert", "rank", ("qwen3", "clip"), weights=(1.0, 2.0, 0.5), scored=True
    ),
    "regression, two teachers, one by a projection": Scenario(
        "siglip", "regression", ("clip", "qwen2_vl"), weights=(1.0, 3.0), alpha=(0.1, 0.9)
    ),
    "regression of prefixes": Scenario("clip", "regression", ("siglip",), mrl_dims=(12, 4)),
    "LoRA, regression by a projection": Scenario(
        "qwen2_vl", "regression", ("qwen3_vl",), mrl_dims=(16, 6), lora=True
    ),
    "MaxSim": Scenario("colqwen2", "kl", ("colpali", "clip"), weights=(1.0, 1.0)),
    "kl of scores": Scenario("bert", "kl", scored=True, temperature=1.0),
    "moving average": Scenario("clip", "mse", ("ema",), alpha=(0.5, 0.5)),
    "moving average, projected": Scenario(
        "bert", "regression", ("ema", "clip"), weights=(1.0, 1.0), mrl_dims=(16, 7)
    ),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """``prepared(scenario)``: folders, items and heads of its families, and three plain steps."""

    @functools.cache
    def folder_of(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        if family in COMPOSED:
            for stream, part in COMPOSED[family].items():
                FAMILIES[part].save(folder / f"{stream}_encoder")
        else:
            FAMILIES[family].save(folder)
        return folder

    @functools.cache
    def prepare(name: str) -> dict[str, Any]:
        scenario = SCENARIOS[name]
        student = scenario.student
        families = {student, *scenario.teachers} - {"ema"}
        folders = {family: folder_of(family) for family in families}
        batches = [make_items(student, step) for step in range(3)]
        items = {}
        for family, folder in folders.items():
            processor = load_processor(folder, composed=family in COMPOSED)
            items[family] = [
                {role: encoded(processor, found) for role, found in batch.items()}
                for batch in batches
            ]
        heads = {student: random_heads(student)} if student in COMPOSED else {}
        plain = train_plain(scenario, folders, items, optimizer=OPTIMIZER, heads=heads)
        return {
            "plain": plain,
            "folders": {family: str(folder) for family, folder in folders.items()},
            "items": items,
            "heads": heads,
        }

    return prepare


# Teachers come before the student's engine and know nothing of its stage: a few run at every one;
# so does what the student learns for them.
EVERY_STAGE = (
    "kl of another family and width",
    "margin_mse, teacher offloaded",
    "rank, two teachers and scores",
    "regression, two teachers, one by a projection",
    "moving average",
)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        (name, stage)
        for name in SCENARIOS
        for stage in ((0, 1, 2, 3) if name in EVERY_STAGE else (2, 3))
    ],
)
@pytest.mark.one_in(3)
def test_following_teachers(
    world: Callable[[int], World],
    prepared: Callable[[str], dict[str, Any]],
    name: str,
    stage: int,
) -> None:
    made = dict(prepared(name))
    plain = made.pop("plain")
    results = world(2).run(
        "tests.parity.distillation_cases:train",
        scenario=SCENARIOS[name],
        ds_config=ds_config(stage, 2),
        **made,
    )
    check(plain, results)
    for result in results:
        # In every step, and not again in its replay.
        assert result["forwards"] == result["asked"]
        assert all(len(set(counts)) == 3 for counts in zip(*result["asked"], strict=True))
