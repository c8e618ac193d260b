"""Base weights in 4 bit under trained adapters (QLoRA, Dettmers et al. 2023), by bitsandbytes.

A weight is cut into blocks of 64 values, which are rounded to the 16 levels of NF4 times the
block's largest magnitude; these magnitudes are themselves rounded to 8 bit ("double quantisation",
their sections 3.1 and 3.2). What the layer computes with is the rounded weight, in the precision
of its input. It is frozen, so that rounding happens once, before training.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vembed_ds.errors import ConfigError


def quantize_layers(backbone: nn.Module, names: Iterable[str]) -> None:
    """Hold the weights of some linear layers in 4 bit, in place.

    In a state dict they stay what they stand for: ``[out, in]`` float32 under the same name. So
    checkpoints and exports are as without this. Loading one cannot give other weights: it is
    refused unless they are the same.

    Args:
        backbone: Float32, on the host; the same on every rank.
        names: Of layers of type ``nn.Linear``.

    Raises:
        ConfigError: A layer is of another type, or bitsandbytes is missing.
    """
    layers = {name: backbone.get_submodule(name) for name in names}
    for name, layer in layers.items():
        if type(layer) is not nn.Linear:
            raise ConfigError(
                f"load_in_4bit=true: {type(backbone).__name__}'s {name} is a "
                f"{type(layer).__name__}, and only Linear layers are held in 4 bit; name others in "
                "lora_target_modules, or set load_in_4bit: false"
            )
    bnb = _import_bitsandbytes()
    for name, layer in layers.items():
        assert isinstance(layer, nn.Linear)
        owner, _, leaf = name.rpartition(".")
        setattr(backbone.get_submodule(owner), leaf, _quantized(bnb, layer))


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer's own weight is held in 4 bit."""
    return getattr(module, "quant_state", None) is not None


def whole_shape(parameter: Tensor) -> tuple[int, ...] | None:
    """``[out, in]`` of a parameter that is held in 4 bit; ``None``: it is not."""
    state = getattr(parameter, "quant_state", None)
    return None if state is None else tuple(state.shape)


def _quantized(bnb: Any, layer: nn.Linear) -> nn.Module:
    made: Any = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, quant_type="nf4"
    )
    made.weight = bnb.nn.Params4bit(
        layer.weight.data,
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=True,
        module=made,
    )
    if layer.bias is not None:
        made.bias = layer.bias
    made.to(layer.weight.device)  # quantises
    # It would keep the precision of its first input for ever, and that is the float32 probe's.
    made.compute_dtype, made.compute_type_is_set = None, True
    # In evaluation mode on some CPUs it would repack its weight for good, for inference alone.
    made.support_avx512bf16_for_cpu = False
    made.train(layer.training)
    made.register_state_dict_post_hook(_save_rounded)
    made.register_load_state_dict_pre_hook(_keep_own)
    quantized: nn.Module = made
    return quantized


def dequantized(layer: Any) -> Tensor:
    """``[out, in]`` float32: what the 4-bit weight of a layer stands for."""
    bnb = _import_bitsandbytes()
    whole: Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.quant_state)
    return whole


def _save_rounded(layer: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]  # bitsandbytes' own way to save the same
    state[f"{prefix}weight"] = dequantized(layer)


def _keep_own(layer: Any, state: dict[str, Any], prefix: str, metadata: Any, *lists: Any) -> None:
    name = f"{prefix}weight"
    saved, own = state.get(name), dequantized(layer)
    if saved is None or not torch.equal(saved.to(own), own):
        lists[-1].append(f"{name}: the base model is not the one that this was trained on")
    state[name] = layer.weight.data


def _import_bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except Exception as error:  # it loads compiled code, and what that raises is open
        raise ConfigError(
            f"load_in_4bit=true needs bitsandbytes, which cannot be imported ({error}); "
            "pip install 'vembed-ds[qlora]', or set load_in_4bit: false"
        ) from error
