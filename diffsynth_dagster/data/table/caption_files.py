"""Read captions from text files beside the samples: `cat.txt` for `cat.png`."""

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
    """Where the caption files are.

    Attributes:
        base: the folder that the paths of a table are relative to.
        extension: extension of the caption files, such as .txt.
        encoding: encoding of the caption files.
        required: whether a sample without a caption file is rejected.
    """

    base: Path
    extension: str
    encoding: str
    required: bool

    def added(self, table: Table, file: str, caption: Input, instead: Mapping[str, str]) -> Table:
        """Add the column of captions to a table.

        The whole text of a caption file is one caption, with spaces for line breaks. If a row may
        have several captions, each line is one.

        Args:
            file: the column of the samples' files.
            instead: path → the caption of a sample without a caption file.

        Raises:
            ParameterError: the encoding does not exist.
        """
        codec = text_codec(self.encoding)
        encoding = "utf-8-sig" if codec.name == "utf-8" else codec.name  # skips a byte order mark
        problems = dict(table.problems)  # row index → reason and message; the first of a row counts
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
        """The text of a sample's caption file, or the reason and message why there is none."""
        if not isinstance(path, str):  # the row is rejected for its path already
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
    """Convert the texts of caption files to a column of captions."""
    if not caption.many:
        plain = [None if text is None else " ".join(text.split()) for text in texts]
        return pl.Series(caption.column, plain, dtype=pl.String)
    # Split the texts in Polars: it is slow to build a column from many small Python lists.
    lines = pl.Series(caption.column, texts, dtype=pl.String).str.replace_all(r"[^\S\n\r]+", " ")
    listed = lines.str.replace_all(r"\r\n?", "\n").str.split("\n")
    kept = pl.element().str.strip_chars()
    return listed.list.eval(kept.filter(kept != ""))
