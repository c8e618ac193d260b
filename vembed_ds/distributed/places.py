"""Where in the code a rank is, in one line."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence


def place_of_main_thread() -> str:
    """Of what runs now."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    lines = []
    while frame is not None:
        lines.append(_line(frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return place(lines)


def place_of(error: BaseException) -> str:
    """Where ``error`` was raised."""
    found, lines = error.__traceback__, list[str]()
    while found is not None:
        lines.append(_line(found.tb_frame.f_code.co_filename, found.tb_lineno))
        found = found.tb_next
    return place(list(reversed(lines)))


def place(lines: Sequence[str]) -> str:
    """The innermost line, and the line of this package that led there.

    Args:
        lines: Of a stack, the innermost first.
    """
    own = next((line for line in lines if _is_own(line)), "")
    innermost = lines[0] if lines else "?"
    return innermost if own in ("", innermost) else f"{own}, in {innermost}"


def _is_own(line: str) -> bool:
    elsewhere = ("vembed_ds/distributed/", "vembed_ds/command.py")
    return line.startswith("vembed_ds/") and not line.startswith(elsewhere)


def _line(file: str, number: int) -> str:
    """Without the folder that it was imported from, the innermost: an environment may lie in another."""
    folders = [folder for folder in sys.path if folder and file.startswith(folder + os.sep)]
    if folders:
        file = file[len(max(folders, key=len)) + 1 :]
    return f"{file}:{number}"
