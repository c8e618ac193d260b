"""Student, teacher, adapters and engine for a script of one's own."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from vembed_ds.checkpointing.frozen import keep_frozen_weights
from vembed_ds.config.fields import ScratchModel
from vembed_ds.config.schema import Config
from vembed_ds.distributed import comm
from vembed_ds.distributed.seeding import seed_everything
from vembed_ds.engine.activation import enable_activation_checkpointing
from vembed_ds.engine.ds_config import load_ds_config
from vembed_ds.engine.extensions import prepare_extensions
from vembed_ds.engine.initialize import initialize_engine
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.errors import ConfigError
from vembed_ds.inference import find_model
from vembed_ds.models.backbones import BackboneSource
from vembed_ds.models.builder import ModelSpec, build_encoder
from vembed_ds.models.embedding_model import EmbeddingModel
from vembed_ds.models.lora import add_adapters
from vembed_ds.training.config import as_config
from vembed_ds.training.engine_setup import fill_ds_config
from vembed_ds.training.model_setup import (
    lora_spec,
    model_spec,
    refuse_layer_drop,
    refuse_partitioned_4_bit,
    setup_model,
)

logger = logging.getLogger(__name__)

_LETTERS = {"t": {"text"}, "i": {"image"}, "m": {"text", "image"}, "x": {"text", "image"}}


def build_model(config: Config | Mapping[str, Any]) -> EmbeddingModel:
    """The model to train, on the host, without adapters; the same on every rank.

    Args:
        config: A configuration, or a plain mapping.

    Raises:
        ConfigError: It cannot be built, or not trained exactly.
    """
    found = as_config(config)
    seed_everything(found.training.seed)
    mode = found.data.retrieval_mode
    without_adapters = found.model.model_copy(update={"use_lora": False})
    plain = found.model_copy(update={"model": without_adapters})
    # The ZeRO stage is not known yet; `prepare_engine` looks at what depends on it.
    model = setup_model(
        plain, model_spec(found.model), used=_LETTERS[mode[0]] | _LETTERS[mode[-1]], zero_stage=0
    )
    if found.model.gradient_checkpointing:
        for backbone in model.trained_backbones():
            enable_activation_checkpointing(
                backbone,
                mechanism=found.model.activation_checkpointing,
                slice_size=found.model.gradient_checkpointing_slice_size,
            )
    return model


def build_teacher_model(config: Config | Mapping[str, Any]) -> EmbeddingModel | None:
    """The model of ``teacher_model_name``, frozen and in evaluation mode; ``None`` without one.

    Args:
        config: A configuration, or a plain mapping.

    Raises:
        ConfigError: It cannot be loaded.
    """
    reference = config.get("teacher_model_name")
    if not reference:
        return None
    if isinstance(reference, ScratchModel):
        spec = ModelSpec({"": BackboneSource(config=reference.config)})
    else:
        trusted = bool(config.get("teacher_trust_remote_code"))
        spec = find_model(reference, trust_remote_code=trusted).spec
    teacher = EmbeddingModel(build_encoder(spec))
    teacher.requires_grad_(False)
    for backbone in teacher.children():
        teacher.keep_in_eval(backbone)
    return teacher.eval()


def apply_lora(
    model: EmbeddingModel, config: Config | Mapping[str, Any], engine: Any = None
) -> EmbeddingModel:
    """Put adapters into the model where ``use_lora`` says so; before the engine is made.

    Args:
        model: From :func:`build_model`; changed in place.
        config: A configuration, or a plain mapping.
        engine: ``None``: an engine already holds the parameters that it trains.

    Returns:
        The model.

    Raises:
        ConfigError: There is an engine already, or the model has nothing to adapt.
    """
    found = as_config(config)
    if not found.model.use_lora:
        logger.info("use_lora is false: the backbones are trained whole")
        return model
    if engine is not None:
        raise ConfigError(
            "apply_lora: the engine was made before the adapters and would not train them; apply "
            "them first, then call prepare_engine"
        )
    adapters = lora_spec(found.model)
    assert adapters is not None
    add_adapters(model.trained_backbones(), adapters)
    return model


def enable_static_graph(
    model: nn.Module, config: Config | Mapping[str, Any], engine: Any = None
) -> nn.Module:
    """Nothing, and says so: a static graph is a promise to DDP, which is not used here.

    Args:
        model: Returned as it is.
        config: Not read.
        engine: Not used.
    """
    del config, engine
    logger.info("enable_static_graph: nothing to do, DeepSpeed reduces gradients, not DDP")
    return model


def prepare_engine(
    model: EmbeddingModel,
    config: Config | Mapping[str, Any],
    *,
    ds_config: str | Path | Mapping[str, Any],
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
) -> TrainEngine:
    """The engine that takes the accelerator's place. Collective, after ``init_distributed``.

    DeepSpeed makes the optimizer that its file names from ``optimizer``'s groups, and the schedule
    anew on it: these two step, those that were given do not.

    Args:
        model: From :func:`build_model`, the same on every rank.
        config: A configuration, or a plain mapping.
        ds_config: DeepSpeed's file, or its content; ``"auto"`` is filled in from ``config``.
        optimizer: From :func:`build_optimizer`.
        scheduler: From :func:`build_scheduler`; ``None``: a constant rate.

    Raises:
        ConfigError: The settings contradict each other, or cannot be handed to DeepSpeed.
    """
    found = as_config(config)
    is_file = isinstance(ds_config, str | Path)
    raw = load_ds_config(ds_config) if isinstance(ds_config, str | Path) else ds_config
    origin = str(ds_config) if is_file else "ds_config"
    resolved = fill_ds_config(found, raw, origin=origin, origins={})
    zero_stage = resolved["zero_optimization"]["stage"]
    reduction = found.training.gradient_reduction
    refuse_layer_drop(model, zero_stage=zero_stage, gradient_reduction=reduction)
    refuse_partitioned_4_bit(model, zero_stage=zero_stage)
    prepare_extensions(resolved)
    if found.model.precision != "fp32":
        folder = Path(found.run.output_dir)
        comm.run_together(lambda: _keep_frozen(model, folder), doing=f"writing {folder}")
    engine = initialize_engine(
        model,
        ds_config=resolved,
        param_groups=_groups(optimizer),
        schedule=None if scheduler is None else _schedule(scheduler),
        zero3_gather=found.training.zero3_gather,
        gradient_reduction=reduction,
    )
    # Same weights everywhere, but each rank drops out units of its own.
    seed_everything(found.training.seed + 1 + comm.rank())
    return engine


def _keep_frozen(model: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    keep_frozen_weights(model, folder)


def _groups(optimizer: Optimizer) -> Sequence[dict[str, Any]]:
    if type(optimizer) is not AdamW:
        raise ConfigError(
            f"optimizer: {type(optimizer).__name__} cannot be handed to DeepSpeed, which makes its "
            "own; give torch.optim.AdamW, as build_optimizer does"
        )
    kept = ("params", "weight_decay", "betas", "eps")
    return [
        # A schedule has already moved `lr` to that of its first step.
        {**{key: group[key] for key in kept}, "lr": group.get("initial_lr", group["lr"])}
        for group in optimizer.param_groups
    ]


def _schedule(scheduler: LRScheduler) -> Any:
    if not isinstance(scheduler, LambdaLR):
        raise ConfigError(
            f"scheduler: {type(scheduler).__name__} cannot be made anew on DeepSpeed's optimizer; "
            "give a torch LambdaLR, as build_scheduler does"
        )
    return lambda optimizer: LambdaLR(optimizer, scheduler.lr_lambdas)
