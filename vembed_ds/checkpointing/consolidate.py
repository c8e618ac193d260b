"""DeepSpeed shards to one float32 state dict, for every ZeRO stage and precision.

What DeepSpeed 0.19.8 leaves in a checkpoint folder for N ranks:

* ZeRO-0: ``mp_rank_00_model_states.pt`` with whole weights. In 16 bit the float32 masters are in
  its ``optimizer`` entry, by optimizer group and without names.
* ZeRO-1/2: the same file with whole (perhaps 16-bit) weights, and N optimizer shards, each with
  a flat piece of every group's masters and a table of which parameter lies where.
* ZeRO-3: N model and N optimizer shards; every parameter is cut into N equal pieces.

The files are pickles. They are read by PyTorch's restricted loader, so that a checkpoint from
elsewhere cannot run code; that also means that DeepSpeed itself is not needed here.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vembed_ds.checkpointing.frozen import FROZEN_FILE, read_frozen_weights
from vembed_ds.errors import CheckpointError

MODEL_FOLDER = "model"
PARAMETERS_FILE = "parameters.json"
_WHOLE = "mp_rank_00_model_states.pt"


class _Plain:
    """Stands in for DeepSpeed's classes; holds their fields and none of their code."""

    def __getattr__(self, name: str) -> Any:  # only for mypy: fields are set by the unpickler
        raise AttributeError(name)


def _member(kind: Any, name: str) -> str:
    """Stands in for the ``getattr`` by which some releases (Python 3.11.2) pickle an enum's member.

    The name itself: nothing is looked up, so that no file can reach anything by it.
    """
    return name


