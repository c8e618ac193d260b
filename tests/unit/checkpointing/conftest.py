"""A checkpoint as one rank leaves it at ZeRO-0 in float32, without an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.distributed import export_cases as cases
from vembed_ds.checkpointing.describe import describe_model
from vembed_ds.models.embedding_model import EmbeddingModel


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbones")
    cases.save_backbones(folder)
    return folder


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """``save(model, kind)``: folder of a checkpoint of the model."""

    def write(model: EmbeddingModel, kind: str) -> Path:
        folder = tmp_path / "run" / "checkpoint-step-1"
        folder.mkdir(parents=True)
        optimizer: dict[str, object] = {"state": {}, "param_groups": []}
        buffers = [name for name, _ in model.named_buffers() if name in model.state_dict()]
        saved = {
            "module": model.state_dict(),
            "buffer_names": buffers,
            "optimizer": optimizer,
            "shared_params": None,
            "dp_world_size": 1,
        }
        torch.save(saved, folder / "mp_rank_00_model_states.pt")
        processor = cases.make_processor(model, kind)
        describe_model(folder / "model", model=model, processor=processor, settings={})
        return folder

    return write
