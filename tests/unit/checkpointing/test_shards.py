"""Which files are opened for which range, and files that do not belong together.

That the values are right is seen in tests/distributed/test_export.py and test_restore.py.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.tensor_fragment import fragment_address

from tests.memory import measure
from vembed_ds.checkpointing.layouts import WEIGHT
from vembed_ds.checkpointing.shards import open_checkpoint
from vembed_ds.errors import CheckpointError

MODEL, OPTIMIZER = "mp_rank_00_model_states.pt", "mp_rank_00_optim_states.pt"
# Two groups of 5 + 7 and 3 values on three ranks: pieces of 4 and of 2 (padded to an even number).
SHAPES = [OrderedDict(a=torch.Size([5]), b=torch.Size([7])), OrderedDict(c=torch.Size([3]))]
A, B, C = torch.arange(5.0), torch.arange(10.0, 17.0), torch.arange(20.0, 23.0)
GROUPS = [torch.cat([A, B]), torch.cat([C, torch.zeros(3)])]
TABLES: list[list[dict[str, tuple[int, int]]]] = [  # start in the piece, and length
    [{"a": (0, 4)}, {"c": (0, 2)}],
    [{"a": (0, 1), "b": (1, 3)}, {"c": (0, 1)}],
    [{"b": (0, 4)}, {}],
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As ZeRO-2 leaves it; the state is a thousand times the weight."""
    weights = {"a": A.bfloat16(), "b": B.bfloat16(), "c": C.bfloat16(), "again": A.bfloat16()}
    model = {
        "module": weights,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": SHAPES,
        "shared_params": {"again": "a"},
        "dp_world_size": 3,
        "lr_scheduler": {"last_epoch": 4, "_step_count": 5},
        "global_steps": 4,
        "global_samples": 48,
        "skipped_steps": 0,
    }
    torch.save(model, tmp_path / MODEL)
    for rank in range(3):
        save_shard(tmp_path, rank)
    return tmp_path


def save_shard(folder: Path, rank: int, **changes: Any) -> None:
    pieces = [GROUPS[0][4 * rank :][:4], GROUPS[1][2 * rank :][:2]]
    padding = [0, [0, 1, 2][rank]]
    state = {
        group: {"step": torch.tensor(4.0), "exp_avg": 1000 * piece}
        for group, piece in enumerate(pieces)
    }
    saved = {
        "single_partition_of_fp32_groups": [
            piece[: len(piece) - pad] for piece, pad in zip(pieces, padding, strict=True)
        ],
        "group_paddings": padding,
        "base_optimizer_state": {"state": state, "param_groups": [{}, {}]},
        "param_slice_mappings": [
            {name: fragment_address(start=s, numel=n) for name, (s, n) in table.items()}
            for table in TABLES[rank]
        ],
    }
    torch.save({"optimizer_state_dict": saved | changes}, shard(folder, rank))


def shard(folder: Path, rank: int) -> Path:
    return folder / f"zero_pp_rank_{rank}_{OPTIMIZER}"


@pytest.mark.parametrize("near", [0, 1, 2, 5])
def test_every_range(folder: Path, near: int) -> None:
    reader = open_checkpoint(folder, near=near)
    for name, whole in {"a": A, "b": B, "c": C, "again": A}.items():
        assert torch.equal(reader.weight(name), whole)
        for start in range(len(whole)):
            for stop in range(start + 1, len(whole) + 1):
                expected = whole[start:stop]
                assert torch.equal(reader.read(name, WEIGHT, start, stop), expected)
                assert torch.equal(reader.read(name, "exp_avg", start, stop), 1000 * expected)
    assert (reader.optimizer.kinds, reader.optimizer.step) == (["exp_avg"], 4)
    assert reader.schedule == {"last_epoch": 4, "step_count": 5}


def test_a_parameter_of_several_ranks_is_in_memory_once(tmp_path: Path) -> None:
    """As ZeRO-3 leaves it; 160 MB."""
    size, ranks = 40_000_000, 2
    model = {
        **{key: {} for key in ("module", "frozen_param_shapes", "shared_params")},
        **{"buffer_names": [], "optimizer": None, "dp_world_size": ranks},
        "param_shapes": [OrderedDict(a=torch.Size([size]))],
    }
    for rank in range(ranks):
        torch.save(model, tmp_path / f"zero_pp_rank_{rank}_{MODEL}")
        flat = {"fp32_flat_groups": [torch.full((size // ranks,), 1.0 + rank)]}
        torch.save({"optimizer_state_dict": flat}, shard(tmp_path, rank))
    megabytes, outcome = measure(
        "from pathlib import Path\nfrom vembed_ds.checkpointing.shards import open_checkpoint",
        "outcome = float(open_checkpoint(Path(sys.argv[1])).weight('a').mean())",
        str(tmp_path),
    )
    assert float(outcome) == pytest.approx(1.5)
    assert megabytes < 190  # joined from pieces it takes 320


@pytest.mark.parametrize("rank", range(3))
def test_a_rank_opens_its_own_shard_alone(folder: Path, rank: int) -> None:
    """As on machines with disks of their own, where the others' are not there."""
    for other in {0, 1, 2} - {rank}:
        shard(folder, other).unlink()
    reader = open_checkpoint(folder, near=rank)
    begins = {"a": (0, 0), "b": (0, 5), "c": (1, 0)}
    for table in TABLES[rank]:
        for name, (start, length) in table.items():
            group, begin = begins[name]
            first = start + rank * [4, 2][group] - begin
            values = reader.read(name, WEIGHT, first, first + length)
            assert torch.equal(values, {"a": A, "b": B, "c": C}[name][first : first + length])
    with pytest.raises(CheckpointError, match=r"optim_states.pt: missing; 3 ranks .* 1 of their 3"):
        [reader.weight(name) for name in "abc"]
    with pytest.raises(CheckpointError, match=r"optim_states.pt: missing; 3 ranks"):
        reader.check_whole()


def test_a_shard_of_another_model(folder: Path) -> None:
    table = [{"a": fragment_address(start=0, numel=3)}, {"c": fragment_address(start=0, numel=2)}]
    save_shard(folder, 0, param_slice_mappings=table)
    message = r"zero_pp_rank_0_.*: damaged: its table of parameters does not fit .* \(first: a\)"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder, near=1).weight("a")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"group_paddings": []}, "IndexError"),
        ({"single_partition_of_fp32_groups": None}, "TypeError"),
        ({"param_slice_mappings": [{"a": 1}]}, "AttributeError"),
        ({"base_optimizer_state": {}}, "KeyError"),
    ],
)
def test_a_shard_that_deepspeed_did_not_write(
    folder: Path, changes: dict[str, Any], what: str
) -> None:
    save_shard(folder, 0, **changes)
    with pytest.raises(CheckpointError, match=rf"zero_pp_rank_0_.*: damaged: not as .*{what}"):
        open_checkpoint(folder).read("a", "exp_avg", 0, 2)


def test_what_was_not_trained_has_no_state(folder: Path) -> None:
    state = torch.load(folder / MODEL)
    torch.save(state | {"module": state["module"] | {"d": torch.ones(2)}}, folder / MODEL)
    reader = open_checkpoint(folder)
    assert reader.weight("d").tolist() == [1, 1]
    with pytest.raises(CheckpointError, match="d was not trained, so it has no exp_avg"):
        reader.read("d", "exp_avg", 0, 2)
