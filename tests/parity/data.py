"""Synthetic batches and tiny models that the project's step and the plain reference share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

GLOBAL_BATCH = 12
TEXTS = ("negatives", "tokens", "lengths")  # texts with ragged explicit negatives
FUSED = ("fused clip", "fused towers")  # items of every kind in both roles
REPEATED = {"repeated": "shared", "repeated clip": "clip"}  # the same items several times
CLIPS = ("clip", "fused clip", "repeated clip")
SHARED = ("shared", "repeated", *TEXTS)  # one text tower
VOCAB, EOS = 50, 49
MOST_TOKENS = 16  # that any of these models takes
Item = tuple[str, dict[str, np.ndarray]]

TEXT = {
    "model_type": "bert",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": MOST_TOKENS,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_inner": 24,
    "n_positions": MOST_TOKENS,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), EOS),
}
IMAGE = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}
CLIP = {
    "model_type": "clip",
    "projection_dim": 12,
    "text_config": {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": MOST_TOKENS,
        "eos_token_id": EOS,
        "bos_token_id": 1,
        "pad_token_id": 0,
    },
    "vision_config": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 8,
        "patch_size": 4,
    },
}


def save_backbone(folder: Path, settings: dict[str, Any], *, dropout: float, seed: int) -> None:
    """A tiny random Hugging Face model with livelier weights than the default 0.02."""
    torch.manual_seed(seed)
    settings = dict(settings)
    model_type = settings.pop("model_type")
    if model_type == "clip":
        parts = {
            name: {**settings[name], "attention_dropout": dropout}
            for name in ("text_config", "vision_config")
        }
        config = AutoConfig.for_model(model_type, **{**settings, **parts})
    else:
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        config = AutoConfig.for_model(model_type, **settings, **dict.fromkeys(names, dropout))
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)


def make_batch(kind: str, step: int) -> list[dict[str, Item]]:
    """The global batch of a step: ``GLOBAL_BATCH`` records of encoded query and positive."""
    generator = np.random.default_rng(1000 + step)
    num_images = GLOBAL_BATCH
    if kind in SHARED or (kind == "skip" and step == 1):
        num_images = 0
    if kind in REPEATED:
        return _repeated(make_batch(REPEATED[kind], step))
    if kind == "lengths":
        return [_record_of_its_rank(generator, index) for index in range(GLOBAL_BATCH)]
    if kind in TEXTS:
        return [_record_with_negatives(generator, index, step) for index in range(GLOBAL_BATCH)]
    if kind == "patches":
        return [{r: _image(generator) for r in ("query", "positive")} for _ in range(num_images)]
    if kind in FUSED:
        return [
            {role: _any(generator) for role in ("query", "positive")} for _ in range(num_images)
        ]
    if kind == "mixed":  # of two ranks, one has images only and the other none
        num_images = GLOBAL_BATCH // 2
    return [
        {
            "query": _text(generator),
            "positive": _image(generator) if index < num_images else _text(generator),
        }
        for index in range(GLOBAL_BATCH)
    ]


def fillers() -> dict[str, Item]:
    """A valid item per stream, which no role refers to."""
    generator = np.random.default_rng(0)
    text, image = _text(generator), _image(generator)
    return {"text": text, "image": image, "joint": ("joint", text[1] | image[1])}


def pad(stream: str, items: list[dict[str, np.ndarray]], *, at_least: int = 0) -> dict[str, Tensor]:
    """Right-pad a chunk's items to one batch; texts to ``at_least`` so many tokens."""
    if stream == "joint":
        return pad("text", items, at_least=at_least) | pad("image", items)
    if stream == "image":
        return {"pixel_values": torch.stack([torch.from_numpy(i["pixel_values"]) for i in items])}
    longest = max(at_least, *(len(item["input_ids"]) for item in items))
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    mask = torch.zeros(len(items), longest, dtype=torch.long)
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        ids[row, :length] = torch.from_numpy(item["input_ids"])
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _record_with_negatives(generator: np.random.Generator, index: int, step: int) -> Any:
    """0 to 3 negatives; of two ranks one has none at all in the second step."""
    number = 0 if step == 1 and index >= GLOBAL_BATCH // 2 else int(generator.integers(4))
    texts = [_text(generator) for _ in range(2 + number)]
    return {"query": texts[0], "positive": texts[1], "negatives": texts[2:]}


def _record_of_its_rank(generator: np.random.Generator, index: int) -> Any:
    """Of two ranks the first has many long texts, the other few short ones."""
    rich = index < GLOBAL_BATCH // 2
    lengths = generator.integers(*((8, 16) if rich else (2, 5)), size=2 + (3 if rich else 0))
    query, positive, *negatives = (_text(generator, int(length)) for length in lengths)
    return {"query": query, "positive": positive, "negatives": negatives}


def _repeated(pool: list[dict[str, Item]]) -> list[dict[str, Item]]:
    """Four queries and three positives make up the batch of a rank; equal, not the same objects.

    Where both are texts, two records have one text on both sides, and one has another's query.
    """
    records = []
    for index in range(GLOBAL_BATCH):
        query = pool[index % 4]["query"]
        positive = pool[4 + index % 3]["positive"]
        if positive[0] == query[0] and index % 6 in (1, 2):
            positive = pool[(index - index % 6 // 2) % 4]["query"]
        records.append({"query": _copy(query), "positive": _copy(positive)})
    return records


def _copy(item: Item) -> Item:
    return item[0], {name: array.copy() for name, array in item[1].items()}


def _any(generator: np.random.Generator) -> Item:
    """A text, an image, or an item that is both."""
    text, image = _text(generator), _image(generator)
    return [text, image, ("joint", text[1] | image[1])][generator.integers(3)]


def _text(generator: np.random.Generator, length: int | None = None) -> Item:
    length = int(generator.integers(3, 10)) if length is None else length
    ids = generator.integers(2, EOS, size=length)
    ids[-1] = EOS
    return "text", {"input_ids": ids}


def _image(generator: np.random.Generator) -> Item:
    return "image", {"pixel_values": generator.normal(size=(3, 8, 8)).astype(np.float32)}
