"""What would crash, fill the memory or mislead the libraries that read data files.

Run once per file, when it is converted, or line by line while it is streamed: Arrow's JSON parser ends the process without a word
(a stack overflow) on deep nesting, and a compressed or sparse member of an archive can be a
thousand times larger than the archive.
"""

from __future__ import annotations

import gzip
import json
import mmap
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

MAX_LINE_BYTES = 64 * 2**20
MAX_DEPTH = 64
MAX_MEMBER_BYTES = 2**30
MAX_RATIO = 200  # texts shrink to a tenth; gzip can do a thousandth

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
COMPRESSED_MEMBERS = (".gz", ".bz2", ".xz", ".lz4", ".zst")

# A string, whose brackets do not count, or a bracket. Possessive, so that a long string costs
# no memory.
JSON_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[\]}]', re.DOTALL)


class BadLineError(ValueError):
    """A line, or what a file grows to, must not be handed to a parser."""


def data_suffix(file: Path) -> str:
    """The suffix that says what is in a file: ``.jsonl`` of ``pairs.jsonl.gz``; lower case."""
    name = Path(file.stem) if file.suffix.lower() == ".gz" else file
    return name.suffix.lower()


def open_plain(file: Path) -> BinaryIO:
    """The bytes of a file, decompressed where its name ends in ``.gz``."""
    if file.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(file, "rb"))
    return file.open("rb")


def file_problem(file: Path) -> str | None:
    """Why a data file must not be handed to its parser, or None.

    Args:
        file: An existing file of a known suffix. Read once, in bounded memory.

    Returns:
        A rule and a remedy, with the line where there is one.
    """
    suffix = data_suffix(file)
    try:
        if suffix == ".tar":
            return _tar_problem(file)
        if suffix not in TEXT_SUFFIXES:
            return None
        if suffix == ".json" and starts_with_bracket(file):
            return _array_problem(file)
        return _text_problem(file, is_json=suffix in (".jsonl", ".json"))
    except (OSError, EOFError, tarfile.TarError) as error:
        return f"cannot be read ({error}); replace the file"


def first_json_problem(file: Path) -> str | None:
    """Finds the first line that is not a JSON object; None for one big JSON value."""
    with open_plain(file) as stream:
        for number, line in enumerate(stream, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            if number == 1 and data_suffix(file) == ".json" and line.lstrip()[:1] == b"[":
                return None
            try:
                value = json.loads(line)
            except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
                return f"line {number} is not valid JSON ({error})"
            if not isinstance(value, dict):
                return f"line {number} is {type(value).__name__}, not a JSON object"
    return None


def checked_lines(file: Path, *, is_json: bool) -> Iterator[tuple[int, bytes]]:
    """The lines of a text file, each looked at before anybody parses it.

    Args:
        file: Plain, or compressed with gzip.
        is_json: Whether brackets nest.

    Yields:
        Number, from 1, and bytes of each line, its end included.

    Raises:
        BadLineError: A rule and a remedy, with the line where there is one.
    """
    depth = total = 0
    largest = MAX_RATIO * file.stat().st_size
    with open_plain(file) as stream:
        for number, line in _bounded_lines(stream):
            total += len(line)
            if file.suffix.lower() == ".gz" and total > largest:
                raise BadLineError(
                    f"grows to more than {MAX_RATIO} times its size; decompress it yourself"
                )
            if problem := _line_problem(line, is_first=number == 1):
                raise BadLineError(f"line {number} {problem}")
            if is_json:
                depth, deepest = _depths(line, depth)
                if deepest > MAX_DEPTH:
                    raise BadLineError(
                        f"line {number} is nested more than {MAX_DEPTH} levels deep; flatten it"
                    )
            yield number, line


def _text_problem(file: Path, *, is_json: bool) -> str | None:
    try:
        for _ in checked_lines(file, is_json=is_json):
            pass
    except BadLineError as error:
        return str(error)
    return None


def _bounded_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        yield number, line


def _line_problem(line: bytes, *, is_first: bool) -> str | None:
    if is_first and line.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "is UTF-16; save the file as UTF-8"
    if len(line) > MAX_LINE_BYTES:
        return f"is longer than {MAX_LINE_BYTES >> 20} MiB; put images into files of their own"
    if b"\0" in line:
        return "holds a NUL byte, so that the file is damaged or no text; write it again"
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"is not UTF-8 ({error}); save the file as UTF-8"
    return None


def _depths(line: bytes, depth: int) -> tuple[int, int]:
    """Depth after the line, and the greatest in it, from the depth before it."""
    opened = line.count(b"[") + line.count(b"{")
    if depth + opened <= MAX_DEPTH and opened == line.count(b"]") + line.count(b"}"):
        return depth, depth  # most lines, at the speed of memory
    deepest = depth
    for match in JSON_TOKEN.finditer(line):
        token = match[0]
        if token in (b"[", b"{"):
            depth += 1
            deepest = max(deepest, depth)
        elif token in (b"]", b"}"):
            depth = max(0, depth - 1)
    return depth, deepest


def starts_with_bracket(file: Path) -> bool:
    """Whether a JSON file is one array, and not one object a line."""
    with open_plain(file) as stream:
        return stream.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _array_problem(file: Path) -> str | None:
    """One JSON value, which its parser holds in memory as a whole."""
    if file.suffix.lower() == ".gz":
        return "is one JSON array; save it as JSON lines, one object a line"
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        depth = 0
        for match in JSON_TOKEN.finditer(data):
            token = match[0][:1]
            depth += (token in b"[{") - (token in b"]}")
            if depth > MAX_DEPTH:
                return f"is nested more than {MAX_DEPTH} levels deep; flatten it"
    return None


def _tar_problem(file: Path) -> str | None:
    """Nothing is ever extracted: names are only keys, links and devices are passed over."""
    with tarfile.open(file, "r:") as archive:
        for member in archive:
            if problem := member_problem(member):
                return problem
    return None


def member_problem(member: tarfile.TarInfo) -> str | None:
    """Why a member of an archive must not be read, or None; also for what is no file."""
    if member.issparse() or (member.isreg() and member.size > MAX_MEMBER_BYTES):
        return (
            f"member {member.name!r} is sparse or larger than "
            f"{MAX_MEMBER_BYTES >> 30} GiB; remove it"
        )
    if member.isreg() and member.name.lower().endswith(COMPRESSED_MEMBERS):
        return f"member {member.name!r} is compressed; store it as it is"
    return None
