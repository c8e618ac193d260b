"""What is converted piece by piece is, byte for byte, what `save_pretrained` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from tests.distributed.export_cases import SETTINGS
from tests.parity.families import FAMILIES, SIZES, WORDS
from vembed_ds.checkpointing.tensor_files import write_tensors
from vembed_ds.errors import CheckpointError
from vembed_ds.models import disk_layout
from vembed_ds.models.disk_layout import DiskLayout
from vembed_ds.models.families import build_from_config, trainable_config

EXPERTS = {**SIZES, **WORDS, "num_key_value_heads": 1, "head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    **{name: family.settings for name, family in FAMILIES.items()},
    **{f"exported {name}": settings for name, settings in SETTINGS.items()},
    # Matrices that transformers joins while loading and parts while saving.
    "dinov2_swiglu": {**FAMILIES["dinov2"].settings, "use_swiglu_ffn": True},
    "mixtral": {"model_type": "mixtral", **EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **EXPERTS,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
    },
    # Three names of one matrix.
    "bart": {
        "model_type": "bart",
        "vocab_size": 50,
        "d_model": 16,
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 8),
    },
}
CONVERTED = {"dinov2_swiglu": 4, "mixtral": 4, "qwen3_moe": 4}


def build(name: str, device: str) -> Any:
    settings = dict(MODELS[name])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    with torch.device(device):
        return build_from_config(trainable_config(config), dtype=torch.float32)


@pytest.mark.filterwarnings("ignore")  # of transformers, about token numbers of tiny configs
@pytest.mark.parametrize("name", MODELS)
def test_files_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model, layout = build(name, "cpu"), DiskLayout(build(name, "meta"))
    model.save_pretrained(tmp_path)
    state, tensors = model.state_dict(), {}
    for group in layout.groups:
        converted = layout.convert(group, {source: state[source] for source in group.sources})
        assert {n: t.shape for n, t in converted.items()} == {
            n: t.shape for n, t in group.targets.items()
        }
        tensors |= converted
    assert tensors.keys() == layout.targets.keys()
    write_tensors(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert sum(not group.same for group in layout.groups) == CONVERTED.get(name, 0)


def test_of_tied_weights_one_is_written() -> None:
    layout = DiskLayout(build("bart", "meta"))
    assert layout.tied == {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }


def test_a_conversion_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = disk_layout.revert_weight_conversion

    def joined(model: Any, state: dict[str, Any]) -> dict[str, Any]:
        """Another version of transformers, which joins what is in different layers."""
        made = own(model, state)
        return {"all": torch.cat([t.flatten() for t in made.values()])} if len(made) > 1 else made

    monkeypatch.setattr(disk_layout, "revert_weight_conversion", joined)
    with pytest.raises(CheckpointError, match=r"BertModel: transformers .*first: all\); convert"):
        DiskLayout(build("bert", "meta"))
