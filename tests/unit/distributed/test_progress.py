"""Bars of work that takes long."""

from __future__ import annotations

import pytest

from vembed_ds.distributed import progress
from vembed_ds.distributed.progress import watched


@pytest.mark.parametrize(
    ("rank", "patience", "shown"), [("0", 0, True), ("0", 60, False), ("1", 0, False)]
)
def test_rank_0_counts_what_takes_long(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: str,
    patience: float,
    shown: bool,
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", patience)
    assert list(watched(range(7), what="reading")) == list(range(7))
    assert ("reading: 100%" in (said := capsys.readouterr().err)) == shown
    assert ("7/7" in said) == shown


def test_it_ends_where_the_work_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with pytest.raises(ZeroDivisionError):
        [1 / (3 - row) for row in watched(range(7), what="reading")]
    assert "3/7" in capsys.readouterr().err
