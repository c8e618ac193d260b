"""Random state of host and accelerator is captured and restored together."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vembed_ds.distributed.seeding import capture_rng, restore_rng


def test_an_accelerators_state_is_restored_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the device module; no accelerator is here."""
    states = {"cuda:1": torch.tensor([1, 2])}
    module = SimpleNamespace(
        get_rng_state=lambda device: states[str(device)].clone(),
        set_rng_state=lambda state, device: states.__setitem__(str(device), state),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _device: module)
    device = torch.device("cuda:1")
    before = capture_rng(device)
    drawn = torch.rand(3)
    states["cuda:1"] = torch.tensor([9, 9])
    restore_rng(before, device)
    assert states["cuda:1"].tolist() == [1, 2]
    assert torch.equal(torch.rand(3), drawn)
