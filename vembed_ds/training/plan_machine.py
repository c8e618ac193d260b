"""From the configuration and a machine to a plan: what every way to run takes, and which to take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from vembed_ds.config.distillation import teacher_entries
from vembed_ds.config.schema import Config
from vembed_ds.data.chunking import AUTO
from vembed_ds.engine.ds_config import HPZ, load_ds_config
from vembed_ds.engine.traffic_model import (
    predict_embedding_bytes,
    predict_step_bytes,
    reused_share,
)
from vembed_ds.errors import ConfigError
from vembed_ds.planning.memory import Peak
from vembed_ds.planning.recommend import (
    GIB,
    Outcome,
    Way,
    largest_chunk,
    recommend,
    settings_of,
)
from vembed_ds.planning.report import Line, Plan
from vembed_ds.planning.states import Setting, states_of
from vembed_ds.training.compiling import refuse_compiling
from vembed_ds.training.data_setup import dataset_entries
from vembed_ds.training.engine_setup import chunk_budget, fill_ds_config_for
from vembed_ds.training.loss_setup import loss_configs
from vembed_ds.training.model_setup import model_spec
from vembed_ds.training.placement import placement
from vembed_ds.training.step_costs import StepCosts
from vembed_ds.training.step_items import StepItems, imagined_items, sample_items

RESERVE_GIB = {"cuda": 2.0, "cpu": 0.5}
"""Of a rank, for what is not counted; assumed, not measured."""
OUR_FILES = {"zero_optimization": {"reduce_bucket_size": 50_000_000}}
"""What the files in ``ds_configs`` have in common."""
_NOT_COUNTED = {
    "cuda": ("CUDA context", "NCCL buffers", "workspaces of kernels", "fragmentation"),
    "cpu": ("Python and its libraries", "what the allocator keeps"),
}


@dataclass(frozen=True)
class Machine:
    """Where a run is to go.

    Attributes:
        gpus: Accelerators of one machine, a rank each.
        nodes: Machines.
        memory_gib: Of an accelerator.
        device: ``cuda`` or ``cpu``.
    """

    gpus: int
    nodes: int
    memory_gib: float
    device: str = "cuda"

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.gpus * self.nodes

    @property
    def reserve(self) -> int:
        """Bytes of a rank's memory that are set aside."""
        return int(GIB * RESERVE_GIB[self.device])

    @property
    def usable(self) -> int:
        """Bytes of a rank's memory for what is counted."""
        return int(GIB * self.memory_gib) - self.reserve


def plan_on(
    config: Config,
    machine: Machine,
    *,
    title: str,
    ds_config: Path | None = None,
    origins: Mapping[str, str] | None = None,
    tokens: int | None = None,
) -> Plan:
    """What every way to run takes on a machine.

    Args:
        config: Of the run.
        machine: Where it is to go.
        title: Of the run, for people.
        ds_config: DeepSpeed's JSON file, whose way comes first.
        origins: Where the values of ``config`` came from, for messages.
        tokens: Of every text, where no data is read; ``None``: a sample of it is.

    Raises:
        VembedError: The configuration, the data or the model cannot be used.
    """
    if machine.usable <= 0:
        raise ConfigError(
            f"--gpu_memory {machine.memory_gib:g}: {RESERVE_GIB[machine.device]:g} GiB of it are set aside for "
            "what is not counted, so nothing is left; give more"
        )
    if problems := [*_not_compared(config)]:
        raise ConfigError(problems)
    configured = None
    if ds_config is not None:  # what is wrong with it is said before anything is built
        configured = _resolved(config, machine, ds_config, origins or {})
    losses = loss_configs(config.loss, dataset_entries(config.data))
    spec = model_spec(config.model, layers=losses[0].mrl_layers or ())
    if tokens is None:
        items = sample_items(config, spec)
    else:
        items = imagined_items(config, spec, tokens=tokens)
    costs = StepCosts(config, spec, losses, items, fused=machine.device != "cpu")
    return _Planner(config, machine, costs, items).plan(title, configured)


