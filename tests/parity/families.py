"""Every model family as a tiny config, a processor folder and a plain forward pass of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel, ViTMAEModel

from tests.tokenizers import gemma_tokenizer, qwen_tokenizer, word_tokenizer

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
WORDS = {"vocab_size": 308, "max_position_embeddings": 128, "pad_token_id": 301}
PIXELS = {"image_size": 16, "patch_size": 8}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
QWEN_TEXT = {**SIZES, "num_key_value_heads": 1, **WORDS, "rope_parameters": ROPE}
QWEN_IDS = {
    "image_token_id": 306,
    "video_token_id": 307,
    "vision_start_token_id": 303,
    "vision_end_token_id": 304,
}
VISION = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2}
QWEN2_VISION = {**VISION, "embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2}
QWEN2_VL = {
    "model_type": "qwen2_vl",
    "text_config": QWEN_TEXT,
    "vision_config": QWEN2_VISION,
    **QWEN_IDS,
}
SQUARE = {"size": {"height": 16, "width": 16}}
QWEN_PIXELS = {
    "patch_size": 8,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64 * 4},
}


Inputs = dict[str, np.ndarray]
Embed = Callable[[Any, str, Inputs], Tensor]


def batched(inputs: Inputs, *, but: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """An item's arrays as a batch of one."""
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    return {name: value if name in but else value[None] for name, value in tensors.items()}


def first_state(model: Any, stream: str, inputs: Inputs) -> Tensor:
    return model(**batched(inputs)).last_hidden_state[0, 0]


def last_state(model: Any, stream: str, inputs: Inputs) -> Tensor:
    # Qwen-VL takes the patches of all images in one row.
    return model(**batched(inputs, but=("pixel_values", "image_grid_thw"))).last_hidden_state[0, -1]


def mean_state(model: Any, stream: str, inputs: Inputs) -> Tensor:
    return model(**batched(inputs)).last_hidden_state[0].mean(dim=0)


def own_pooler(model: Any, stream: str, inputs: Inputs) -> Tensor:
    return model(**batched(inputs)).pooler_output[0].flatten()


def two_towers(model: Any, stream: str, inputs: Inputs) -> Tensor:
    encode = model.get_text_features if stream == "text" else model.get_image_features
    return encode(**batched(inputs)).pooler_output[0]


def every_token(model: Any, stream: str, inputs: Inputs) -> Tensor:
    return model(**batched(inputs, but=("image_grid_thw",))).embeddings[0]


def unmasked(model: Any, stream: str, inputs: Inputs) -> Tensor:
    """ViT-MAE with all its patches, in another order; its export is a ViT."""
    pixels = batched(inputs)["pixel_values"]
    if model.config.model_type == "vit":
        return model(pixels).last_hidden_state[0, 0]
    noise = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    return model(pixels, noise=noise).last_hidden_state[0, 0]


@dataclass(frozen=True)
class TestFamily:
    """What the tests of a family need.

    Attributes:
        settings: Its config, with ``model_type``.
        embed: From the model and the unpadded inputs of one item to ``[D]`` or ``[L, D]``.
        streams: What it embeds; ``both`` besides, if an item may be a text and an image.
        image_processor: Class of its image processor; ``None`` without images.
        image_settings: Of that processor.
        tokenizer: Makes its tokenizer; ``None`` without texts.
        model_class: In transformers.
        files: Further files of its folder.
    """

    __test__ = False

    settings: dict[str, Any]
    embed: Embed
    streams: tuple[str, ...]
    image_processor: str | None = None
    image_settings: dict[str, Any] = field(default_factory=dict)
    tokenizer: Callable[[], Any] | None = None
    model_class: str = "AutoModel"
    files: dict[str, Any] = field(default_factory=dict)

    def save_processor(self, folder: Path) -> None:
        """Tokenizer and image processor files."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.tokenizer is not None:
            self.tokenizer().save_pretrained(folder)
        if self.image_processor is not None:
            kind = getattr(transformers, self.image_processor)
            kind(**self.image_settings).save_pretrained(folder)
        for name, content in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content))

    def save(self, folder: Path) -> None:
        """A random model and its processor."""
        torch.manual_seed(0)
        settings = dict(self.settings)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        kind = getattr(transformers, self.model_class)
        model = kind.from_config(config) if self.model_class == "AutoModel" else kind(config)
        random_model(model).save_pretrained(folder)
        self.save_processor(folder)

    def load(self, folder: Path) -> Any:
        """The plain model; ViT-MAE's positions are trained, as in its authors' fine-tuning."""
        config = AutoConfig.from_pretrained(folder)
        if config.model_type == "vit_mae":
            model = ViTMAEModel.from_pretrained(folder, mask_ratio=0.0)
            model.embeddings.position_embeddings.requires_grad_(True)
            return model
        if config.model_type == "dinov3_vit":
            # The files keep the random rescaling of coordinates, which training leaves out.
            return AutoModel.from_pretrained(folder, pos_embed_rescale=None)
        kind = "AutoModel" if config.model_type == "vit" else self.model_class
        return getattr(transformers, kind).from_pretrained(folder)


def random_model(model: Any) -> Any:
    """Livelier weights than the default 0.02, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


