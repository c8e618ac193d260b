"""What the ranks of ``test_mine.py`` run."""

from __future__ import annotations

from unittest import mock

from vembed_ds import mine
from vembed_ds.errors import VembedError
from vembed_ds.mining import run


def mine_files(argv: list[str], *, queries_at_a_time: int = 7) -> str | None:
    """Run the command on this rank, searching for few queries at a time; its error."""
    real = run.mine

    def few(*given: object, **options: object) -> object:
        return real(*given, **options, queries_at_a_time=queries_at_a_time)  # type: ignore[arg-type]

    try:
        with mock.patch.object(run, "mine", few):
            mine.run(mine.build_parser().parse_args(argv))
    except VembedError as error:
        return f"{type(error).__name__}: {error}"
    return None
