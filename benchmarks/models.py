"""Models of random weights, with the tokenizer and image processor that belong to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen2VLModel,
)

PAD, UNKNOWN, END = 0, 1, 2
FIRST_WORD = 3
INPUTS = ("input_ids", "attention_mask")
# Of Qwen2-VL; they stand behind the words.
VISION_TOKENS = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
VISION_PATCH, MERGED = 14, 2


class Shape(NamedTuple):
    """Of a model; a vision-language model's are its language model's.

    Attributes:
        layers: Of each tower.
        width: Of each tower.
        heads: Of attention.
        inner: Width between the layers of the feed-forward blocks.
        vocabulary: Tokens.
        positions: Tokens of the longest text.
        pixels: Edge of a picture.
    """

    layers: int
    width: int
    heads: int
    inner: int
    vocabulary: int
    positions: int
    pixels: int


def bert(shape: Shape) -> BertModel:
    """One tower for texts."""
    return BertModel(
        BertConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.inner,
            max_position_embeddings=max(shape.positions, 64),
            pad_token_id=PAD,
        )
    )


def clip(shape: Shape) -> CLIPModel:
    """Two towers alike; patches of 8 pixels; a text is read at its last token."""
    layers = {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.inner,
    }
    text = {
        **layers,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.positions,
        "pad_token_id": PAD,
        "bos_token_id": UNKNOWN,
        "eos_token_id": END,
    }
    image = {**layers, "image_size": shape.pixels, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=shape.width))


def vision_language(shape: Shape) -> Qwen2VLModel:
    """Qwen2-VL; at 28 layers, 1536 wide, 12 heads, 8960 between and 151,936 tokens the 2B one."""
    ids = {f"{name}_token_id": n for name, n in vision_tokens(shape.vocabulary).items()}
    text = {
        "vocab_size": shape.vocabulary + len(VISION_TOKENS),
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": max(shape.heads // 6, 1),
        "intermediate_size": shape.inner,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": _sections(shape.width // shape.heads // 2),
        },
    }
    vision = {
        "depth": shape.layers + shape.layers // 7,
        "embed_dim": max(shape.width * 5 // 6 // 64, 1) * 64,
        "num_heads": 16,
        "hidden_size": shape.width,
        "patch_size": VISION_PATCH,
        "spatial_merge_size": MERGED,
    }
    return Qwen2VLModel(
        Qwen2VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=ids["image_pad_token_id"],
            video_token_id=ids["video_pad_token_id"],
            vision_start_token_id=ids["vision_start_token_id"],
            vision_end_token_id=ids["vision_end_token_id"],
        )
    )


MODELS: Mapping[str, Any] = {"text": bert, "clip": clip, "vlm": vision_language}


def tokenizer(kind: str, shape: Shape) -> PreTrainedTokenizerFast:
    """One token a word: ``w17`` is token 17."""
    words = {"[PAD]": PAD, "[UNK]": UNKNOWN, "[END]": END}
    words |= {f"w{number}": number for number in range(FIRST_WORD, shape.vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    outer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=4096 if kind == "vlm" else shape.positions,
        model_input_names=list(INPUTS),
    )
    if kind == "vlm":
        outer.add_tokens([f"<|{name}|>" for name in VISION_TOKENS], special_tokens=True)
    return outer


def image_processor(kind: str, shape: Shape) -> Any:
    """Leaves pictures of the shape's size as large as they are; ``None``: the model has no use."""
    if kind == "clip":
        edge = {"height": shape.pixels, "width": shape.pixels}
        return CLIPImageProcessor(size={"shortest_edge": shape.pixels}, crop_size=edge)
    if kind == "vlm":
        area = shape.pixels**2
        return Qwen2VLImageProcessorPil(
            patch_size=VISION_PATCH,
            merge_size=MERGED,
            temporal_patch_size=2,
            size={"shortest_edge": area, "longest_edge": area},
        )
    return None


def vision_tokens(vocabulary: int) -> dict[str, int]:
    """Their numbers."""
    return {name: vocabulary + number for number, name in enumerate(VISION_TOKENS)}


def set_dropout(model: PreTrainedModel, value: float) -> None:
    """In the model's config, for whoever loads it."""
    config: Any = model.config
    for part in (config, *(getattr(config, n, None) for n in ("text_config", "vision_config"))):
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"):
            if hasattr(part, name):
                setattr(part, name, value)


def _sections(half: int) -> list[int]:
    """How time, height and width share the rotary dimensions: 2 : 3 : 3."""
    time = half // 4
    height = (half - time) // 2
    return [time, height, half - time - height]
