"""Code that loads a converted model, for its card: right for this model, as the tests run it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vembed_ds.models.lora import ADAPTER_CONFIG

_ITEMS = {
    "text": 'texts = ["a dog on the beach", "rain"]',
    "image": 'images = [Image.open("a.jpg"), Image.open("b.jpg")]',
}
_POOLING = {
    "text": {
        "cls": ["rows = outputs.last_hidden_state[:, 0]"],
        "mean": [
            'mask = inputs["attention_mask"].unsqueeze(-1)',
            "rows = (outputs.last_hidden_state * mask).sum(1) / mask.sum(1)",
        ],
        "last_token": [
            'last = inputs["attention_mask"].sum(1) - 1',
            "rows = outputs.last_hidden_state[torch.arange(len(last)), last]",
        ],
        "pooler": ["rows = outputs.pooler_output.flatten(1)"],
        "none": ["rows = outputs.last_hidden_state  # [n, length, width]; see attention_mask"],
    },
    "image": {
        "cls": ["rows = outputs.last_hidden_state[:, 0]"],
        "mean": ["rows = outputs.last_hidden_state.flatten(2).mean(2)"],  # of a map of features
        "last_token": ["rows = outputs.last_hidden_state[:, -1]"],
        "pooler": ["rows = outputs.pooler_output.flatten(1)"],
        "none": ["rows = outputs.last_hidden_state  # one vector per patch"],
    },
}
_OWN_INPUTS = (
    "The weights are plain transformers weights (`AutoModel.from_pretrained`), but {what} is done by "
    "`vembed_ds` and by no automatic class; use the code above."
)


def loading_snippets(
    folder: Path, *, name: str, settings: Mapping[str, Any], adapter: bool
) -> Iterator[str]:
    """Markdown that shows how the model embeds, by every library that can read it.

    Args:
        folder: Complete but for the card.
        name: To load it by, in the code.
        settings: Content of its ``vembed_config.json``.
        adapter: Whether it holds an adapter instead of weights.
    """
    yield "With `vembed_ds`:"
    yield _code(_own(name, settings))
    yield "With `transformers`:"
    if (reason := _not_plain(settings, adapter=adapter)) is not None:
        yield _OWN_INPUTS.format(what=reason)
    else:
        yield _code(_plain(folder, name, settings, adapter=adapter))
        if told := _instructions(settings):
            yield told
    if (folder / "modules.json").is_file():
        yield "With `sentence-transformers`:"
        yield _code(_sentence_transformers(folder, name, settings))


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _own(name: str, settings: Mapping[str, Any]) -> list[str]:
    streams = settings["streams"]
    lines = ["from vembed_ds import Encoder", "", f"encoder = Encoder({name!r})"]
    roles = settings.get("query_instruction") or settings.get("document_instruction")
    if "text" in streams:
        lines.append('texts = ["a dog on the beach", "rain"]')
        role = ', role="query"' if roles else ""
        lines.append(f"text_embeddings = encoder.encode_text(texts{role})")
    if "image" in streams:
        role = ', role="document"' if roles else ""
        lines.append(f'image_embeddings = encoder.encode_image(["a.jpg", "b.jpg"]{role})')
    return lines


def _not_plain(settings: Mapping[str, Any], *, adapter: bool) -> str | None:
    """What a few lines of transformers cannot do; ``None``: nothing."""
    pooling, streams = settings["pooling"], settings["streams"]
    if pooling and len(pooling) < len(streams):
        return "the input of a model that reads texts and images in one"
    if settings.get("topk_tokens"):
        return "the choice of patches"
    if adapter and settings["encoder_mode"] == "composed":
        return "the merging of adapters into their base models"
    return None


def _instructions(settings: Mapping[str, Any]) -> str | None:
    told = {
        side: settings.get(f"{side}_instruction")
        for side in ("query", "document")
        if settings.get(f"{side}_instruction")
    }
    if not told:
        return None
    said = " and ".join(f"every {side} with {json.dumps(text)}" for side, text in told.items())
    return f"Begin {said}, as in training."


def _plain(folder: Path, name: str, settings: Mapping[str, Any], *, adapter: bool) -> list[str]:
    streams = settings["streams"]
    kinds = {"text": "AutoTokenizer", "image": "AutoImageProcessor"}
    classes = ", ".join(sorted(["AutoModel", *(kinds[stream] for stream in streams)]))
    lines = ["import torch"]
    if "image" in streams:
        lines.append("from PIL import Image")
    if adapter:
        lines.append("from peft import PeftModel")
    if settings["projections"]:
        lines.append("from safetensors.torch import load_file")
    lines += ["from torch.nn import functional", f"from transformers import {classes}", ""]
    base = _base(folder) if adapter else None
    for stream in streams:
        lines += [_ITEMS[stream], *_stream(stream, name, settings, base=base), ""]
    return lines[:-1]


def _base(folder: Path) -> str:
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return str(config["base_model_name_or_path"])


def _stream(
    stream: str, name: str, settings: Mapping[str, Any], *, base: str | None
) -> Iterator[str]:
    composed = settings["encoder_mode"] == "composed"
    place = f"{name}/{stream}_encoder" if composed else name
    yield f"model = AutoModel.from_pretrained({base or place!r}).float().eval()"
    if base is not None:
        yield f"model = PeftModel.from_pretrained(model, {place!r}).eval()"
    yield from _inputs(stream, place, settings)
    yield "with torch.no_grad():"
    pooling = settings["pooling"]
    if not pooling:
        yield f"    rows = model.get_{stream}_features(**inputs).pooler_output"
    else:
        yield "    outputs = model(**inputs)"
        method = pooling[stream if composed else ""]
        for line in _POOLING[stream][method]:
            yield f"    {line}"
    head = f"{stream}_projection" if composed else "projection_head"
    for line in _projection(head, name, settings):
        yield f"    {line}"
    yield f"{stream}_embeddings = functional.normalize(rows, dim=-1)"


def _inputs(stream: str, place: str, settings: Mapping[str, Any]) -> Iterator[str]:
    if stream == "image":
        yield f'processor = AutoImageProcessor.from_pretrained({place!r}, backend="pil")'
        yield 'inputs = processor(images, return_tensors="pt")'
        return
    yield f"tokenizer = AutoTokenizer.from_pretrained({place!r})"
    padding = '"max_length"' if settings.get("pad_to_max_length") else "True"
    segments = "" if settings["pooling"] else ", return_token_type_ids=False"
    yield (
        f"inputs = tokenizer(texts, padding={padding}, truncation=True{segments}, "
        'return_tensors="pt")'
    )


def _projection(head: str, name: str, settings: Mapping[str, Any]) -> Iterator[str]:
    described = settings["projections"].get(head)
    if described is None:
        return
    yield f'head = load_file("{name}/{head}.safetensors")'
    yield "head = {key: value.float() for key, value in head.items()}"
    if described["layers"] == 1:
        yield 'rows = functional.linear(rows, head["weight"])'
        return
    yield 'rows = functional.gelu(functional.linear(rows, head["0.weight"], head["0.bias"]))'
    yield 'rows = functional.linear(rows, head["2.weight"])'


def _sentence_transformers(folder: Path, name: str, settings: Mapping[str, Any]) -> list[str]:
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    own = any(module["type"].startswith("vembed_ds.") for module in modules)
    late = "none" in settings["pooling"].values()
    kind = "MultiVectorEncoder" if late and not own else "SentenceTransformer"
    trusted = ", trust_remote_code=True" if own else ""
    tokens = ', output_value="token_embeddings"' if late and own else ""
    lines = [f"from sentence_transformers import {kind}", "", f"model = {kind}({name!r}{trusted})"]
    if "text" in settings["streams"]:
        told = settings.get("query_instruction") or settings.get("document_instruction")
        encode = "encode_query" if told else "encode"
        lines.append(f'text_embeddings = model.{encode}(["a dog on the beach", "rain"]{tokens})')
    if "image" in settings["streams"]:
        lines += ["from PIL import Image", _ITEMS["image"]]
        lines.append(f"image_embeddings = model.encode(images{tokens})")
    return lines
