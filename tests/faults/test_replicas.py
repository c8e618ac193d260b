"""F33: replicas that differ are found, whatever made them differ, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_train import ds_file
from tests.faults.test_nonfinite import config_of
from tests.parity.conftest import folders
from tests.worlds import World

__all__ = ["folders"]

pytestmark = [pytest.mark.faults]

SAME = "step {}: the ranks no longer hold the same model: {}"
WHERE = "on rank 1 other than on rank 0 (no majority says which is right). A device turned bits"
HEAD = "encoder.backbone.text_projection.weight"
FROZEN = "encoder.towers.text.backbone.embeddings.word_embeddings.weight"


@pytest.fixture
def damaged(
    world: Callable[[int], World], folders: dict[float, Path], tmp_path: Path
) -> Callable[..., list[str]]:
    """The errors of both ranks, of which one damages something of its own behind the third step."""

    def call(stage: int, setting: str = "fp32", **settings: Any) -> list[str]:
        return world(2).run(
            "tests.faults.replica_cases:damage",
            folder=str(folders[0.0]),
            ds_config=config_of(stage, setting),
            **settings,
        )

    return call


@pytest.mark.parametrize(("stage", "setting"), [(0, "fp32"), (1, "fp32"), (2, "bf16")])
def test_one_bit_of_a_weight(damaged: Callable[..., list[str]], stage: int, setting: str) -> None:
    for error in damaged(stage, setting, what="weight", name=HEAD):
        assert error.startswith(SAME.format(3, f"{HEAD}, {WHERE}"))
        assert "resume from the last one (--resume auto)" in error


@pytest.mark.parametrize(
    ("setting", "first"),
    [("fp32", f"exp_avg_sq of {HEAD}"), ("bf16", f"exp_avg_sq of {HEAD}")],
)
def test_one_bit_of_a_moment_at_stage_0(
    damaged: Callable[..., list[str]], setting: str, first: str
) -> None:
    for error in damaged(0, setting, what="moment", name=HEAD):
        assert error.startswith(SAME.format(3, f"{first}, {WHERE}"))


def test_one_bit_of_the_float32_weights_behind_16_bit(damaged: Callable[..., list[str]]) -> None:
    for error in damaged(0, "bf16", what="master", name=HEAD):
        assert error.startswith(SAME.format(3, f"float32 weights of {HEAD}, {WHERE}"))


@pytest.mark.parametrize("stage", [0, 2])
def test_a_frozen_weight_is_still_wrong_steps_later(
    damaged: Callable[..., list[str]], stage: int
) -> None:
    settings = {"kind": "frozen", "what": "weight", "name": FROZEN}
    for error in damaged(stage, every=5, **settings):
        assert error.startswith(SAME.format(5, FROZEN))


def test_at_stage_3_a_buffer_and_the_counters(damaged: Callable[..., list[str]]) -> None:
    for error in damaged(3, what="buffer", name="table"):
        assert error.startswith(SAME.format(3, f"table, {WHERE}"))
    for error in damaged(3, what="rate", name=""):
        assert error.startswith(SAME.format(3, f"the learning rate, {WHERE}"))


def test_a_forgotten_synchronisation_shows_behind_the_first_step(
    damaged: Callable[..., list[str]],
) -> None:
    for error in damaged(0, what="nothing is reduced", name="", every=100):
        assert error.startswith(SAME.format(1, "logit_scale, and "))


def test_a_healthy_run_is_not_accused(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path
) -> None:
    """With dropout, adapters and 16 bit."""
    for stage in (0, 2, 3):
        config = make_config(
            **{"replica_check_steps": 1, "precision": "bf16", "use_lora": True, "lora_r": 2},
            **{"max_steps": 3, "val_data_path": None, "output_dir": str(tmp_path / str(stage))},
        )
        answers = world(2).run(
            "tests.distributed.train_cases:run_train", config=config, ds_config=ds_file(stage)
        )
        assert all("error" not in answer for answer in answers), answers


@pytest.mark.parametrize("every", [0, 2])
def test_what_has_diverged_is_not_saved(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path, every: int
) -> None:
    config = make_config(replica_check_steps=every, save_steps=1, val_data_path=None)
    answers = world(2).run(
        "tests.faults.replica_cases:train_damaged", step=2, config=config, ds_config=ds_file(2)
    )
    for answer in answers:
        assert answer["error"].startswith(
            "ReplicaError: step 2: the ranks no longer hold the same model: logit_scale, on rank 1"
        )
    assert (tmp_path / "out" / "latest").read_text() == "checkpoint-step-1"
    assert not (tmp_path / "out" / "checkpoint-step-2").exists()
