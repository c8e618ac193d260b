"""vembed-factory's snippets, as a script of one's own on two ranks writes them here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor
from transformers import AutoTokenizer

from vembed_ds.distributed import comm
from vembed_ds.engine.train_engine import TrainEngine
from vembed_ds.errors import VembedError
from vembed_ds.losses import build_loss
from vembed_ds.training import (
    Evaluator,
    Trainer,
    apply_lora,
    build_model,
    build_optimizer,
    build_scheduler,
    build_teacher_model,
    enable_static_graph,
    get_distributed_config,
    load_and_parse_config,
    load_checkpoint,
    prepare_engine,
    resolve_tracker,
    save_checkpoint,
)

PAIRS, STEPS = 4, 3  # pairs per rank; steps of an epoch
EDGE = 16


def global_batch(step: int, *, pairs: int) -> dict[str, Tensor]:
    """Captions of several lengths, padded as a tokenizer pads them, and pixels.

    On every rank the second caption is the first once more.
    """
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(3, 9, (pairs,), generator=generator)
    lengths[1::PAIRS] = lengths[::PAIRS]
    longest = int(lengths.max()) + 1  # a column that is padding in every row
    ids = torch.randint(1000, 20000, (pairs, longest), generator=generator)
    ids[1::PAIRS] = ids[::PAIRS]
    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids[torch.arange(pairs), lengths - 1] = 102  # the tiny CLIP pools at it
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "pos_pixel_values": torch.randn(pairs, 3, EDGE, EDGE, generator=generator),
    }


class Loader:
    """This rank's share of every global batch."""

    def __init__(self, *, first: int = 0, steps: int = STEPS) -> None:
        self.first, self.steps = first, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        mine = slice(comm.rank() * PAIRS, (comm.rank() + 1) * PAIRS)
        for step in range(self.first, self.first + self.steps):
            batch = global_batch(step, pairs=PAIRS * comm.world_size())
            yield {name: tensor[mine] for name, tensor in batch.items()}


class CustomTrainer(Trainer):
    """Counts, and changes what it learns from."""

    calls = 0

    def _step_standard(self, batch: Any) -> Tensor:
        self.calls += 1
        return super()._step_standard({**batch, "pos_pixel_values": -batch["pos_pixel_values"]})


