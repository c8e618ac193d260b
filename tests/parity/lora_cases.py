"""Adapters twice: the project's, and plain ones written from the formulas. Both start alike."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from tests.parity import cases
from tests.parity.reference import PlainModel
from tests.worlds import set_fp16_support
from vembed_ds.distributed import comm
from vembed_ds.engine.activation import enable_activation_checkpointing
from vembed_ds.models.lora import LoraSpec, add_adapters

RANK, ALPHA = 3, 6.0
IN_BLOCK = re.compile(r".*\.(layers?|h)\.\d+\..*")


class PlainAdapter(nn.Module):
    """A linear layer and what is trained of it: no peft."""

    def __init__(
        self, base: nn.Linear | Conv1D, name: str, *, variant: str, dropout: float
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        out, width = self.weight.shape
        self.scaling = ALPHA / (RANK**0.5 if variant == "rslora" else RANK)
        self.dropout = dropout
        self.lora_A = nn.Parameter(start_value(f"{name}.lora_A", (RANK, width)))
        self.lora_B = nn.Parameter(start_value(f"{name}.lora_B", (out, RANK)))
        if variant == "dora":
            length = self.weight.norm(dim=1) * lengthening(f"{name}.lora_magnitude_vector", out)
            self.lora_magnitude_vector = nn.Parameter(length)

    @property
    def weight(self) -> Tensor:
        """``[out, in]``; a `Conv1D` stores it the other way around."""
        return self.base.weight.T if isinstance(self.base, Conv1D) else self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        dropped = functional.dropout(x, self.dropout, self.training)
        if not hasattr(self, "lora_magnitude_vector"):
            return self.base(x) + self.scaling * (dropped @ self.lora_A.T @ self.lora_B.T)
        direction = self.weight + self.scaling * self.lora_B @ self.lora_A
        length = direction.norm(dim=1).detach()  # section 4.3 of the DoRA paper
        weight = direction * (self.lora_magnitude_vector / length).unsqueeze(1)
        # What the adapter adds is what dropout acts on; without dropout this is `weight @ x`.
        return self.base(x) + functional.linear(dropped, weight - self.weight)


def start_value(name: str, shape: tuple[int, ...]) -> Tensor:
    """Not zero: with B = 0 the gradient of A would be zero whatever the step did."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator) * 0.2


def lengthening(name: str, size: int) -> Tensor:
    return 1 + start_value(name, (size,))


def adapt_plain(model: PlainModel, *, variant: str, dropout: float) -> None:
    """Adapters in every linear layer of the trained parts' blocks; the rest of them frozen."""
    for part in model.parts.values():
        trained = any(parameter.requires_grad for parameter in part.parameters())
        part.requires_grad_(False)
        if trained:
            _adapt_part(model, part, variant=variant, dropout=dropout)


def _adapt_part(model: PlainModel, part: nn.Module, *, variant: str, dropout: float) -> None:
    names = {module: name for name, module in model.named_modules()}
    round_weight = _round_to_4_bit if variant == "qlora" else (lambda weight: weight)
    for module in list(part.modules()):
        name = names[module]
        if isinstance(module, (nn.Linear, Conv1D)) and IN_BLOCK.match(name):
            module.weight.data = round_weight(module.weight.data)
            owner, _, leaf = name.rpartition(".")
            adapter = PlainAdapter(module, name, variant=variant, dropout=dropout)
            setattr(model.get_submodule(owner), leaf, adapter)


def _round_to_4_bit(weight: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    code, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    rounded = dequantize_4bit(code, state)
    assert not torch.equal(rounded, weight)
    return rounded


def make_model(folder: Path, kind: str, *, variant: str, dropout: float) -> Any:
    """The project's model with the project's adapters, at the plain ones' start."""
    model = cases.make_model(folder, kind=kind, temperature=0.1)
    spec = LoraSpec(
        r=RANK,
        alpha=ALPHA,
        dropout=dropout,
        use_dora=variant == "dora",
        use_rslora=variant == "rslora",
        load_in_4bit=variant == "qlora",
    )
    add_adapters(model.trained_backbones(), spec)
    for name, parameter in model.named_parameters():
        plain = plain_name(name)
        if ".lora_magnitude_vector" in plain:
            parameter.data *= lengthening(plain, len(parameter))
        elif ".lora_" in plain:
            parameter.data.copy_(start_value(plain, parameter.shape))
    return model


def plain_name(name: str) -> str:
    return cases.reference_name(name).replace(".default.weight", "")


def train(
    *,
    folder: str,
    kind: str,
    variant: str,
    ds_config: dict[str, Any],
    chunk_size: int | None,
    dropout: float = 0.0,
    checkpointing: bool = False,
    modes: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Three steps, as `cases.train`, with adapters."""
    if ds_config["fp16"]["enabled"]:
        set_fp16_support(True)
    model = make_model(Path(folder), kind, variant=variant, dropout=dropout)
    if checkpointing:
        for backbone in model.trained_backbones():
            enable_activation_checkpointing(backbone, mechanism="huggingface")
    modes = modes or {"zero3_gather": "per_module"}  # ZeRO-3 puts away what DoRA reads
    engine = cases.make_engine(model, ds_config=ds_config, modes=modes)
    torch.manual_seed(comm.rank())
    model.train()
    losses, norms = [], []
    for step in range(3):
        losses.append(cases.train_step(engine, model, kind, step, chunk_size, True, 0.1))
        norms.append(float(engine.step()))
    after = {n.replace(".default.weight", ""): p for n, p in cases.whole_parameters(engine).items()}
    engine.engine.destroy()
    return {"losses": losses, "norms": norms, "after": after}
