"""What can be wrong with a checkpoint; right ones are in tests/distributed/test_export.py."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from tests.checkpoints import load_consolidated
from vembed_ds.checkpointing.files import resolve_checkpoint
from vembed_ds.errors import CheckpointError

WHOLE = "mp_rank_00_model_states.pt"
SIZE = torch.Size([3])
INNER: dict[str, Any] = {"optimizer_state_dict": {"state": {}, "param_groups": []}}


class Bomb:
    """Leaves a file behind when it is unpickled with code allowed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "run" / "checkpoint-step-4"
    place.mkdir(parents=True)
    return place


def save_whole(folder: Path, **changes: Any) -> None:
    weights = {"w": torch.ones(3), "n": torch.tensor(5)}
    saved = {
        "module": weights,
        "buffer_names": [],
        "optimizer": {"state": {}, "param_groups": []},
        "shared_params": None,
        "dp_world_size": 1,
    }
    torch.save(saved | changes, folder / WHOLE)


def save_stage_3(folder: Path, *, ranks: tuple[int, ...] = (0, 1)) -> None:
    """``w`` = 0, 1, 2 on two ranks, the last value being padding."""
    state = {
        "module": {"w": torch.zeros(0)},
        "optimizer": None,
        "buffer_names": [],
        "dp_world_size": 2,
        "param_shapes": [OrderedDict(w=SIZE)],
        "frozen_param_shapes": {},
        "frozen_param_fragments": {},
        "shared_params": {},
    }
    for rank in ranks:
        torch.save(state, folder / f"zero_pp_rank_{rank}_{WHOLE}")
        pieces = [torch.tensor([2.0 * rank, 2.0 * rank + 1])]
        optimizer = {"optimizer_state_dict": {"fp32_flat_groups": pieces}}
        torch.save(optimizer, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def test_whole_weights_keep_integers(folder: Path) -> None:
    save_whole(folder)
    state = load_consolidated(folder)
    assert torch.equal(state["w"], torch.ones(3))
    assert state["n"].dtype == torch.int64


def test_pieces_are_joined_without_padding(folder: Path) -> None:
    save_stage_3(folder)
    assert load_consolidated(folder)["w"].tolist() == [0.0, 1.0, 2.0]


def test_latest_names_the_checkpoint(folder: Path) -> None:
    save_whole(folder)
    (folder.parent / "latest").write_text(folder.name + "\n")
    assert resolve_checkpoint(folder.parent) == folder
    assert resolve_checkpoint(folder) == folder


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such checkpoint folder; check the"):
        resolve_checkpoint(tmp_path / "nowhere")


def test_folder_without_checkpoint(folder: Path) -> None:
    message = r"run: no DeepSpeed checkpoint .* and no file `latest`; give a checkpoint-step-N"
    with pytest.raises(CheckpointError, match=message):
        resolve_checkpoint(folder.parent)


def test_folder_that_is_converted_already(tmp_path: Path) -> None:
    (tmp_path / "vembed_config.json").touch()
    with pytest.raises(CheckpointError, match=r"is a converted model already .*; use it as it is"):
        resolve_checkpoint(tmp_path)


def test_folder_that_describes_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "vembed_config.json").touch()
    (tmp_path / "parameters.json").touch()
    with pytest.raises(
        CheckpointError, match=rf"lacks what was trained; give .*, {tmp_path.parent}$"
    ):
        resolve_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        *[(name, "names '.*', which is no") for name in (b"gone", b"../elsewhere", b"..")],
        (b"x" * 300, "names 'x{100}', which is no"),
        (b"", "empty"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_latest_names_nothing(folder: Path, content: bytes, problem: str) -> None:
    (folder.parent / "latest").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"latest: {problem}.*; give a checkpoint-step-N"):
        resolve_checkpoint(folder.parent)


def test_latest_names_an_empty_folder(folder: Path) -> None:
    (folder.parent / "latest").write_text(folder.name)
    with pytest.raises(CheckpointError, match=r"checkpoint-step-4: no DeepSpeed checkpoint"):
        resolve_checkpoint(folder.parent)


@pytest.mark.parametrize("suffix", [WHOLE, "mp_rank_00_optim_states.pt"])
def test_missing_shard_of_stage_3(folder: Path, suffix: str) -> None:
    save_stage_3(folder)
    (folder / f"zero_pp_rank_1_{suffix}").unlink()
    message = rf"zero_pp_rank_1_{suffix}: missing; 2 ranks wrote .* 1 of their 2 files"
    with pytest.raises(CheckpointError, match=message):
        load_consolidated(folder)


def test_missing_first_shard_of_stage_3(folder: Path) -> None:
    save_stage_3(folder, ranks=(1,))
    with pytest.raises(CheckpointError, match=f"zero_pp_rank_0_{WHOLE}: missing; the checkpoint"):
        load_consolidated(folder)


