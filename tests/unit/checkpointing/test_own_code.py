"""A model whose repository brings Python code: its way from the checkpoint to whoever reads it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers.dynamic_module_utils as dynamic
from transformers import AutoConfig, AutoModel

from tests.distributed import export_cases as cases
from vembed_ds import Encoder, convert, evaluate
from vembed_ds.errors import ConfigError
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec, build_model

CONFIG_CODE = """
from transformers import BertConfig

class OwnConfig(BertConfig):
    model_type = "own-of-this-test"
"""
MODEL_CODE = """
from pathlib import Path
from transformers import BertModel
from .configuration_own import OwnConfig

with Path({trace!r}).open("a") as file:
    file.write("x")

class OwnModel(BertModel):
    config_class = OwnConfig
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def checkpoint(
    tmp_path: Path, trace: Path, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A checkpoint of such a model; the repository that it came from is gone."""
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)  # of another test's cache
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "configuration_own.py").write_text(CONFIG_CODE)
    (folder / "modeling_own.py").write_text(MODEL_CODE.format(trace=str(trace)))
    config = {
        **cases.SETTINGS["text"],
        "model_type": "own-of-this-test",
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModel": "modeling_own.OwnModel",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    own = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    AutoModel.from_config(own, trust_remote_code=True).save_pretrained(folder)
    source = BackboneSource(name=str(folder))
    spec = ModelSpec({"": source}, pooling={"": "mean"}, trust_remote_code=True)
    saved = save(build_model(spec), "shared")
    for file in folder.iterdir():
        file.unlink()
    trace.unlink()
    return saved


def test_nothing_runs_unless_it_is_asked_for(
    checkpoint: Path, tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert convert.main([str(checkpoint), str(out)]) == 2
    error = capsys.readouterr().err
    assert "model: the model cannot be built: " in error
    assert "trust_remote_code" in error
    assert not out.exists()
    assert convert.main([str(checkpoint), str(out), "--trust_remote_code"]) == 0
    trace.unlink()
    with pytest.raises(ConfigError, match="trust_remote_code"):
        Encoder(out, device="cpu")
    data = tmp_path / "val.jsonl"
    rows = [{"query": text, "positive": f"this is {text}"} for text in cases.TEXTS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--model", str(out), "--data_path", str(data), "--config_override"]
    command += ["retrieval_mode=t2t", "num_workers=0", "eval_recall_k=[1]"]
    assert evaluate.main(command) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert not trace.exists()
    assert evaluate.main([*command, "--trust_remote_code"]) == 0
    assert trace.exists()


@pytest.mark.filterwarnings("ignore")  # sentence-transformers' own
def test_the_converted_model_is_the_saved_one(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sentence_transformers import SentenceTransformer  # takes seconds

    out = tmp_path / "out"
    assert convert.main([str(checkpoint), str(out), "--trust_remote_code"]) == 0
    call = f"SentenceTransformer({str(out)!r}, trust_remote_code=True)"
    assert f"sentence-transformers: {call}\n" in capsys.readouterr().out
    encoder = Encoder(out, device="cpu", trust_remote_code=True)
    backbone = encoder.model.encoder.tower("text").backbone
    assert type(backbone).__name__ == "OwnModel"
    saved = torch.load(checkpoint / "mp_rank_00_model_states.pt")["module"]
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, saved[f"encoder.towers.text.backbone.{name}"]), name
    rows = encoder.encode_text(cases.TEXTS)
    assert np.abs(rows[0] - rows[1]).max() > 1e-3
    theirs = SentenceTransformer(str(out), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(theirs.encode(cases.TEXTS), rows, rtol=0, atol=1e-6)
