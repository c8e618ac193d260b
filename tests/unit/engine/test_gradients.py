"""Local sums of chunk gradients, parameter groups, schedules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vembed_ds.engine.gradients import LocalGradients
from vembed_ds.engine.param_groups import build_param_groups
from vembed_ds.engine.schedules import build_schedule


def accumulate(parameter: nn.Parameter, chunks: list[torch.Tensor]) -> torch.Tensor:
    local = LocalGradients([parameter])
    for chunk in chunks:
        local.before_backward()
        (parameter * chunk).sum().backward()
    local.finish()
    assert parameter.grad is not None
    return parameter.grad


def test_bf16_chunks_are_summed_in_float32_and_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    chunks = [torch.randn(100, generator=generator).bfloat16() for _ in range(64)]
    exact = torch.stack([chunk.float() for chunk in chunks]).sum(0)
    grad = accumulate(nn.Parameter(torch.zeros(100, dtype=torch.bfloat16)), chunks)
    assert torch.equal(grad, exact.bfloat16())
    rounded = torch.zeros(100, dtype=torch.bfloat16)
    for chunk in chunks:
        rounded += chunk
    assert not torch.equal(rounded, exact.bfloat16()), "the test would not see 16-bit sums"


def test_float32_chunks_sum_as_in_plain_torch() -> None:
    chunks = [torch.randn(10, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    grad = accumulate(nn.Parameter(torch.zeros(10)), chunks)
    torch.testing.assert_close(grad, torch.stack(chunks).sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_without_gradient_gets_zero(dtype: torch.dtype) -> None:
    used, idle = (nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(2))
    local = LocalGradients([used, idle])
    for _ in range(2):
        local.before_backward()
        used.sum().backward()
    local.finish()
    assert used.grad is not None
    assert used.grad.tolist() == [2.0, 2.0, 2.0]
    assert idle.grad is not None
    assert idle.grad.tolist() == [0.0, 0.0, 0.0]
    assert idle.grad.dtype == dtype


def test_the_next_step_starts_from_nothing() -> None:
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    local = LocalGradients([parameter])
    for _ in range(2):
        parameter.grad = None
        for _ in range(2):
            local.before_backward()
            parameter.sum().backward()
        local.finish()
        assert parameter.grad is not None
        assert parameter.grad.tolist() == [2.0, 2.0, 2.0]
    local.discard()
    assert parameter.grad is None


def test_a_partitioned_parameter_gets_a_gradient_of_its_whole_shape() -> None:
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_shape = torch.Size([2, 3])  # type: ignore[attr-defined]
    LocalGradients([parameter]).finish()
    assert parameter.grad is not None
    assert parameter.grad.shape == (2, 3)
    assert parameter.shape == (0,)


def test_only_matrices_decay() -> None:
    module = nn.ModuleDict({"linear": nn.Linear(3, 2), "norm": nn.LayerNorm(3)})
    module.register_parameter("token", nn.Parameter(torch.zeros(1, 1, 3)))
    module.register_parameter("scale", nn.Parameter(torch.zeros(1)))
    module.register_parameter("kernel", nn.Parameter(torch.zeros(2, 3, 3, 3)))
    module.register_parameter("frozen", nn.Parameter(torch.zeros(2, 2), requires_grad=False))
    decay, rest = build_param_groups(module, weight_decay=0.1)
    names = {id(p): n for n, p in module.named_parameters()}
    assert {names[id(p)] for p in decay["params"]} == {"linear.weight", "kernel"}
    assert decay["weight_decay"] == 0.1
    assert {names[id(p)] for p in rest["params"]} == {
        "linear.bias",
        "norm.weight",
        "norm.bias",
        "token",
        "scale",
    }
    assert rest["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1.0] * 8),
        ("constant_with_warmup", [0.0, 0.5, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.0, 0.5, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("cosine", [0.0, 0.5, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067]),
    ],
)
@pytest.mark.parametrize(
    "warmup", [{"warmup_steps": 2, "warmup_ratio": 0.9}, {"warmup_ratio": 0.25}]
)
def test_schedules(name: str, expected: list[float], warmup: dict[str, float]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    settings = {"warmup_steps": 0, **warmup}
    schedule = build_schedule(name, num_steps=8, **settings)(optimizer)  # type: ignore[arg-type]
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected, abs=1e-3)
