"""Python code of a model's repository runs only when that is asked for by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import transformers.dynamic_module_utils as dynamic

from vembed_ds.config.schema import ModelConfig
from vembed_ds.errors import ConfigError
from vembed_ds.models.backbones import load_skeleton
from vembed_ds.training.model_setup import _warn_of_remote_code, model_spec

CODE = """
from pathlib import Path
from transformers import BertConfig, BertModel

Path({trace!r}).touch()

class OwnConfig(BertConfig):
    model_type = "own-of-this-test"

class OwnModel(BertModel):
    config_class = OwnConfig
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A file that exists once the code has run."""
    return tmp_path / "ran"


@pytest.fixture
def repository(tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own.py").write_text(CODE.format(trace=str(trace)))
    config = {
        "model_type": "own-of-this-test",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"},
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 10,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def skeleton(repository: Path, **options: bool) -> str:
    spec = model_spec(ModelConfig(model_name=str(repository), **options))
    return type(load_skeleton(spec.sources[""], trust_remote_code=spec.trust_remote_code)).__name__


def test_code_does_not_run_by_itself(repository: Path, trace: Path) -> None:
    with pytest.raises(ConfigError, match="Python code of its own"):
        skeleton(repository)
    assert not trace.exists()


def test_code_runs_when_asked_for(repository: Path, trace: Path) -> None:
    assert skeleton(repository, trust_remote_code=True) == "OwnModel"
    assert trace.exists()


def test_whose_code_runs_is_said(repository: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = model_spec(ModelConfig(model_name=str(repository), trust_remote_code=True))
    with caplog.at_level(logging.WARNING):
        _warn_of_remote_code(spec)
    assert caplog.messages == [
        f"trust_remote_code=true: Python code in {repository}, where there is any, runs with your rights"
    ]
