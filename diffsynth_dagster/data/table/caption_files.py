"""Captions that lie in text files beside the samples: `cat.txt` for `cat.png`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.table.read import INDEX, Table

USUAL = ".txt"
_NONE = "no_caption_file"
_UNREADABLE = "unreadable_caption"


@dataclass(frozen=True)
class CaptionFiles:
    """Where captions lie.

    Attributes:
        base: the folder that the paths of a table start from.
        extension: of the files, such as .txt.
        encoding: of their text.
        required: whether a sample without a file is refused.
    """

    base: Path
    extension: str
    encoding: str
    required: bool

    def added(self, table: Table, file: str, caption: Input, instead: Mapping[str, str]) -> Table:
        """A table with the column of captions that its files have beside them.

        A caption is all of a file's text, with single spaces for line breaks; where a row may have several
        captions, each line of it is one.

        Args:
            file: the column of the samples' files.
            instead: path → the caption of a sample that has no file of its own.

        Raises:
            MetadataError: the table cannot be read.
        """
        rows = table.collect(table.rows)
        texts: list[list[str] | None] = []
        problems = dict(table.odd)
        for index, path in rows.select(INDEX, file).iter_rows():
            text, problem = self._read(path)
            if text is None and path in instead:
                text, problem = instead[path], None
            if problem is not None:
                problems.setdefault(index, problem)
            lines = None if text is None else [" ".join(line.split()) for line in text.splitlines()]
            texts.append(lines and [line for line in lines if line])
        values = pl.Series(caption.column, texts, dtype=pl.List(pl.String))
        if not caption.many:
            values = values.list.join(" ")
        return replace(
            table,
            rows=rows.with_columns(values).lazy(),
            columns=(*table.columns, caption.column),
            odd=problems,
        )

    def _read(self, path: str | None) -> tuple[str | None, tuple[str, str] | None]:
        """The text of a caption file, or why there is none: reason and message."""
        if path is None:
            return None, None
        name = os.path.splitext(path)[0] + self.extension
        encoding = "utf-8-sig" if self.encoding.lower() in ("utf-8", "utf8") else self.encoding
        try:
            return Path(self.base, name).read_text(encoding=encoding), None
        except (FileNotFoundError, NotADirectoryError):
            why = f"there is no caption file '{name}'"
            return None, (_NONE, why) if self.required else None
        except (OSError, ValueError) as error:
            what = f"is not {self.encoding} text" if isinstance(error, UnicodeError) else str(error)
            return None, (_UNREADABLE, f"the caption file '{name}': {what}")
