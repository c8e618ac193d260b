"""What a check found, and the table of all."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

OK, WARN, FAIL = "ok", "warn", "fail"
_WIDTH = 110


class Finding(NamedTuple):
    """One line of the table; ``remedy`` is empty where nothing is to be done."""

    check: str
    finding: str
    state: str = OK
    remedy: str = ""
    host: str = ""


def failed(findings: Sequence[Finding]) -> bool:
    """Whether a run would not work."""
    return any(finding.state == FAIL for finding in findings)


def table(findings: Sequence[Finding]) -> str:
    """The findings as lines: state, check, host where there are several, finding, remedy below it."""
    several = len({finding.host for finding in findings}) > 1
    names = [_name(finding, several=several) for finding in findings]
    width = max((len(name) for name in names), default=0)
    lines = []
    for finding, name in zip(findings, names, strict=True):
        head = f"{finding.state:4}  {name:{width}}  "
        lines.append(_wrapped(finding.finding, head, indent=len(head)))
        if finding.remedy:
            lines.append(_wrapped(finding.remedy, f"{'':{len(head)}}-> ", indent=len(head) + 3))
    counts = [
        (state, sum(found.state == state for found in findings)) for state in (FAIL, WARN, OK)
    ]
    lines.append(", ".join(f"{count} {state}" for state, count in counts if count) or "no checks")
    return "\n".join(lines) + "\n"


def _name(finding: Finding, *, several: bool) -> str:
    return f"{finding.check} ({finding.host})" if several and finding.host else finding.check


def _wrapped(text: str, head: str, *, indent: int) -> str:
    return textwrap.fill(
        text,
        width=max(_WIDTH, indent + 50),
        initial_indent=head,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
