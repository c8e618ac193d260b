"""Which checkpoints a run leaves, and where the next one goes on."""

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
from vembed_ds import convert

RUN = "tests.distributed.train_cases:run_train"

pytestmark = [pytest.mark.distributed(2), pytest.mark.faults]


def run(world: World, config: str, **more: Any) -> None:
    ds_config = str(ROOT / "ds_configs" / "zero2.json")
    for answer in world.run(RUN, config=config, ds_config=ds_config, **more):
        assert "error" not in answer, answer["error"]


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("background", [False, True])
def test_the_best_and_the_last_stay_and_a_resumed_run_goes_on_from_a_whole_one(
    world: Callable[[int], World],
    make_config: Callable[..., str],
    tmp_path: Path,
    background: bool,
) -> None:
    out = tmp_path / "out"
    config = make_config(
        max_steps=6,  # an epoch has 3
        seed=2,  # the best step is not the last
        eval_steps=1,
        save_epochs=1,
        best_metric="mrr",
        save_total_limit=1,
        save_async=background,
    )
    run(world(2), config)
    values = {r["step"]: r["eval/mrr"] for r in records(out) if "eval/mrr" in r and r["step"]}
    best = max(values, key=lambda step: values[step])  # of equal ones the first
    expected = {f"checkpoint-step-{step}" for step in (best, 6)}
    assert {path.name for path in out.glob("checkpoint-step-*")} == expected
    assert (out / "best").read_text() == f"checkpoint-step-{best}"
    for name in expected:
        verify(out / name)
    digests = {
        json.loads((out / n / "manifest.json").read_text())["config_digest"] for n in expected
    }
    assert len(digests) == 1
    assert None not in digests
    state = json.loads((out / "checkpoint-step-6" / "trainer_state.json").read_text())
    assert state["best"] == {"metric": "mrr", "value": values[best], "step": best}
    losses = {r["step"]: r["train/loss"] for r in records(out) if "train/loss" in r}

    # The last one is damaged: the run goes on from the one before, and what a crash left goes.
    assert best < 6, "another seed is needed"
    other = f"checkpoint-step-{best}"
    shard = out / "checkpoint-step-6" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shard.write_bytes(shard.read_bytes()[:-1])
    shutil.copytree(out / other, out / ".checkpoint-step-5.partial")
    run(world(2), config, resume="auto")
    assert {path.name for path in out.glob("*checkpoint-step-*")} == expected
    verify(out / "checkpoint-step-6")
    assert {r["step"]: r["train/loss"] for r in records(out) if "train/loss" in r} == losses
    assert convert.main([str(out), str(tmp_path / "hf"), "--best"]) == 0


def test_no_best_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main([str(tmp_path), str(tmp_path / "hf"), "--best"]) == 2
    assert "best: missing; train with best_metric" in capsys.readouterr().err
