"""A JSON array of any length, rewritten to one element for each line."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TextIO

_CHUNK = 1 << 20
_SPACE = " \t\r\n"
_LONGEST_TOKEN = 16
"""An error this near to the end of what was read may come from what was not."""


def json_array_to_lines(source: Path, target: Path) -> int:
    """Write the elements of the array in `source` to `target`, a line each.

    Returns:
        How many there are.

    Raises:
        ValueError: the file is no JSON array; it says near which element (from 1) and line.
        OSError: a file cannot be read or written.
    """
    with source.open(encoding="utf-8") as text, target.open("w", encoding="utf-8") as lines:
        return _Reader(text).copy(lines)


class _Reader:
    """Takes elements off a text that is read in chunks."""

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self._buffer = ""
        self._at = 0
        self._line = 1
        self._ended = False
        self._decoder = json.JSONDecoder()

    def copy(self, lines: TextIO) -> int:
        if self._next() != "[":
            raise ValueError(self._other_form())
        self._at += 1
        count = 0
        mark = self._next()
        while mark != "]":
            lines.write(self._element(count + 1))
            count += 1
            mark = self._next()
            if mark == ",":
                self._at += 1
                self._next()
            elif mark != "]":
                raise ValueError(f"row {count} is followed by no comma, line {self._here()}")
        self._at += 1
        if self._next():
            raise ValueError(f"something follows the list, line {self._here()}")
        return count

    def _other_form(self) -> str:
        """What is wrong with a file that does not begin with a bracket."""
        if self._next() == "{":
            with suppress(ValueError):
                self._element(1)
                if self._next() == "{":
                    return "it holds an object on each line, not one list: call the file .jsonl"
        return "it is not a JSON list of rows, line 1"

    def _more(self) -> bool:
        """Read on; whether there was more."""
        self._line += self._buffer.count("\n", 0, self._at)
        chunk = "" if self._ended else self._text.read(max(_CHUNK, len(self._buffer)))
        self._buffer = self._buffer[self._at :] + chunk
        self._at = 0
        self._ended = not chunk
        return bool(chunk)

    def _here(self) -> int:
        return self._line + self._buffer.count("\n", 0, self._at)

    def _next(self) -> str:
        """The next character that is no space, or nothing at the end."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def _element(self, number: int) -> str:
        while True:
            try:
                _, end = self._decoder.raw_decode(self._buffer, self._at)
            except RecursionError as error:
                raise ValueError(f"row {number} is nested too deeply") from error
            except json.JSONDecodeError as error:
                line = self._line + error.lineno - 1
                near_end = error.pos >= len(self._buffer) - _LONGEST_TOKEN
                if (near_end or error.msg.startswith("Unterminated")) and self._more():
                    continue
                raise ValueError(f"row {number} is not JSON: {error.msg}, line {line}") from error
            length = end - self._at
            text = self._buffer[self._at : end]
            if end == len(self._buffer) and self._more():
                continue  # a number may go on in what was read
            self._at += length
            return text.replace("\n", " ").replace("\r", " ") + "\n"
