"""Captions that lie in text files beside the samples: `cat.txt` for `cat.png`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.table.read import INDEX, Table, text_codec

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
            ParameterError: there is no such encoding.
        """
        codec = text_codec(self.encoding)
        encoding = "utf-8-sig" if codec.name == "utf-8" else codec.name
        problems = dict(table.problems)
        texts: list[str | None] = []
        for index, path in table.rows.select(INDEX, file).iter_rows():
            text, problem = self._read(path, encoding)
            if text is None and isinstance(path, str) and path in instead:
                text, problem = instead[path], None
            if problem is not None:
                problems.setdefault(index, problem)
            texts.append(text)
        return replace(
            table,
            rows=table.rows.with_columns(_captions(texts, caption)),
            columns=(*table.columns, caption.column),
            problems=problems,
        )

    def _read(self, path: object, encoding: str) -> tuple[str | None, tuple[str, str] | None]:
        """The text of a caption file, or why there is none: reason and message."""
        if not isinstance(path, str):  # the row is refused for that
            return None, None
        name = os.path.splitext(path)[0] + self.extension
        try:
            return Path(self.base, name).read_text(encoding=encoding), None
        except (FileNotFoundError, NotADirectoryError):
            why = f"there is no caption file '{name}'"
            return None, (_NONE, why) if self.required else None
        except (OSError, ValueError) as error:
            what = f"is not {self.encoding} text" if isinstance(error, UnicodeError) else str(error)
            return None, (_UNREADABLE, f"the caption file '{name}': {what}")


def _captions(texts: Sequence[str | None], caption: Input) -> pl.Series:
    """The texts of files as a column of captions."""
    if not caption.many:
        plain = [None if text is None else " ".join(text.split()) for text in texts]
        return pl.Series(caption.column, plain, dtype=pl.String)
    # Lists are cut out of one text each: those of Python would be a builder each for Polars.
    lines = pl.Series(caption.column, texts, dtype=pl.String).str.replace_all(r"[^\S\n\r]+", " ")
    listed = lines.str.replace_all(r"\r\n?", "\n").str.split("\n")
    kept = pl.element().str.strip_chars()
    return listed.list.eval(kept.filter(kept != ""))
