"""Rows of JSON, one a line, whose text says what no table can hold: a column twice, or a lone
surrogate, which is half a character. And numbers that would not stay as they are written.

Parsers take them without a word, so they are looked for before a table is scanned.
"""

import json
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

_ESCAPED = re.compile(
    rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<lone>\\u[dD][89a-fA-F]..)|\\.", re.DOTALL
)
"""Two surrogates that make a character, one alone, or anything else after a backslash."""
_CHUNK = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPES = (b"\\u00", b"\\ud", b"\\uD")
"""How a column's name may be written otherwise, and how a surrogate is written."""
_STRING = rb'"(?:[^"\\\n]|\\.)*+"'
_NUMBER = rb"-?+(?:0|[1-9]\d*+)(?:\.\d++)?+(?:[eE][+-]?+\d++)?+(?=[ \t\r]*[,}\]])"
_ODD_NUMBER = rb"(?!(?:0|-?[1-9]\d{0,17})[ \t\r]*[,}\]])" + _NUMBER
"""A number that parsers write otherwise: with a fraction, an exponent or many digits, or -0."""
_IN_LIST = re.compile(_STRING + rb"|(?<![^\[, \t\r])" + _NUMBER)


@dataclass(frozen=True)
class OddRows:
    """What was found in the text of a table.

    Attributes:
        problems: row index → reason and message of the rows that cannot be used.
        broken: indices of rows that hold lone surrogates, in columns that are read or not.
    """

    problems: dict[int, tuple[str, str]] = field(default_factory=dict[int, tuple[str, str]])
    broken: set[int] = field(default_factory=set[int])


def lines_of(text: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and text of the lines that are not empty."""
    with text.open("rb") as source:
        for number, line in enumerate(source, 1):
            if line.strip():
                yield number, line


def odd_rows(text: Path, columns: Sequence[str]) -> OddRows:
    """Look through all rows. Those that are no JSON are passed over.

    Args:
        columns: the columns that are read.
    """
    found = OddRows()
    rows = 0
    with text.open("rb") as source:
        for chunk in _whole_lines(source):
            lines = [line for line in chunk.split(b"\n") if line.strip()]
            for at in _suspects(chunk, lines, columns):
                if _mended(lines[at]) != lines[at]:
                    found.broken.add(rows + at)
                problem = _problem(_pairs(lines[at]), columns)
                if problem is not None:
                    found.problems[rows + at] = problem
            rows += len(lines)
    return found


def _suspects(chunk: bytes, lines: Sequence[bytes], columns: Sequence[str]) -> set[int]:
    """Indices of the lines that may be odd: to parse every line would take longer than all else.

    Args:
        lines: those of the chunk that are not empty.
    """
    found: set[int] = set()
    escapes = [*_ESCAPES]
    for column in columns:
        plain, escaped = (json.dumps(column, ensure_ascii=a).encode() for a in (False, True))
        found.update([at for at, line in enumerate(lines) if line.count(plain) > 1])
        if escaped != plain:
            escapes.append(escaped)
    for escape in escapes:
        if escape in chunk:
            found.update(at for at, line in enumerate(lines) if escape in line)
    return found


def mended(text: Path, copy: Path, broken: Set[int]) -> Path:
    """A copy of the rows in which a question mark stands for every lone surrogate."""
    with copy.open("wb") as target:
        for index, (_, line) in enumerate(lines_of(text)):
            target.write(_mended(line) if index in broken else line)
    return copy


def with_written_numbers(text: Path, copy: Path, columns: Sequence[str]) -> Path:
    """The rows with the numbers of columns as strings of what is written: a caption `2.0` is no `2`.

    Args:
        columns: those that hold text or files, or lists of them.

    Returns:
        The text itself, where every number stays as it is written; else the copy.
    """
    patterns = [_odd_numbers(column) for column in columns]
    with text.open("rb") as source:
        if not any(p.search(chunk) for chunk in _whole_lines(source) for p in patterns):
            return text
    with text.open("rb") as source, copy.open("wb") as target:
        for chunk in _whole_lines(source):
            for pattern in patterns:
                chunk = pattern.sub(_as_strings, chunk)
            target.write(chunk)
    return copy


def _whole_lines(source: BinaryIO) -> Iterator[bytes]:
    """The text in parts that end where a line ends."""
    while chunk := source.read(_CHUNK) + source.readline():
        yield chunk


def _odd_numbers(column: str) -> re.Pattern[bytes]:
    """The column's name, and behind it an odd number, or a list. In JSON a quote inside a string has a
    backslash before it: the name in quotes, with a colon behind it, is a name."""
    name = re.escape(json.dumps(column, ensure_ascii=False).encode())
    listed = rb"\[(?:[^\]\[\"{}\n]|" + _STRING + rb")*+\]"
    space = rb"[ \t\r]*+"
    return re.compile(
        b"(?P<name>"
        + name
        + space
        + b":"
        + space
        + b")(?=[-\\d\\[])(?:(?P<one>"
        + _ODD_NUMBER
        + b")|"
        b"(?P<list>(?=\\[(?:[^\n]*?[, \t\r])?" + _ODD_NUMBER + b")" + listed + b"))"
    )


def _as_strings(found: re.Match[bytes]) -> bytes:
    """What `_odd_numbers` found, with numbers as strings."""
    if found["one"] is not None:
        return found["name"] + b'"' + found["one"] + b'"'

    def quoted(item: re.Match[bytes]) -> bytes:
        return item[0] if item[0].startswith(b'"') else b'"' + item[0] + b'"'

    return found["name"] + _IN_LIST.sub(quoted, found["list"])


def with_lists(text: Path, copy: Path, columns: Sequence[str]) -> Path:
    """A copy of a jsonl file in which the columns hold nothing but lists of text, and nulls.

    Raises:
        ValueError, AttributeError, RecursionError: a line is no row.
    """
    with copy.open("w", encoding="utf-8") as target:
        for _, line in lines_of(text):
            row: dict[str, Any] = json.loads(line)
            row |= {name: as_list(row.get(name)) for name in columns}
            target.write(json.dumps(row) + "\n")
    return copy


def as_list(value: Any) -> list[str | None] | None:
    """A json value as a list of text: itself, or the only element; None for what cannot be one."""
    if value is None or isinstance(value, dict | bool):
        return None
    elements: list[Any] = value if isinstance(value, list) else [value]
    return [v if v is None or isinstance(v, str) else json.dumps(v) for v in elements]


def _mended(line: bytes) -> bytes:
    return _ESCAPED.sub(lambda found: b"?" if found["lone"] else found[0], line)


class _Object(list[tuple[str, Any]]):
    """A JSON object as a list of its names and values, as they are written."""


def _pairs(line: bytes) -> list[tuple[str, Any]]:
    """A row; nothing for what is none."""
    try:
        value = json.loads(line, object_pairs_hook=_Object)
    except (ValueError, RecursionError):
        return []
    return value if isinstance(value, _Object) else []


def _problem(pairs: Sequence[tuple[str, Any]], columns: Sequence[str]) -> tuple[str, str] | None:
    names = [name for name, _ in pairs]
    for column in columns:
        if names.count(column) > 1:
            return "repeated_key", f"{column}: the row has this key {names.count(column)} times"
    for name, value in pairs:
        texts: list[Any] = value if isinstance(value, list) else [value]
        if name in columns and any(isinstance(t, str) and _SURROGATE.search(t) for t in texts):
            return "lone_surrogate", f"{name}: the value holds half a character, a lone surrogate"
    return None
