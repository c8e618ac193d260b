"""Value, scale and direction of the loss's gradient through the gather."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from tests.worlds import World

CASES = "tests.distributed.loss_cases"


def plain(
    query: torch.Tensor, positive: torch.Tensor, log_scale: float | None, bidirectional: bool
) -> dict[str, object]:
    """The whole batch in float64, written from the formula."""
    q, p = (x.double().requires_grad_() for x in (query, positive))
    scale = torch.tensor(
        math.log(10.0) if log_scale is None else log_scale, dtype=torch.float64, requires_grad=True
    )
    unit_q, unit_p = (x / x.norm(dim=1, keepdim=True) for x in (q, p))
    logits = unit_q @ unit_p.T * scale.exp()
    loss = -torch.log_softmax(logits, 1).diagonal().mean()
    if bidirectional:
        loss = (loss - torch.log_softmax(logits, 0).diagonal().mean()) / 2
    loss.backward()
    return {"loss": float(loss.detach()), "query": q.grad, "positive": p.grad, "scale": scale.grad}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("log_scale", [None, 2.0])
@pytest.mark.parametrize("world_size", [1, 2])
def test_info_nce_equals_the_whole_batch(
    world: Callable[[int], World], world_size: int, log_scale: float | None, bidirectional: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, positive = (torch.randn(6, 5, generator=generator) for _ in range(2))
    results = world(world_size).run(
        f"{CASES}:info_nce",
        query=query,
        positive=positive,
        log_scale=log_scale,
        bidirectional=bidirectional,
    )
    expected = plain(query, positive, log_scale, bidirectional)
    assert results[0]["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for name in ("query", "positive"):
        got = torch.cat([result[name] for result in results]).double()
        torch.testing.assert_close(got, expected[name], rtol=1e-5, atol=1e-7)
        cosine = functional.cosine_similarity(got.flatten(), expected[name].flatten(), dim=0)
        assert float(cosine) > 1 - 1e-9
    if log_scale is not None:
        assert results[0]["scale"] == pytest.approx(float(expected["scale"]), rel=1e-5)


def test_the_gradient_of_gathered_rows_is_the_sum_over_ranks(world: Callable[[int], World]) -> None:
    rows, weights = torch.randn(2, 3, 4), torch.randn(2, 6, 4)
    results = world(2).run(f"{CASES}:gather", rows=rows, weights=weights)
    for rank, result in enumerate(results):
        assert torch.equal(result["gathered"], rows.reshape(6, 4))
        expected = weights[:, rank * 3 : rank * 3 + 3].sum(0)
        torch.testing.assert_close(result["grad"], expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_is_raised_on_both(world: Callable[[int], World], rank: int) -> None:
    messages = world(2).run(f"{CASES}:raise_on", rank=rank)
    assert messages[rank] == "DataError: row 7 is broken"
    assert messages[1 - rank] == f"DistributedError: rank {rank} failed: row 7 is broken"


def test_no_error_raises_nothing(world: Callable[[int], World]) -> None:
    assert world(2).run(f"{CASES}:raise_on", rank=None) == ["nothing", "nothing"]
