"""Rows of JSON, one a line, whose text says what no table can hold: a column twice, or a lone
surrogate, which is half a character.

Parsers take both without a word, so they are looked for before a table is scanned.
"""

import json
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_ESCAPED = re.compile(
    rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<lone>\\u[dD][89a-fA-F]..)|\\.", re.DOTALL
)
"""Two surrogates that make a character, one alone, or anything else after a backslash."""
_CHUNK = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPES = (b"\\u00", b"\\ud", b"\\uD")
"""How a column's name may be written otherwise, and how a surrogate is written."""


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
        while chunk := source.read(_CHUNK) + source.readline():
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
