"""I3: a run goes on from its checkpoint, whatever ZeRO stage and number of ranks wrote it.

Every engine that loads starts at other weights, frozen ones included. What it then has is saved
again and compared bit for bit with what was loaded, and what it does in the next steps with what
the uninterrupted run does.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.conftest import ds_config, save_models
from tests.thinning import one_in
from tests.worlds import World
from vembed_ds.checkpointing.layouts import WEIGHT
from vembed_ds.errors import counted

TOLERANCE = 1e-5  # relative, of losses in float32
STAGES = [0, 1, 2, 3]
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
ALL_OFFLOAD = {**OFFLOAD, "offload_param": {"device": "cpu"}}

pytestmark = [pytest.mark.distributed(2)]


def config(
    stage: int,
    ranks: int,
    precision: str = "fp32",
    zero: dict[str, Any] | None = None,
    *,
    kind: str = "AdamW",
    torch_adam: bool = True,
    **extra: Any,
) -> dict[str, Any]:
    params: dict[str, Any] = {"lr": 0.02, "betas": [0.8, 0.95], "eps": 1e-3, "weight_decay": 0.1}
    params["torch_adam"] = torch_adam
    if kind == "SGD":
        params = {"lr": 0.05, "momentum": 0.9}
    optimizer = {"optimizer": {"type": kind, "params": params}}
    made = ds_config(stage, ranks, precision=precision, zero=zero, max_grad_norm=1.0, **extra)
    return made | optimizer


class Runs:
    """Uninterrupted runs, each trained once, and runs that go on from them."""

    def __init__(self, world: Callable[[int], World], folders: Any, place: Path) -> None:
        self._world, self._folders, self._place = world, folders, place
        self._saved: dict[Any, dict[str, Any]] = {}
        self._numbers = itertools.count()

    def save(
        self, ranks: int, made: dict[str, Any], kind: str, dropout: float = 0.0, **more: Any
    ) -> Any:
        key = (ranks, str(made), kind, dropout, *more)
        if key not in self._saved:
            out = self._place / str(next(self._numbers))
            self._saved[key] = self.run("save", ranks, made, kind, dropout, out=out, **more)[0]
        return self._saved[key]

    def resume(
        self,
        ranks: int,
        made: dict[str, Any],
        kind: str,
        place: str,
        dropout: float = 0.0,
        **more: Any,
    ) -> Any:
        out = self._place / str(next(self._numbers))
        return self.run("resume", ranks, made, kind, dropout, place=place, out=out, **more)

    def run(
        self,
        function: str,
        ranks: int,
        made: dict[str, Any],
        kind: str,
        dropout: float = 0.0,
        **arguments: Any,
    ) -> Any:
        paths = {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}
        return self._world(ranks).run(
            f"tests.distributed.restore_cases:{function}",
            folder=str(self._folders[dropout]),
            kind=kind,
            ds_config=made,
            **paths,
        )


@pytest.fixture(scope="module")
def runs(world: Callable[[int], World], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folders = {dropout: tmp_path_factory.mktemp("models") for dropout in (0.0, 0.2)}
    for dropout, folder in folders.items():
        save_models(folder, dropout=dropout)
    return Runs(world, folders, tmp_path_factory.mktemp("runs"))


def copied(place: str, out: Path) -> Path:
    shutil.copytree(place, out)
    return out


def same(state: dict[str, Any], other: dict[str, Any]) -> None:
    """Bit for bit, and the same counts."""
    assert state["counted"] == other["counted"]
    assert state["trained"] == other["trained"]
    assert state["values"].keys() == other["values"].keys()
    for key, value in state["values"].items():
        assert torch.equal(value, other["values"][key]), key


def close(losses: list[float], expected: list[float], tolerance: float = TOLERANCE) -> None:
    assert losses == pytest.approx(expected, rel=tolerance)


def check(saved: dict[str, Any], resumed: dict[str, Any], *, bitwise: bool) -> None:
    same(resumed["state"], saved["state"])
    assert saved["losses"] != [saved["losses"][0]] * len(saved["losses"]), "nothing is trained"
    if bitwise:
        assert resumed["losses"] == saved["losses"]
        same(resumed["end"], saved["end"])
    else:
        close(resumed["losses"], saved["losses"])


@pytest.mark.parametrize(("first", "later"), one_in(2, STAGES, STAGES))
@pytest.mark.one_in(3)
def test_stages(runs: Runs, first: int, later: int) -> None:
    """All pairs on two ranks, with dropout: the random states are those that were saved."""
    saved = runs.save(2, config(first, 2), "clip", 0.2)
    for resumed in runs.resume(2, config(later, 2), "clip", saved["place"], 0.2):
        check(saved, resumed, bitwise=first == later)
        assert not any("random states" in line for line in resumed["messages"])
        assert resumed["gathered"] == 0


QUICK = {(2, 1, 0, 3), (2, 1, 3, 3), (2, 1, 2, 0), (1, 2, 3, 2), (1, 2, 1, 1), (1, 2, 0, 3)}
WORLDS = [
    pytest.param(*pair, marks=[] if pair in QUICK else [pytest.mark.slow])
    for pair in itertools.product((2, 1), (1, 2), STAGES, STAGES)
    if pair[0] != pair[1]
]
WORLDS += [
    pytest.param(*pair, marks=pytest.mark.slow)
    for pair in [(2, 3, 1, 3), (2, 3, 3, 3), (2, 3, 3, 2), (4, 2, 3, 3), (4, 2, 1, 0), (4, 2, 2, 2)]
]


@pytest.mark.parametrize(("ranks", "more", "first", "later"), WORLDS)
@pytest.mark.one_in(2)
def test_numbers_of_ranks(runs: Runs, ranks: int, more: int, first: int, later: int) -> None:
    saved = runs.save(ranks, config(first, ranks), "clip")
    results = runs.resume(more, config(later, more), "clip", saved["place"])
    for resumed in results:
        check(saved, resumed, bitwise=False)
    randoms = [tuple(resumed["random"]) for resumed in results]
    assert len(set(randoms)) == more, "ranks must not share a stream"
    text = (
        f"{counted(ranks, 'rank')} wrote it, {more} go on. Drawn anew from seed 11, step 2 and rank"
    )
    assert [text in " ".join(r["messages"]) for r in results] == [True] + [False] * (more - 1)
    again = runs.resume(more, config(later, more), "clip", saved["place"])
    assert [tuple(resumed["random"]) for resumed in again] == randoms


@pytest.mark.parametrize("kind", ["lora", "frozen", "tied"])
@pytest.mark.parametrize(
    ("ranks", "more", "first", "later"), [(2, 2, 0, 3), (2, 1, 3, 2), (2, 2, 2, 2)]
)
@pytest.mark.one_in(2)
def test_kinds_of_models(
    runs: Runs, kind: str, ranks: int, more: int, first: int, later: int
) -> None:
    saved = runs.save(ranks, config(first, ranks), kind)
    for resumed in runs.resume(more, config(later, more), kind, saved["place"]):
        check(saved, resumed, bitwise=(ranks, first) == (more, later))


@pytest.mark.parametrize(
    ("first", "later", "kind"),
    [
        (0, 2, "frozen"),
        (2, 3, "frozen"),
        (3, 0, "frozen"),
        (1, 0, "tied"),
        (0, 0, "lora"),
        (3, 3, "clip"),
    ],
)
@pytest.mark.one_in(2)
def test_bf16(runs: Runs, first: int, later: int, kind: str) -> None:
    """The float32 masters are kept, and frozen weights as they were before they were cast."""
    saved = runs.save(2, config(first, 2, "bf16"), kind)
    values = [value for (_, what), value in saved["state"]["values"].items() if what == WEIGHT]
    assert any((value != value.bfloat16().float()).any() for value in values)
    for resumed in runs.resume(2, config(later, 2, "bf16"), kind, saved["place"]):
        # The copy has no file of what the frozen weights were, and has them as they are used.
        for state in (saved["state"], resumed["state"]):
            for name, what in state["values"]:
                if name not in state["trained"]:
                    state["values"][name, what] = state["values"][name, what].bfloat16()
        same(resumed["state"], saved["state"])
        close(resumed["losses"], saved["losses"], 0.0 if first == later else 1e-2)


@pytest.mark.parametrize(("first", "later"), [(0, 0), (0, 2), (2, 0)])
def test_masters_in_flat_groups(runs: Runs, first: int, later: int) -> None:
    """ZeRO-0 in bf16 with a fused Adam, which is what a GPU would have."""
    saved = runs.save(2, config(first, 2, "bf16"), "clip", fused=first == 0)
    made = config(later, 2, "bf16")
    for resumed in runs.resume(2, made, "clip", saved["place"], fused=later == 0):
        same(resumed["state"], saved["state"])
        close(resumed["losses"], saved["losses"], 0.0 if first == later else 1e-2)


def test_weights_in_4_bit(runs: Runs, tmp_path: Path) -> None:
    """They are not written, and must be what they were."""
    pytest.importorskip("bitsandbytes")
    saved = runs.save(2, config(2, 2), "qlora")
    for resumed in runs.resume(2, config(0, 2), "qlora", saved["place"]):
        check(saved, resumed, bitwise=False)
    place = copied(saved["place"], tmp_path / "other")
    file = place / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=False)
    name = next(n for n in state["module"] if n.endswith("base_layer.weight"))
    state["module"][name] *= 1.01
    torch.save(state, file)
    for [text] in runs.run("refuse", 2, config(2, 2), "qlora", places=[str(place)]):
        assert f"{place}: {name}: the base model is not the one that this was trained on" in text


FP16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 24, "hysteresis": 2}


@pytest.mark.parametrize(("first", "later"), [(1, 3), (3, 2), (2, 2)])
def test_the_loss_scale_goes_on(runs: Runs, first: int, later: int) -> None:
    saved = runs.save(2, config(first, 2, fp16=FP16), "clip")
    assert saved["scales"] == [2.0**24, 2.0**23], "the first step lowers the hysteresis"
    assert saved["state"]["counted"]["skipped_steps"] == 2
    for resumed in runs.resume(2, config(later, 2, fp16=FP16), "clip", saved["place"]):
        same(resumed["state"], saved["state"])
        assert resumed["scale"] == 2.0**23
        assert resumed["end"]["counted"] == saved["end"]["counted"]


@pytest.mark.parametrize(
    ("first", "later"),
    [
        (config(2, 2, zero=OFFLOAD, torch_adam=False), config(3, 2)),
        (config(3, 2), config(2, 2, zero=OFFLOAD, torch_adam=False)),
        (config(1, 2), config(3, 2, zero=ALL_OFFLOAD)),
        (config(3, 2, zero={**ALL_OFFLOAD, "sub_group_size": 500}), config(0, 2)),
        (config(2, 2, kind="SGD"), config(3, 2, kind="SGD")),
        (config(3, 2, kind="SGD"), config(0, 2, kind="SGD")),
    ],
    ids=["off the host", "to the host", "all on the host", "groups", "momentum", "momentum, back"],
)
@pytest.mark.one_in(2)
def test_optimizers(runs: Runs, first: dict[str, Any], later: dict[str, Any]) -> None:
    """Offloaded and not, of torch and of DeepSpeed: the state is the same."""
    saved = runs.save(2, first, "clip")
    for resumed in runs.resume(2, later, "clip", saved["place"]):
        check(saved, resumed, bitwise=False)


@pytest.mark.parametrize(
    ("kind", "later", "changes", "message"),
    [
        (
            "clip",
            config(2, 2),
            {"schedule": False},
            "was written with a learning rate schedule, and this engine is made without one",
        ),
        (
            "clip",
            config(3, 2),
            {"freeze": "vision_model.post"},
            r"frozen now and trained there: 2 \(.*post_layernorm.bias, .*post_layernorm.weight\). Resume",
        ),
        (
            "clip",
            config(0, 2, kind="SGD"),
            {},
            "its optimizer keeps exp_avg, exp_avg_sq of a parameter, and this one momentum_buffer;",
        ),
        (
            "lora",
            config(2, 2),
            {},
            r"only in the model: 96 \(.*lora_A.default.weight, ...\); only in the checkpoint: 48 \(",
        ),
    ],
)
def test_what_does_not_fit(
    runs: Runs, kind: str, later: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    """The same words on every rank."""
    place = runs.save(2, config(2, 2), "clip")["place"]
    found = runs.run("refuse", 2, later, kind, places=[place], **changes)
    for [text] in found:
        assert re.search(f"^CheckpointError: {place}: .*{message}", text), text
    assert found[0] == found[1]


def test_another_shape(runs: Runs, tmp_path: Path) -> None:
    """Of a projection, in a checkpoint that says it had other sizes."""
    saved = runs.save(2, config(2, 2), "composed")
    place = copied(saved["place"], tmp_path / "other")
    file = place / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=False)
    name = "encoder.towers.text.projection.weight"
    state["module"][name] = state["module"][name].T.contiguous()
    torch.save(state, file)
    [[text], _] = runs.run("refuse", 2, config(2, 2), "composed", places=[str(place)])
    assert re.search(
        rf"of another shape: 1 \({name} \(\[16, 12\] there, \[12, 16\] here\)\)", text
    ), text
