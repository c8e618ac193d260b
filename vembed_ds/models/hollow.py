"""The model of a specification before it has weights, and the weights as a stream.

What :func:`build_encoder` builds, on placeholders that take next to no memory. They can be computed
with, so that the model is probed like any other: a matrix ``[a, b]`` is a window on ``a + b - 1``
random numbers, in which both strides move by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vembed_ds.errors import ConfigError
from vembed_ds.models.backbones import load_skeleton, refuse_missing
from vembed_ds.models.builder import ModelSpec, build_encoder
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.encoder import TowerEncoder
from vembed_ds.models.merging import StoredAdapter
from vembed_ds.models.probe import OUTLINE
from vembed_ds.models.stored import StoredWeights, weight_files


@dataclass(frozen=True)
class HollowModel:
    """A model and where its weights are.

    Attributes:
        model: Frozen, on the host. What no file holds is there already: projections, computed
            buffers, an unused pooler.
        names: Parameters and buffers that :meth:`tensors` gives.
    """

    model: EmbeddingModel
    names: frozenset[str]
    _streams: tuple[Iterator[tuple[str, Tensor]], ...]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The stored tensors by their names in :attr:`model`, float32, of its shapes; only once.

        At one time there is what one tensor is made of: itself, or the parts that a conversion
        joins; and with an adapter its sum in float64.

        Raises:
            ConfigError: A tensor cannot be read, or has another shape.
        """
        return itertools.chain(*self._streams)


def build_hollow(spec: ModelSpec) -> HollowModel:
    """The model of a specification, its weights still in their files.

    Args:
        spec: Of sources that have names.

    Raises:
        ConfigError: As :func:`build_encoder`; the weights are in no safetensors files; or the
            model is stored quantised.
    """
    found: dict[str, tuple[nn.Module, StoredWeights]] = {}

    def load(spec: ModelSpec, key: str) -> nn.Module:
        found[key] = _hollow_backbone(spec, key)
        return found[key][0]

    # What is drawn here is a placeholder, or read by nobody; the caller's numbers stay his.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = EmbeddingModel(build_encoder(spec, load=load)).eval().requires_grad_(False)
    for key, (backbone, stored) in found.items():
        if _reads_pooler(model, backbone):
            refuse_missing(spec.sources[key], backbone, stored.missing())
    owners = {module: name for name, module in model.named_modules()}
    prefixes = {key: f"{owners[backbone]}." for key, (backbone, _) in found.items()}
    streams = [_in_model(_merged(spec, key, *found[key]), model, prefixes[key]) for key in found]
    names = {
        f"{prefixes[key]}{name}" for key, (_, stored) in found.items() for name in stored.names
    }
    return HollowModel(model, frozenset(names), tuple(streams))


def outline_backbone(spec: ModelSpec, key: str) -> nn.Module:
    """The backbone of a source on placeholders, from its config alone: no file of weights is read.

    For :func:`build_model`; what an adapter would be merged into has the same shapes without it.

    Raises:
        ConfigError: Its config cannot be found, or no model built of it.
    """
    backbone = load_skeleton(
        spec.sources[key],
        attn_implementation=spec.attn_implementation,
        trust_remote_code=spec.trust_remote_code,
    )
    trained = {
        name: parameter.requires_grad
        for name, parameter in backbone.named_parameters(remove_duplicate=False)
    }
    _compute_rest(backbone, set(trained))
    _place_holders(backbone, set(trained))
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(trained[name])
    setattr(backbone, OUTLINE, True)
    return backbone


def _hollow_backbone(spec: ModelSpec, key: str) -> tuple[nn.Module, StoredWeights]:
    source = spec.sources[key]
    backbone: Any = load_skeleton(source, trust_remote_code=spec.trust_remote_code)
    if getattr(backbone.config, "quantization_config", None) is not None:
        raise ConfigError(
            f"model {source.describe()}: is stored quantised, which cannot be sharded here; "
            "give the model it was made from"
        )
    stored = StoredWeights(backbone, weight_files(source), origin=source.describe())
    # An untrained pooler is in models without one, and is not read then.
    missing = [name for name in stored.missing() if "pooler." not in name]
    refuse_missing(source, backbone, missing)
    _compute_rest(backbone, stored.names)
    _place_holders(backbone, stored.names)
    return backbone, stored


def _reads_pooler(model: EmbeddingModel, backbone: nn.Module) -> bool:
    towers = [module for module in model.modules() if isinstance(module, TowerEncoder)]
    return any(tower.backbone is backbone and tower.pooling == "pooler" for tower in towers)


def _merged(
    spec: ModelSpec, key: str, backbone: nn.Module, stored: StoredWeights
) -> Iterator[tuple[str, Tensor]]:
    if key not in spec.adapters:
        return stored.tensors()
    return StoredAdapter(spec.adapters[key], backbone).merge(stored.tensors())


def _in_model(
    tensors: Iterator[tuple[str, Tensor]], model: nn.Module, prefix: str
) -> Iterator[tuple[str, Tensor]]:
    values = model.state_dict()  # with scalars as vectors, see scalars.py
    for name, tensor in tensors:
        yield f"{prefix}{name}", tensor.reshape(values[f"{prefix}{name}"].shape)


def _compute_rest(backbone: Any, held: set[str]) -> None:
    """Let transformers compute, as when it loads, what the files do not hold."""
    for module in backbone.modules():
        module.__dict__.pop("_is_hf_initialized", None)  # it was, on the meta device
    shared = {id(v) for n, v in backbone.state_dict(keep_vars=True).items() if n in held}
    for owner, leaf, value in list(_values(backbone)):
        if id(value) in shared:
            value._is_hf_initialized = True  # type: ignore[attr-defined]
        else:
            _replace(owner, leaf, torch.empty_like(value, device="cpu"))
    backbone.initialize_weights()


def _place_holders(backbone: nn.Module, held: set[str]) -> None:
    """Put a placeholder in the place of everything that is still on the meta device."""
    made: dict[int, Tensor] = {}
    for owner, leaf, value in list(_values(backbone)):
        if value.is_meta:
            holder = made.setdefault(id(value), _placeholder(value))
            _replace(owner, leaf, holder)


def _values(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for owner in module.modules():
        for leaf, value in [*owner._parameters.items(), *owner._buffers.items()]:
            if value is not None:
                yield owner, leaf, value


def _replace(owner: nn.Module, leaf: str, value: Tensor) -> None:
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        owner._parameters[leaf] = (
            value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        )


def _placeholder(value: Tensor) -> Tensor:
    if not isinstance(value, nn.Parameter):
        return torch.ones_like(value, device="cpu")
    if not value.numel():
        return nn.Parameter(torch.empty_like(value, device="cpu"), requires_grad=False)
    strides = [1] * value.dim()
    if value.dim() > 2:
        strides[-2] = value.shape[-1]  # whole matrices, which the kernels of experts ask for
    reach = sum((size - 1) * stride for size, stride in zip(value.shape, strides, strict=True))
    numbers = 0.02 * torch.randn(reach + 1)
    if value.dim() == 1:  # a scale, or a bias, for which one is as good
        numbers += 1.0
    return nn.Parameter(numbers.as_strided(value.shape, strides), requires_grad=False)
