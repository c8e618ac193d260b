"""Memory that runs out, wherever a run is, is an error that names the place and what helps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.distributed.conftest import ROOT
from tests.faults.run_cases import PLACES
from tests.worlds import World
from vembed_ds.distributed.phases import Kind

pytestmark = [pytest.mark.faults, pytest.mark.distributed(2)]

EXPECTED = {
    Kind.LOADING: ("preparing the run: loading the model", "fewer ranks on this machine"),
    Kind.BUILDING: ("preparing the run: building the engine", "a higher ZeRO stage than 2"),
    # Up to here the step was made again, in smaller chunks.
    Kind.EMBEDDING: ("step 1: embedding chunk 1 of 4", "gradient_checkpointing: true"),
    Kind.LOSS: ("step 1: loss", "batch_size below 4"),
    Kind.REPLAY: ("step 1: differentiating chunk 4 of 4", "gradient_checkpointing: true"),
    Kind.REDUCTION: ("step 1: reducing the gradient", "a higher ZeRO stage than 2"),
    Kind.OPTIMIZER: ("step 1: optimizer step", "a higher ZeRO stage than 2"),
    Kind.EVALUATION: ("step 1: evaluation", "eval_batch_size below 3"),
    Kind.SAVING: ("step 1: saving checkpoint-step-1", "fewer ranks on this machine"),
}


def test_every_place_is_tried() -> None:
    assert set(PLACES) == set(EXPECTED)


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_phase_is_named(
    world: Callable[[int], World], make_config: Callable[..., str], kind: Kind
) -> None:
    config = make_config(
        max_steps=1,
        eval_on_start=False,
        gradient_self_test=False,
        encode_duplicates_once=False,  # it embeds one item before the first step
        eval_recall_k=[1],
    )
    ds_config = str(ROOT / "ds_configs" / "zero2.json")
    place, help_ = EXPECTED[kind]
    for error in world(2).run(
        "tests.faults.run_cases:run_out", kind=kind.value, config=config, ds_config=ds_config
    ):
        assert error.startswith(f"OutOfMemoryError: {place}"), error
        assert ": no memory on the host (2.00 GiB asked, " in error
        assert f"what helps, in this order: (1) {help_}" in error


def test_deepspeed_s_own_groups_wait_no_longer_than_the_run_s(
    world: Callable[[int], World],
) -> None:
    for first, own in world(2).run("tests.faults.run_cases:group_timeouts"):
        assert first == own == 300
