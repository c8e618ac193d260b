"""F24: what a file would call when it is unpickled is not called; file and call are named.

A manifest is no defence: whoever makes such a checkpoint makes its manifest too.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import seal
from tests.parity.conftest import ds_config, save_models
from tests.worlds import World
from vembed_ds.checkpointing.export import export_model
from vembed_ds.errors import CheckpointError, ConfigError
from vembed_ds.models.backbones import BackboneSource, load_backbone
from vembed_ds.models.foreign import read_tensors
from vembed_ds.teachers.teacher import _prepare

pytestmark = [pytest.mark.faults, pytest.mark.distributed(2)]

MODEL = "mp_rank_00_model_states.pt"
OPTIMIZER = "mp_rank_00_optim_states.pt"
FILES = {
    2: [MODEL, f"zero_pp_rank_0_{OPTIMIZER}", f"zero_pp_rank_1_{OPTIMIZER}"],
    3: [f"zero_pp_rank_0_{MODEL}", f"zero_pp_rank_1_{MODEL}", f"zero_pp_rank_1_{OPTIMIZER}"],
}


class Bomb:
    """Leaves a file behind when it is unpickled with code allowed."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder, dropout=0.0)
    return folder


@pytest.mark.parametrize("stage", [2, 3])
def test_of_a_checkpoint(
    world: Callable[[int], World], models: Path, tmp_path: Path, stage: int
) -> None:
    """Each file in turn, on the way to resume and on the way to convert."""
    arguments: dict[str, Any] = {
        "folder": str(models),
        "kind": "frozen",
        "ds_config": ds_config(stage, 2),
    }
    [saved, _] = world(2).run(
        "tests.distributed.restore_cases:save", out=str(tmp_path / "run"), **arguments
    )
    trace = tmp_path / "ran"
    places = {}
    for name in [*FILES[stage], "random_state_rank_0.pt", "random_state_rank_1.pt"]:
        places[name] = tmp_path / f"with {name}"
        shutil.copytree(saved["place"], places[name])
        whole = torch.load(places[name] / name, weights_only=False)
        torch.save(whole | {"bomb": Bomb(trace)}, places[name] / name)
        # Whoever plants it can also write a manifest.
        seal(places[name], step=1, world_size=2, zero_stage=stage)
    words = "holds posix.system, which is not loaded, because it could run code"
    found = world(2).run(
        "tests.distributed.restore_cases:refuse",
        places=[str(place) for place in places.values()],
        **arguments,
    )
    for messages in found:
        for message, (name, place) in zip(messages, places.items(), strict=True):
            assert re.search(f"{place / name}: {words}", message), message
    for name, place in places.items():
        if not name.startswith("random"):
            with pytest.raises(CheckpointError, match=f"{place / name}: {words}"):
                export_model(place, tmp_path / "out")
    assert not trace.exists()


def test_of_a_head(tmp_path: Path) -> None:
    path, trace = tmp_path / "projection_head.pt", tmp_path / "ran"
    torch.save({"0.weight": torch.ones(2, 2), "bomb": Bomb(trace)}, path)
    with pytest.raises(ConfigError, match=r"projection_head.pt: .*posix.system.*, which could run"):
        read_tensors(path)
    assert not trace.exists()


def test_of_a_teacher_and_a_model(models: Path, tmp_path: Path) -> None:
    """A teacher's weights are read from safetensors only; transformers unpickles a student's."""
    folder, trace = tmp_path / "text", tmp_path / "ran"
    shutil.copytree(models / "text", folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights | {"bomb": Bomb(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(
        ConfigError, match=r"teacher big: .*pytorch_model.bin only, which cannot be"
    ):
        _prepare(str(folder), "big", seed=0, trust_remote_code=False, processor=None)
    with pytest.raises(
        ConfigError, match=r"text: cannot be loaded: .* hold posix.system, which is"
    ):
        load_backbone(
            BackboneSource(name=str(folder)), attn_implementation=None, trust_remote_code=False
        )
    assert not trace.exists()
