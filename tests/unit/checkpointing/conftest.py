"""A checkpoint as one rank leaves it at ZeRO-0 in float32, without an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.converting import save_checkpoint
from tests.distributed import export_cases as cases
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
        return save_checkpoint(tmp_path / "run", model, cases.make_processor(model, kind))

    return write
