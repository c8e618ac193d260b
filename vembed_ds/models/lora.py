"""Low-rank adapters (LoRA, DoRA, rsLoRA) in the layers of a backbone, injected by peft.

An adapted layer computes ``W x + s B A x``, where only ``A`` ``[r, in]`` and ``B`` ``[out, r]``
are trained and ``s`` is ``alpha / r`` (Hu et al. 2021, section 4.1) or, for rsLoRA,
``alpha / sqrt(r)`` (Kalajdzievski 2023). DoRA also trains the length ``m`` ``[out]`` of every row
(Liu et al. 2024, eq. 5): ``m V x / |V|`` with ``V = W + s B A``; no gradient flows through
``|V|`` (their section 4.3).

GPT-2's layers (``Conv1D``) compute the same and store ``W`` transposed, ``[in, out]``; peft calls
that ``fan_in_fan_out``. ``A``, ``B`` and ``m`` have the same shapes there.
"""

from __future__ import annotations

import difflib
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vembed_ds.errors import ConfigError, one_line
from vembed_ds.models.quantized import quantize_layers

ALL_LINEAR = "all-linear"
ADAPTER = "default"  # the name that peft gives a model's only adapter
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_MERGED_AT_A_TIME = 1 << 18  # values; some copies of so many in float64 are in memory


@dataclass(frozen=True)
class LoraSpec:
    """What is added to every trained backbone.

    Attributes:
        r: Rank.
        alpha: Numerator of the scaling ``s``.
        dropout: Of the adapters' input, in training.
        target_modules: Names of linear layers, each whole or its end behind a dot;
            ``"all-linear"``: every linear layer; ``None``: those of the repeated blocks, which
            are attention and feed-forward.
        use_dora: Also train the length of every row.
        use_rslora: Scale by ``alpha / sqrt(r)``.
        modules_to_save: Names of modules that are trained whole.
        load_in_4bit: Hold the weights of the adapted layers in 4 bit (QLoRA).
    """

    r: int
    alpha: float
    dropout: float = 0.0
    target_modules: Sequence[str] | str | None = None
    use_dora: bool = False
    use_rslora: bool = False
    modules_to_save: Sequence[str] = ()
    load_in_4bit: bool = False


def add_adapters(backbones: Sequence[nn.Module], spec: LoraSpec) -> None:
    """Freeze the backbones and put adapters into them, in place.

    What was frozen before gets no adapter. The backbones stay in training mode as they are, so
    that their dropout acts as it does when they are trained whole.

    Args:
        backbones: Hugging Face models, float32, on the host.
        spec: Of the adapters. ``A`` is drawn from the global generator and ``B`` is zero, so
            that the embeddings are unchanged at first.

    Raises:
        ConfigError: A name matches nothing, or a backbone has no layer to adapt.
    """
    if not backbones:
        raise ConfigError(
            "use_lora=true: no tower is trained, so there is nothing to adapt; "
            "unfreeze a tower or set use_lora: false"
        )
    _check_names("lora_modules_to_save", spec.modules_to_save, map(_trained_modules, backbones))
    if not isinstance(spec.target_modules, str):
        _check_names("lora_target_modules", spec.target_modules or (), map(_linears, backbones))
    for backbone in backbones:
        _add_to(backbone, spec)


def adapter_config(backbone: nn.Module) -> Any:
    """The ``LoraConfig`` of a backbone that has adapters, else ``None``."""
    configs: Mapping[str, Any] = backbone.__dict__.get("peft_config", {})
    return configs.get(ADAPTER)


def merged_weight(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor | None,
    *,
    scaling: float,
    transposed: bool = False,
) -> Tensor:
    """The one matrix that does what a layer and its adapter do.

    Args:
        weight: ``W`` ``[out, in]``, float32 like all; transposed: ``[in, out]``.
        a: ``[r, in]``.
        b: ``[out, r]``.
        magnitude: ``[out]`` of DoRA; ``None``: LoRA.
        scaling: ``s``.
        transposed: Whether ``W`` is stored as ``Conv1D`` stores it.

    Returns:
        As ``weight``.
    """
    merged = torch.empty_like(weight, memory_format=torch.contiguous_format)
    source, target = (weight.T, merged.T) if transposed else (weight, merged)
    wide_a = a.double()
    step = max(1, _MERGED_AT_A_TIME // source.shape[1])
    for start in range(0, len(source), step):  # rows know nothing of each other
        rows = slice(start, start + step)
        # In float64, so that the sum is rounded once.
        whole = source[rows].double() + scaling * (b[rows].double() @ wide_a)
        if magnitude is not None:
            length: Tensor = torch.linalg.norm(whole, dim=1)
            whole = whole * (magnitude[rows].double() / length).unsqueeze(1)
        target[rows] = whole
    return merged


def scaling_of(config: Mapping[str, Any]) -> float:
    """``s`` of an adapter configuration in peft's terms."""
    rank = config["r"]
    return float(config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank))


def inside(name: str, parents: Iterable[str]) -> bool:
    """Whether a module or parameter is one of the modules ``parents``, or in one."""
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def saved_by_peft(name: str, wanted: Iterable[str]) -> bool:
    """Whether peft takes a parameter for one of the modules to save, ``wanted``.

    It compares how names of modules end, as strings: ``norm`` is ``layers.0.input_layernorm`` too.
    """
    ends, parts = tuple(wanted), name.split(".")
    return any(".".join(parts[:length]).endswith(ends) for length in range(1, len(parts)))


