"""The README says what the code does; `tests/integration/test_readme_commands.py` runs it."""

from __future__ import annotations

import re
from pathlib import Path

from vembed_ds.config.table import config_table

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()


def test_the_config_table_is_the_generated_one() -> None:
    assert config_table().strip() in README


def test_every_file_it_names_exists() -> None:
    named = set(re.findall(r"(?:ds_configs|launch|examples|docs|tests)/[\w./-]+", README))
    assert {"launch/quickstart.sh", "launch/test.sh", "ds_configs/zero2.json"} <= named
    for name in named:
        assert (ROOT / name.rstrip(".")).exists(), name
