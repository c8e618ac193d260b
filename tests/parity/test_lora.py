"""I1 and I2 with adapters: the update is that of one plain process with hand-written ones.

All adapters start away from zero, so that every one of their gradients counts. The chunk size
leaves an uneven last chunk. DoRA reads the base layer's weight without calling it, which ZeRO-3
has put away by then: DeepSpeed gathers it again, and its cells prove that. rsLoRA is another number in the same formula: one kind of model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity import data, lora_cases
from tests.parity.conftest import OPTIMIZER, ds_config, update_error
from tests.parity.reference import train_plain
from tests.parity.test_step_matrix import PRECISIONS, check
from tests.thinning import one_in
from tests.worlds import World

CHUNK = 5
CELLS = [
    *[(kind, variant) for kind in ("shared", "clip", "composed") for variant in ("lora", "dora")],
    ("frozen", "lora"),
    ("clip", "rslora"),
]

pytestmark = [pytest.mark.parity]


@pytest.fixture(scope="module")
def plain(folders: dict[float, Path]) -> Callable[..., dict[str, Any]]:
    """``plain(kind, variant)``: three plain steps, cached."""
    known: dict[Any, dict[str, Any]] = {}

    def compute(
        kind: str,
        variant: str,
        *,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        folder: Path | None = None,
    ) -> dict[str, Any]:
        key = (kind, variant, dropout, dtype, folder)
        if key not in known:
            known[key] = train_plain(
                folder or folders[dropout],
                kind=kind,
                steps=3,
                optimizer=OPTIMIZER,
                max_grad_norm=0.0,
                bidirectional=True,
                temperature=0.1,
                dropout_plan=(2, CHUNK) if dropout else None,
                dtype=dtype,
                change=partial(lora_cases.adapt_plain, variant=variant, dropout=dropout),
            )
        return known[key]

    return compute


@pytest.mark.parametrize(("cell", "stage"), one_in(2, CELLS, [0, 1, 2, 3]))
@pytest.mark.one_in(3)
def test_adapters(
    world: Callable[[int], World],
    folders: dict[float, Path],
    plain: Callable[..., Any],
    cell: tuple[str, str],
    stage: int,
) -> None:
    kind, variant = cell
    results = world(2).run(
        "tests.parity.lora_cases:train",
        folder=str(folders[0.0]),
        kind=kind,
        variant=variant,
        ds_config=ds_config(stage, 2),
        chunk_size=CHUNK,
    )
    expected = plain(kind, variant)
    trained = {name for name, value in expected["after"].items() if not _same(expected, name)}
    assert trained == set(expected["after"]) == set(results[0]["after"])
    check(expected, results)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    data.save_backbone(folder / "text", data.GPT2, dropout=0.0, seed=0)
    return folder


@pytest.mark.parametrize(("variant", "stage"), one_in(2, ["lora", "dora"], [0, 1, 2, 3]))
def test_transposed_layers(
    world: Callable[[int], World], gpt2: Path, plain: Callable[..., Any], variant: str, stage: int
) -> None:
    """GPT-2's `Conv1D`: the weight is stored transposed."""
    results = world(2).run(
        "tests.parity.lora_cases:train",
        folder=str(gpt2),
        kind="shared",
        variant=variant,
        ds_config=ds_config(stage, 2),
        chunk_size=CHUNK,
    )
    expected = plain("shared", variant, folder=gpt2)
    assert sum(".c_attn." in name for name in expected["after"]) >= 4, "no adapter in the layers"
    assert set(expected["after"]) == set(results[0]["after"])
    check(expected, results)


