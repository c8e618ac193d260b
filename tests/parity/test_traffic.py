"""Bytes on the wire are those of the model, and parameters are held only while they should be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parity import data
from tests.parity.conftest import MODES, ds_config, update_error
from tests.parity.traffic_cases import BERT
from tests.thinning import one_in
from tests.worlds import World
from vembed_ds.engine.traffic_model import predict_embedding_bytes, predict_step_bytes

pytestmark = [pytest.mark.parity]

WAYS = {
    **{f"{stage} once": (stage, {}) for stage in (0, 1, 2)},
    "3 once": (3, {"zero3_gather": "once"}),
    **MODES,
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that norms and embeddings do not count, small enough for a unit test."""
    folder = tmp_path_factory.mktemp("bert")
    data.save_backbone(folder / "text", BERT, dropout=0.0, seed=0)
    return folder


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.one_in(3)
def test_bytes_are_the_predicted_ones(
    world: Callable[[int], World], bert: Path, way: str, chunk_size: int | None
) -> None:
    stage, modes = WAYS[way]
    for result in _count(world, bert, ds_config(stage, 2), modes, chunk_size):
        predicted = _predict(result, stage, modes)
        assert sum(result["sent"].values()) == pytest.approx(predicted, rel=0.01), result


@pytest.mark.parametrize(
    ("gather", "threshold", "reuse"),
    one_in(2, ["once", "cache_pass", "per_module"], [0, 5000], [0, 10**9]),
)
@pytest.mark.one_in(2)
def test_small_parameters_and_distant_uses(
    world: Callable[[int], World], bert: Path, gather: str, threshold: int, reuse: int
) -> None:
    zero = {
        "stage3_param_persistence_threshold": threshold,
        "stage3_max_reuse_distance": reuse,
        "stage3_prefetch_bucket_size": 0,
    }
    modes = {"zero3_gather": gather}
    for result in _count(world, bert, ds_config(3, 2, zero=zero), modes, 2):
        assert bool(result["persistent"]) == bool(threshold)
        predicted = _predict(result, 3, modes, reused=1.0 if reuse else 0.0)
        assert sum(result["sent"].values()) == pytest.approx(predicted, rel=0.01), result


@pytest.mark.parametrize(
    ("gather", "reuse", "kept"),
    one_in(3, ["cache_pass", "per_module"], [0, 10**9], [0, 1, 2, 4, 5]),
)
@pytest.mark.one_in(2)
def test_what_a_run_embeds_between_steps_changes_nothing(
    world: Callable[[int], World], bert: Path, gather: str, reuse: int, kept: int
) -> None:
    """DeepSpeed decides anew what a module puts away (`engine/module_order.py`)."""
    zero = {"stage3_max_reuse_distance": reuse, "stage3_prefetch_bucket_size": 0}
    modes, config = {"zero3_gather": gather}, ds_config(3, 2, zero=zero)
    for result in _count(world, bert, config, modes, 2, kept=kept, looked_at=True):
        predicted = _predict(result, 3, modes, reused=1.0 if reuse else 0.0, kept_chunks=kept)
        assert sum(result["sent"].values()) == pytest.approx(predicted, rel=0.01), result


@pytest.mark.slow
@pytest.mark.parametrize("gather", ["cache_pass", "per_module"])
def test_a_copy_per_machine_is_gathered_within_it(
    world: Callable[[int], World], bert: Path, gather: str
) -> None:
    config = ds_config(3, 4, zero={"zero_hpz_partition_size": 2})
    modes = {"zero3_gather": gather}
    for result in _count(world, bert, config, modes, 2, world_size=4):
        predicted = _predict(result, 3, modes, world_size=4, machine_ranks=2)
        assert sum(result["sent"].values()) == pytest.approx(predicted, rel=0.01), result


@pytest.mark.parametrize("reuse", [0, 10**9])
@pytest.mark.parametrize("gather", ["once", "per_module"])
def test_slices_of_a_layer_share_its_parameters(
    world: Callable[[int], World], bert: Path, gather: str, reuse: int
) -> None:
    """Gathered for its forward and its backward pass, however many slices there are."""
    zero = {"stage3_max_reuse_distance": reuse, "stage3_prefetch_bucket_size": 0}
    modes = {"zero3_gather": gather}
    config = ds_config(3, 2, zero=zero)
    for result in _count(world, bert, config, modes, None, slice_size=1):
        assert result["chunks"] == 1
        predicted = _predict(result, 3, modes, reused=1.0 if reuse else 0.0)
        assert sum(result["sent"].values()) == pytest.approx(predicted, rel=0.01), result


