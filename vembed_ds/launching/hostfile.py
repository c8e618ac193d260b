"""Host files: lines ``HOST slots=RANKS``, and which of their machines a launch uses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vembed_ds.errors import ConfigError

DEFAULT_HOSTFILE = "/job/hostfile"  # where the DeepSpeed launcher looks by itself


def hostfile_of(flags: Mapping[str, Any]) -> Path | None:
    """The host file of a launch; ``None``: it is on this machine alone.

    Raises:
        ConfigError: It does not exist; the launcher would start here, with a warning.
    """
    if "hostfile" in flags:
        path = Path(flags["hostfile"])
        if not path.is_file():
            raise ConfigError(
                f"--hostfile={path}: no such file; give one with a line `HOST slots=RANKS` per machine"
            )
        return path
    return Path(DEFAULT_HOSTFILE) if Path(DEFAULT_HOSTFILE).is_file() else None


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks of every host, in the order of the file.

    Raises:
        ConfigError: It cannot be read, a line is none, a host comes twice, or there is none.
    """
    hosts: dict[str, int] = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        # A name with a dash before it would be an option of ssh; some editors put U+FEFF there.
        found = re.match(r"([^\s\ufeff-]\S*)\s+slots=(\d+)(?=\s|#|$)", text)
        if found is None or int(found[2]) < 1:
            raise ConfigError(
                f"{path}, line {number}: {text!r}: must be `HOST slots=RANKS`, such as `node1 slots=8`"
            )
        if found[1] in hosts:
            raise ConfigError(f"{path}, line {number}: {found[1]} comes twice; give it one line")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ConfigError(f"{path}: names no host; give a line `HOST slots=RANKS` per machine")
    return hosts


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is not UTF-8; save it as plain text with a line `HOST "
            "slots=RANKS` per machine"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror or error}); correct its rights, or --hostfile"
        ) from error


def used_hosts(hosts: Mapping[str, int], flags: Mapping[str, Any]) -> dict[str, int]:
    """Hosts and their ranks that are left by --include, --exclude, --num_nodes and --num_gpus.

    Raises:
        ConfigError: They name a host or device that the file does not have, or leave none.
    """
    devices = {host: list(range(slots)) for host, slots in hosts.items()}
    for key in ("include", "exclude"):
        if key in flags:
            chosen = _parsed(flags[key], key=key, devices=devices)
            devices = chosen if key == "include" else _without(devices, chosen)
    left = {host: len(devices[host]) for host in hosts if devices.get(host)}
    left = dict(list(left.items())[: flags.get("num_nodes", len(left))])
    if not left:
        raise ConfigError(f"--exclude={flags.get('exclude')}: leaves no device to start on")
    if "num_nodes" in flags and len(left) < flags["num_nodes"]:
        raise ConfigError(
            f"--num_nodes={flags['num_nodes']}: the host file has {len(left)}; give it more lines"
        )
    return {host: flags.get("num_gpus", count) for host, count in left.items()}


def _parsed(text: str, *, key: str, devices: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Of ``a@b:0,2`` the devices of every host."""
    found: dict[str, list[int]] = {}
    for part in text.split("@"):
        host, _, numbers = part.partition(":")
        if host not in devices:
            raise ConfigError(
                f"--{key}={text}: {host!r} is not in the host file; it has {', '.join(devices)}"
            )
        listed = numbers.split(",") if numbers else [str(number) for number in devices[host]]
        if wrong := [
            word for word in listed if not word.isdecimal() or int(word) not in devices[host]
        ]:
            raise ConfigError(
                f"--{key}={text}: {host} has no device {wrong[0]}; it has 0 to {len(devices[host]) - 1}"
            )
        found.setdefault(host, []).extend(int(word) for word in listed)
    return {host: sorted(set(numbers)) for host, numbers in found.items()}


def _without(
    devices: Mapping[str, list[int]], left_out: Mapping[str, list[int]]
) -> dict[str, list[int]]:
    return {
        host: [number for number in numbers if number not in left_out.get(host, [])]
        for host, numbers in devices.items()
    }
