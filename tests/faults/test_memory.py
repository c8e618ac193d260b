"""Memory that runs out in a step: the ranks make it again, smaller, and its update is the same.

Compared bit for bit, with dropout, with a run that was never short and has the smaller chunks from
the start of the same step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_train import ds_file
from tests.faults.processes import ranks
from tests.worlds import World

CASES = "tests.faults.memory_cases"
# Twelve texts and twelve images per rank, in chunks of eight at first: two chunks.
CUT = {"batch_size": 12, "gradient_cache_chunk_size": 8, "gradient_cache_kept_graphs": 2}
FAULTS: list[tuple[list[int], str, str]] = [
    # two graphs are kept, and one rank fails
    ([1], "embed", "step 1: embedding chunk 2 of 2"),
    # 8 -> 4, in the forward pass of the replay
    ([0], "embed", "step 2: replaying chunk 1 of 2"),
    # 4 -> 2, in the middle of a backward pass, when later chunks have left their gradient
    ([1], "backward", "step 3: replaying chunk 2 of 3"),
    # 2 -> 1, on both ranks, in the graph that was kept
    ([0, 1], "backward", "step 4: differentiating chunk 6 of 6"),
]
SIZES = {1: 8, 2: 4, 3: 2, 4: 1, 5: 1, 6: 1}

pytestmark = [pytest.mark.faults, pytest.mark.distributed(2)]


@pytest.mark.parametrize(
    "stage",
    # At 3 parameters are gathered once. 2 has stage 1's way of keeping gradients.
    [2, 3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, "2_offload"))],
)
def test_the_step_is_made_again_and_the_update_is_the_same(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path, stage: int | str
) -> None:
    def run(case: str, out: str, **options: Any) -> list[dict[str, Any]]:
        config = make_config(
            **CUT,
            output_dir=str(tmp_path / out),
            max_steps=6,
            save_steps=4,
            val_data_path=None,
            gradient_self_test=False,
        )
        answers = world(2).run(
            f"{CASES}:{case}", config=config, ds_config=ds_file(stage), **options
        )
        for answer in answers:
            assert "error" not in answer, answer["error"]
        return answers

    short = run("run_short", "short", faults=FAULTS)
    clean = run("run_in_sizes", "clean", sizes=SIZES)
    for answer, expected in zip(short, clean, strict=True):
        assert answer["left"] == []
        assert answer["sizes"] == SIZES
        assert answer["graphs"] == {1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1}
        assert expected["graphs"][2] == 2
        assert answer["depth"] == [0]
        same(answer["after"], expected["after"])
    assert all(count > 0 for answer in short for count in answer["partial"])
    told = short[0]["log"]
    assert len(told) == 4
    again = "the step is made again, with the same gradient,"
    ran_out = "(CUDA out of memory. Tried to allocate 2.00 GiB.); "
    assert told[0] == (
        f"no memory: rank 1, step 1: embedding chunk 2 of 2 {ran_out}{again} keeping one graph, and "
        "later fewer than up to now"
    )
    assert told[1] == (
        f"no memory: rank 0, step 2: replaying chunk 1 of 2 {ran_out}{again} with "
        "gradient_cache_chunk_size 8 -> 4 from now on"
    )

    # A run that goes on cuts as it did, and so does the dropout.
    state = json.loads(
        (tmp_path / "short" / "checkpoint-step-4" / "trainer_state.json").read_text()
    )
    assert state["chunk_budget"] == {"items": 1, "tokens": "auto"}
    (tmp_path / "short" / "latest").write_text("checkpoint-step-4")
    gone_on = run("run_short", "short", faults=[], resume="auto")
    assert gone_on[0]["sizes"] == {5: 1, 6: 1}
    same(gone_on[0]["after"], clean[0]["after"])
    assert gone_on[0]["log"] == [
        "chunks are smaller than configured, as since memory ran out: gradient_cache_chunk_size 1, "
        "gradient_cache_chunk_tokens auto; set either to have them otherwise"
    ]


@pytest.mark.parametrize(
    ("stage", "gather", "expected"),
    # Where chunks gather, one that keeps its graph gathers less: all ranks keep what the poorest can.
    [
        (2, "auto", [3, 2]),
        (3, "per_module", [2, 2]),
        (3, "once", [3, 2]),
        (3, "cache_pass", [1, 1]),  # there the number moves the last bit
    ],
)
@pytest.mark.one_in(3)
def test_graphs_are_kept_as_far_as_there_is_room(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    tmp_path: Path,
    stage: int,
    gather: str,
    expected: list[int],
) -> None:
    def run(case: str, kept: int | str, **options: Any) -> list[dict[str, Any]]:
        config = make_config(
            **CUT | {"gradient_cache_chunk_size": 4, "gradient_cache_kept_graphs": kept},
            zero3_gather=gather,
            output_dir=str(tmp_path / str(kept)),
            max_steps=3,
            val_data_path=None,
            gradient_self_test=False,
        )
        answers = world(2).run(
            f"{CASES}:{case}", config=config, ds_config=ds_file(stage), **options
        )
        for answer in answers:
            assert "error" not in answer, answer["error"]
        return answers

    one = run("run_short", 1, faults=[])
    found = run("run_with_room", "auto", graphs=[9, 2])
    for answer, clean, number in zip(found, one, expected, strict=True):
        assert clean["graphs"] == {1: 1, 2: 1, 3: 1}
        assert answer["graphs"] == {1: 1, 2: number, 3: number}
        same(answer["after"], clean["after"])


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_standard_step_is_cut_too(
    world: Callable[[int], World], make_config: Callable[..., str]
) -> None:
    config = make_config(
        **CUT | {"use_gradient_cache": False, "gradient_cache_chunk_size": None},
        max_steps=2,
        val_data_path=None,
        gradient_self_test=False,
    )
    answers = world(2).run(
        f"{CASES}:run_short",
        faults=[([0], "backward", "step 1: differentiating chunk 1 of 1")],
        config=config,
        ds_config=ds_file(2),
    )
    for answer in answers:
        assert "error" not in answer, answer["error"]
        assert answer["left"] == []
        assert answer["sizes"] == {1: 6, 2: 6}


def test_with_the_smallest_chunks_it_ends_on_every_rank(
    world: Callable[[int], World], make_config: Callable[..., str]
) -> None:
    config = make_config(**CUT, max_steps=2, val_data_path=None, gradient_self_test=False)
    first, second = world(2).run(
        f"{CASES}:always_short", rank=1, config=config, ds_config=ds_file(2)
    )
    report = (
        "step 1: embedding chunk 1 of 12: no memory on the host (2.00 GiB asked, {free} GiB free "
        "now); what helps, in this order: (1) gradient_checkpointing: true (slower); (2) a higher "
        "ZeRO stage than 2"
    )
    begin, _, end = report.partition("{free}")
    assert second["error"].startswith(f"OutOfMemoryError: {begin}")
    assert end in second["error"]
    assert first["error"].startswith(f"DistributedError: rank 1 failed: {begin}")
    assert len(first["log"]) == 4  # 8, 4, 2 and 1 in a chunk, none with more than one graph


def test_where_chunks_gather_it_ends_and_names_the_size(make_config: Callable[..., str]) -> None:
    """The other rank waits in a gather; it ends within the time of any other death."""
    config = make_config(
        **CUT,
        zero3_gather="per_module",
        max_steps=3,
        val_data_path=None,
        gradient_self_test=False,
    )
    arguments = ["--config", config, "--ds_config", ds_file(3)]
    command = ["-m", "tests.faults.trainer", "memory", "1", "2", "2", *arguments]
    with ranks(command, size=2) as running:
        second = running.wait([1], seconds=90)[1]
        first = running.wait([0], seconds=15)[0]
    assert (first.code, second.code) == (2, 2)
    assert (
        "vembed_ds: rank 1: OutOfMemoryError: step 2: embedding chunk 2 of 2: no memory on the host"
    ) in second.stderr
    assert (
        "what helps, in this order: (1) gradient_cache_kept_graphs: 1, not 2 (slower, the update "
        "stays the same); (2) gradient_cache_chunk_size: 4, half of now (slower, the update stays the "
        "same)"
    ) in second.stderr
    assert "rank 1 (host" in first.stderr
    assert "ended: OutOfMemoryError: step 2: embedding chunk 2 of 2" in first.stderr
    assert "Traceback" not in first.stderr + second.stderr
