"""YAML file and ``key=value`` overrides to a validated :class:`Config`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vembed_ds.config.describe import describe_field
from vembed_ds.config.schema import ALIASES, SECTION_OF, SECTIONS, Config, Section
from vembed_ds.config.validation import cross_field_problems
from vembed_ds.config.yaml_text import dump_yaml, parse_scalar, parse_yaml, read_yaml_mapping
from vembed_ds.errors import ConfigError

OVERRIDE = "--config_override"


@dataclass(frozen=True)
class _Setting:
    """One value a user gave: its key, the key as it was spelled, and where."""

    name: str
    value: Any
    spelling: str
    origin: str

    def __str__(self) -> str:
        return f"{self.spelling}={self.value!r}"


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read, merge and validate the configuration of a run.

    Args:
        path: YAML file with flat keys, sections, or both; None for overrides only.
        overrides: ``key=value`` or ``section.key=value``; they win over the file.

    Raises:
        ConfigError: Listing every problem found; no value is guessed or dropped.
    """
    values = {} if path is None else read_yaml_mapping(Path(path))
    return parse_config(values, origin=str(path), overrides=overrides)


def setting_origins(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Where each given value came from, for messages: the file, or ``--config_override``.

    Args:
        path: As in :func:`load_config`, which has checked both.
        overrides: As in :func:`load_config`.

    Returns:
        Origin by key; a key that is missing has its default.
    """
    values = {} if path is None else read_yaml_mapping(Path(path))
    problems: list[str] = []
    settings = _collect(_flatten(values, str(path), problems), str(path), problems)
    given = _flatten_all(_read_overrides(overrides, problems), problems)
    settings |= _collect(given, OVERRIDE, problems)
    return {name: setting.origin for name, setting in settings.items()}


def parse_config(
    values: Mapping[Any, Any], *, origin: str = "config", overrides: Sequence[str] = ()
) -> Config:
    """Validate values that are already in memory; otherwise as :func:`load_config`.

    Args:
        values: Flat keys, sections, or both.
        origin: Where the values came from, for messages.
        overrides: ``key=value`` or ``section.key=value``; they win over ``values``.

    Raises:
        ConfigError: Listing every problem found.
    """
    problems: list[str] = []
    settings = _collect(_flatten(values, origin, problems), origin, problems)
    given = _flatten_all(_read_overrides(overrides, problems), problems)
    settings |= _collect(given, OVERRIDE, problems)
    config, invalid = _build(settings, problems)
    problems += cross_field_problems(config, skip=invalid)
    if problems:
        raise ConfigError(problems)
    return config


def dump_config(config: Config) -> str:
    """Write every value, defaults too, as YAML that :func:`load_config` reads back as equal."""
    values = config.model_dump(mode="json")
    if config.data.num_workers == 0:
        # These have no effect without workers, and giving them is an error then.
        for name in {"prefetch_factor", "persistent_workers"} - config.data.model_fields_set:
            del values["data"][name]
    return dump_yaml(values)


def _read_overrides(tokens: Sequence[str], problems: list[str]) -> Iterator[dict[str, Any]]:
    """One mapping per token, so that a key given twice is seen."""
    for token in tokens:
        key, equals, text = token.partition("=")
        if not (equals and key.strip()):
            problems.append(f"{token!r} ({OVERRIDE}): expected key=value")
            continue
        try:
            yield {key.strip(): _read_value(text.strip(), key.strip())}
        except ConfigError as error:
            problems += error.problems


def _read_value(text: str, key: str) -> Any:
    if text[:1] in ("[", "{"):
        return parse_yaml(text, origin=f"{key}={text} ({OVERRIDE})")
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return None if text.lower() in ("none", "null") else parse_scalar(text)


def _flatten(
    values: Mapping[Any, Any], origin: str, problems: list[str]
) -> Iterator[tuple[str, Any]]:
    """Yield (key as spelled, value): ``lr`` or ``optimizer.lr``."""
    for key, value in values.items():
        if key not in SECTIONS:
            yield str(key), value
        elif isinstance(value, Mapping):
            yield from ((f"{key}.{leaf}", inner) for leaf, inner in value.items())
        else:
            problems.append(
                f"{key}={value!r} ({origin}): {key} is a section; expected a mapping of its keys"
            )


def _flatten_all(
    mappings: Iterable[Mapping[str, Any]], problems: list[str]
) -> Iterator[tuple[str, Any]]:
    for mapping in mappings:
        yield from _flatten(mapping, OVERRIDE, problems)


def _collect(
    pairs: Iterable[tuple[str, Any]], origin: str, problems: list[str]
) -> dict[str, _Setting]:
    """Name every key; two spellings of one key must agree."""
    settings: dict[str, _Setting] = {}
    for spelling, value in pairs:
        if problem := _key_problem(spelling, value, origin):
            problems.append(problem)
            continue
        setting = _Setting(_leaf_name(spelling), value, spelling, origin)
        first = settings.setdefault(setting.name, setting)
        if first.value != value:
            problems.append(
                f"{first} and {setting} ({origin}): one setting with two values; keep one"
            )
    return settings


def _leaf_name(spelling: str) -> str:
    leaf = spelling.rpartition(".")[2]
    return ALIASES.get(leaf, leaf)


def _key_problem(spelling: str, value: Any, origin: str) -> str | None:
    section, _, leaf = spelling.rpartition(".")
    home = SECTION_OF.get(_leaf_name(spelling))
    if home is not None and section in ("", home):
        return None
    if home is not None and section in SECTIONS:
        return (
            f"{spelling}={value!r} ({origin}): {leaf} belongs to section {home}; "
            f"write {home}.{leaf}, or {leaf} outside sections"
        )
    near = difflib.get_close_matches(leaf, [*SECTION_OF, *ALIASES, *SECTIONS], n=1)
    remedy = f"did you mean {near[0]}?" if near else "remove it (the README lists all keys)"
    return f"{spelling}={value!r} ({origin}): unknown key; {remedy}"


def _build(settings: Mapping[str, _Setting], problems: list[str]) -> tuple[Config, set[str]]:
    """Build the config from the valid values; name the keys whose value is invalid or missing.

    The config is returned even when problems were found, so that cross-field rules on the other
    keys are reported in the same error.
    """
    invalid: set[str] = set()
    sections: dict[str, Section] = {}
    for section, schema in SECTIONS.items():
        given = {name: s.value for name, s in settings.items() if SECTION_OF[name] == section}
        rules = _broken_rules(schema, given)
        problems += [_value_problem(name, rule, settings) for name, rule in rules.items()]
        invalid |= set(rules)
        valid = {name: value for name, value in given.items() if name not in rules}
        # "." stands for a required text that is absent or wrong; rules on its key are skipped.
        filler = {name: "." for name in rules if schema.model_fields[name].is_required()}
        sections[section] = schema.model_validate(filler | valid)
    return Config(**sections), invalid  # type: ignore[arg-type]


def _value_problem(name: str, rule: str, settings: Mapping[str, _Setting]) -> str:
    if name not in settings:
        return f"{name}: required, but not given; expected {rule}"
    return f"{settings[name]} ({settings[name].origin}): {rule}"


def _broken_rules(schema: type[Section], values: Mapping[str, Any]) -> dict[str, str]:
    """Validate one section; return the broken rule of each key, without pydantic's words."""
    try:
        schema.model_validate(dict(values))
    except ValidationError as error:
        errors = error.errors(include_url=False)
        names = dict.fromkeys(str(e["loc"][0]) for e in errors)
        return {
            name: _rule(schema, name, values, [e for e in errors if e["loc"][0] == name])
            for name in names
        }
    return {}


def _rule(
    schema: type[Section], name: str, values: Mapping[str, Any], errors: Sequence[Any]
) -> str:
    expected = describe_field(schema.model_fields[name])
    if name not in values:
        return expected
    if own := [str(e["ctx"]["error"]) for e in errors if e["type"] == "value_error"]:
        return own[0]
    if isinstance(values[name], Mapping):
        inner = [(e["type"], e["loc"][-1]) for e in errors]
        for kind, word in (("extra_forbidden", "unknown"), ("missing", "missing")):
            if keys := [str(key) for found, key in inner if found == kind]:
                return f"{word} key {keys[0]}; expected {expected}"
    is_number = isinstance(values[name], int | float)
    hint = "; put it in quotes" if is_number and "text" in expected else ""
    return f"expected {expected}{hint}"
