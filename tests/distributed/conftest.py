"""A few captioned pictures, and the configuration that trains the tiny CLIP on them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.tiny import caption, save_picture

ROOT = Path(__file__).parent.parent.parent
NUM_PAIRS = 24


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``pairs.jsonl`` with captions and image paths, beside the images."""
    folder = tmp_path_factory.mktemp("pairs")
    generator = np.random.default_rng(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for index in range(NUM_PAIRS):
            save_picture(folder / f"{index}.png", index=index, generator=generator)
            file.write(json.dumps({"query": caption(index), "positive": f"{index}.png"}) + "\n")
    return folder / "pairs.jsonl"


def tiny_config(
    folder: Path, name: str = "run.yaml", *, model: Path, pairs: Path, **changes: Any
) -> str:
    """Write a YAML that trains the tiny CLIP for 4 steps into ``folder/out``; its path."""
    values = {
        "model_name": str(model),
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
        "output_dir": str(folder / "out"),
        "report_to": "none",
        **changes,
    }
    path = folder / name
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return str(path)


@pytest.fixture
def make_config(clip_folder: Path, pairs: Path, tmp_path: Path) -> Callable[..., str]:
    """:func:`tiny_config` in the test's folder; keywords change or remove keys."""
    return functools.partial(tiny_config, tmp_path, model=clip_folder, pairs=pairs)
