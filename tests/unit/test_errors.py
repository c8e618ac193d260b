"""Parts of messages."""

from __future__ import annotations

from vembed_ds.errors import counted, one_line


def test_what_another_library_says_is_cut_behind_a_word() -> None:
    error = RuntimeError("Connection  closed\nby peer")
    assert one_line(error) == one_line(error, length=25) == "Connection closed by peer"
    assert one_line(error, length=24) == "Connection closed by..."
    assert one_line(error, length=15) == "Connection..."
    assert one_line(error, length=10) == "Connect..."
    assert one_line(RuntimeError()) == "RuntimeError"


def test_one_is_no_plural() -> None:
    assert [counted(number, "rank") for number in (0, 1, 2)] == ["0 ranks", "1 rank", "2 ranks"]
