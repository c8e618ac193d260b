"""From a run to what it says of itself at its start and its end."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

import vembed_ds
from vembed_ds.checkpointing.names import checkpoint_name
from vembed_ds.checkpointing.saver import Saver
from vembed_ds.config.distillation import teacher_entries
from vembed_ds.config.fields import ScratchModel
from vembed_ds.config.schema import Config, LossConfig
from vembed_ds.data.chunking import ChunkBudget
from vembed_ds.distributed import comm
from vembed_ds.engine.choices import Gather, Reduce
from vembed_ds.engine.memory import rank_bytes
from vembed_ds.planning.parameters import ModelSize
from vembed_ds.planning.states import Setting, states_of
from vembed_ds.tracker_names import tracker_names
from vembed_ds.training.banner import PartFacts, StartFacts, counted
from vembed_ds.training.data_setup import ONLY, data_paths, dataset_entries, validation_entries
from vembed_ds.training.loop import TrainingLoop
from vembed_ds.training.loss_setup import learned_scalars
from vembed_ds.training.memory_setup import is_to_be_chosen, resumed_budget
from vembed_ds.training.placement import placement
from vembed_ds.training.plan import RunPlan
from vembed_ds.training.resuming import Resumption
from vembed_ds.training.summary import EndFacts, best_of

_GATHERED = {
    Gather.ONCE: "once a step",
    Gather.CACHE_PASS: "once, and for every chunk that is replayed",
    Gather.PER_MODULE: "for every module",
}
_REDUCED = {Reduce.ONCE: "once a step", Reduce.PER_CHUNK: "after every chunk"}


def planned_facts(plan: RunPlan, resumption: Resumption | None) -> StartFacts:
    """What :func:`vembed_ds.training.banner.banner` shows of a run before its model is loaded. Collective.

    Args:
        plan: Of the run.
        resumption: What it goes on from.
    """
    config, training = plan.config, plan.config.training
    entries = dataset_entries(config.data)
    unknown = is_to_be_chosen(training, resumption)
    return StartFacts(
        version=vembed_ds.__version__,
        output_dir=config.run.output_dir,
        run_name=config.run.run_name,
        resumed=None if resumption is None else str(resumption.folder),
        step=0 if resumption is None else resumption.step,
        num_steps=plan.intervals.num_steps,
        steps_per_epoch=plan.intervals.steps_per_epoch,
        models=_models(config),
        precision=config.model.precision,
        zero_stage=plan.zero_stage,
        world_size=comm.world_size(),
        machines=len(set(comm.all_gather_objects(platform.node()))),
        device=_device(),
        batch_size=training.batch_size,
        chunks=_chunks(config, None if unknown else resumed_budget(training, resumption)),
        loss=_loss(plan.losses),
        teachers=[entry.name or "" for entry in teacher_entries(config.distillation)],
        data=[
            (_data_name(name, data_paths(entry, key="data_path")), _records(member))
            for (name, entry), member in zip(entries.items(), plan.data.members, strict=True)
        ],
        validation=[
            (
                _data_name(name, data_paths(entry, key="val_data_path")),
                len(plan.data.val[name].dataset),
            )
            for name, entry in validation_entries(config.data).items()
        ],
        schedule=_schedule(config, plan.intervals.num_steps),
        saving=_saving(config),
        evaluating=_evaluating(config, bool(plan.data.val)),
        trackers=tracker_names(config.run.report_to),
    )


def start_facts(
    plan: RunPlan,
    size: ModelSize,
    loop: TrainingLoop,
    resumption: Resumption | None,
    *,
    width: int,
) -> StartFacts:
    """All that it shows. Collective.

    Args:
        plan: Of the run.
        size: Of its model.
        loop: Before its first step.
        resumption: What it goes on from.
        width: Dimensions of an embedding.
    """
    config, engine = plan.config, loop.engine
    setting = placement(
        config,
        size,
        plan.ds_config,
        ranks=comm.world_size(),
        memory=rank_bytes(),
        accelerator=engine.device.type != "cpu",
    )
    states = states_of(size, setting)
    return replace(
        planned_facts(plan, resumption),
        chunks=_chunks(config, loop.budget),
        parts=[PartFacts(part.name, part.trained, part.frozen) for part in size.parts],
        width=width,
        gather=_GATHERED[engine.gather] if plan.zero_stage == 3 else "",
        reduction=_REDUCED[engine.reduce],
        offload=_offload(setting),
        state_bytes=states.parameters + states.optimizer + states.gradients + states.buffers,
    )


def end_facts(plan: RunPlan, loop: TrainingLoop, saver: Saver) -> EndFacts:
    """What :func:`vembed_ds.training.summary.summary` shows. Local."""
    data = validation_entries(plan.config.data)
    paths = data_paths(next(iter(data.values())), key="val_data_path") if data else []
    return EndFacts(
        output_dir=plan.config.run.output_dir,
        step=loop.step,
        record=loop.record,
        best=best_of(saver.best),
        checkpoint=checkpoint_name(loop.step),
        val_data=paths[0] if paths else None,
        trackers=tracker_names(plan.config.run.report_to),
    )


def _models(config: Config) -> str:
    model = config.model
    references = [model.text_model_name, model.image_model_name]
    if not any(references):
        references = [model.model_name]
    named = [
        f"{reference.config['model_type']} from random weights"
        if isinstance(reference, ScratchModel)
        else str(reference)
        for reference in references
        if reference is not None
    ]
    lora = f", LoRA of rank {model.lora_r}" if model.use_lora else ""
    bits = " in 4 bit" if model.load_in_4bit else ""
    return f"{' and '.join(named)}{bits}{lora}"


def _offload(setting: Setting) -> str:
    if not setting.offload_optimizer:
        return ""
    return f"{'parameters and ' if setting.offload_parameters else ''}optimizer on the host"


def _device() -> str:
    accelerator = get_accelerator()
    name = str(accelerator.device_name())
    return str(torch.cuda.get_device_name()) if name == "cuda" else name


def _chunks(config: Config, budget: ChunkBudget | None) -> str:
    """``None``: it is still to be chosen."""
    training = config.training
    if budget is None:
        return "as large as fit, which is tried before the first step"
    if budget.items is None:
        return "none: a rank's batch is embedded at once (use_gradient_cache: false)"
    size = f"as large as {budget.items:,} of the longest items"
    if budget.tokens is None:
        size = f"{budget.items:,} items each"
    elif isinstance(budget.tokens, int):
        size = f"at most {budget.tokens:,} tokens each, or {budget.items:,} images"
    kept = training.gradient_cache_kept_graphs
    graphs = "as many graphs kept as fit" if kept == "auto" else f"{kept} graphs kept"
    recomputing = ", activations computed again" if config.model.gradient_checkpointing else ""
    return f"{size}; {graphs}{recomputing}"


def _loss(losses: Sequence[LossConfig]) -> str:
    return "; ".join(dict.fromkeys(map(_one_loss, losses)))


def _one_loss(loss: LossConfig) -> str:
    told: list[str] = [loss.loss_type]
    scale, _ = learned_scalars(loss)
    if loss.loss_type in ("infonce", "colbert", "in_batch_hard", "hard_negative"):
        learned = " at first, learned" if scale is not None else ""
        told.append(f"temperature {loss.temperature:g}{learned}")
    if loss.loss_bidirectional or len(loss.loss_directions) > 1:
        told.append("several directions")
    if loss.use_mrl:
        told.append(f"Matryoshka {', '.join(map(str, loss.mrl_dims))}")
    return ", ".join(told)


def _schedule(config: Config, num_steps: int) -> str:
    optimizer = config.optimizer
    rates = [f"learning rate {optimizer.lr:g}, {optimizer.scheduler_type}"]
    if optimizer.scheduler_type != "constant":
        warmup = optimizer.warmup_steps or round(optimizer.warmup_ratio * num_steps)
        rates.append(f"warm-up {counted(warmup, 'step')}")
    return ", ".join(rates)


def _saving(config: Config) -> str:
    run = config.run
    every = [f"every {run.save_steps:,} steps"] if run.save_steps else []
    every += [f"every {run.save_epochs} epochs"] if run.save_epochs else []
    every += [f"every {run.save_every_minutes:g} minutes"] if run.save_every_minutes else []
    every += [f"at the best {run.best_metric}"] if run.best_metric else []
    kept = f"; the newest {run.save_total_limit} are kept" if run.save_total_limit else ""
    return f"{', '.join([*every, 'at the end'])}{kept}"


def _evaluating(config: Config, has_data: bool) -> str:
    run = config.run
    if not has_data:
        return "none"
    start = ["at the start"] if run.eval_on_start else []
    every = [f"every {run.eval_steps:,} steps"] if run.eval_steps else []
    return ", ".join([*start, *every, "at the end"])


def _data_name(name: str, paths: Sequence[str]) -> str:
    shown = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    return shown if name == ONLY else f"{name} ({shown})"


def _records(member: Any) -> int | None:
    return len(member) if hasattr(member, "__len__") else None
