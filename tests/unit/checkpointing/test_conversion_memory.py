"""Converting takes memory for a tensor, not for a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.memory import measure
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec, build_model
from vembed_ds.models.lora import LoraSpec, add_adapters

INTERPRETER = 16  # MB before the first import
BERT = {
    "model_type": "bert",
    "hidden_size": 1024,
    "num_hidden_layers": 21,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "vocab_size": 30522,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CONVERT = """
import contextlib
from vembed_ds import convert
with contextlib.redirect_stdout(sys.stderr):
    outcome = convert.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_of_the_whole_process(
    save: Callable[..., Path],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    adapters: bool,
) -> None:
    """1.19 GB of weights; imports of torch and transformers are counted too."""
    torch.manual_seed(0)
    spec = ModelSpec({"": BackboneSource(config=BERT)}, pooling={"": "mean"})
    model = build_model(spec)
    if adapters:
        add_adapters(model.trained_backbones(), LoraSpec(r=8, alpha=16.0, use_dora=True))
    saved = save(model, "shared")
    del model
    out = tmp_path / "out"
    megabytes, outcome = measure("", CONVERT, str(saved), str(out), "--max_shard_size", "200MB")
    assert outcome == "0"
    sizes = [path.stat().st_size for path in out.glob("model-*.safetensors")]
    assert sum(sizes) > 1e9
    peak = (megabytes + INTERPRETER) * 2**20
    record_property("peak_megabytes", peak / 1e6)
    assert peak < 1.3 * max(sizes) + 500e6