class _Planner:
    def __init__(
        self, config: Config, machine: Machine, costs: StepCosts, items: StepItems
    ) -> None:
        self._config, self._machine, self._costs, self._items = config, machine, costs, items
        self._largest = costs.largest
        self.outcome = cache(self._outcome)

    def plan(self, title: str, configured: Mapping[str, Any] | None) -> Plan:
        machine, config = self._machine, self._config
        base = self._placed(configured or OUR_FILES)
        settings = settings_of(
            self._placed(OUR_FILES),  # what is recommended names one of these
            partitions=not (config.model.load_in_4bit or config.training.use_torch_compile),
        )
        told = settings
        if configured is not None:
            told = [base, *(setting for setting in settings if setting != base)]
        recomputes = self._recomputes()
        advice = recommend(
            settings,
            largest=self._largest,
            memory=machine.usable,
            take=self.outcome,
            checkpointing=recomputes,
        )
        first = Way(base, self._chunk_size(base), config.model.gradient_checkpointing)
        return Plan(
            title=f"{title} on {machine.nodes} x {machine.gpus} {machine.device} of "
            f"{machine.memory_gib:g} GiB",
            size=self._costs.size,
            precision=config.model.precision,
            width=self._costs.width,
            batch_size=config.training.batch_size,
            items=self._costs.items,
            origin=self._origin(),
            memory=machine.usable,
            reserve=machine.reserve,
            lines=[self._line(replace(first, setting=s), recomputes) for s in told],
            configured=configured is not None,
            advice=advice,
            left_out=[*_NOT_COUNTED[machine.device], *_left_out(config)],
        )

    def _origin(self) -> str:
        """Where the items are from, and whether there are enough of them to train."""
        records = self._items.records
        batch = self._config.training.batch_size * self._machine.ranks
        if records is None or records >= batch:
            return self._items.origin
        return (
            f"{self._items.origin}; {records} do not fill one global batch of {batch} (batch_size x ranks), "
            "so that a run would refuse them"
        )

    def _placed(self, ds_config: Mapping[str, Any]) -> Setting:
        machine = self._machine
        return placement(
            self._config,
            self._costs.size,
            ds_config,
            ranks=machine.ranks,
            memory=int(GIB * machine.memory_gib),
            accelerator=machine.device != "cpu",
        )

    def _chunk_size(self, setting: Setting) -> int:
        """As configured; where that is ``auto``, what a run would choose."""
        training = self._config.training
        if not training.use_gradient_cache or training.gradient_cache_chunk_size != AUTO:
            return min(chunk_budget(training).items or self._largest, self._largest)
        found = self._largest_chunk(setting, self._config.model.gradient_checkpointing)
        return found.chunk_size if found else 1

    def _largest_chunk(self, setting: Setting, checkpointing: bool) -> Way | None:
        return largest_chunk(
            setting,
            checkpointing,
            largest=self._largest,
            memory=self._machine.usable,
            take=self.outcome,
        )

    def _recomputes(self) -> bool:
        """Whether activations can be computed again."""
        if self._config.training.use_torch_compile:  # it is refused
            return False
        try:
            self._costs.chunk(1, checkpointing=True)
        except ConfigError:
            if self._config.model.gradient_checkpointing:
                raise
            return False
        return True

    def _line(self, way: Way, recomputes: bool) -> Line:
        outcome = self.outcome(way)
        plain = self._largest_chunk(way.setting, False)
        again = self._largest_chunk(way.setting, True) if recomputes else None
        return Line(
            way=way,
            peak=self._peak(way),
            host=states_of(self._costs.size, way.setting).host,
            sent=outcome.sent,
            fits=outcome.memory <= self._machine.usable,
            largest=plain.chunk_size if plain else None,
            largest_recomputing=again.chunk_size if again else None,
        )

    def _outcome(self, way: Way) -> Outcome:
        return Outcome(memory=self._peak(way).total, sent=self._sent(way))

    def _peak(self, way: Way) -> Peak:
        return self._costs.peak(
            way.setting, chunk_size=way.chunk_size, checkpointing=way.checkpointing
        )

    def _sent(self, way: Way) -> int:
        size, setting = self._costs.size, way.setting
        small = size.kept_whole(setting.persistence)
        step = predict_step_bytes(
            world_size=setting.ranks,
            zero_stage=setting.zero_stage,
            parameters=size.used(setting.persistence) + small,
            trained=size.trained,
            element_size=setting.width,
            num_chunks=self._costs.num_chunks(way.chunk_size),
            kept_chunks=self._costs.kept_graphs(way.chunk_size),
            zero3_gather=setting.gather,
            gradient_reduction=setting.reduction,
            persistent=small,
            reused=reused_share(size.total, setting.reuse_distance),
        )
        embeddings = predict_embedding_bytes(
            world_size=setting.ranks, rows=setting.ranks, width=self._costs.gathered_values
        )
        return round(step.total + embeddings)


def _resolved(
    config: Config, machine: Machine, path: Path, origins: Mapping[str, str]
) -> dict[str, Any]:
    resolved = fill_ds_config_for(
        config,
        load_ds_config(path),
        origin=str(path),
        origins=origins,
        world_size=machine.ranks,
        device_type=machine.device,
        fp16_supported=machine.device != "cpu",
        bf16_supported=True,
    )
    copies = resolved["zero_optimization"].get(HPZ, 1)
    if copies != 1:
        raise ConfigError(
            f"zero_optimization.{HPZ}={copies} ({path}): what a machine's copy takes was not compared with "
            "memory; plan without it"
        )
    refuse_compiling(config, resolved)
    if config.model.load_in_4bit and resolved["zero_optimization"]["stage"] == 3:
        raise ConfigError(
            f"load_in_4bit=true: ZeRO stage 3 ({path}) cannot partition 4-bit weights; use stage 0, 1 or 2"
        )
    return resolved


def _not_compared(config: Config) -> Iterator[str]:
    """Settings of which nobody knows whether a plan is right."""
    training = config.training
    slice_size, tokens = (
        config.model.gradient_checkpointing_slice_size,
        training.gradient_cache_chunk_tokens,
    )
    if slice_size is not None:
        yield (
            f"gradient_checkpointing_slice_size={slice_size}: what layers in slices hold was not compared "
            "with memory; plan with null"
        )
    if training.use_gradient_cache and isinstance(tokens, int):
        yield (
            f"gradient_cache_chunk_tokens={tokens}: chunks of so many tokens were not compared with memory; "
            "plan with auto"
        )


def _left_out(config: Config) -> list[str]:
    entries = teacher_entries(config.distillation)
    found = [  # of a cached one only vectors are left when training begins
        f"model and passes of teacher {entry.name}"
        for entry in entries
        if not entry.scores and entry.mode != "cached"
    ]
    if entries:
        found.append("what the loss compares with teachers")
    losses = loss_configs(config.loss, dataset_entries(config.data))
    if any(own.guide_model_name is not None for own in losses):
        found.append("vectors of the guide")
    if config.model.load_in_4bit:
        found.append("a layer's weights in full while it computes")
    if config.training.use_torch_compile:
        found.append("what compiled layers take more or less")
    return found
