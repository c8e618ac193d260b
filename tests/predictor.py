"""What vembed-factory's ``Predictor`` does with a folder, written anew from its description.

``VEMBED_SPEC.md``, sections 4, 7 and 8. Unlike it, no fallback to a random projection: none is
needed here, and a test must not pass by one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer


class Predictor:
    """Encodes texts and images with one model, or (``encoder_mode="composed"``) two."""

    def __init__(
        self,
        folder: str,
        *,
        encoder_mode: str = "auto",
        text_model_name: str = "",
        image_model_name: str = "",
    ) -> None:
        self.settings = json.loads((Path(folder) / "vembed_config.json").read_text())
        # Every value must be one that its constructors take.
        assert isinstance(self.settings["topk_tokens"], int)
        self.composed = encoder_mode == "composed"
        dim = self.settings["projection_dim"]
        if self.composed:
            AutoTokenizer.from_pretrained(text_model_name)  # its towers load their own as well
            AutoImageProcessor.from_pretrained(image_model_name)
            self.models = {
                "text": AutoModel.from_pretrained(text_model_name).eval(),
                "image": AutoModel.from_pretrained(image_model_name).eval(),
            }
            self.heads: dict[str, Any] = {
                name: two_layers(model.config.hidden_size, dim or 512)
                for name, model in self.models.items()
            }
            for name, head in self.heads.items():
                head.load_state_dict(read(Path(folder) / f"{name}_projection.pt"))
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.pixels = AutoImageProcessor.from_pretrained(folder)
            return
        model = AutoModel.from_pretrained(folder)
        if (Path(folder) / "adapter_config.json").is_file():
            model = PeftModel.from_pretrained(model, folder).merge_and_unload()
        self.models = dict.fromkeys(("text", "image"), model.eval())
        width = width_of(model.config)
        head = None
        if dim and dim != width:
            head = nn.Linear(width, dim, bias=False)
            head.load_state_dict(read(Path(folder) / "projection_head.pt"))
        self.heads = dict.fromkeys(("text", "image"), head)
        self.tokenizer = self.pixels = AutoProcessor.from_pretrained(folder)

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> np.ndarray:
        """``[N, D]``, unit norm."""
        inputs = self.tokenizer(text=texts, return_tensors="pt", padding=True, truncation=True)
        tensors = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return self._embed("text", tensors, self.settings["pooling_method"])

    @torch.no_grad()
    def encode_image(self, images: list[Any]) -> np.ndarray:
        """``[N, D]``, unit norm. It says ``padding`` too, which not every processor takes."""
        inputs = self.pixels(images=[i.convert("RGB") for i in images], return_tensors="pt")
        method = "cls" if self.composed else self.settings["pooling_method"]
        return self._embed("image", {"pixel_values": inputs["pixel_values"]}, method)

    def _embed(self, stream: str, inputs: dict[str, Tensor], method: str) -> np.ndarray:
        model = self.models[stream]
        encode = getattr(model, f"get_{stream}_features", model)
        rows = pooled(encode(**inputs), inputs.get("attention_mask"), method)
        head = self.heads[stream]
        rows = rows if head is None else head(rows)
        result: np.ndarray = functional.normalize(rows, dim=1).numpy()
        return result


def pooled(outputs: Any, mask: Tensor | None, method: str) -> Tensor:
    """A pooled output of the backbone's own comes first."""
    own = getattr(outputs, "pooler_output", None)
    hidden: Tensor = getattr(outputs, "last_hidden_state", own)
    if method == "none":
        return hidden
    if own is not None:
        return own  # type: ignore[no-any-return]
    if method == "cls":
        return hidden[:, 0]
    if method == "last_token":
        assert mask is not None
        return hidden[torch.arange(len(hidden)), mask.sum(dim=1) - 1]  # padding on the right
    weights = torch.ones(hidden.shape[:2]) if mask is None else mask.float()
    return (hidden * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True)


def width_of(config: Any) -> int:
    """Width that the projection starts from."""
    text = getattr(config, "text_config", None)
    found = getattr(config, "hidden_size", None) or getattr(config, "projection_dim", None)
    return int(found or getattr(text, "hidden_size", 768))


def two_layers(width: int, dim: int) -> nn.Module:
    """A projection of its composed encoder."""
    return nn.Sequential(
        nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim, bias=False)
    ).eval()


def read(path: Path) -> dict[str, Tensor]:
    """A file of a projection."""
    found: dict[str, Tensor] = torch.load(path, weights_only=True)
    return found
