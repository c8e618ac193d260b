"""AdamW, its groups and the schedule: the update equals that of torch's AdamW on the whole batch.

SGD hides what only AdamW has: moments that a wrong or missing gradient spoils for later steps,
a bias correction that counts steps, and a weight decay that also acts where the gradient is zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.conftest import MODES, ds_config, update_error
from tests.parity.reference import train_plain
from tests.parity.test_step_matrix import TENSOR_TOLERANCE, TOLERANCE
from tests.worlds import World

pytestmark = [pytest.mark.parity]

# eps: where the true gradient is zero (the bias of attention keys) there is noise of 1e-9, which
# Adam with its usual eps of 1e-8 would blow up to a tenth of a step. eps 1e-3 makes it 1e-6 of a
# step; gradients, clipped to a norm of 1, are near 1e-2 in most tensors, so Adam stays adaptive.
ADAMW = {"lr": 0.02, "betas": [0.8, 0.95], "eps": 1e-3, "weight_decay": 0.1}
COSINE = (2, 6)  # rates 0, 0.5, 1, 0.85 of the highest; "skip" has its idle tower at 0.5
# bf16 against bf16, the sums in another order: 0.8 % of the update seen, 3.2 % of one tensor's.
BF16_TOLERANCE = 0.03
BF16_TENSOR_TOLERANCE = 0.1
Reference = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def adamw_reference(folders: dict[float, Path]) -> Reference:
    """``adamw_reference(kind, ...)``: plain steps on the whole batch, cached."""

    @functools.cache
    def compute(
        kind: str,
        steps: int = 4,
        max_grad_norm: float = 1.0,
        cosine: tuple[int, int] | None = COSINE,
        dtype: torch.dtype = torch.float32,
        rates: tuple[tuple[str, float], ...] = (),
    ) -> dict[str, Any]:
        return train_plain(
            folders[0.0],
            kind=kind,
            steps=steps,
            optimizer={"type": "AdamW", **ADAMW},
            max_grad_norm=max_grad_norm,
            bidirectional=True,
            temperature=0.1,
            dropout_plan=None,
            dtype=dtype,
            decay_matrices_only=True,
            cosine=cosine,
            rates=dict(rates),
        )

    return compute


def adamw_config(stage: int, *, torch_adam: bool = True, **settings: Any) -> dict[str, Any]:
    """A resolved config for two ranks, with AdamW."""
    optimizer = {"type": "AdamW", "params": {**ADAMW, "torch_adam": torch_adam}}
    return ds_config(stage, 2, optimizer=optimizer, **settings)


def train(world: Callable[[int], World], folder: Path, **settings: Any) -> list[dict[str, Any]]:
    """Both ranks' results of the project's training."""
    return world(2).run(
        "tests.parity.cases:train",
        folder=str(folder),
        bidirectional=True,
        temperature=0.1,
        weight_decay=ADAMW["weight_decay"],
        **settings,
    )


def check(reference: dict[str, Any], results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["losses"] == pytest.approx(reference["losses"], rel=TOLERANCE)
        assert result["norms"] == pytest.approx(reference["norms"], rel=TOLERANCE)
        error = update_error(reference, result["after"])
        assert error["whole"] <= TOLERANCE, error
        assert error["worst"] <= TENSOR_TOLERANCE, error


def without(reference: dict[str, Any], part: str, *, tensors: int) -> dict[str, Any]:
    """The reference less exactly ``tensors`` tensors whose name contains ``part``."""
    before = reference["before"]
    kept = {name: tensor for name, tensor in before.items() if part not in name}
    assert len(kept) == len(before) - tensors
    return {**reference, "before": kept}


def expect_fp32(adamw_reference: Reference, kind: str) -> dict[str, Any]:
    """Less BERT's and ViT's unused poolers: the project freezes them, torch decays them."""
    expected = adamw_reference(kind)
    return expected if kind == "clip" else without(expected, ".pooler.", tensors=4)


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["clip", "skip"])
@pytest.mark.one_in(3)
def test_fp32(
    world: Callable[[int], World],
    folders: dict[float, Path],
    adamw_reference: Reference,
    kind: str,
    stage: int,
    chunk_size: int | None,
) -> None:
    config = adamw_config(stage, max_grad_norm=1.0)
    results = train(
        world,
        folders[0.0],
        kind=kind,
        ds_config=config,
        steps=4,
        chunk_size=chunk_size,
        cosine=COSINE,
    )
    check(expect_fp32(adamw_reference, kind), results)


# kind: rates of the project's parts, and of the reference's parameters by the start of their names.
RATES = {
    "clip": (
        {"text_encoder": 0.004, "image_encoder": 0.05},
        (
            ("parts.clip.text_", 0.004),
            ("parts.clip.vision_model", 0.05),
            ("parts.clip.visual_projection", 0.05),
        ),
    ),
    "composed": (
        {"text_encoder": 0.004, "projection": 0.05},
        (("parts.text.", 0.004), ("heads.", 0.05)),
    ),
}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", RATES)
@pytest.mark.one_in(3)
def test_every_part_at_its_own_rate(
    world: Callable[[int], World],
    folders: dict[float, Path],
    adamw_reference: Reference,
    kind: str,
    stage: int,
) -> None:
    rates, plain_rates = RATES[kind]
    results = train(
        world,
        folders[0.0],
        kind=kind,
        ds_config=adamw_config(stage, max_grad_norm=1.0),
        steps=4,
        chunk_size=5,
        cosine=COSINE,
        rates=rates,
    )
    expected = adamw_reference(kind, rates=plain_rates)
    check(expected if kind == "clip" else without(expected, ".pooler.", tensors=4), results)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_adam_on_the_host(
    world: Callable[[int], World],
    folders: dict[float, Path],
    adamw_reference: Reference,
    stage: int,
) -> None:
    offload = {"offload_optimizer": {"device": "cpu"}}
    config = adamw_config(stage, torch_adam=False, max_grad_norm=1.0, zero=offload)
    results = train(
        world, folders[0.0], kind="skip", ds_config=config, steps=4, chunk_size=5, cosine=COSINE
    )
    check(expect_fp32(adamw_reference, "skip"), results)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.one_in(3)
def test_bf16(
    world: Callable[[int], World],
    folders: dict[float, Path],
    adamw_reference: Reference,
    stage: int,
) -> None:
    config = adamw_config(stage, precision="bf16")
    results = train(world, folders[0.0], kind="clip", ds_config=config, steps=2, chunk_size=3)
    expected = without(
        adamw_reference("clip", steps=2, max_grad_norm=0.0, cosine=None, dtype=torch.bfloat16),
        # Their true gradient is zero (softmax ignores what all scores of a query have in common).
        # bf16's noise in its place is not small against eps: 29 % of one tensor's update seen.
        ".k_proj.bias",
        tensors=4,
    )
    for result in results:
        error = update_error(expected, result["after"])
        assert error["whole"] <= BF16_TOLERANCE, error
        assert error["worst"] <= BF16_TENSOR_TOLERANCE, error


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_16_bit_chunks_are_summed_in_float32(
    world: Callable[[int], World], folders: dict[float, Path], stage: int
) -> None:
    config = ds_config(stage, 2, precision="bf16")
    ranks = world(2).run(
        "tests.parity.cases:sum_chunks", folder=str(folders[0.0]), kind="shared", ds_config=config
    )

    def mean(which: str) -> torch.Tensor:
        """Over ranks, of the local gradients in bf16, as the all-reduce computes it."""
        halves = [torch.cat([g[which].flatten() for g in rank]).bfloat16() / 2 for rank in ranks]
        return (halves[0] + halves[1]).float()

    right, wrong = mean("summed"), mean("rounded")
    assert (wrong - right).norm() > 1e-3 * right.norm(), "the two sums must be distinguishable"
    for rank in ranks:
        assert torch.equal(torch.cat([g["reduced"].flatten() for g in rank]), right)


@pytest.mark.parametrize("mode", ["2 per chunk", "3 once, per chunk", "3 per module, per chunk"])
def test_16_bit_chunks_that_are_reduced_apart_are_summed_in_float32(
    world: Callable[[int], World], folders: dict[float, Path], mode: str
) -> None:
    stage, modes = MODES[mode]
    ranks = world(2).run(
        "tests.parity.cases:sum_chunks",
        folder=str(folders[0.0]),
        kind="shared",
        ds_config=ds_config(stage, 2, precision="bf16"),
        modes=modes,
    )
    halves = [torch.cat([g["each"] for g in rank], dim=1).bfloat16() / 2 for rank in ranks]
    means = halves[0] + halves[1]
    right = sum(means.float(), torch.zeros(means.shape[1]))
    assert not torch.equal(right, sum(means, torch.zeros(means.shape[1]).bfloat16()).float())
    for rank in ranks:
        assert torch.equal(torch.cat([g["reduced"].flatten() for g in rank]), right)
