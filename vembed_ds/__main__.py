"""``python -m vembed_ds`` is ``vembed-ds``."""

from __future__ import annotations

from vembed_ds.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
