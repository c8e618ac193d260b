"""Where DeepSpeed 0.19.8 puts the values of trained parameters, for every ZeRO stage.

What lies in a checkpoint of N ranks:

* ZeRO-0: ``mp_rank_00_model_states.pt`` with whole weights and the optimizer's state, by group and
  number and without names; in 16 bit, its float32 masters too.
* ZeRO-1 and 2: the same file with whole (perhaps 16-bit) weights, and N optimizer shards. Each
  group of parameters is one flat tensor, cut into N equal pieces.
* ZeRO-3: N model and N optimizer shards; every parameter is cut into N equal pieces, and the
  pieces of one rank lie one behind the other in a flat tensor per group.

Weights are the optimizer's float32 masters, :data:`WEIGHT`; Adam also keeps ``exp_avg`` and
``exp_avg_sq`` of the same shape, and the number of steps. All are read by ranges of a flattened
parameter, and only the shards that hold a part of the range are opened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vembed_ds.checkpointing.files import (
    MODEL_FOLDER,
    OPTIMIZER_STATES,
    PARAMETERS_FILE,
    read_parameters,
    shard_file,
)
from vembed_ds.checkpointing.torch_file import Range, TorchFile, read_joined
from vembed_ds.errors import CheckpointError

WEIGHT = "weight"  # kind of value: the float32 master
_COMPARED = 1 << 20  # values at a time, so that there is no second tensor


class Layout(Protocol):
    """The values of the trained parameters of one checkpoint."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Of every trained parameter, by its first name."""

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer's own state, as the near rank saved it."""

    @property
    def loss_scaler(self) -> Mapping[str, Any]:
        """Fields of what scales the loss in fp16; empty at ZeRO-0."""

    def has(self, name: str, kind: str) -> bool:
        """Whether :meth:`read` gives it, and the model states do not."""

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """``[stop - start]`` values of a flattened parameter, on the host, of one kind."""


class Optimizer(NamedTuple):
    """An optimizer's state dict in a file.

    Attributes:
        file: Where it is.
        state: By number, what belongs to a parameter or group.
        groups: Hyperparameters of the groups.
    """

    file: TorchFile
    state: Mapping[int, Mapping[str, Any]]
    groups: Sequence[Mapping[str, Any]]

    @property
    def kinds(self) -> list[str]:
        """What is kept of the shape of a parameter; empty before the first step."""
        with self.file.as_written():
            found = {k for own in self.state.values() for k, v in own.items() if _has_shape(v)}
        return sorted(found)

    @property
    def step(self) -> int:
        """Steps, as the bias correction counts them."""
        with self.file.as_written():
            # One kind of Adam counts in its groups, or in the last parameter of a group only.
            places = [*self.state.values(), *self.groups]
            steps = [place["step"] for place in places if place.get("step") is not None]
            counts = [
                int(self.file.read(step)) if isinstance(step, Tensor) else int(step)
                for step in steps
            ]
        return max(counts, default=0)