@pytest.mark.parametrize(
    ("kind", "precision", "stage"),
    [
        *[("shared", "fp32", stage) for stage in (0, 1, 2)],
        ("clip", "fp32", 2),
        ("composed", "fp32", 2),
        *[("shared", "bf16", stage) for stage in (0, 2)],
    ],
)
def test_4_bit_base_weights(
    world: Callable[[int], World],
    folders: dict[float, Path],
    plain: Callable[..., Any],
    kind: str,
    precision: str,
    stage: int,
) -> None:
    """QLoRA: the reference rounds its weights once by bitsandbytes, and is plain PyTorch then."""
    pytest.importorskip("bitsandbytes", reason="the extra `qlora`")
    results = world(2).run(
        "tests.parity.lora_cases:train",
        folder=str(folders[0.0]),
        kind=kind,
        variant="qlora",
        ds_config=ds_config(stage, 2, precision=precision),
        chunk_size=CHUNK,
    )
    dtype, tolerance, tensor_tolerance = PRECISIONS.get(precision, (torch.float32, 0.0, 0.0))
    expected = plain(kind, "qlora", dtype=dtype)
    assert set(expected["after"]) == set(results[0]["after"])
    if precision == "fp32":
        check(expected, results)
    for result in results if precision != "fp32" else []:
        assert result["losses"] == pytest.approx(expected["losses"], rel=tolerance)
        error = update_error(expected, result["after"])
        assert error["whole"] <= tolerance, error
        assert error["worst"] <= tensor_tolerance, error


@pytest.mark.parametrize(("stage", "checkpointing"), one_in(2, [0, 1, 2], [False, True]))
def test_4_bit_base_weights_with_dropout(
    world: Callable[[int], World],
    folders: dict[float, Path],
    plain: Callable[..., Any],
    stage: int,
    checkpointing: bool,
) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `qlora`")
    results = world(2).run(
        "tests.parity.lora_cases:train",
        folder=str(folders[0.2]),
        kind="clip",
        variant="qlora",
        ds_config=ds_config(stage, 2),
        chunk_size=CHUNK,
        dropout=0.2,
        checkpointing=checkpointing,
    )
    check(plain("clip", "qlora", dropout=0.2), results)


def _same(result: dict[str, Any], name: str) -> bool:
    return torch.equal(result["after"][name], result["before"][name])


@pytest.mark.parametrize(
    ("kind_and_variant", "stage", "checkpointing"),
    one_in(2, [("shared", "lora"), ("clip", "dora")], [0, 2, 3], [False, True]),
)
@pytest.mark.one_in(2)
def test_dropout_of_adapters_and_backbone(
    world: Callable[[int], World],
    folders: dict[float, Path],
    plain: Callable[..., Any],
    kind_and_variant: tuple[str, str],
    stage: int,
    checkpointing: bool,
) -> None:
    kind, variant = kind_and_variant
    results = world(2).run(
        "tests.parity.lora_cases:train",
        folder=str(folders[0.2]),
        kind=kind,
        variant=variant,
        ds_config=ds_config(stage, 2),
        chunk_size=CHUNK,
        dropout=0.2,
        checkpointing=checkpointing,
    )
    check(plain(kind, variant, dropout=0.2), results)


@pytest.mark.parametrize(
    ("precision", "stage"), [("bf16", 0), ("bf16", 2), ("bf16", 3), ("fp16", 2), ("fp16", 3)]
)
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.one_in(3)
def test_16_bit(
    world: Callable[[int], World],
    folders: dict[float, Path],
    plain: Callable[..., Any],
    variant: str,
    precision: str,
    stage: int,
) -> None:
    results = world(2).run(
        "tests.parity.lora_cases:train",
        folder=str(folders[0.0]),
        kind="clip",
        variant=variant,
        ds_config=ds_config(stage, 2, precision=precision),
        chunk_size=CHUNK,
    )
    dtype, tolerance, tensor_tolerance = PRECISIONS[precision]
    expected = plain("clip", variant, dtype=dtype)
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], rel=tolerance)
        error = update_error(expected, result["after"])
        assert error["whole"] <= tolerance, error
        assert error["worst"] <= tensor_tolerance, error
