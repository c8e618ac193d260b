"""What is decided before the model: steps, warm-up, batch sizes of inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vembed_ds.config.loading import parse_config
from vembed_ds.config.schema import Config
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.errors import ConfigError
from vembed_ds.training.engine_setup import chunk_budget, inference_batch_size
from vembed_ds.training.plan import plan_intervals


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("{}\n")


def config(**values: Any) -> Config:
    return parse_config({"model_name": "some/model", "data_path": "train.jsonl", **values})


def test_a_warm_up_longer_than_the_epochs_is_refused() -> None:
    long = config(epochs=2, batch_size=4, warmup_steps=6)
    assert plan_intervals(long, per_epoch=4).num_steps == 8
    with pytest.raises(ConfigError, match=r"warmup_steps=6: the run has 6 steps \(2 epochs of 3\)"):
        plan_intervals(long, per_epoch=3)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, 512),
        ({"use_gradient_cache": True, "gradient_cache_chunk_size": 16}, 16),
        ({"use_gradient_cache": True, "eval_batch_size": 7}, 7),
    ],
)
def test_inference_takes_what_fits_in_training(values: dict[str, Any], expected: int) -> None:
    assert inference_batch_size(config(batch_size=512, **values)) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"use_gradient_cache": False}, ChunkBudget(None)),
        ({}, ChunkBudget(16, tokens="auto", sort=True)),
        ({"gradient_cache_chunk_tokens": 4096}, ChunkBudget(16, tokens=4096, sort=True)),
        (
            {"gradient_cache_chunk_tokens": None, "gradient_cache_sort": False},
            ChunkBudget(16, tokens=None, sort=False),
        ),
    ],
)
def test_chunks_are_cut_as_configured(values: dict[str, Any], expected: ChunkBudget) -> None:
    cached = {"use_gradient_cache": True, "gradient_cache_chunk_size": 16}
    assert chunk_budget(config(**{**cached, **values}).training) == expected


def test_checkpoints_by_steps_and_by_epochs() -> None:
    def saved(**values: Any) -> list[int]:
        intervals = plan_intervals(config(epochs=3, batch_size=4, **values), per_epoch=4)
        return [step for step in range(1, 13) if intervals.save_due(step)]

    assert saved() == [12]
    assert saved(save_epochs=1) == [4, 8, 12]
    assert saved(save_epochs=2) == [8, 12]
    assert saved(save_epochs=2, save_steps=5) == [5, 8, 10, 12]
