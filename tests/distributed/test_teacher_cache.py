"""Ranks fill one table together, beforehand or during the first epoch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.conftest import NUM_PAIRS
from tests.distributed.test_train import ds_file
from tests.letters import keys_of, tokens_of, vector_of
from tests.tiny import CLIP_WIDTH
from tests.worlds import World
from vembed_ds.data.vector_table import IDENTITY_FILE, VectorTable

CASES = "tests.distributed.cache_cases:"
Worlds = Callable[[int], World]


def write(path: Path, texts: list[str]) -> str:
    rows = [{"query": text, "positive": texts[0]} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stored(table: VectorTable, text: str) -> Any:
    found = table.embeddings(keys_of([text]))
    return found.values[0].tolist()


@pytest.mark.parametrize("gives_tokens", [False, True])
def test_the_ranks_share_what_is_missing(world: Worlds, tmp_path: Path, gives_tokens: bool) -> None:
    folder, expected = tmp_path / "cache", tokens_of if gives_tokens else vector_of
    texts = ["x" * length for length in range(1, 68)]
    options = {"folder": str(folder), "gives_tokens": gives_tokens}
    first = world(2).run(CASES + "fill", path=write(tmp_path / "a.jsonl", texts), **options)
    # 34 items per rank, 2 per call; the last rank's 34th is another's, and is not written twice.
    assert first[0] == first[1]
    assert (first[0]["embedded"], first[0]["calls"]) == (67, 17)
    assert len(VectorTable(folder)) == 67
    more = write(tmp_path / "b.jsonl", [*texts, "y"])
    second = world(2).run(CASES + "fill", path=more, **options)
    assert (second[0]["embedded"], second[1]["calls"]) == (1, 1)
    assert second[0]["segments"][:2] == first[0]["segments"]
    third = world(2).run(CASES + "fill", path=more, **options)
    assert [(rank["embedded"], rank["calls"]) for rank in third] == [(0, 0)] * 2
    table = VectorTable(folder)
    assert len(table) == 68
    for text in [*texts, "y"]:
        assert stored(table, text) == expected(text)


def test_a_full_disk_on_one_rank_ends_all(world: Worlds, tmp_path: Path) -> None:
    results = world(2).run(
        CASES + "fill",
        path=write(tmp_path / "a.jsonl", ["a", "b", "c"]),
        folder=str(tmp_path / "cache"),
        gives_tokens=False,
        full_disk=True,
    )
    for result in results:
        assert (
            f"writing {tmp_path / 'cache'}: [Errno 28] No space left on device" in result["error"]
        )
    assert VectorTable(tmp_path / "cache").segments == []


@pytest.mark.parametrize("gives_tokens", [False, True])
def test_the_first_epoch_keeps_what_the_live_teacher_gave(
    world: Worlds, tmp_path: Path, gives_tokens: bool
) -> None:
    folder, path = tmp_path / "cache", write(tmp_path / "a.jsonl", list("abcdefg"))
    results = world(2).run(
        CASES + "first_epoch", path=path, folder=str(folder), gives_tokens=gives_tokens
    )
    before, after = results[0]["segments"]
    assert results[0]["segments"] == results[1]["segments"]
    assert (len(before), after[:4], len(after)) == (4, before, 5)
    assert [result["embedded"] for result in results] == [1, 1]
    assert results[0]["texts"] == ["g"]
    table = VectorTable(folder)
    assert len(table) == 7  # each content once
    kept = {"a": [0, 0], "b": [0, 1], "c": [1, 1], "d": [0, 11], "e": [0, 21], "f": [1, 21]}
    for text, who in kept.items():
        assert torch.tensor(stored(table, text)).flatten().tolist() == who
    assert torch.tensor(stored(table, "g")).tolist() == (
        tokens_of("g") if gives_tokens else vector_of("g")
    )
    # What was not committed before the run ended is gone.
    left = {path.name for path in folder.iterdir()}
    assert left == {IDENTITY_FILE, *table.segments}


def test_a_run_finds_what_the_command_has_embedded(
    world: Worlds, make_config: Callable[..., str], clip_folder: Path, tmp_path: Path
) -> None:
    cached = {"teacher_mode": "cached", "teacher_cache": str(tmp_path / "cache")}
    config = make_config(teacher_model_name=str(clip_folder), **cached)
    live = make_config("live.yaml", teacher_model_name=str(clip_folder))
    results = world(2).run(CASES + "precompute", config=live)
    for result in results:
        assert (
            "teacher_mode: no teacher of this run is cached, so there is nothing" in result["error"]
        )
    name, folder = clip_folder.name, tmp_path / "cache" / clip_folder.name
    would = "would embed what {}, with {} items, lacks of {} records\n"
    said, nothing = world(2).run(CASES + "precompute_dry", config=config)
    assert said.startswith(
        f"teacher {name} ({clip_folder}): {would.format(folder, 0, NUM_PAIRS)}a dry run: nothing was"
    )
    assert nothing == ""
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "out").exists()
    (first, _) = world(2).run(CASES + "precompute", config=config)
    assert first == {name: 2 * NUM_PAIRS}
    table = VectorTable(folder)
    assert (len(table), table.width) == (2 * NUM_PAIRS, CLIP_WIDTH)
    (said, _) = world(2).run(CASES + "precompute_dry", config=config)
    assert would.format(folder, 2 * NUM_PAIRS, NUM_PAIRS) in said
    results = world(2).run(
        "tests.distributed.train_cases:run_train",
        config=config,
        ds_config=ds_file(2),
        overrides=["max_steps=1", "eval_on_start=false", "val_data_path=null"],
    )
    assert "error" not in results[0], results[0]["error"]
    assert VectorTable(table.folder).segments == table.segments