_ALLOWED: list[Any] = [
    (_member, "builtins.getattr"),
    (_member, "__builtin__.getattr"),  # as protocol 2 spells it
    (_Plain, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Plain, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Plain, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint folder that ``path`` is, or that its ``latest`` file names.

    Args:
        path: ``<output_dir>/checkpoint-step-<N>``, or ``<output_dir>``.

    Raises:
        CheckpointError: No such folder, or nothing in it that DeepSpeed wrote.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder; check the path")
    folder = _latest(path) if (path / "latest").is_file() else path
    if not any(folder.glob("*_model_states.pt")):
        raise CheckpointError(
            f"{folder}: no DeepSpeed checkpoint (*_model_states.pt) and no file `latest`; give a "
            "checkpoint-step-N folder or the output_dir that holds them"
        )
    return folder


def load_consolidated(checkpoint: Path) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of the trained model, whole.

    Trained parameters are the optimizer's float32 masters, frozen ones what they were before the
    run cast them. Buffers exist only in the precision of the run, and are widened.

    Args:
        checkpoint: As in :func:`resolve_checkpoint`.

    Returns:
        By name in the trained module: tensors on the CPU, float32 where floating. Names of one
        shared parameter give one and the same tensor.

    Raises:
        CheckpointError: Missing, incomplete or damaged files; names the file.
    """
    checkpoint = resolve_checkpoint(checkpoint)
    state = _load_shards(checkpoint)
    frozen = read_frozen_weights(checkpoint / MODEL_FOLDER)
    if missing := sorted(frozen.keys() - state.keys()):
        raise CheckpointError(
            f"{checkpoint}: {missing[0]} of {FROZEN_FILE} is not in the shards; the files do not "
            "belong together"
        )
    # By tensor, because several names may share one.
    original = {id(state[name]): tensor for name, tensor in frozen.items()}
    return {name: original.get(id(tensor), tensor) for name, tensor in state.items()}


def _load_shards(checkpoint: Path) -> dict[str, Tensor]:
    if not (checkpoint / _WHOLE).is_file():
        return _load_stage_3(checkpoint)
    saved = _read(checkpoint / _WHOLE)
    if saved.get("optimizer") is not None:
        return _load_stage_0(checkpoint, saved)
    return _load_stages_1_and_2(checkpoint, saved)


def check_files(checkpoint: Path, *, zero_stage: int, world_size: int) -> None:
    """See that every file is there that ``world_size`` ranks write at ``zero_stage``.

    Raises:
        CheckpointError: A file is missing; names it.
    """
    if zero_stage < 3:
        _existing(checkpoint / _WHOLE)
    else:
        _shard_files(checkpoint, world_size, prefix="", suffix=_WHOLE)
    if zero_stage > 0:
        _optimizer_files(checkpoint, world_size)


def read_parameters(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """What ``describe_model`` noted about every parameter and persistent buffer.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    path = checkpoint / MODEL_FOLDER / PARAMETERS_FILE
    try:
        parameters: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    return parameters


def _latest(path: Path) -> Path:
    name = (path / "latest").read_text(encoding="utf-8").strip()
    folder = path / name
    if not name or Path(name).name != name or not folder.is_dir():
        raise CheckpointError(
            f"{path / 'latest'}: names {name!r}, which is no folder beside it; give a "
            "checkpoint-step-N folder instead"
        )
    return folder


def _load_stage_0(checkpoint: Path, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    weights, optimizer = saved["module"], saved["optimizer"]
    state = _widened(weights)
    if "fp32_groups_flat" in optimizer:
        state |= _unnamed_masters(checkpoint, weights, optimizer["fp32_groups_flat"])
    elif "fp32_groups" in optimizer:
        flat = [torch.cat([t.reshape(-1) for t in group]) for group in optimizer["fp32_groups"]]
        state |= _unnamed_masters(checkpoint, weights, flat)
    return _with_shared(state, _shared_storages(weights))


def _unnamed_masters(
    checkpoint: Path, weights: Mapping[str, Tensor], groups: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Names for masters that DeepSpeed saved by group and position only.

    Which parameter is in which group is known from training; that each master rounds to the
    weight of that name, bit for bit, proves the assignment.
    """
    parameters = read_parameters(checkpoint)
    masters = {}
    for index, flat in enumerate(groups):
        names = [name for name, entry in parameters.items() if entry["group"] == index]
        shapes = [weights[name].shape for name in names]
        if sum(map(math.prod, shapes)) != flat.numel():
            raise _wrong_groups(checkpoint, f"group {index} has {flat.numel()} values")
        pieces = torch.split(flat, [math.prod(shape) for shape in shapes])
        for name, shape, piece in zip(names, shapes, pieces, strict=True):
            master = piece.view(shape)
            if not torch.equal(master.to(weights[name].dtype), weights[name]):
                raise _wrong_groups(checkpoint, f"{name} differs from its float32 master")
            masters[name] = master
    return masters


def _wrong_groups(checkpoint: Path, finding: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint / _WHOLE}: the optimizer's groups are not those noted in "
        f"{MODEL_FOLDER}/{PARAMETERS_FILE} ({finding}); the two files do not belong together"
    )


def _load_stages_1_and_2(checkpoint: Path, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    weights = saved["module"]
    pieces: dict[str, list[Tensor]] = {}
    for shard in _optimizer_shards(checkpoint, saved["dp_world_size"]):
        groups = shard["single_partition_of_fp32_groups"]
        for places, flat in zip(shard["param_slice_mappings"], groups, strict=True):
            for name, place in places.items():
                pieces.setdefault(name, []).append(flat.narrow(0, place.start, place.numel))
    trained = [name for group in saved["param_shapes"] for name in group]
    masters = {
        name: _joined(checkpoint, name, pieces.get(name, []), weights[name].shape)
        for name in trained
    }
    return _with_shared(_widened(weights) | masters, saved["shared_params"])


def _load_stage_3(checkpoint: Path) -> dict[str, Tensor]:
    first = _read(_existing(checkpoint / f"zero_pp_rank_0_{_WHOLE}"))
    world_size = first["dp_world_size"]
    state = _widened({name: first["module"][name] for name in first["buffer_names"]})
    frozen: dict[str, torch.Size] = first["frozen_param_shapes"]
    files = _shard_files(checkpoint, world_size, prefix="", suffix=_WHOLE)
    fragments = [_read(file)["frozen_param_fragments"] for file in files]
    for name, shape in frozen.items():
        pieces = [fragment[name].reshape(-1) for fragment in fragments]
        state[name] = _joined(checkpoint, name, pieces, shape).float()
    # The pieces of one rank lie one behind the other, over all groups.
    ranks = [
        torch.cat([flat.reshape(-1) for flat in shard["fp32_flat_groups"]])
        for shard in _optimizer_shards(checkpoint, world_size)
    ]
    start = 0
    for name, shape in ((n, s) for group in first["param_shapes"] for n, s in group.items()):
        length = math.ceil(math.prod(shape) / world_size)
        pieces = [flat[start : start + length] for flat in ranks]
        state[name] = _joined(checkpoint, name, pieces, shape)
        start += length
    return _with_shared(state, first["shared_params"])


def _joined(checkpoint: Path, name: str, pieces: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """The ranks' pieces one behind the other, without the padding at the end."""
    size = math.prod(shape)
    found = sum(piece.numel() for piece in pieces)
    if found < size:
        raise CheckpointError(
            f"{checkpoint}: {name} has {found} of its {size} values in the optimizer shards; "
            "the checkpoint is incomplete (an optimizer offloaded to NVMe keeps them elsewhere)"
        )
    return torch.cat(list(pieces))[:size].reshape(tuple(shape))


def _optimizer_shards(checkpoint: Path, world_size: int) -> Iterator[dict[str, Any]]:
    for file in _optimizer_files(checkpoint, world_size):
        yield _read(file)["optimizer_state_dict"]


def _optimizer_files(checkpoint: Path, world_size: int) -> list[Path]:
    prefix = "bf16_" if any(checkpoint.glob("bf16_zero_pp_rank_*")) else ""
    suffix = "mp_rank_00_optim_states.pt"
    return _shard_files(checkpoint, world_size, prefix=prefix, suffix=suffix)


def _shard_files(checkpoint: Path, world_size: int, *, prefix: str, suffix: str) -> list[Path]:
    names = [f"{prefix}zero_pp_rank_{rank}_{suffix}" for rank in range(world_size)]
    missing = [name for name in names if not (checkpoint / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{checkpoint / missing[0]}: missing; {world_size} ranks wrote this checkpoint and "
            f"{world_size - len(missing)} of their {world_size} files *_{suffix} are here. Copy "
            "the folder from every node, or take an earlier checkpoint"
        )
    return [checkpoint / name for name in names]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete")
    return path


def _read(path: Path) -> dict[str, Any]:
    """A DeepSpeed file, memory-mapped, by the loader that runs no code."""
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            content: dict[str, Any] = torch.load(
                path, map_location="cpu", mmap=True, weights_only=True
            )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds objects that are not loaded, because they could run code, or is "
            f"damaged: {_first_line(error)}"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: {_first_line(error)}") from error
    return content


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _widened(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.float() if t.is_floating_point() else t for n, t in weights.items()}


def _shared_storages(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Second names of shared parameters, each with the first."""
    first: dict[tuple[int, torch.Size], str] = {}
    whole = {name: tensor for name, tensor in weights.items() if tensor.numel()}
    named = {n: first.setdefault((t.data_ptr(), t.shape), n) for n, t in whole.items()}
    return {name: source for name, source in named.items() if name != source}


def _with_shared(state: dict[str, Tensor], shared: Mapping[str, str]) -> dict[str, Tensor]:
    detached = {name: tensor.detach() for name, tensor in state.items()}
    return detached | {name: detached[source] for name, source in shared.items()}
