"""The README's tables of keys: ``python -m vembed_ds.config.table``."""

from __future__ import annotations

import json
import sys

from vembed_ds.config.fields import Section
from vembed_ds.config.schema import ALIASES, SECTIONS


def config_table() -> str:
    """Every key with its default and meaning, one Markdown table per section."""
    return "\n".join(_section_table(name, schema) for name, schema in SECTIONS.items())


def _section_table(name: str, schema: type[Section]) -> str:
    rows = [f"**`{name}`**", "", "| key | default | meaning |", "| --- | --- | --- |"]
    for key, field in schema.model_fields.items():
        default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        rows.append(f"| `{key}`{_aliases(key)} | {default} | {field.description} |")
    return "\n".join([*rows, ""])


def _aliases(key: str) -> str:
    return "".join(f" (`{alias}`)" for alias, target in ALIASES.items() if target == key)


if __name__ == "__main__":
    sys.stdout.write(config_table())
