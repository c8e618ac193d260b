"""A text of which nothing is left is refused before training: all texts would be the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vembed_ds.config.loading import parse_config
from vembed_ds.config.schema import Config
from vembed_ds.data.records import RecordReader
from vembed_ds.errors import ConfigError
from vembed_ds.training.model_setup import model_spec, setup_processor


def set_up(clip_folder: Path, *, query: str = "", document: str = "", **keys: Any) -> Any:
    values = {"model_name": str(clip_folder), "data_path": ".", "retrieval_mode": "t2t", **keys}
    config: Config = parse_config(values)
    reader = RecordReader(
        ["query", "positive"],
        retrieval_mode="t2t",
        column_mapping={},
        image_root="",
        origin="train.jsonl",
        instructions={"query": query, "positive": document},
    )
    return setup_processor(config, model_spec(config.model), needed=[reader])


@pytest.mark.parametrize("length", [1, 2])  # a tokenizer does not cut below its special tokens
def test_special_tokens_alone(clip_folder: Path, length: int) -> None:
    with pytest.raises(
        ConfigError, match=f"max_seq_length={length} .* special tokens alone take 2"
    ):
        set_up(clip_folder, max_seq_length=length)
    assert set_up(clip_folder, max_seq_length=3).max_length == 3


@pytest.mark.parametrize("role", ["query", "document"])
def test_an_instruction_that_fills_the_length(clip_folder: Path, role: str) -> None:
    with pytest.raises(ConfigError, match=f"{role}_instruction take 32 tokens.*or shorten {role}"):
        set_up(clip_folder, **{role: "cat " * 30})
    assert set_up(clip_folder, **{role: "cat " * 29}).max_length == 32
