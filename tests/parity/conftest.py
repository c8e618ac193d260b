"""Model folders and plain references, computed once per setting."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity import data
from tests.parity.reference import PROJECTION, train_plain

OPTIMIZER = {"type": "SGD", "lr": 0.05, "momentum": 0.9}

MODES: dict[str, tuple[int, dict[str, str]]] = {
    "2 per chunk": (2, {"gradient_reduction": "per_chunk"}),
    "3 per module": (3, {"zero3_gather": "per_module"}),
    "3 cache pass": (3, {"zero3_gather": "cache_pass"}),
    **{
        f"3 {gather.replace('_', ' ')}, per chunk": (
            3,
            {"zero3_gather": gather, "gradient_reduction": "per_chunk"},
        )
        for gather in ("once", "cache_pass", "per_module")
    },
}
"""Ways to gather parameters and to reduce gradients beside the default, and their stages."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """By dropout probability: a folder with the three tiny backbones and two heads."""
    made = {dropout: tmp_path_factory.mktemp("models") for dropout in (0.0, 0.2)}
    for dropout, folder in made.items():
        save_models(folder, dropout=dropout)
    return made


def save_models(folder: Path, *, dropout: float) -> None:
    """The three tiny backbones and two heads."""
    for seed, (name, settings) in enumerate(
        {"text": data.TEXT, "image": data.IMAGE, "clip": data.CLIP}.items()
    ):
        data.save_backbone(folder / name, settings, dropout=dropout, seed=seed)
    torch.manual_seed(3)
    heads = {stream: torch.randn(PROJECTION, 16) * 0.3 for stream in ("text", "image")}
    torch.save(heads, folder / "heads.pt")


@pytest.fixture(scope="session")
def reference(folders: dict[float, Path]) -> Callable[..., dict[str, Any]]:
    """``reference(kind, ...)``: three plain steps on the whole batch, cached."""

    @functools.cache
    def compute(
        kind: str,
        dropout: float = 0.0,
        max_grad_norm: float = 0.0,
        dropout_plan: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        return train_plain(
            folders[dropout],
            kind=kind,
            steps=3,
            optimizer=OPTIMIZER,
            max_grad_norm=max_grad_norm,
            bidirectional=True,
            temperature=0.1,
            dropout_plan=dropout_plan,
            dtype=dtype,
        )

    return compute


def ds_config(
    stage: int,
    world_size: int,
    *,
    max_grad_norm: float = 0.0,
    precision: str = "fp32",
    zero: dict[str, Any] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """A resolved DeepSpeed config with the reference's optimizer."""
    params = {key: value for key, value in OPTIMIZER.items() if key != "type"}
    section: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 100_000}
    if stage == 3:
        section["stage3_param_persistence_threshold"] = 0  # partition the smallest too
    return {
        "train_batch_size": data.GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": data.GLOBAL_BATCH // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": section | (zero or {}),
        "optimizer": {"type": "SGD", "params": params},
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "loss_scale": 128.0},
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **extra,
    }


def update_error(reference: dict[str, Any], got: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How far the update is from the reference's.

    Returns:
        ``whole``: ``|u - u_ref| / |u_ref|`` over all tensors together. ``worst``: the largest
        ``|u_t - u_t_ref| / (|u_t_ref| + 0.01 |u_ref|)`` of one tensor, and its name: a wrong
        small tensor (a bias, the temperature), which ``whole`` would hide. The floor keeps out
        tensors whose true gradient is zero (the bias of attention keys): they hold only noise.
    """
    updates = {name: reference["after"][name] - old for name, old in reference["before"].items()}
    total = float(torch.stack([u.norm() for u in updates.values()]).norm())
    assert total > 0, "the reference did not move; the comparison would say nothing"
    squared, worst, worst_name = 0.0, 0.0, ""
    for name, update in updates.items():
        if name not in got:
            assert not update.any(), f"{name} is trained by the reference and not by the project"
            continue
        error = float((got[name].reshape(update.shape) - reference["after"][name]).norm())
        squared += error**2
        relative = error / (float(update.norm()) + 0.01 * total)
        if relative > worst:
            worst, worst_name = relative, name
    return {"whole": squared**0.5 / total, "worst": worst, "name": worst_name}