class WholeLayout:
    """ZeRO-0.

    Args:
        folder: The checkpoint.
        file: Its model states.
    """

    loss_scaler: Mapping[str, Any] = {}

    def __init__(self, folder: Path, file: TorchFile) -> None:
        self._folder, self._file = folder, file
        self._weights: Mapping[str, Tensor] = file.content["module"]
        saved = file.content["optimizer"]
        # A wrapper of 16-bit weights has the optimizer inside.
        inner = saved.get("optimizer_state_dict", saved)
        self.optimizer = Optimizer(file, inner["state"], inner["param_groups"])
        self._masters: Sequence[Any] | None = saved.get(
            "fp32_groups_flat", saved.get("fp32_groups")
        )
        self._flat = "fp32_groups_flat" in saved
        self._places: dict[str, _Place] | None = None

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """By name; needs the description that training wrote."""
        return {name: self._weights[name].shape for name in self._by_name}

    def has(self, name: str, kind: str) -> bool:
        """As of :class:`Layout`: in float32 the weights are their own masters."""
        return (kind != WEIGHT or self._masters is not None) and name in self._by_name

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """As of :class:`Layout`."""
        if kind != WEIGHT:
            return self._read_flat(name, start, stop, lambda p: self._state(p, kind))
        weight = self._file.read(self._weights[name], start, stop)
        master = self._read_flat(name, start, stop, self._master)
        pairs = zip(torch.split(master, _COMPARED), torch.split(weight, _COMPARED), strict=True)
        if not all(_same(one.to(weight.dtype), other) for one, other in pairs):
            raise self._other(f"{name} differs from its float32 master")
        return master

    def _read_flat(
        self, name: str, start: int, stop: int, find: Callable[[_Place], Tensor]
    ) -> Tensor:
        place = self._by_name[name]
        offset = place.offset if self._flat else 0
        return self._file.read(find(place), offset + start, offset + stop)

    def _master(self, place: _Place) -> Tensor:
        assert self._masters is not None
        group: Tensor | Sequence[Tensor] = self._masters[place.group]
        return group if isinstance(group, Tensor) else group[place.member]

    def _state(self, place: _Place, kind: str) -> Tensor:
        state = self.optimizer.state[place.group if self._flat else place.number]
        tensor: Tensor = state[kind]
        return tensor

    @property
    def _by_name(self) -> dict[str, _Place]:
        """DeepSpeed saves masters and state by group and number only.

        Which parameter is in which group is known from training. That each master rounds to the
        weight of that name, bit for bit, proves the assignment; in float32 the shapes must do.
        """
        if self._places is None:
            self._places = self._assigned()
        return self._places

    def _assigned(self) -> dict[str, _Place]:
        parameters = read_parameters(self._folder)
        numbers = max(
            (entry["group"] for entry in parameters.values() if _trained(entry)), default=-1
        )
        names = [
            [name for name, entry in parameters.items() if entry["group"] == group]
            for group in range(numbers + 1)
        ]
        places, number = {}, 0
        for group, members in enumerate(names):
            sizes = [math.prod(self._weights[name].shape) for name in members]
            starts = accumulate(sizes, initial=0)
            for index, (name, offset) in enumerate(zip(members, starts, strict=False)):
                places[name] = _Place(group, index, number, offset)
                number += 1
            self._check_group(group, members, sum(sizes))
        self._check_state(places)
        return places

    def _check_group(self, group: int, members: Sequence[str], size: int) -> None:
        if self._masters is None:
            return
        found = self._masters[group] if group < len(self._masters) else []
        masters = [found] if isinstance(found, Tensor) else list(found)
        values = sum(master.numel() for master in masters)
        if values != size or (not self._flat and len(masters) != len(members)):
            raise self._other(f"group {group} has {values} values")

    def _check_state(self, places: Mapping[str, _Place]) -> None:
        """The optimizer's numbers mean the parameters that are noted, as far as shapes tell."""
        state = self.optimizer.state
        if self._flat or not state:
            return
        if sorted(state) != list(range(len(places))):
            raise self._other(f"it has the state of {len(state)} parameters, not {len(places)}")
        for name, place in places.items():
            shapes = [v.shape for v in state[place.number].values() if _has_shape(v)]
            if any(shape != self._weights[name].shape for shape in shapes):
                raise self._other(f"the state of {name} has another shape")

    def _other(self, finding: str) -> CheckpointError:
        return CheckpointError(
            f"{self._file.path}: the optimizer's groups are not those noted in "
            f"{MODEL_FOLDER}/{PARAMETERS_FILE} ({finding}); the two files do not belong together"
        )


