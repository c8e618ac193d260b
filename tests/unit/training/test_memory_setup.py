"""How large the chunks of a run are that goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vembed_ds.config.loading import parse_config
from vembed_ds.config.schema import Config
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.training.changes import flat_settings
from vembed_ds.training.engine_setup import UNCHOSEN, chunk_budget
from vembed_ds.training.memory_setup import (
    BUDGET,
    is_to_be_chosen,
    resumed_budget,
    saved_budget,
    tell_resumed_budget,
)
from vembed_ds.training.resuming import Resumption

CACHED = {"use_gradient_cache": True, "gradient_cache_chunk_size": 8}
TOKENS = CACHED | {"gradient_cache_chunk_tokens": 100}
SMALLER = ChunkBudget(2)


def config(values: dict[str, Any]) -> Config:
    return parse_config({"model_name": "a/b", "data_path": ".", "output_dir": "out", **values})


def checkpoint(values: dict[str, Any], **state: Any) -> Resumption:
    settings = flat_settings(config(values).model_dump(mode="json"))
    saved = json.loads(json.dumps({"step": 7, "settings": settings, **state}))
    return Resumption(Path("out/checkpoint-step-7"), saved)


@pytest.mark.parametrize(
    ("before", "now", "used", "expected"),
    [
        (CACHED, CACHED, SMALLER, SMALLER),
        ({}, {}, SMALLER, SMALLER),
        (TOKENS, TOKENS, ChunkBudget(4, tokens=50), ChunkBudget(4, tokens=50)),
        (
            CACHED,
            CACHED | {"gradient_cache_sort": False},
            SMALLER,
            ChunkBudget(2, sort=False),
        ),
        # Other chunks are configured now.
        (CACHED, CACHED | {"gradient_cache_chunk_size": 4}, SMALLER, ChunkBudget(4)),
        (CACHED, TOKENS, SMALLER, ChunkBudget(8, tokens=100)),
        (CACHED, {}, SMALLER, ChunkBudget(None)),
        # It was never short of memory.
        (CACHED, CACHED, ChunkBudget(8), ChunkBudget(8)),
        ({}, {}, ChunkBudget(None), ChunkBudget(None)),
    ],
)
def test_chunks_that_became_smaller_remain_so_until_others_are_set(
    before: dict[str, Any],
    now: dict[str, Any],
    used: ChunkBudget,
    expected: ChunkBudget,
    caplog: pytest.LogCaptureFixture,
) -> None:
    training = config(now).training
    found = resumed_budget(training, checkpoint(before, **{BUDGET: saved_budget(used)}))
    assert found == expected
    tell_resumed_budget(training, found)
    differs = expected != chunk_budget(training)
    assert ("as since memory ran out" in caplog.text) == differs


AUTOMATIC = CACHED | {"gradient_cache_chunk_size": "auto"}


def test_chunks_that_were_chosen_are_chosen_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    training = config(AUTOMATIC).training
    assert is_to_be_chosen(training, None)
    begun = checkpoint(AUTOMATIC, **{BUDGET: saved_budget(ChunkBudget(64))})
    assert not is_to_be_chosen(training, begun)
    assert resumed_budget(training, begun) == ChunkBudget(64)
    tell_resumed_budget(training, ChunkBudget(64))
    assert "gradient_cache_chunk_size: 64, as when the run began" in caplog.text
    anew = replace(begun, allowed=("gradient_cache_chunk_size",))
    assert is_to_be_chosen(training, anew)
    assert resumed_budget(training, anew) == ChunkBudget(UNCHOSEN)


@pytest.mark.parametrize(
    ("before", "now", "chosen"),
    [
        (CACHED, AUTOMATIC, True),
        (AUTOMATIC, CACHED, False),
        (AUTOMATIC, AUTOMATIC | {"use_gradient_cache": False}, False),
    ],
)
def test_other_settings_of_a_resumed_run(
    before: dict[str, Any], now: dict[str, Any], chosen: bool
) -> None:
    begun = checkpoint(before, **{BUDGET: saved_budget(ChunkBudget(64))})
    training = config(now).training
    assert is_to_be_chosen(training, begun) == chosen
    assert resumed_budget(training, begun) == chunk_budget(training)


def test_without_a_checkpoint_that_says_so_they_are_as_configured() -> None:
    training = config(CACHED).training
    for resumption in (None, checkpoint(CACHED)):  # the second is of an earlier version
        assert resumed_budget(training, resumption) == ChunkBudget(8)
