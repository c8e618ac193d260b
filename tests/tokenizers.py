"""Tokenizers trained in a moment on a few words: byte-level BPE as Qwen's, and one like Gemma's."""

from __future__ import annotations

import json

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

CORPUS = [
    "a red apple on a wooden table, a dog runs in the rain and the sun is bright",
    "Represent the user's input. Find the picture that answers the question: Query 12345",
    "Describe the image. You are a helpful assistant. system user assistant",
]
QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# The template of Qwen2-VL's and Qwen3-VL's releases, as far as images and texts need it.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def word_tokenizer(*, max_length: int = 16) -> PreTrainedTokenizerFast:
    """Words between a class token and a separator, as BERT's; the separator ends CLIP's texts."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(
        CORPUS,
        trainers.WordLevelTrainer(vocab_size=60, special_tokens=special, show_progress=False),
    )
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=max_length,
    )


def qwen_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> Qwen2Tokenizer:
    """About 300 tokens; the special ones of Qwen-VL behind them."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    state = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(pair) for pair in state["merges"]],
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=512,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_TOKENS[1:])})
    tokenizer.chat_template = chat_template
    return tokenizer


def gemma_tokenizer(*, max_length: int = 512) -> PreTrainedTokenizerFast:
    """BPE over the whole string with a visible space, as Gemma's; with an image token."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<image>"]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "\u2581")
    bpe.decoder = decoders.Replace("\u2581", " ")
    bpe.train_from_iterator(
        [*CORPUS, "\n"],
        trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        model_max_length=max_length,
        extra_special_tokens={"image_token": "<image>"},
    )
