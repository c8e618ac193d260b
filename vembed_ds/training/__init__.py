"""Composition: from a validated configuration to a trained model.

The names below are those of vembed-factory's training module, for scripts of one's own, with an
engine in the place of its accelerator; ``docs/vembed_factory.md`` shows them together.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vembed_ds.training.checkpoint import load_checkpoint, save_checkpoint
    from vembed_ds.training.config import get_distributed_config, load_and_parse_config
    from vembed_ds.training.data_utils import (
        concat_batches,
        maybe_first,
        unpack_negative_batch,
        unpack_positive_batch,
        unpack_query_batch,
    )
    from vembed_ds.training.evaluator import Evaluator
    from vembed_ds.training.model_builder import (
        apply_lora,
        build_model,
        build_teacher_model,
        enable_static_graph,
        prepare_engine,
    )
    from vembed_ds.training.optimizer_builder import (
        build_optimizer,
        build_scheduler,
        resolve_tracker,
    )
    from vembed_ds.training.trainer import Trainer

_HOME = {
    "checkpoint": ("load_checkpoint", "save_checkpoint"),
    "config": ("get_distributed_config", "load_and_parse_config"),
    "data_utils": (
        "concat_batches",
        "maybe_first",
        "unpack_negative_batch",
        "unpack_positive_batch",
        "unpack_query_batch",
    ),
    "evaluator": ("Evaluator",),
    "model_builder": (
        "apply_lora",
        "build_model",
        "build_teacher_model",
        "enable_static_graph",
        "prepare_engine",
    ),
    "optimizer_builder": ("build_optimizer", "build_scheduler", "resolve_tracker"),
    "trainer": ("Trainer",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Evaluator",
    "Trainer",
    "apply_lora",
    "build_model",
    "build_optimizer",
    "build_scheduler",
    "build_teacher_model",
    "concat_batches",
    "enable_static_graph",
    "get_distributed_config",
    "load_and_parse_config",
    "load_checkpoint",
    "maybe_first",
    "prepare_engine",
    "resolve_tracker",
    "save_checkpoint",
    "unpack_negative_batch",
    "unpack_positive_batch",
    "unpack_query_batch",
]


def __getattr__(name: str) -> Any:
    """Import a published name, and PyTorch and DeepSpeed with it, only when it is asked for."""
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"vembed_ds.training.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
