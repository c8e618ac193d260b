"""What a rank says that it is doing."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from vembed_ds.distributed import phases
from vembed_ds.distributed.phases import Kind, phase


@pytest.fixture(autouse=True)
def _at_step_12() -> Iterator[None]:
    before = phases.current().place
    phases.set_place("step 12")
    yield
    phases.set_place(before)


def test_phases_nest_and_end() -> None:
    assert str(phases.current()) == "step 12"
    with phase(Kind.EVALUATION), phase(Kind.EMBEDDING, "embedding chunk 3 of 8"):
        assert str(phases.current()) == "step 12: evaluation: embedding chunk 3 of 8"
        assert phases.current().kinds == (Kind.EVALUATION, Kind.EMBEDDING)
    assert str(phases.current()) == "step 12"


def test_every_change_is_counted_and_timed() -> None:
    before = phases.current()
    with phase(Kind.DATA):
        inside = phases.current()
    after = phases.current()
    assert (inside.changes, after.changes) == (before.changes + 1, before.changes + 2)
    assert before.since <= inside.since <= after.since


def fail() -> None:
    with phase(Kind.SAVING, "saving checkpoint-step-12"), phase(Kind.WAITING):
        raise MemoryError


def test_an_error_remembers_where_it_was_raised() -> None:
    with pytest.raises(MemoryError) as caught, phase(Kind.OTHER, "outside"):
        fail()
    expected = "step 12: outside: saving checkpoint-step-12: waiting for the other ranks"
    assert str(phases.status_of(caught.value)) == expected
    assert str(phases.current()) == "step 12"


def test_an_error_that_was_raised_again_is_known_by_its_cause() -> None:
    def again() -> None:
        try:
            fail()
        except MemoryError as error:
            raise RuntimeError("no memory") from error

    with pytest.raises(RuntimeError) as caught, phase(Kind.LOADING):
        again()
    assert Kind.SAVING in phases.status_of(caught.value).kinds


def test_other_threads_change_nothing_and_see_the_main_one() -> None:
    seen: list[str] = []

    def work() -> None:
        with phase(Kind.SAVING):
            seen.append(str(phases.current()))

    with phase(Kind.DATA):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == ["step 12: waiting for data"]
