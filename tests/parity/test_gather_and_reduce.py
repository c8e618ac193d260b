"""I1 for every way to gather parameters and to reduce gradients, beside the default.

The default (both once per step, at these sizes) runs in all other files here. What differs is
which rank has which parameters and gradients when, so the cells take the models and batches that
use different ones in different chunks and steps, and every mechanism that runs passes of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.parity import lora_cases
from tests.parity.conftest import MODES, OPTIMIZER, ds_config, update_error
from tests.parity.data import FUSED, GLOBAL_BATCH, TEXTS
from tests.parity.reference import train_plain
from tests.parity.test_step_matrix import CHUNKS, KINDS, PRECISIONS, check
from tests.thinning import one_in
from tests.worlds import World

Run = Callable[..., list[dict[str, Any]]]
PER_CHUNK = [mode for mode in MODES if "per chunk" in mode]

pytestmark = [pytest.mark.parity]


@pytest.fixture
def run(world: Callable[[int], World], folders: dict[float, Path]) -> Run:
    """``run(mode, kind, chunk)``: three steps."""

    def train(
        mode: str,
        kind: str,
        chunk: str,
        *,
        world_size: int = 2,
        dropout: float = 0.0,
        checkpointing: str | None = None,
        kept: int = 1,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        stage, modes = MODES[mode]
        return world(world_size).run(
            "tests.parity.cases:train",
            folder=str(folders[dropout]),
            kind=kind,
            ds_config=ds_config(stage, world_size, **settings),
            steps=3,
            chunk_size=CHUNKS[chunk],
            bidirectional=True,
            temperature=0.1,
            checkpointing=checkpointing,
            modes=modes,
            kept=kept,
        )

    return train


@pytest.mark.parametrize(
    ("kind", "mode", "chunk", "world_size"),
    one_in(12, [*KINDS, "mixed", *FUSED, *TEXTS, "patches"], MODES, CHUNKS, [1, 2]),
)
@pytest.mark.one_in(3)
def test_plain(
    run: Run, reference: Callable[..., Any], kind: str, mode: str, chunk: str, world_size: int
) -> None:
    check(reference(kind), run(mode, kind, chunk, world_size=world_size))


@pytest.mark.parametrize(("kind", "mode", "kept"), one_in(4, ["clip", "skip"], MODES, [2, 99]))
def test_several_kept_graphs(
    run: Run, reference: Callable[..., Any], kind: str, mode: str, kept: int
) -> None:
    """As `gradient_cache_kept_graphs: auto` keeps them; the last bit may differ in some modes."""
    check(reference(kind), run(mode, kind, "many", kept=kept))


@pytest.mark.parametrize(
    ("kind", "mode", "mechanism"),
    [
        cell
        for cell in one_in(6, KINDS, MODES, [None, "huggingface", "deepspeed"])
        # Refused when the configuration is read.
        if cell.values[1] not in PER_CHUNK or cell.values[2] != "deepspeed"
    ],
)
@pytest.mark.one_in(2)
def test_dropout_clipping_and_recomputation(
    run: Run, reference: Callable[..., Any], kind: str, mode: str, mechanism: str | None
) -> None:
    results = run(mode, kind, "uneven", dropout=0.2, max_grad_norm=1.0, checkpointing=mechanism)
    plan = (2, CHUNKS["uneven"] or 2 * GLOBAL_BATCH)
    check(reference(kind, dropout=0.2, max_grad_norm=1.0, dropout_plan=plan), results)


@pytest.mark.parametrize(
    ("kind", "mode", "precision"), one_in(4, ["shared", "clip", "skip"], MODES, PRECISIONS)
)
@pytest.mark.one_in(2)
def test_16_bit(
    run: Run, reference: Callable[..., Any], kind: str, mode: str, precision: str
) -> None:
    dtype, tolerance, tensor_tolerance = PRECISIONS[precision]
    expected = reference(kind, dtype=dtype)
    for result in run(mode, kind, "many", precision=precision):
        assert result["losses"] == pytest.approx(expected["losses"], rel=tolerance)
        error = update_error(expected, result["after"])
        assert error["whole"] <= tolerance, error
        assert error["worst"] <= tensor_tolerance, error


@pytest.mark.parametrize(
    ("kind", "mode", "offloaded"),
    [
        # In "mixed" the step's first chunk has no image: DeepSpeed's sums on the host are a trap.
        *[(kind, "2 per chunk", "optimizer") for kind in ("skip", "mixed")],
        *one_in(4, ["skip", "mixed"], list(MODES)[1:], ["optimizer", "both"]),
    ],
)
@pytest.mark.one_in(2)
def test_on_the_host(
    run: Run, reference: Callable[..., Any], kind: str, mode: str, offloaded: str
) -> None:
    names = (
        ["offload_optimizer"]
        if offloaded == "optimizer"
        else ["offload_optimizer", "offload_param"]
    )
    zero = {name: {"device": "cpu"} for name in names}
    check(reference(kind), run(mode, kind, "many", zero=zero))


@pytest.mark.parametrize("mode", PER_CHUNK)
def test_16_bit_on_the_host(run: Run, reference: Callable[..., Any], mode: str) -> None:
    """Sums on the host would be in 16 bit if DeepSpeed were not told otherwise."""
    dtype, tolerance, _ = PRECISIONS["bf16"]
    expected = reference("skip", dtype=dtype)
    zero = {"offload_optimizer": {"device": "cpu"}}
    for result in run(mode, "skip", "many", precision="bf16", zero=zero):
        assert update_error(expected, result["after"])["whole"] <= tolerance


@pytest.mark.parametrize(("variant", "mode"), one_in(2, ["lora", "dora"], MODES))
@pytest.mark.one_in(2)
def test_adapters(
    world: Callable[[int], World], folders: dict[float, Path], variant: str, mode: str
) -> None:
    """Most parameters are frozen; DoRA reads the base layer's weight without calling it."""
    stage, modes = MODES[mode]
    results = world(2).run(
        "tests.parity.lora_cases:train",
        folder=str(folders[0.0]),
        kind="clip",
        variant=variant,
        ds_config=ds_config(stage, 2),
        chunk_size=5,
        modes=modes,
    )
    expected = train_plain(
        folders[0.0],
        kind="clip",
        steps=3,
        optimizer=OPTIMIZER,
        max_grad_norm=0.0,
        bidirectional=True,
        temperature=0.1,
        dropout_plan=None,
        change=partial(lora_cases.adapt_plain, variant=variant, dropout=0.0),
    )
    check(expected, results)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.one_in(2)
def test_the_self_test_leaves_no_trace(
    world: Callable[[int], World],
    folders: dict[float, Path],
    reference: Callable[..., Any],
    mode: str,
) -> None:
    stage, modes = MODES[mode]
    results = world(2).run(
        "tests.parity.cases:self_test",
        folder=str(folders[0.0]),
        ds_config=ds_config(stage, 2),
        modes=modes,
    )
    assert all(result["difference"] < 1e-5 for result in results)
    check(reference("clip"), results)