def _count(
    world: Callable[[int], World],
    folder: Path,
    config: dict[str, Any],
    modes: dict[str, str],
    chunk_size: int | None,
    world_size: int = 2,
    **settings: Any,
) -> list[dict[str, Any]]:
    return world(world_size).run(
        "tests.parity.traffic_cases:count_bytes",
        folder=str(folder),
        ds_config=config,
        modes=modes,
        chunk_size=chunk_size,
        **settings,
    )


def _predict(
    result: dict[str, Any],
    stage: int,
    modes: dict[str, str],
    *,
    world_size: int = 2,
    **settings: Any,
) -> float:
    predicted = predict_step_bytes(
        world_size=world_size,
        zero_stage=stage,
        parameters=result["parameters"],
        trained=result["trained"],
        element_size=4,
        num_chunks=result["chunks"],
        persistent=result["persistent"],
        **modes,
        **settings,
    )
    forwards = 0
    if (
        modes.get("zero3_gather") == "per_module"
        and settings.get("reused", 1.0)
        and not result["persistent"]
    ):
        # BERT's pooler, of which no backward pass comes, is put away by every forward pass.
        forwards = result["chunks"] - settings.get("kept_chunks", 1)
    unread = forwards * 4 * (result["parameters"] - result["trained"]) * (1 - 1 / world_size)
    rows = data.GLOBAL_BATCH
    return (
        unread
        + predicted.total
        + predict_embedding_bytes(world_size=world_size, rows=rows, width=64)
    )


@pytest.mark.parametrize("stage", [2, 3])
def test_reducing_per_chunk_keeps_no_whole_gradient(
    world: Callable[[int], World], tmp_path: Path, stage: int
) -> None:
    deep = BERT | {"vocab_size": 50, "num_hidden_layers": 6}
    data.save_backbone(tmp_path / "text", deep, dropout=0.0, seed=0)
    bucket, largest = 5000, 64 * 256
    config = ds_config(stage, 2, zero={"reduce_bucket_size": bucket})
    for reduction in ("once", "per_chunk"):
        for every, most in world(2).run(
            "tests.parity.traffic_cases:whole_gradients",
            folder=str(tmp_path),
            ds_config=config,
            modes={"gradient_reduction": reduction},
        ):
            if reduction == "once":
                assert most == every
            else:  # ZeRO-2 keeps its part until the end of a backward pass
                part = every / 2 if stage == 2 else 0
                assert most <= part + bucket + 2 * largest < 0.85 * every


@pytest.mark.parametrize("threshold", [0, 300])
@pytest.mark.parametrize("gather", ["once", "cache_pass", "per_module"])
@pytest.mark.one_in(5)
def test_parameters_are_held_for_a_step_only(
    world: Callable[[int], World],
    folders: dict[float, Path],
    reference: Callable[..., dict[str, Any]],
    gather: str,
    threshold: int,
) -> None:
    """Also when a step fails; and evaluations between steps see the weights of the last step."""
    config = ds_config(3, 2, zero={"stage3_param_persistence_threshold": threshold})
    for result in world(2).run(
        "tests.parity.traffic_cases:hold", folder=str(folders[0.0]), ds_config=config, gather=gather
    ):
        whole = set() if gather == "per_module" else result["all"]
        assert result["held"] == whole
        assert not result["reduced"], "gradients are reduced beside whole parameters"
        assert not result["afterwards"]
        assert not result["after an error"]
        assert max(result["distances"]) < 1e-5
        assert update_error(reference("clip"), result["after"])["whole"] < 1e-5


def test_idle_parameters_stay_in_parts(
    world: Callable[[int], World], folders: dict[float, Path]
) -> None:
    for result in world(2).run(
        "tests.parity.traffic_cases:hold",
        folder=str(folders[0.0]),
        ds_config=ds_config(3, 2),
        gather="idle",
    ):
        missing = result["all"] - result["held"]
        assert missing == {name for name in result["all"] if "vision_model" in name}


def test_an_unknown_deepspeed_is_refused_by_name(
    world: Callable[[int], World], folders: dict[float, Path]
) -> None:
    refused, taken = (
        world(2).run(
            "tests.parity.traffic_cases:refuse",
            folder=str(folders[0.0]),
            ds_config=ds_config(3, 2),
            gather=gather,
        )
        for gather in ("once", "auto")
    )
    assert "zero3_gather=once: DeepSpeed" in refused[0]
    assert "set zero3_gather: per_module" in refused[0]
    assert taken[0] == "per_module"


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_that_differentiate_other_parameters_are_stopped(
    world: Callable[[int], World], folders: dict[float, Path], stage: int
) -> None:
    for message in world(2).run(
        "tests.parity.traffic_cases:per_rank_graphs",
        folder=str(folders[0.0]),
        ds_config=ds_config(stage, 2),
    ):
        assert "did not differentiate the same parameters" in message
