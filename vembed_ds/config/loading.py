"""YAML file and ``key=value`` overrides to a validated :class:`Config`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from vembed_ds.config.compat import (
    NULL_IS_DEFAULT,
    forced_pooling,
    needless_model_name,
    translate,
)
from vembed_ds.config.describe import describe_field, entry_type
from vembed_ds.config.fields import Section
from vembed_ds.config.schema import ALIASES, SECTION_OF, SECTIONS, Config, default_of
from vembed_ds.config.validation import cross_field_problems
from vembed_ds.config.yaml_text import dump_yaml, parse_scalar, parse_yaml, read_yaml_mapping
from vembed_ds.errors import ConfigError

OVERRIDE = "--config_override"


class Layer(NamedTuple):
    """Values from one place.

    Attributes:
        values: Flat keys, sections, or both.
        origin: The place, for messages.
    """

    values: Mapping[Any, Any]
    origin: str


class ReadConfig(NamedTuple):
    """A configuration that was read.

    Attributes:
        config: Validated.
        origins: Where each given value came from, as of :func:`setting_origins`.
        notices: As of :func:`config_notices`.
    """

    config: Config
    origins: dict[str, str]
    notices: list[str]


@dataclass(frozen=True)
class _Setting:
    """One value a user gave: its key, the key as it was spelled, and where."""

    name: str
    value: Any
    spelling: str
    origin: str

    given: Any  # as the user wrote it

    def __str__(self) -> str:
        return f"{self.spelling}={self.given!r}"


@dataclass
class _Reading:
    """What was found in a file and its overrides."""

    settings: dict[str, _Setting] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


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
    settings = _read([Layer(values, str(path))], overrides).settings
    return {name: setting.origin for name, setting in settings.items()}


def config_notices(path: str | Path | None, overrides: Sequence[str] = ()) -> list[str]:
    """One line for each key that was accepted and does not do what it says.

    Args:
        path: As in :func:`load_config`, which has checked both.
        overrides: As in :func:`load_config`.
    """
    values = {} if path is None else read_yaml_mapping(Path(path))
    return _read([Layer(values, str(path))], overrides).notices


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
    return read_layers([Layer(values, origin)], overrides).config


def read_layers(
    layers: Sequence[Layer], overrides: Sequence[str] = (), *, data_comes_later: bool = False
) -> ReadConfig:
    """Validate values from several places; otherwise as :func:`load_config`.

    Args:
        layers: Later ones win.
        overrides: As in :func:`load_config`; they win over all layers.
        data_comes_later: Take it that ``data_path`` and ``val_data_path``, where they are missing, will
            be given; they are ``None`` in the configuration.

    Raises:
        ConfigError: Listing every problem found.
    """
    reading = _read(layers, overrides)
    origins = {name: setting.origin for name, setting in reading.settings.items()}
    awaited = _await_data(reading.settings) if data_comes_later else {}
    config, invalid = _build(reading.settings, reading.problems)
    reading.problems += cross_field_problems(config, skip=invalid)
    if reading.problems:
        raise ConfigError(reading.problems)
    data = config.data.model_copy(update=awaited)
    return ReadConfig(config.model_copy(update={"data": data}), origins, reading.notices)


def _await_data(settings: dict[str, _Setting]) -> dict[str, None]:
    """Put a stand-in where no data is named, which suits every rule; gives the keys, with null."""
    if "datasets" in settings and settings["datasets"].value:
        return {}
    names = ("data_path", "val_data_path")
    missing = [n for n in names if n not in settings or settings[n].value is None]
    settings |= {name: _Setting(name, ".", name, "default", None) for name in missing}
    return dict.fromkeys(missing)


def dump_config(config: Config) -> str:
    """Write every value, defaults too, as YAML that :func:`load_config` reads back as equal."""
    values = config.model_dump(mode="json")
    if config.data.num_workers == 0:
        # These have no effect without workers, and giving them is an error then.
        for name in {"prefetch_factor", "persistent_workers"} - config.data.model_fields_set:
            del values["data"][name]
    return dump_yaml(values)


def _read(layers: Sequence[Layer], overrides: Sequence[str]) -> _Reading:
    """Name every key of the layers, of which later ones win, and of the overrides, which win."""
    reading = _Reading()
    problems = reading.problems
    for values, origin in layers:
        reading.settings |= _collect(_flatten(values, origin, problems), origin, reading)
    given = _flatten_all(_read_overrides(overrides, problems), problems)
    reading.settings |= _collect(given, OVERRIDE, reading)
    given_values = {name: setting.value for name, setting in reading.settings.items()}
    if notice := needless_model_name(given_values):
        dropped = reading.settings.pop("model_name")
        reading.notices.append(f"{dropped} ({dropped.origin}): {notice}")
    if pooling := forced_pooling(given_values):
        _force("pooling_method", pooling, because=reading.settings["loss_type"], reading=reading)
    return reading


def _force(name: str, value: Any, *, because: _Setting, reading: _Reading) -> None:
    """Set a key that another one decides, and say so where the user wrote something else."""
    stated = reading.settings.get(name)
    if stated is not None and stated.value not in (None, value):
        reading.notices.append(f"{stated} ({stated.origin}): {because} needs {name}={value!r}")
    reading.settings[name] = _Setting(name, value, name, because.origin, value)


def _read_overrides(tokens: Sequence[str], problems: list[str]) -> Iterator[dict[str, Any]]:
    """One mapping per token, so that a key given twice is seen."""
    for token in tokens:
        key, equals, text = token.partition("=")
        if not (equals and key.strip() and text.strip()):  # `lr=$UNSET` would mean the default
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
    pairs: Iterable[tuple[str, Any]], origin: str, reading: _Reading
) -> dict[str, _Setting]:
    """Name every key; two spellings of one key must agree, unless one of them is null."""
    settings: dict[str, _Setting] = {}
    for spelling, value in pairs:
        setting = _setting(spelling, value, origin, reading)
        if setting is None:
            continue
        first = settings.setdefault(setting.name, setting)
        if first.spelling != spelling and None in (first.given, value):
            settings[setting.name] = setting if first.given is None else first
        elif first.value != setting.value:
            reading.problems.append(
                f"{first} and {setting} ({origin}): one setting with two values; keep one"
            )
    return settings


def _setting(spelling: str, value: Any, origin: str, reading: _Reading) -> _Setting | None:
    """What one line sets; ``None`` when it sets nothing, which is reported where it matters."""
    legacy = translate(spelling.rpartition(".")[2], value)
    if legacy is not None:
        for text, found in (
            (legacy.notice, reading.notices),
            (legacy.problem, reading.problems),
        ):
            if text is not None:
                found.append(f"{spelling}={value!r} ({origin}): {text}")
        if legacy.name is None:
            return None
        return _Setting(legacy.name, legacy.value, spelling, origin, value)
    if problem := _key_problem(spelling, value, origin):
        reading.problems.append(problem)
        return None
    name = _leaf_name(spelling)
    meant = default_of(name) if value is None and name in NULL_IS_DEFAULT else value
    return _Setting(name, meant, spelling, origin, value)


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


def _entry_rule(schema: type[Section], name: str, errors: Sequence[Any]) -> str | None:
    """The broken rule of a value inside a list of mappings; ``None``: it is not one."""
    entry = entry_type(schema.model_fields[name])
    for error in errors if entry is not None else ():
        _, *inner = error["loc"]
        if len(inner) > 1 and inner[1] in entry.model_fields:  # type: ignore[union-attr]
            expected = describe_field(entry.model_fields[inner[1]])  # type: ignore[union-attr]
            return f"[{inner[0]}].{inner[1]}={error['input']!r}: expected {expected}"
    return None


def _rule(
    schema: type[Section], name: str, values: Mapping[str, Any], errors: Sequence[Any]
) -> str:
    expected = describe_field(schema.model_fields[name])
    if name not in values:
        return expected
    if own := [str(e["ctx"]["error"]) for e in errors if e["type"] == "value_error"]:
        return own[0]
    if problem := _entry_rule(schema, name, errors):
        return problem
    if isinstance(values[name], Mapping | list):
        inner = [(e["type"], e["loc"][-1]) for e in errors]
        for kind, word in (("extra_forbidden", "unknown"), ("missing", "missing")):
            if keys := [str(key) for found, key in inner if found == kind]:
                return f"{word} key {keys[0]}; expected {expected}"
    is_number = isinstance(values[name], int | float)
    hint = "; put it in quotes" if is_number and "text" in expected else ""
    return f"expected {expected}{hint}"
