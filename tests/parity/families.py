"""Every model family as a tiny config, a processor folder and a plain forward pass of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tokenizers import gemma_tokenizer, qwen_tokenizer

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


@dataclass(frozen=True)
class TestFamily:
    """What the tests of a family need.

    Attributes:
        settings: Its config, with ``model_type``.
        image_settings: Of its image processor, with ``image_processor_type``; none without.
        tokenizer: Makes its tokenizer; ``None`` without texts.
    """

    __test__ = False

    settings: dict[str, Any]
    image_settings: dict[str, Any] = field(default_factory=dict)
    image_processor: str | None = None
    tokenizer: Callable[[], Any] | None = None

    def save_processor(self, folder: Path) -> None:
        """Tokenizer and image processor files."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.tokenizer is not None:
            self.tokenizer().save_pretrained(folder)
        if self.image_processor is not None:
            kind = getattr(transformers, self.image_processor)
            kind(**self.image_settings).save_pretrained(folder)


FAMILIES = {
    "qwen2_vl": TestFamily(QWEN2_VL, QWEN_PIXELS, "Qwen2VLImageProcessorPil", qwen_tokenizer),
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
        QWEN_PIXELS,
        "Qwen2VLImageProcessorPil",
        qwen_tokenizer,
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
        QWEN_PIXELS,
        "Qwen2VLImageProcessorPil",
        qwen_tokenizer,
    ),
    "colqwen2": TestFamily(
        {"model_type": "colqwen2", "vlm_config": QWEN2_VL, "embedding_dim": 12},
        QWEN_PIXELS,
        "Qwen2VLImageProcessorPil",
        qwen_tokenizer,
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
        SQUARE,
        "SiglipImageProcessorPil",
        gemma_tokenizer,
    ),
}


def random_model(model: Any) -> Any:
    """Livelier weights than the default 0.02, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model
