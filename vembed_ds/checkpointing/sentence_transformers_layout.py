"""The files with which sentence-transformers reads a converted folder as it was trained.

Without them it would pool any folder by the mean. They are small and lie beside the others:

======================================  ======================================================
``modules.json``                        what follows what
``sentence_bert_config.json``           the backbone: inputs, longest text, padding
``1_Pooling``, ``2_Dense``, ...         pooling, projection (a copy of its weights), length 1
``config_sentence_transformers.json``   instructions as prompts, similarity, Matryoshka widths
``router_config.json``                  of a composed encoder: the way of texts, and of images
======================================  ======================================================

Models that its modules cannot compute are read by a module of this package
(``sentence_transformers_module.py``), which it loads with ``trust_remote_code=True`` only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vembed_ds.models.lora import ADAPTER_CONFIG

OWN_MODULE = "vembed_ds.sentence_transformers_module.EncoderModule"
_THEIRS = "sentence_transformers.models."  # names that all its versions have for the same classes
_SENTENCE, _TOKENS = "sentence_embedding", "token_embeddings"
_POOLING = {"cls": "cls_token", "mean": "mean_tokens", "last_token": "lasttoken"}
_IDENTITY, _GELU = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.GELU"
# A projection's layers: how their tensors' names begin, and what follows each.
_LAYERS = {"": _IDENTITY, "0.": _GELU, "2.": _IDENTITY}


class _Module(NamedTuple):
    """One step from an item to its embedding.

    Attributes:
        kind: Its class.
        config: Content of its configuration file.
        weights: Of a Dense module.
    """

    kind: str
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor] = {}


def write_sentence_transformers(
    folder: Path, settings: Mapping[str, Any], *, adapter: bool
) -> None:
    """Add sentence-transformers' files to a converted folder. Not collective.

    Args:
        folder: Complete but for these files.
        settings: Content of its ``vembed_config.json``.
        adapter: Whether it holds adapters and not the weights.
    """
    unit = _normalize(_TOKENS if _gives_tokens(settings) else _SENTENCE)
    routes = {} if adapter and _own_adapter(folder) else _routes(folder, settings)
    if not routes:
        _write_chain(folder, [_Module(OWN_MODULE, {}), unit])
    elif "" in routes:
        _write_chain(folder, [*routes[""], unit])
    else:
        _write_router(folder, routes)
        _write_chain(folder, [_Module("Router", {}), unit])
    _write_json(folder / "config_sentence_transformers.json", _model_config(settings))


def sentence_transformers_call(folder: Path, settings: Mapping[str, Any]) -> str:
    """The expression that loads a converted folder, or that embeds where loading says too little."""
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    own = modules[0]["type"] == OWN_MODULE
    code = any("auto_map" in path.read_text("utf-8") for path in folder.rglob("config.json"))
    trusted = ", trust_remote_code=True" if own or code else ""
    if _gives_tokens(settings) and not own:
        return f"MultiVectorEncoder({str(folder)!r}{trusted})"
    tokens = ".encode(items, output_value='token_embeddings')" if _gives_tokens(settings) else ""
    return f"SentenceTransformer({str(folder)!r}{trusted}){tokens}"


def _own_adapter(folder: Path) -> bool:
    """Whether transformers (5.23) does not load an adapter as peft does.

    It finds no base model below the first folder, and leaves out the lengths that DoRA trains.
    """
    config = folder / ADAPTER_CONFIG
    return not config.is_file() or json.loads(config.read_text(encoding="utf-8"))["use_dora"]


def _routes(folder: Path, settings: Mapping[str, Any]) -> dict[str, list[_Module]]:
    """Modules by stream (``""``: of any); none: its modules cannot compute this model."""
    streams, pooling = settings["streams"], settings["pooling"]
    composed = settings["encoder_mode"] == "composed"
    inputs = settings["image_inputs"]
    if inputs not in (None, ["pixel_values"]):
        return {}  # patches, masks and shapes, which its processors and methods do not pass on
    if not pooling:
        head = _dense(_head(folder, settings, "projection_head"), _SENTENCE)
        return {"": [_two_towers(settings), *head]}
    if len(pooling) < len(streams) or ("image" in streams and "none" in pooling.values()):
        return {}  # vision-language; token embeddings of images, which have no mask
    if composed:
        return {s: _tower(folder, settings, s, s, f"{s}_projection") for s in streams}
    return {"": _tower(folder, settings, streams[0], "", "projection_head")}


def _tower(
    folder: Path, settings: Mapping[str, Any], stream: str, key: str, projection: str
) -> list[_Module]:
    """One backbone, its pooling and its projection."""
    pooling, backbone = settings["pooling"][key], settings["backbones"][key]
    head, width = _head(folder, settings, projection), backbone["width"]
    if pooling == "none":
        # MultiVectorEncoder looks for a Dense module, and without one it adds a random one.
        head = head or {"weight": torch.eye(width)}
        return [_backbone(stream, settings, "last_hidden_state", _TOKENS), *_dense(head, _TOKENS)]
    if pooling != "pooler":
        pooled = _pooling(_POOLING[pooling], width)
        return [
            _backbone(stream, settings, "last_hidden_state", _TOKENS),
            pooled,
            *_dense(head, _SENTENCE),
        ]
    if backbone["own_pooler"] == "map":  # of one place, so that its mean is its content
        return [
            _backbone(stream, settings, "pooler_output", _TOKENS),
            _pooling("mean_tokens", width),
            *_dense(head, _SENTENCE),
        ]
    return [_backbone(stream, settings, "pooler_output", _SENTENCE), *_dense(head, _SENTENCE)]


def _pooling(method: str, width: int) -> _Module:
    modes = {f"pooling_mode_{name}": name == method for name in _POOLING.values()}
    return _Module("Pooling", {"word_embedding_dimension": width, **modes})


def _two_towers(settings: Mapping[str, Any]) -> _Module:
    """A CLIP-like backbone."""
    ways = {
        stream: {"method": f"get_{stream}_features", "method_output_name": "pooler_output"}
        for stream in settings["streams"]
    }
    return _Module("Transformer", _inputs(settings, list(ways)) | _outputs(ways, _SENTENCE))


def _backbone(stream: str, settings: Mapping[str, Any], output: str, name: str) -> _Module:
    config = _inputs(settings, [stream])
    if (stream, output) == ("text", "last_hidden_state"):
        return _Module("Transformer", config)  # taken for granted, and all that old versions know
    way = {stream: {"method": "forward", "method_output_name": output}}
    return _Module("Transformer", config | _outputs(way, name))


def _inputs(settings: Mapping[str, Any], streams: Sequence[str]) -> dict[str, Any]:
    """How items become inputs; and float32, as in :class:`Encoder`, whatever the files hold."""
    config: dict[str, Any] = {"model_args": {"dtype": "float32"}}
    if "image" in streams:
        # Pillow's resizing is what the model was trained with; torchvision's differs.
        config["tokenizer_args"] = {"backend": "pil"}
    length = settings["max_seq_length"]
    if "text" in streams and length:
        config |= {"max_seq_length": length, "do_lower_case": False}
        if "image" in streams or settings["pad_to_max_length"]:
            # A processor of both would first ask what else the tokenizer's settings say.
            padding = "max_length" if settings["pad_to_max_length"] else True
            text = {"max_length": length, "truncation": True, "padding": padding}
            config["processing_kwargs"] = {"text": text}
    return config


def _outputs(ways: Mapping[str, Mapping[str, str]], name: str) -> dict[str, Any]:
    return {"modality_config": ways, "module_output_name": name}


def _head(folder: Path, settings: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The weights of a projection; none where there is no projection."""
    if name not in settings["projections"]:
        return {}
    return dict(load_file(folder / f"{name}.safetensors"))