def test_missing_shards_of_stage_2(folder: Path) -> None:
    shapes = [OrderedDict(w=SIZE)]
    save_whole(folder, optimizer=None, dp_world_size=2, param_shapes=shapes, shared_params={})
    message = r"zero_pp_rank_0_mp_rank_00_optim_states.pt: missing; 2 ranks .* 0 of their 2 files"
    with pytest.raises(CheckpointError, match=message):
        load_consolidated(folder)


def test_shard_with_too_few_values(folder: Path) -> None:
    save_stage_3(folder)
    short = {"optimizer_state_dict": {"fp32_flat_groups": [torch.zeros(0)]}}
    torch.save(short, folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    with pytest.raises(
        CheckpointError, match=r"groups have \[0\] values, where .* say \[2\]; the files"
    ):
        load_consolidated(folder)


def test_foreign_code_does_not_run(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    save_whole(folder, bomb=Bomb(trace))
    with pytest.raises(CheckpointError, match=rf"{WHOLE}: holds pathlib.Path, which is not"):
        load_consolidated(folder)
    assert not trace.exists()


class Member:
    """Pickles as Python 3.11.2 does the member of an enum: by ``getattr``."""

    def __init__(self, kind: Any, name: str) -> None:
        self.kind, self.name = kind, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.kind, self.name)


# Nothing is looked up, or the second would fail.
@pytest.mark.parametrize("name", ["weights", "no_such_member"])
def test_an_enum_is_read_whatever_python_wrote_it(folder: Path, name: str) -> None:
    save_whole(folder, zero_stage=Member(ZeroStageEnum, name))
    assert load_consolidated(folder)["w"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("size", [0, 11, 600])
def test_cut_file(folder: Path, size: int) -> None:
    save_whole(folder)
    path = folder / WHOLE
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=rf"{WHOLE}: .*damaged"):
        load_consolidated(folder)


def describe(folder: Path, **groups: int | None) -> None:
    (folder / "model").mkdir()
    entries = {name: {"group": group} for name, group in groups.items()}
    (folder / "model" / "parameters.json").write_text(json.dumps(entries))


def save_16_bit(folder: Path, masters: dict[str, list[Any]]) -> None:
    weights = {name: torch.tensor([1.0]).bfloat16() for name in ("a", "b")}
    save_whole(folder, module=weights | {"c": torch.ones(1)}, optimizer=masters | INNER)


@pytest.mark.parametrize("flat", [False, True])
def test_masters_of_stage_0(folder: Path, flat: bool) -> None:
    masters = [torch.tensor([1.001]), torch.tensor([1.002])]
    groups = (
        {"fp32_groups_flat": [torch.cat(masters)]} if flat else {"fp32_groups": [list(masters)]}
    )
    save_16_bit(folder, groups)
    describe(folder, a=0, b=0, c=None)
    state = load_consolidated(folder)
    assert [state["a"], state["b"]] == masters
    assert state["c"] == 1


def test_masters_without_description(folder: Path) -> None:
    save_16_bit(folder, {"fp32_groups": [[torch.ones(1)]]})
    with pytest.raises(CheckpointError, match=r"parameters.json: missing; the checkpoint is incom"):
        load_consolidated(folder)


def test_masters_with_damaged_description(folder: Path) -> None:
    save_16_bit(folder, {"fp32_groups": [[torch.ones(1)]]})
    describe(folder)
    (folder / "model" / "parameters.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"parameters.json: damaged: Expecting"):
        load_consolidated(folder)


def test_masters_of_other_groups(folder: Path) -> None:
    save_16_bit(folder, {"fp32_groups": [[torch.ones(1)], [torch.ones(1)]]})
    describe(folder, a=0, b=0)
    with pytest.raises(CheckpointError, match=r"groups are not those noted .*group 0 has 1 values"):
        load_consolidated(folder)


def test_masters_of_other_weights(folder: Path) -> None:
    save_16_bit(folder, {"fp32_groups": [[torch.ones(1)], [torch.tensor([1.1])]]})
    describe(folder, a=0, b=1)
    with pytest.raises(CheckpointError, match=r"b differs from its float32 master"):
        load_consolidated(folder)


def test_masters_that_are_no_numbers_are_those_of_their_weights(folder: Path) -> None:
    describe(folder, a=0, b=0)
    nan, one = torch.full((1,), torch.nan), torch.ones(1)
    weights = {"a": nan.bfloat16(), "b": one.bfloat16()}
    masters = {"fp32_groups": [[nan, one]]}
    save_whole(folder, module=weights, optimizer=masters | INNER)
    assert load_consolidated(folder)["a"].isnan().all()
