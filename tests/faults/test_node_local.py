"""``node_local_output``: every machine keeps its part of a checkpoint on its own disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import verify
from tests.distributed.conftest import ROOT
from tests.worlds import World
from vembed_ds.checkpointing.manifest import read_manifest

CASES = "tests.faults.node_cases:"
DS_CONFIG = str(ROOT / "ds_configs" / "zero{}.json")
SHARD = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"

pytestmark = [pytest.mark.faults, pytest.mark.distributed(2)]


@pytest.fixture(scope="module")
def saved(world: Callable[[int], World], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("disks")
    world(2).run(f"{CASES}save_on_disks", out=str(out), stage=2, steps=4)
    return out


@pytest.fixture
def out(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "out"))


@pytest.fixture
def find(world: Callable[[int], World], out: Path) -> Callable[..., dict[str, Any]]:
    """What both machines found."""

    def run(**more: Any) -> dict[str, Any]:
        answers = world(2).run(f"{CASES}find_on_disks", out=str(out), **more)
        names = [str(out / f"disk-{rank}") for rank in range(2)]
        shown = [str(a).replace(n, "DISK") for a, n in zip(answers, names, strict=True)]
        if "error" in answers[0]:
            assert shown[0].replace(names[1], "DISK") == shown[1].replace(names[0], "DISK")
        else:
            assert answers[0]["found"] == answers[1]["found"]
        return dict(answers[0])

    return run


def test_every_machine_has_its_part(saved: Path) -> None:
    ids = set()
    for rank in range(2):
        disk = saved / f"disk-{rank}"
        assert sorted(path.name for path in disk.iterdir()) == [
            "best",
            *(f"checkpoint-step-{step}" for step in (2, 3, 4)),
            "latest",
        ]
        assert (disk / "latest").read_text() == "checkpoint-step-4"
        assert (disk / "best").read_text() == "checkpoint-step-2"
        manifest = verify(disk / "checkpoint-step-4")
        assert set(manifest.files) == {
            "mp_rank_00_model_states.pt",
            SHARD.format(rank),
            f"random_state_rank_{rank}.pt",
            "trainer_state.json",
            "model/config.json",
            "model/parameters.json",
        }
        assert manifest.num_disks == manifest.world_size == 2
        ids.add(manifest.save_id)
    assert len(ids) == 1
    assert read_manifest(saved / "disk-0" / "checkpoint-step-3").save_id not in ids


def test_at_stage_3_too(world: Callable[[int], World], tmp_path: Path) -> None:
    world(2).run(f"{CASES}save_on_disks", out=str(tmp_path), stage=3, steps=1)
    for rank in range(2):
        files = verify(tmp_path / f"disk-{rank}" / "checkpoint-step-1").files
        own = [name for name in files if name.startswith("zero_pp_rank_")]
        assert len(own) == 2
        assert all(name.startswith(f"zero_pp_rank_{rank}_") for name in own)


def test_all_machines_go_on_from_the_same(out: Path, find: Callable[..., dict[str, Any]]) -> None:
    assert find() == {"found": "checkpoint-step-4", "warned": ""}
    shard = out / "disk-1" / "checkpoint-step-4" / SHARD.format(1)
    shard.write_bytes(shard.read_bytes()[:-1])
    found = find()
    assert found["found"] == "checkpoint-step-3"
    assert f"{shard}: has " in found["warned"]
    # Machine 1 was lost between the renames of both.
    (out / "disk-1" / "checkpoint-step-3").rename(out / "disk-1" / ".checkpoint-step-3.partial")
    found = find()
    assert found["found"] == "checkpoint-step-2"
    assert "1 have one now" in found["warned"]


def test_parts_of_two_saves_are_no_checkpoint(
    out: Path, find: Callable[..., dict[str, Any]], world: Callable[[int], World], tmp_path: Path
) -> None:
    world(2).run(f"{CASES}save_on_disks", out=str(tmp_path / "other"), stage=2, steps=4)
    shutil.rmtree(out / "disk-1" / "checkpoint-step-4")
    shutil.copytree(
        tmp_path / "other" / "disk-1" / "checkpoint-step-4", out / "disk-1" / "checkpoint-step-4"
    )
    found = find()
    assert found["found"] == "checkpoint-step-3"
    assert "the machines have parts of different runs or saves" in found["warned"]


def test_parts_are_not_taken_for_a_shared_folder(find: Callable[..., dict[str, Any]]) -> None:
    error = find(node_local=False)["error"]
    assert "no checkpoint is whole: " in error
    assert "2 disks had a part of this checkpoint each, and 1 have one now" in error


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_a_run_goes_on_from_its_disks(
    world: Callable[[int], World], make_config: Callable[..., str], tmp_path: Path, stage: int
) -> None:
    config = make_config(node_local_output=True, save_steps=2)
    arguments = {"config": config, "ds_config": DS_CONFIG.format(stage), "out": str(tmp_path)}
    for answer in world(2).run(f"{CASES}train_on_disks", **arguments):
        assert "error" not in answer, answer["error"]
    metrics = tmp_path / "disk-0" / "metrics.jsonl"
    expected = metrics.read_text()
    states = tmp_path / "disk-1" / "checkpoint-step-4" / "random_state_rank_1.pt"
    states.write_bytes(states.read_bytes()[:-1])
    for answer in world(2).run(f"{CASES}train_on_disks", **arguments, resume="auto"):
        assert "error" not in answer, answer["error"]
    assert losses(metrics.read_text()) == losses(expected)
    for rank in range(2):
        verify(tmp_path / f"disk-{rank}" / "checkpoint-step-4")


def losses(text: str) -> list[tuple[int, float]]:
    return [
        (record["step"], record["train/loss"])
        for record in map(json.loads, text.splitlines())
        if "train/loss" in record
    ]


def test_a_shared_folder_is_refused(
    world: Callable[[int], World], make_config: Callable[..., str]
) -> None:
    config = make_config(node_local_output=True)
    for answer in world(2).run(
        f"{CASES}train_as_two_machines", config=config, ds_config=DS_CONFIG.format(0)
    ):
        assert "node_local_output=true, and this folder is shared by several" in answer["error"]
