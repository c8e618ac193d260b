"""A peft adapter that is merged into its base model's weights while these are read, one by one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vembed_ds.errors import ConfigError, one_line
from vembed_ds.models.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    matching,
    merged_weight,
    saved_by_peft,
    scaling_of,
)

_PREFIX = "base_model.model."
_ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
# What would give some layers an adapter of another kind than merged_weight knows.
_REFUSED = ("rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules", "lora_bias")


class StoredAdapter:
    """The adapter in a peft folder.

    Args:
        folder: ``adapter_config.json`` and ``adapter_model.safetensors``; held in memory.
        backbone: Its base model; the values of its weights do not matter.

    Raises:
        ConfigError: The adapter is missing, does not fit, or is of a kind that is not offered.
    """

    def __init__(self, folder: Path, backbone: nn.Module) -> None:
        self._folder, self._kind = folder, type(backbone).__name__
        self._config = self._read_config()
        self._tensors = self._read_weights()
        self._whole = self._config.get("modules_to_save") or ()
        self._check(backbone)

    def merge(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The base model's weights, merged.

        Args:
            tensors: By their names in the base model, float32.
        """
        for name, tensor in tensors:
            layer = name.removesuffix(".weight")
            a, b, magnitude = (self._tensors.get(f"{layer}{ending}") for ending in _ENDINGS)
            if name in self._tensors:
                yield name, self._tensors[name].to(tensor.dtype)
            elif a is None or b is None or name == layer:
                yield name, tensor
            else:
                yield name, self._merged(tensor, a, b, magnitude)

    def _merged(self, weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None) -> Tensor:
        return merged_weight(
            weight,
            a,
            b,
            magnitude,
            scaling=scaling_of(self._config),
            transposed=self._config.get("fan_in_fan_out", False),
        )

    def _read_config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self._folder / ADAPTER_CONFIG).read_text("utf-8"))
        refused = [key for key in _REFUSED if config.get(key)]
        if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or refused:
            raise self._unfit(
                f"{', '.join(refused) or 'peft_type, bias'}: only plain LoRA is merged"
            )
        return {"use_rslora": False, **config}

    def _read_weights(self) -> dict[str, Tensor]:
        try:
            stored = load_file(self._folder / ADAPTER_WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise self._unfit(one_line(error)) from error
        return {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}

    def _check(self, backbone: nn.Module) -> None:
        """Every adapted layer has its adapter whole, and there is nothing else."""
        endings = _ENDINGS if self._config.get("use_dora") else _ENDINGS[:2]
        linears = [n for n, m in backbone.named_modules() if isinstance(m, nn.Linear | Conv1D)]
        linears = [n for n in linears if not saved_by_peft(f"{n}.weight", self._whole)]
        expected = {f"{layer}{ending}" for layer in self._targets(linears) for ending in endings}
        own = backbone.state_dict()
        expected |= {name for name in own if saved_by_peft(name, self._whole)}
        if differing := expected ^ set(self._tensors):
            raise self._unfit(f"{min(differing)} is on one side only")

    def _targets(self, linears: list[str]) -> list[str]:
        wanted = self._config["target_modules"]
        if isinstance(wanted, str):
            return [name for name in linears if re.fullmatch(wanted, name)]
        return matching(wanted, linears)

    def _unfit(self, problem: str) -> ConfigError:
        return ConfigError(f"{self._folder}: the adapter does not fit {self._kind}: {problem}")
