"""Weights that are read one by one are those that transformers and peft load whole."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertForMaskedLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.parity.families import FAMILIES
from vembed_ds.errors import ConfigError
from vembed_ds.models.backbones import BackboneSource, cached_revision
from vembed_ds.models.builder import ModelSpec, build_encoder
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.hollow import HollowModel, build_hollow
from vembed_ds.models.stored import weight_files

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = BertConfig(vocab_size=40, intermediate_size=24, **SMALL)
MOE = Qwen3MoeConfig(
    vocab_size=40,
    moe_intermediate_size=8,
    num_experts=4,
    num_experts_per_tok=2,
    num_key_value_heads=1,
    head_dim=8,
    tie_word_embeddings=False,
    **SMALL,
)


def spec_of(folder: Path, **options: Any) -> ModelSpec:
    return ModelSpec({"": BackboneSource(name=str(folder))}, **options)


def filled(hollow: HollowModel) -> dict[str, torch.Tensor]:
    """The state of the model with everything in its place."""
    state = hollow.model.state_dict()
    for name, tensor in hollow.tensors():
        assert state[name].shape == tensor.shape
        state[name] = tensor
    return state


def check(hollow: HollowModel, spec: ModelSpec, *, but: str = "no name", atol: float = 0) -> None:
    """All weights and computed buffers are the whole model's."""
    whole = EmbeddingModel(build_encoder(spec))
    expected = whole.state_dict()
    found = filled(hollow)
    assert found.keys() == expected.keys()
    for name in (name for name in expected if but not in name):
        assert found[name].dtype == expected[name].dtype
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=atol)
    computed = dict(hollow.model.named_buffers())
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(computed[name], buffer, rtol=0, atol=0)
    assert hollow.model.pooling() == whole.pooling()


def old_bert(folder: Path) -> None:
    """A language model's names with a prefix, and norms as they were called once; no pooler."""
    BertForMaskedLM(BERT).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for new, old in (("weight", "gamma"), ("bias", "beta")):
        tensors = {n.replace(f"LayerNorm.{new}", f"LayerNorm.{old}"): t for n, t in tensors.items()}
    assert "bert.embeddings.LayerNorm.gamma" in tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def experts(folder: Path) -> None:
    """One file per few tensors; every expert is a tensor of its own, in bf16."""
    Qwen3MoeForCausalLM(MOE).to(torch.bfloat16).save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert any("experts.3.down_proj" in name for name in index)


@pytest.mark.parametrize("save", [old_bert, experts, FAMILIES["dinov3_vit"].save])
def test_the_stream_is_what_transformers_loads(
    save: Callable[[Path], None], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    save(tmp_path)
    numbers = torch.get_rng_state()
    hollow = build_hollow(spec_of(tmp_path))
    assert torch.equal(torch.get_rng_state(), numbers)
    assert not any(parameter.requires_grad for parameter in hollow.model.parameters())
    check(hollow, spec_of(tmp_path), but="pooler.")


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    AutoModel.from_config(BERT).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(bert: Path) -> Path:
    config = LoraConfig(
        r=2,
        lora_alpha=8,
        target_modules=["query", "dense"],
        use_dora=True,
        modules_to_save=["pooler"],
        init_lora_weights=False,
    )
    folder = bert.parent / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by an old name
        model = get_peft_model(AutoModel.from_pretrained(bert), config)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 1
    model.save_pretrained(folder)
    return folder


def test_an_adapter_is_merged_while_its_base_is_read(bert: Path, adapter: Path) -> None:
    spec = spec_of(bert, adapters={"": adapter})
    check(build_hollow(spec), spec, atol=1e-6)
    plain = dict(build_hollow(spec_of(bert)).tensors())
    changed = {n for n, t in build_hollow(spec).tensors() if not torch.equal(t, plain[n])}
    ends = {".".join(name.split(".")[-3:]) for name in changed}
    assert ends == {"self.query.weight", "output.dense.weight", "intermediate.dense.weight"} | {
        f"pooler.dense.{leaf}" for leaf in ("weight", "bias")
    }


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"rank_pattern": {"query": 4}}, "rank_pattern: only plain LoRA is merged"),
        ({"bias": "all"}, "peft_type, bias: only plain LoRA is merged"),
        ({"target_modules": ["query"]}, r"base_model.*|encoder.*dense.*is on one side only"),
        ({"use_dora": False}, "lora_magnitude_vector is on one side only"),
    ],
)
def test_an_adapter_that_does_not_fit(
    bert: Path, adapter: Path, values: dict[str, Any], problem: str
) -> None:
    change_config(adapter, **values)
    with pytest.raises(ConfigError, match=f"adapter does not fit BertModel: .*{problem}"):
        list(build_hollow(spec_of(bert, adapters={"": adapter})).tensors())


def test_an_adapter_without_weights(bert: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="adapter does not fit BertModel: No such file"):
        list(build_hollow(spec_of(bert, adapters={"": adapter})).tensors())


def without(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


def test_files_that_lack_a_weight(bert: Path) -> None:
    without(bert, "encoder.layer.1.output.dense.bias")
    problem = r"its files lack 1 of the weights of BertModel \(first: encoder.layer.1.output.dense"
    with pytest.raises(ConfigError, match=problem):
        build_hollow(spec_of(bert))


def test_a_pooler_that_is_read_is_no_weight_to_do_without(bert: Path) -> None:
    without(bert, "pooler.dense.bias")
    build_hollow(spec_of(bert))
    with pytest.raises(ConfigError, match=r"lack 1 of the weights .*pooler.dense.bias"):
        build_hollow(spec_of(bert, pooling={"": "pooler"}))


def test_files_that_cannot_be_streamed(bert: Path) -> None:
    file = bert / "model.safetensors"
    torch.save(load_file(file), bert / "pytorch_model.bin")
    content = file.read_bytes()
    file.write_bytes(content[:40])
    with pytest.raises(ConfigError, match=r"model.safetensors is damaged"):
        build_hollow(spec_of(bert))
    file.unlink()
    with pytest.raises(
        ConfigError, match=r"pytorch_model.bin only, which cannot be read tensor by"
    ):
        build_hollow(spec_of(bert))
    (bert / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match=r"has no model.safetensors; give a folder with weights"):
        build_hollow(spec_of(bert))
    index = {"weight_map": {"pooler.dense.bias": "model-00001-of-00002.safetensors"}}
    (bert / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ConfigError, match=r"names model-00001-of-00002.safetensors, which is missin"
    ):
        build_hollow(spec_of(bert))


def test_files_cut_short_after_the_start(bert: Path) -> None:
    hollow = build_hollow(spec_of(bert))
    (bert / "model.safetensors").unlink()
    with pytest.raises(
        ConfigError, match=r"embeddings.LayerNorm.bias cannot be read: No such file"
    ):
        list(hollow.tensors())


def test_the_revision_of_a_hub_model(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    repository = tmp_path / "cache" / "models--someone--bert"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(bert, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    source = BackboneSource(name="someone/bert")
    assert cached_revision(source) == commit
    assert weight_files(source) == [repository / "snapshots" / commit / "model.safetensors"]
    assert cached_revision(BackboneSource(name=str(bert))) is None


def test_a_quantised_model(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (bert / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is stored quantised, which cannot be sharded here"):
        build_hollow(spec_of(bert))