def _dense(head: Mapping[str, Tensor], name: str) -> list[_Module]:
    """A projection as Dense modules: a matrix, or ``Linear, GELU, Linear``."""
    found = []
    for prefix, activation in _LAYERS.items():
        weight, bias = head.get(f"{prefix}weight"), head.get(f"{prefix}bias")
        if weight is None:
            continue
        config: dict[str, Any] = {
            "in_features": weight.shape[1],
            "out_features": weight.shape[0],
            "bias": bias is not None,
            "activation_function": activation,
        }
        if name != _SENTENCE:
            config |= {"module_input_name": name, "module_output_name": name}
        weights = {"linear.weight": weight}
        if bias is not None:
            weights["linear.bias"] = bias
        found.append(_Module("Dense", config, weights))
    return found


def _normalize(name: str) -> _Module:
    return _Module("Normalize", {"module_input_name": name, "module_output_name": name})


def _gives_tokens(settings: Mapping[str, Any]) -> bool:
    return "none" in settings["pooling"].values()


def _model_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    prompts = {role: settings.get(f"{role}_instruction") or "" for role in ("query", "document")}
    config: dict[str, Any] = {
        # Also of token embeddings: as a MultiVectorEncoder's, SentenceTransformer would drop these
        # modules and pool by the mean; so it ends with an error, and MultiVectorEncoder takes them.
        "model_type": "SentenceTransformer",
        "prompts": prompts,
        "default_prompt_name": None,
    }
    if not _gives_tokens(settings):
        config["similarity_fn_name"] = "cosine"
    if settings.get("use_mrl"):
        config["matryoshka_dims"] = settings["mrl_dims"]
    return config


def _write_chain(folder: Path, modules: Sequence[_Module]) -> None:
    entries = []
    for number, module in enumerate(modules):
        # The first lies in the folder itself, beside what it reads.
        path = f"{number}_{module.kind}" if number else ""
        kind = module.kind if "." in module.kind else f"{_THEIRS}{module.kind}"
        entries.append({"idx": number, "name": str(number), "path": path, "type": kind})
        _write_module(folder / path, module)
    _write_json(folder / "modules.json", entries)


def _write_router(folder: Path, routes: Mapping[str, Sequence[_Module]]) -> None:
    structure: dict[str, list[str]] = {}
    types = {}
    for stream, modules in routes.items():
        names = [f"{stream}_{number}_{module.kind}" for number, module in enumerate(modules)]
        names[0] = f"{stream}_encoder"  # beside what it reads
        structure[stream] = names
        for name, module in zip(names, modules, strict=True):
            types[name] = f"{_THEIRS}{module.kind}"
            _write_module(folder / name, module)
    parameters = {
        "default_route": None,
        "allow_empty_key": False,
        "route_mappings": {f"(None, {stream!r})": stream for stream in routes},
    }
    content = {"types": types, "structure": structure, "parameters": parameters}
    _write_json(folder / "router_config.json", content)


def _write_module(folder: Path, module: _Module) -> None:
    if not module.config:
        return
    folder.mkdir(exist_ok=True)
    name = "sentence_bert_config.json" if module.kind == "Transformer" else "config.json"
    _write_json(folder / name, module.config)
    if module.weights:
        copies = {key: tensor.clone() for key, tensor in module.weights.items()}
        save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
