"""What is refused before anything is computed."""

from __future__ import annotations

import pytest
import torch

from vembed_ds.errors import ConfigError
from vembed_ds.losses import build_loss
from vembed_ds.losses.infonce import info_nce


def test_an_unknown_loss_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="loss_type='nce': no such loss; choose one of infonce"):
        build_loss("nce")


def test_shapes_that_do_not_match_are_named() -> None:
    with pytest.raises(ValueError, match=r"queries \(2, 3\) and positives \(2, 4\)"):
        info_nce(torch.randn(2, 3), torch.randn(2, 4), temperature=0.1)
