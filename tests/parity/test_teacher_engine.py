"""A sharded teacher is the whole model, of every family, and no rank ever holds more than its share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertModel

from tests.parity.families import FAMILIES
from tests.parity.test_families import make_items, random_heads
from tests.tokenizers import word_tokenizer
from tests.worlds import World
from vembed_ds.checkpointing.adapters import adapter_names, describe_adapter, read_adapter_config
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.data.records import Item
from vembed_ds.models.lora import ADAPTER_WEIGHTS, LoraSpec, add_adapters
from vembed_ds.teachers.items import Instructions

CASES = "tests.parity.teacher_cases"
OFTEN = ("bert", "clip", "vit_mae", "qwen2_vl")  # the others are slow only because they are many
COMPOSED = {"text": "bert", "image": "convnext"}
INSTRUCTION = "query: "

pytestmark = [pytest.mark.parity, pytest.mark.distributed(2)]


def save_composed(folder: Path) -> None:
    """An export of two backbones with projections."""
    heads = random_heads("composed")
    for stream, family in COMPOSED.items():
        FAMILIES[family].save(folder / f"{stream}_encoder")
        save_file(heads[stream], folder / f"{stream}_projection.safetensors")
    settings = {
        "format_version": 1,
        "encoder_mode": "composed",
        "streams": list(COMPOSED),
        "pooling": {"text": "mean", "image": "pooler"},
        "projections": {f"{stream}_projection": {} for stream in COMPOSED},
        "projection_dim": 12,
        "projection_layers": 2,
        "max_seq_length": 16,
        "query_instruction": INSTRUCTION,
        "document_instruction": "",
    }
    (folder / "vembed_config.json").write_text(json.dumps(settings))


def save_adapted(folder: Path) -> None:
    """A DoRA adapter and the name of its base."""
    FAMILIES["bert"].save(folder / "base")
    word_tokenizer().save_pretrained(folder)
    backbone = AutoModel.from_pretrained(folder / "base")
    torch.manual_seed(1)
    add_adapters([backbone], LoraSpec(r=3, alpha=6.0, use_dora=True))
    for name, parameter in backbone.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) * 0.3
    describe_adapter(folder, backbone)
    config = read_adapter_config(folder)
    assert config is not None
    state = backbone.state_dict()
    named = adapter_names(state.keys(), config, place=str(folder))
    save_file(
        {theirs: state[own].clone() for theirs, own in named.items()}, folder / ADAPTER_WEIGHTS
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``saved(name)``: the folder of a family, or of an export, written once."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("teacher")
            made = {"composed": save_composed, "adapted": save_adapted}
            made.get(name, lambda f: FAMILIES[name].save(f))(folders[name])
        return folders[name]

    return get


def items_of(name: str) -> list[Item]:
    batch = make_items("bert" if name == "adapted" else name, 1)
    return [*batch["query"][:5], *batch["positive"][:4]]


def check(name: str, found: dict[str, Any], *, limit: float = 1e-6, ranks: int = 2) -> None:
    assert found["error"] <= limit
    assert found["repeatable"]
    assert found["untouched"]
    assert found["width"][0] == found["width"][1]
    assert found["pooling"][0] == found["pooling"][1]
    assert found["identity"]["model"] == found["model digest"]
    if name not in ("vit_mae", "adapted"):  # an untrained pooler; merged in float64 here
        assert found["identity"]["weights"] == found["whole digest"]
    for residence in (found["loaded"], found["after"]):
        assert residence["live"] == 0
        assert residence["total"] / ranks <= residence["shard"] <= residence["total"] / ranks + 100
    # The module that runs, and what its parent reads of others without calling them.
    assert 0 < found["most live"] <= found["largest module"] + found["loaded"]["largest"]


@pytest.mark.parametrize(
    "name",
    [
        *OFTEN,
        "composed",
        "adapted",
        *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES if n not in OFTEN),
    ],
)
@pytest.mark.one_in(2)
def test_sharded_embeddings_are_the_whole_models(
    world: Callable[[int], World], saved: Callable[[str], Path], name: str
) -> None:
    results = world(2).run(f"{CASES}:compare", folder=str(saved(name)), items=items_of(name))
    for found in results:
        check(name, found)
    expected = Instructions(INSTRUCTION, "") if name == "composed" else Instructions()
    assert results[0]["instructions"] == expected


@pytest.mark.parametrize(
    ("precision", "zero"),
    [
        ("fp32", {"offload_param": {"device": "cpu", "pin_memory": True}}),
        ("bf16", {}),
        ("fp16", {}),
        (
            "fp32",
            {"stage3_prefetch_bucket_size": 10**6, "stage3_param_persistence_threshold": 10**6},
        ),
    ],
    ids=["offloaded", "bf16", "fp16", "for speed"],
)
def test_other_precisions_and_places(
    world: Callable[[int], World], saved: Callable[[str], Path], precision: str, zero: Any
) -> None:
    options = {"folder": str(saved("clip")), "items": items_of("clip")}
    found, _ = world(2).run(f"{CASES}:compare", precision=precision, zero=zero, **options)
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    assert found["identity"]["precision"] == names[precision]
    if "stage3_param_persistence_threshold" in zero:
        assert found["error"] <= 1e-6
        # Kept whole, as was asked for; nothing reads logit_scale.
        assert found["after"]["live"] == found["after"]["total"] - 1
    else:
        check("clip", found)


def test_the_digest_is_of_the_weights_and_not_of_the_ranks(
    world: Callable[[int], World], saved: Callable[[str], Path]
) -> None:
    options = {"folder": str(saved("adapted")), "items": items_of("adapted")}
    two, other = world(2).run(f"{CASES}:compare", **options)
    (one,) = world(1).run(f"{CASES}:compare", **options)
    assert two["identity"] == other["identity"] == one["identity"]
    assert one["after"]["shard"] == one["after"]["total"]


@pytest.mark.slow
@pytest.mark.distributed(4)
def test_hpz_keeps_a_second_shard_per_machine(
    world: Callable[[int], World], saved: Callable[[str], Path]
) -> None:
    options = {"folder": str(saved("clip")), "items": items_of("clip")}
    for found in world(4).run(f"{CASES}:compare", zero={"zero_hpz_partition_size": 2}, **options):
        assert found["error"] <= 1e-6
        assert found["untouched"]
        assert found["after"]["live"] == 0
        total = found["after"]["total"]
        assert total * 3 / 4 <= found["after"]["shard"] <= total * 3 / 4 + 400


def test_models_that_are_in_memory(
    world: Callable[[int], World], saved: Callable[[str], Path]
) -> None:
    found = world(2).run(f"{CASES}:from_memory", folder=str(saved("bert")), items=items_of("bert"))[
        0
    ]
    assert found["error"] <= 1e-6
    assert found["shard"] == 2768  # of 5,536
    assert "requires a gradient: a teacher is not trained" in found["refused"]
    first, same, other = found["digests"]
    assert first == same != other
    assert "ties b.weight to a.weight, and its files hold other values for either" in found["tied"]


def test_memory_while_loading_and_embedding(world: Callable[[int], World], tmp_path: Path) -> None:
    """111 MB of weights, of which the largest tensor has 9."""
    torch.manual_seed(0)
    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    BertModel(BertConfig(num_hidden_layers=4, vocab_size=64, **shape)).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    for found in world(2).run(f"{CASES}:memory", folder=str(tmp_path), items=items_of("bert")):
        share, largest = found["total"] / 2, found["largest"]
        assert found["loading"] < share + 2 * largest + 8  # a tensor as read and as kept
        assert found["forward"] < share + 3 * largest + 8  # and as it was sent
        assert share + 3 * largest + 8 < found["total"]


def test_a_failure_of_one_rank_is_raised_on_all(
    world: Callable[[int], World], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    for folder in (tmp_path, tmp_path / "whole"):
        FAMILIES["bert"].save(folder)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["pooler.dense.bias"] = torch.zeros(3)
    save_file(tensors, file, metadata={"format": "pt"})
    own, other = world(2).run(f"{CASES}:failure", folder=str(tmp_path), broken_on=0)
    assert "its files hold pooler.dense.bias of shape [3], and its config.json says [16]" in own
    assert other.startswith("rank 0 failed: ")


def test_what_no_teacher_can_be_made_of(
    world: Callable[[int], World], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    def message(reference: Any, **options: Any) -> str:
        return world(2).run(f"{CASES}:failure", folder=reference, **options)[0]

    assert "teacher teacher: model nobody/nothing: cannot be loaded" in message("nobody/nothing")
    config = {"config": FAMILIES["bert"].settings}
    assert "teacher teacher: has a config and no files, so no processor" in message(config)
    unfit = message(str(saved("bert")), processor=ItemProcessor())
    assert "the model does not embed what its processor gives" in unfit
    several = tmp_path / "several"
    save_composed(several)
    path = several / "vembed_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "query_instruction": None}))
    assert "teacher_query_instruction: the teacher was trained on data sets" in message(
        str(several)
    )
