"""What is refused before anything is computed."""

from __future__ import annotations

import pytest
import torch

from vembed_ds.errors import ConfigError
from vembed_ds.losses import Embeddings, LossInputs, build_loss


def test_an_unknown_loss_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match="loss_type='nce': no such loss; choose one of colbert, cosent"
    ):
        build_loss("nce")


def test_an_option_that_a_loss_does_not_use_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"triplet_margin=0.5: infonce does not use it"):
        build_loss("infonce", temperature=0.1, triplet_margin=0.5)


def test_numbers_that_do_not_fit_are_named() -> None:
    inputs = LossInputs(Embeddings(torch.randn(2, 3)), Embeddings(torch.randn(3, 3)))
    with pytest.raises(ValueError, match="2 queries and 3 positives"):
        build_loss("infonce", temperature=0.1)(inputs)
