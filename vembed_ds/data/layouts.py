"""Where the text of a vision-language model's item stands among what its family writes around it."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vembed_ds.errors import ConfigError

DEFAULT_INSTRUCTION = "Represent the user's input."  # of Qwen3-VL-Embedding's model card
SENTINEL = "vembedtexthere"
QUERY_SUFFIX_TOKENS = 10  # padding tokens behind a query, as room to think (ColBERT's idea)


class Layout(Protocol):
    """Where the text of an item stands."""

    mixes: bool
    """Whether an item may be an image and a text at once."""

    def around(self, instruction: str, *, image: bool, text: bool) -> tuple[str, str]:
        """What stands before the item's own text and behind it; the image is in the first."""
        ...


@dataclass
class ChatLayout:
    """A conversation of a system message, the instruction, and a user's message, the item.

    Args:
        tokenizer: Its chat template is used; without one, the same string is put together.
        image_token: The placeholder of an image.
    """

    tokenizer: Any
    image_token: str
    mixes = True

    def around(self, instruction: str, *, image: bool, text: bool) -> tuple[str, str]:
        """See :class:`Layout`."""
        system = punctuated(instruction) or DEFAULT_INSTRUCTION
        if self.tokenizer.chat_template is None:
            whole = self._built(system, image=image)
        else:
            whole = self._rendered(system, image=image)
        before, found, after = whole.partition(SENTINEL)
        if not found or SENTINEL in after or whole.count(self.image_token) != int(image):
            raise ConfigError(
                "the tokenizer's chat template does not give a text and an image once each "
                f"({whole[:200]!r}); give the template that belongs to the model"
            )
        return before, after

    def _built(self, system: str, *, image: bool) -> str:
        picture = f"<|vision_start|>{self.image_token}<|vision_end|>" if image else ""
        return (
            f"<|im_start|>system\n{system}<|im_end|>\n"
            f"<|im_start|>user\n{picture}{SENTINEL}<|im_end|>\n<|im_start|>assistant\n"
        )

    def _rendered(self, system: str, *, image: bool) -> str:
        content = [{"type": "image"}] if image else []
        conversation = [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": [*content, {"type": "text", "text": SENTINEL}]},
        ]
        rendered: str = self.tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        return rendered


@dataclass
class RetrieverLayout:
    """A text behind a prefix, or an image in a fixed prompt (ColPali, ColQwen2).

    Args:
        query: What stands before and behind a text.
        image: The prompt that holds the image.
    """

    query: tuple[str, str]
    image: str
    mixes = False

    def around(self, instruction: str, *, image: bool, text: bool) -> tuple[str, str]:
        """See :class:`Layout`."""
        return (self.image, "") if image else (self.query[0] + instruction, self.query[1])


def punctuated(instruction: str) -> str:
    """The instruction, closed by a full stop where it ends in no punctuation."""
    stripped = instruction.strip()
    if stripped and not unicodedata.category(stripped[-1]).startswith("P"):
        return f"{stripped}."
    return stripped


def chat_layout(tokenizer: Any, image_token: str, settings: Mapping[str, Any]) -> Layout:
    """Of Qwen-VL."""
    return ChatLayout(tokenizer, image_token)


def colqwen2_layout(tokenizer: Any, image_token: str, settings: Mapping[str, Any]) -> Layout:
    """Of ColQwen2; the processor's settings may change its prefixes."""
    prompt = settings.get("visual_prompt_prefix") or (
        f"<|im_start|>user\n<|vision_start|>{image_token}<|vision_end|>Describe the image."
        "<|im_end|><|endoftext|>"
    )
    suffix = tokenizer.pad_token * QUERY_SUFFIX_TOKENS + "\n"
    return RetrieverLayout((settings.get("query_prefix") or "Query: ", suffix), prompt)


def colpali_layout(tokenizer: Any, image_token: str, settings: Mapping[str, Any]) -> Layout:
    """Of ColPali, likewise."""
    start = tokenizer.bos_token or ""
    prompt = settings.get("visual_prompt_prefix", "Describe the image.")
    prefix = settings.get("query_prefix", "Question: ")
    suffix = tokenizer.pad_token * QUERY_SUFFIX_TOKENS + "\n"
    return RetrieverLayout((start + prefix, suffix), f"{image_token}{start}{prompt}\n")