def base_of(folder: Path) -> str | None:
    """The base model of a peft folder; ``None``: the folder holds no adapter.

    Raises:
        ConfigError: The configuration is damaged, or names none.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: damaged: {one_line(error)}") from error
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base_model_name_or_path={base!r}; name the base model there")
    return base


def merge_adapter_folder(backbone: nn.Module, folder: Path) -> nn.Module:
    """The backbone with the adapter of a peft folder merged into its weights.

    Args:
        backbone: The adapter's base model, float32; its weights change.
        folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ConfigError: The adapter is missing or does not fit.
    """
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of missing weights; see below
            adapted = PeftModel.from_pretrained(backbone, str(folder))
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            differing = set(file.keys()) ^ set(get_peft_model_state_dict(adapted))
    except Exception as error:  # peft raises anything for files that do not fit
        raise _unfit(backbone, folder, one_line(error)) from error
    if differing:
        raise _unfit(backbone, folder, f"{min(differing)} is on one side only")
    merged: nn.Module = adapted.merge_and_unload()
    return merged


def _unfit(backbone: nn.Module, folder: Path, problem: str) -> ConfigError:
    return ConfigError(f"{folder}: the adapter does not fit {type(backbone).__name__}: {problem}")


def _add_to(backbone: nn.Module, spec: LoraSpec) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    whole = matching(spec.modules_to_save, _trained_modules(backbone))
    saved = [p for name in whole for p in backbone.get_submodule(name).parameters()]
    saved = [parameter for parameter in saved if parameter.requires_grad]
    targets = [n for n in _targets(backbone, spec) if not inside(n, whole)]
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        use_dora=spec.use_dora,
        use_rslora=spec.use_rslora,
        fan_in_fan_out=_transposed(backbone, targets),
        base_model_name_or_path=_origin(backbone),
    )
    if spec.load_in_4bit:
        quantize_layers(backbone, targets)
        backbone.is_loaded_in_4bit = True  # type: ignore[assignment]  # what peft asks for
    try:
        inject_adapter_in_model(config, backbone, adapter_name=ADAPTER)  # freezes all but adapters
    except ValueError as error:  # layers whose kernels read the weight themselves (Mamba)
        raise ConfigError(
            f"lora_target_modules: {type(backbone).__name__} cannot have adapters there: "
            f"{one_line(error)}; name other layers, or set use_lora: false"
        ) from error
    for parameter in saved:
        parameter.requires_grad_(True)
    config.target_modules, config.modules_to_save = targets, sorted(whole) or None
    adapted = {name for name, module in backbone.named_modules() if hasattr(module, "lora_A")}
    assert adapted == set(targets), "peft adapted other layers than it was told to"


def _targets(backbone: nn.Module, spec: LoraSpec) -> list[str]:
    linears = _linears(backbone)
    if spec.target_modules == ALL_LINEAR:
        found = list(linears)
    elif spec.target_modules is None:
        lists = [n for n, m in backbone.named_modules() if isinstance(m, nn.ModuleList)]
        found = [name for name in linears if inside(name, lists)]
    else:
        found = matching(spec.target_modules, linears)
    if not found:
        raise ConfigError(
            f"lora_target_modules={_shown(spec.target_modules)}: {type(backbone).__name__} has no "
            f"such linear layer that is trained; its linear layers: {_ends(linears) or 'none'}. "
            "Name some of them, or freeze this tower, or set use_lora: false"
        )
    return found


def _transposed(backbone: nn.Module, targets: Sequence[str]) -> bool:
    """Whether the layers store their weight as ``Conv1D`` does: all of them or none."""
    kinds = {type(backbone.get_submodule(name)): name for name in targets}
    if len(kinds) > 1:  # peft's configuration says it once for a whole model
        raise ConfigError(
            f"lora_target_modules: {type(backbone).__name__} has layers of two kinds, "
            f"{kinds[nn.Linear]} (Linear) and {kinds[Conv1D]} (Conv1D), and one adapter cannot "
            "have both; name layers of one kind"
        )
    return Conv1D in kinds


def _linears(backbone: nn.Module) -> dict[str, nn.Module]:
    """Trained matrices that are called as layers.

    The exact type: a subclass may be there to be read by its parent and never called, such as
    the output of ``nn.MultiheadAttention``, and an adapter in it would do nothing.
    """
    return {
        name: module
        for name, module in backbone.named_modules()
        if type(module) in (nn.Linear, Conv1D) and _weight(module).requires_grad
    }


def _weight(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight


def _trained_modules(backbone: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in backbone.named_modules()
        if name and any(parameter.requires_grad for parameter in module.parameters())
    }


def _check_names(
    key: str, wanted: Iterable[str], places: Iterable[Mapping[str, nn.Module]]
) -> None:
    known = [name for place in places for name in place]
    for name in wanted:
        if not matching([name], known):
            ends = {known_name.rpartition(".")[2] for known_name in known}
            near = difflib.get_close_matches(name, sorted(ends | set(known)), n=3, cutoff=0.0)
            raise ConfigError(
                f"{key}: {name!r} is no part of the model that is trained; nearest: "
                f"{', '.join(near) or 'none, there is no such part'}"
            )


def matching(wanted: Iterable[str], names: Iterable[str]) -> list[str]:
    """Names that are one of ``wanted``, or end in one behind a dot."""
    ends = tuple(wanted)
    return [n for n in names if n in ends or any(n.endswith(f".{end}") for end in ends)]


def _origin(backbone: nn.Module) -> str | None:
    """Where the weights came from; ``None``: from a random start."""
    name: str = getattr(backbone, "name_or_path", "")
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name or None


def _ends(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def _shown(targets: Sequence[str] | str | None) -> str:
    if targets is None:
        return "null (those of repeated blocks)"
    return targets if isinstance(targets, str) else str(list(targets))