def train(*, config: str, ds_config: str, custom: bool = False) -> dict[str, Any]:
    """The quick start's snippet, whole; weights before and after, and what it logged."""
    sys.argv = ["script.py", "--config", config, "--config_override", "epochs=1", "--mine", "3"]
    config = load_and_parse_config()
    use_grad_ckpt, use_grad_cache, find_unused = get_distributed_config(config)
    model = build_model(config)
    teacher = build_teacher_model(config)
    model = apply_lora(model, config)
    optimizer = build_optimizer(model, config)
    loader = Loader()
    scheduler, warmup_steps = build_scheduler(
        optimizer, config, num_epochs=config["epochs"], steps_per_epoch=len(loader)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = prepare_engine(
        model, config, ds_config=ds_config, optimizer=optimizer, scheduler=scheduler
    )
    model = enable_static_graph(model, config, engine)
    criterion = build_loss("infonce", temperature=config["temperature"], loss_bidirectional=False)
    log_with, _ = resolve_tracker(report_to=config["report_to"])
    evaluator = Evaluator(
        model, criterion=criterion, engine=engine, retrieval_mode="t2i", log_with=log_with
    )
    first_loss = evaluator.evaluate(Loader(first=50), global_step=0)
    trainer = (CustomTrainer if custom else Trainer)(
        model=model,
        optimizer=optimizer,
        dataloader=loader,
        criterion=criterion,
        engine=engine,
        config=config,
        scheduler=scheduler,
        teacher_model=teacher,
        evaluator=evaluator,
        val_dataloader=Loader(first=50),
    )
    trainer.train()
    after = whole_parameters(engine)
    metrics = Path(config["output_dir"]) / "metrics.jsonl"
    comm.barrier()
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    engine.engine.destroy()
    return {
        "distributed": (use_grad_ckpt, use_grad_cache, find_unused),
        "warmup_steps": warmup_steps,
        "taught": teacher is not None,
        "first_loss": first_loss,
        "calls": getattr(trainer, "calls", None),
        "merged": sorted(trainer.merged),
        "before": before,
        "after": after,
        "metrics": lines,
    }


def whole_parameters(engine: TrainEngine) -> dict[str, Tensor]:
    """Every parameter, whole, float32."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and engine.zero_stage:
            found[name] = safe_get_full_fp32_param(parameter).detach().clone()
        elif parameter.requires_grad:
            found[name] = parameter.detach().clone()
    return found


def save(*, config: str, ds_config: str, folder: str, out: str) -> str | None:
    """Save untrained, with the folder's tokenizer, twice to the same place."""
    values = load_and_parse_config(["--config", config])
    model = build_model(values)
    engine = prepare_engine(
        model, values, ds_config=ds_config, optimizer=build_optimizer(model, values)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    save_checkpoint(out, model, engine, processor=tokenizer, config=values)
    try:
        save_checkpoint(out, model, engine)
    except VembedError as error:
        return str(error)
    finally:
        engine.engine.destroy()
    return None


def uneven(*, config: str, ds_config: str) -> str | None:
    """Evaluate on more batches on rank 0 than on rank 1."""
    values = load_and_parse_config(["--config", config])
    model = build_model(values)
    engine = prepare_engine(
        model, values, ds_config=ds_config, optimizer=build_optimizer(model, values)
    )
    criterion = build_loss("infonce", temperature=0.05, loss_bidirectional=False)
    evaluator = Evaluator(model, criterion=criterion, engine=engine)
    try:
        evaluator.evaluate(Loader(steps=2 - comm.rank()))
    except VembedError as error:
        return str(error)
    finally:
        engine.engine.destroy()
    return None


def resume(*, config: str, ds_config: str, out: str) -> dict[str, Any]:
    """Four steps; and, from what was saved after two, the last two again on a fresh engine."""

    def start() -> tuple[Trainer, TrainEngine]:
        values = load_and_parse_config(["--config", config])
        model = build_model(values)
        optimizer = build_optimizer(model, values)
        scheduler, _ = build_scheduler(optimizer, values, num_epochs=1, steps_per_epoch=4)
        engine = prepare_engine(
            model, values, ds_config=ds_config, optimizer=optimizer, scheduler=scheduler
        )
        criterion = build_loss("infonce", temperature=0.1)
        trainer = Trainer(
            model=model,
            optimizer=optimizer,
            dataloader=Loader(steps=4),
            criterion=criterion,
            engine=engine,
            config=values,
            scheduler=scheduler,
        )
        model.train()
        return trainer, engine

    def steps(trainer: Trainer, engine: TrainEngine, first: int) -> None:
        for batch in Loader(first=first, steps=2):
            trainer.compute_gradient(trainer._itemized(batch))
            engine.step()

    trainer, engine = start()
    steps(trainer, engine, 0)
    save_checkpoint(out, trainer.model, engine, config=trainer.config)
    halfway = whole_parameters(engine)
    steps(trainer, engine, 2)
    uninterrupted = whole_parameters(engine)
    engine.engine.destroy()
    trainer, engine = start()
    done = load_checkpoint(out, engine)
    loaded = whole_parameters(engine)
    steps(trainer, engine, 2)
    resumed = whole_parameters(engine)
    engine.engine.destroy()
    return {
        "done": done,
        "halfway": halfway,
        "loaded": loaded,
        "uninterrupted": uninterrupted,
        "resumed": resumed,
    }


def load_what_one_rank_does_not_see(*, folder: str) -> str:
    """The error of this rank, where only rank 0 has a checkpoint."""
    place = Path(folder) / str(comm.rank())
    if comm.is_main():
        (place / "training_state").mkdir(parents=True)
        (place / "training_state" / "latest").write_text("checkpoint-step-2")
    try:
        load_checkpoint(place, cast(TrainEngine, None))
    except VembedError as error:
        return str(error)
    return ""