class FlatLayout:
    """ZeRO-1 and 2: every group of parameters is one flat tensor, of which a rank has a piece.

    Args:
        folder: The checkpoint.
        shapes: Of the trained parameters, by group and name.
        world_size: Number of ranks that wrote it.
        near: The rank whose shard is opened when any will do.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Sequence[Mapping[str, torch.Size]],
        *,
        world_size: int,
        near: int,
    ) -> None:
        self._shards = _Shards(folder, world_size=world_size, check=self._check)
        self._near = near
        self.shapes = {name: shape for group in shapes for name, shape in group.items()}
        self._begins: dict[str, tuple[int, int]] = {}  # group, place in the flat group
        for number, group in enumerate(shapes):
            starts = accumulate((math.prod(shape) for shape in group.values()), initial=0)
            for name, start in zip(group, starts, strict=False):
                self._begins[name] = (number, start)

    @property
    def optimizer(self) -> Optimizer:
        """As of :class:`Layout`."""
        return self._shards[self._near].optimizer("base_optimizer_state")

    @property
    def loss_scaler(self) -> Mapping[str, Any]:
        """As of :class:`Layout`."""
        return self._shards[self._near].loss_scaler

    def has(self, name: str, kind: str) -> bool:
        """As of :class:`Layout`."""
        return name in self.shapes

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """As of :class:`Layout`."""
        group, begin = self._begins[name]
        length = self._shards[self._near].piece_length(group)
        first, last = begin + start, begin + stop
        path = (
            ("single_partition_of_fp32_groups", group)
            if kind == WEIGHT
            else ("base_optimizer_state", "state", group, kind)
        )
        found = []
        for rank in range(first // length, math.ceil(last / length)):
            left, right = max(first - rank * length, 0), min(last - rank * length, length)
            found.append(self._shards[rank].range(path, left, right))
        return read_joined(found)

    def _check(self, rank: int, shard: _Shard) -> None:
        """Its own table of what lies where must say what follows from the shapes."""
        expected: dict[str, tuple[int, int]] = {}
        for name, (group, begin) in self._begins.items():
            length = shard.piece_length(group)
            left = max(begin, rank * length)
            right = min(begin + math.prod(self.shapes[name]), (rank + 1) * length)
            if left < right:
                expected[name] = (left - rank * length, right - left)
        tables = shard.content["param_slice_mappings"]
        found = {n: (p.start, p.numel) for table in tables for n, p in table.items()}
        if found != expected:
            wrong = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
            raise shard.file.damaged(
                f"its table of parameters does not fit the model states (first: {wrong[0]}); the "
                "files do not belong together"
            )


class EqualLayout:
    """ZeRO-3: every parameter is cut into equal pieces, one for each rank.

    Args:
        folder: The checkpoint.
        shapes: Of the trained parameters, by group and name.
        world_size: Number of ranks that wrote it.
        near: The rank whose shard is opened when any will do.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Sequence[Mapping[str, torch.Size]],
        *,
        world_size: int,
        near: int,
    ) -> None:
        self._shards = _Shards(folder, world_size=world_size, check=self._check)
        self._near = near
        self.shapes = {name: shape for group in shapes for name, shape in group.items()}
        self._lengths = {
            name: math.ceil(math.prod(shape) / world_size) for name, shape in self.shapes.items()
        }
        self._begins: dict[str, tuple[int, int]] = {}  # group, place in its flat tensor
        self._totals = []
        for number, group in enumerate(shapes):
            starts = accumulate((self._lengths[name] for name in group), initial=0)
            for name, start in zip([*group, ""], starts, strict=True):
                self._begins[name] = (number, start)
            self._totals.append(self._begins.pop("")[1])

    @property
    def optimizer(self) -> Optimizer:
        """As of :class:`Layout`."""
        return self._shards[self._near].optimizer("optimizer_state_dict")

    @property
    def loss_scaler(self) -> Mapping[str, Any]:
        """As of :class:`Layout`."""
        return self._shards[self._near].loss_scaler

    def has(self, name: str, kind: str) -> bool:
        """As of :class:`Layout`."""
        return name in self.shapes

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """As of :class:`Layout`."""
        (group, begin), length = self._begins[name], self._lengths[name]
        path = (
            ("fp32_flat_groups", group)
            if kind == WEIGHT
            else ("optimizer_state_dict", "state", group, kind)
        )
        found = []
        for rank in range(start // length, math.ceil(stop / length)):
            left, right = max(start - rank * length, 0), min(stop - rank * length, length)
            found.append(self._shards[rank].range(path, begin + left, begin + right))
        return read_joined(found)

    def _check(self, rank: int, shard: _Shard) -> None:
        found = [flat.numel() for flat in shard.content["fp32_flat_groups"]]
        if found != self._totals:
            raise shard.file.damaged(
                f"its groups have {found} values, where the model states say {self._totals}; the "
                "files do not belong together, or the optimizer was offloaded to NVMe, which keeps "
                "them elsewhere"
            )


class _Place(NamedTuple):
    """Of a parameter in the optimizer of ZeRO-0.

    Attributes:
        group: Number of its group.
        member: Its place among the group's parameters.
        number: Its place among all.
        offset: Values before it in its group.
    """

    group: int
    member: int
    number: int
    offset: int


class _Shard(NamedTuple):
    file: TorchFile
    content: Mapping[str, Any]

    def optimizer(self, key: str) -> Optimizer:
        with self.file.as_written():
            found = self.content[key]
            return Optimizer(self.file, found["state"], found["param_groups"])

    @property
    def loss_scaler(self) -> Mapping[str, Any]:
        with self.file.as_written():
            return dict(vars(self.content["loss_scaler"]))

    def piece_length(self, group: int) -> int:
        """Values of a group that one rank has, the padding at the end of the group included."""
        with self.file.as_written():
            own: Tensor = self.content["single_partition_of_fp32_groups"][group]
            return own.numel() + int(self.content["group_paddings"][group])

    def range(self, path: Sequence[Any], start: int, stop: int) -> Range:
        """Of the tensor that the keys of ``path`` lead to."""
        with self.file.as_written():
            found: Any = self.content
            for key in path:
                found = found[key]
            return Range(self.file, found, start, stop)


class _Shards:
    """The optimizer shards of a checkpoint, each opened when it is first needed."""

    def __init__(
        self, folder: Path, *, world_size: int, check: Callable[[int, _Shard], None]
    ) -> None:
        self._folder, self._world_size, self._check = folder, world_size, check
        self._open: dict[int, _Shard] = {}

    def __getitem__(self, rank: int) -> _Shard:
        if rank not in self._open:
            file = TorchFile(shard_file(self._folder, OPTIMIZER_STATES, rank, self._world_size))
            with file.as_written():
                shard = _Shard(file, file.content["optimizer_state_dict"])
                self._check(rank, shard)
            self._open[rank] = shard
        return self._open[rank]


def _has_shape(value: Any) -> bool:
    """Whether it is of the shape of a parameter, and no count."""
    return isinstance(value, Tensor) and value.dim() > 0


def _trained(entry: Mapping[str, Any]) -> bool:
    return entry["group"] is not None


def _same(one: Tensor, other: Tensor) -> bool:
    """NaN, of a training that diverged, is the same as NaN."""
    return torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