TEXT, IMAGE, PAIR, BOTH = ("text",), ("image",), ("text", "image"), ("text", "image", "both")
QWEN_READER = ("Qwen2VLImageProcessorPil", QWEN_PIXELS, qwen_tokenizer)
CROPPED = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
SHORT = {**SIZES, "vocab_size": 64, "max_position_embeddings": 16, "pad_token_id": 0}
BERT = {
    "model_type": "bert",
    **SHORT,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
STAGES = {"hidden_sizes": [4, 6, 8, 10], "depths": [1, 1, 1, 1], "image_size": 32}


def short_gemma_tokenizer() -> Any:
    return gemma_tokenizer(max_length=16)


def siglip(vocab_size: int) -> dict[str, Any]:
    return {
        "model_type": "siglip",
        "text_config": {**SHORT, "vocab_size": vocab_size, "projection_size": 16},
        "vision_config": {**SIZES, **PIXELS},
    }


FAMILIES = {
    "clip": TestFamily(
        {
            "model_type": "clip",
            "projection_dim": 12,
            "text_config": {**SHORT, "eos_token_id": 3, "bos_token_id": 2},
            "vision_config": {**SIZES, **PIXELS},
        },
        two_towers,
        PAIR,
        "CLIPImageProcessorPil",
        CROPPED,
        word_tokenizer,
    ),
    "siglip": TestFamily(
        siglip(64), two_towers, PAIR, "SiglipImageProcessorPil", SQUARE, word_tokenizer
    ),
    # SigLIP2 of fixed size: SigLIP's classes, Gemma's tokenizer.
    "siglip2_fixed": TestFamily(
        siglip(201), two_towers, PAIR, "SiglipImageProcessorPil", SQUARE, short_gemma_tokenizer
    ),
    "siglip2": TestFamily(
        {
            "model_type": "siglip2",
            "text_config": {**SHORT, "vocab_size": 201, "projection_size": 16},
            "vision_config": {**SIZES, "patch_size": 8, "num_patches": 16},
        },
        two_towers,
        PAIR,
        "Siglip2ImageProcessorPil",
        {"patch_size": 8, "max_num_patches": 12},
        short_gemma_tokenizer,
    ),
    "siglip2_vision": TestFamily(
        {"model_type": "siglip2_vision_model", **SIZES, "patch_size": 8, "num_patches": 16},
        own_pooler,
        IMAGE,
        "Siglip2ImageProcessorPil",
        {"patch_size": 8, "max_num_patches": 12},
    ),
    "dinov2": TestFamily(
        {"model_type": "dinov2", **SIZES, **PIXELS, "mlp_ratio": 2},
        first_state,
        IMAGE,
        "BitImageProcessorPil",
        CROPPED,
    ),
    "dinov3_vit": TestFamily(
        {"model_type": "dinov3_vit", **SIZES, **PIXELS, "num_register_tokens": 2},
        first_state,
        IMAGE,
        "ViTImageProcessorPil",
        SQUARE,
    ),
    "dinov3_convnext": TestFamily(
        {"model_type": "dinov3_convnext", **STAGES},
        own_pooler,
        IMAGE,
        "ViTImageProcessorPil",
        {"size": {"height": 32, "width": 32}},
    ),
    "convnext": TestFamily(  # the image tower of the composed encoder
        {"model_type": "convnext", **STAGES},
        own_pooler,
        IMAGE,
        "ViTImageProcessorPil",
        {"size": {"height": 32, "width": 32}},
    ),
    "vit": TestFamily(
        {"model_type": "vit", **SIZES, **PIXELS}, first_state, IMAGE, "ViTImageProcessorPil", SQUARE
    ),
    "vit_mae": TestFamily(
        {
            "model_type": "vit_mae",
            **SIZES,
            **PIXELS,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 24,
        },
        unmasked,
        IMAGE,
        "ViTImageProcessorPil",
        SQUARE,
        model_class="ViTMAEForPreTraining",
    ),
    "bert": TestFamily(BERT, first_state, TEXT, tokenizer=word_tokenizer),
    # E5 is a BERT whose folder states another pooling.
    "e5": TestFamily(
        BERT,
        mean_state,
        TEXT,
        tokenizer=word_tokenizer,
        files={"1_Pooling/config.json": {"pooling_mode_mean_tokens": True}},
    ),
    "modernbert": TestFamily(
        {
            "model_type": "modernbert",
            **SHORT,
            "cls_token_id": 2,
            "sep_token_id": 3,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "local_attention": 4,
            "global_attn_every_n_layers": 2,
        },
        first_state,
        TEXT,
        tokenizer=word_tokenizer,
    ),
    "qwen3": TestFamily(
        {
            "model_type": "qwen3",
            **SIZES,
            **WORDS,
            "num_key_value_heads": 1,
            "head_dim": 8,
        },
        last_state,
        TEXT,
        tokenizer=qwen_tokenizer,
    ),
    "qwen2_vl": TestFamily(QWEN2_VL, last_state, BOTH, *QWEN_READER),
    "qwen2_5_vl": TestFamily(
        {
            **QWEN2_VL,
            "model_type": "qwen2_5_vl",
            "vision_config": {
                **VISION,
                "hidden_size": 16,
                "out_hidden_size": 16,
                "intermediate_size": 24,
                "window_size": 32,
                "fullatt_block_indexes": [1],
            },
        },
        last_state,
        BOTH,
        *QWEN_READER,
    ),
    "qwen3_vl": TestFamily(
        {
            **QWEN2_VL,
            "model_type": "qwen3_vl",
            "text_config": {
                **QWEN_TEXT,
                "head_dim": 8,
                "rope_parameters": {**ROPE, "mrope_interleaved": True},
            },
            "vision_config": {
                **VISION,
                "hidden_size": 16,
                "out_hidden_size": 16,
                "intermediate_size": 24,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        },
        last_state,
        BOTH,
        *QWEN_READER,
    ),
    "colqwen2": TestFamily(
        {"model_type": "colqwen2", "vlm_config": QWEN2_VL, "embedding_dim": 12},
        every_token,
        PAIR,
        *QWEN_READER,
        model_class="ColQwen2ForRetrieval",
    ),
    "colpali": TestFamily(
        {
            "model_type": "colpali",
            "embedding_dim": 12,
            "vlm_config": {
                "model_type": "paligemma",
                "image_token_id": 4,
                "image_token_index": 4,
                "pad_token_id": 0,
                "text_config": {
                    "model_type": "gemma",
                    **SIZES,
                    "num_key_value_heads": 1,
                    "head_dim": 8,
                    "vocab_size": 200,
                    "pad_token_id": 0,
                },
                "vision_config": {
                    "model_type": "siglip_vision_model",
                    **SIZES,
                    **PIXELS,
                    "projection_dim": 16,
                    "vision_use_head": False,
                },
                "projection_dim": 16,
            },
        },
        every_token,
        PAIR,
        "SiglipImageProcessorPil",
        SQUARE,
        gemma_tokenizer,
        model_class="ColPaliForRetrieval",
    ),
}
