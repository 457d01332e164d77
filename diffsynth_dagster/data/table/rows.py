"""Read the rows of a data set from a table or a folder, and their captions from wherever they are.

No picture or clip is opened.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import polars as pl

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.table.caption_files import USUAL, CaptionFiles
from diffsynth_dagster.data.table.folder import class_names, numbered, open_folder
from diffsynth_dagster.data.table.read import Table, read_table, require_folder
from diffsynth_dagster.data.table.values import check_structure, is_blank, require_columns
from diffsynth_dagster.errors import MetadataError, ParameterError, nearest

REPEAT = "repeat"
"""Column of a checked table: how often each pass over the data set takes the row. The column is
left out if that is once for all rows."""


@dataclass(frozen=True)
class RowSource:
    """Where the rows of a data set are read from.

    Attributes:
        path: a metadata table, or a folder of files that is used as one.
        base: the folder that paths in the table are relative to.
        encoding: encoding of the table and of caption files.
        caption_extension, caption_prefix, folder_repeats: the parameters of these names.
        left_out: files and folders that are not part of the data set.
    """

    path: Path
    base: Path
    encoding: str
    caption_extension: str | None
    caption_prefix: str | None
    folder_repeats: dict[str, int]
    left_out: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: TrainingConfig) -> Self:
        """The source of a config's rows."""
        assert config.dataset_metadata_path is not None
        own = (config.output_path, config.cache_path, config.validation_metadata_path)
        return cls(
            Path(config.dataset_metadata_path),
            Path(config.dataset_base_path),
            config.metadata_encoding,
            config.caption_extension,
            config.caption_prefix,
            config.folder_repeats,
            tuple(p for p in own if p is not None),
        )

    @property
    def is_folder(self) -> bool:
        """Whether the rows are the files of a folder."""
        return self.path.is_dir()

    def read(self, inputs: Sequence[Input], reader: str) -> pl.DataFrame:
        """Read every row and check its values: see `check_structure`.

        Args:
            inputs: the columns that are read.
            reader: name of the model family, for messages.

        Returns:
            All rows, with the column `REPEAT` if some are taken more than once.

        Raises:
            MetadataError: the table cannot be read, or lacks a column.
            ParameterError: `caption_extension` is given and the table has captions; or
                `folder_repeats` names a folder without samples.
        """
        if self.path == self.base:
            require_folder(self.base)
        # The first file column is what is trained on; captions and folders belong to its files.
        file = next(i for i in inputs if i.is_file)
        caption = next((i for i in inputs if i.caption), None)
        table = self._table(file, inputs)
        if caption is not None:
            table = self._with_captions(table, file, caption)
        if self.is_folder:
            self._require_known(table, inputs, reader)
        require_columns(table, inputs, str(self.path), reader)
        frame = check_structure(table, inputs, str(self.path))
        if caption is not None and self.caption_prefix is not None:
            frame = frame.with_columns(
                _prefixed(pl.col(caption.column), caption, self.caption_prefix)
            )
        return self._with_repeats(frame, file)

    def _table(self, file: Input, inputs: Sequence[Input]) -> Table:
        if self.is_folder:
            sound = [i.column for i in inputs if i.kind == "audio"]
            return open_folder(self.path, self.base, file, sound, self.left_out)
        return read_table(self.path, self.encoding, inputs)

    def _with_captions(self, table: Table, file: Input, caption: Input) -> Table:
        """The table with captions from files, and with the prefix in place of missing captions."""
        extension = self.caption_extension or (USUAL if self.is_folder else None)
        if extension is not None and file.column in table.columns:
            if caption.column in table.columns:
                raise ParameterError(
                    f"the table has the column '{caption.column}', and caption_extension asks for "
                    "captions from files",
                    where=str(self.path),
                    do="leave caption_extension out, or take the column out of the table",
                )
            # With a prefix, a sample without a caption file is trained with the prefix alone.
            files = CaptionFiles(
                self.base, extension, self.encoding, required=self.caption_prefix is None
            )
            # In 10_portraits, a file without a caption gets "portraits", as in kohya's scripts.
            named = class_names(table.rows, file.column) if self.is_folder else {}
            table = files.added(table, file.column, caption, named)
        if self.caption_prefix is None or caption.column not in table.columns:
            return table
        return replace(table, rows=_filled(table.rows, caption.column, self.caption_prefix))

    def _require_known(self, table: Table, inputs: Sequence[Input], reader: str) -> None:
        """Refuse a folder if the family reads columns that only a table can have."""
        lacking = [i.column for i in inputs if i.column not in table.columns]
        if lacking:
            raise MetadataError(
                f"{reader} also reads {', '.join(lacking)} here, which a folder alone does not say",
                where=str(self.path.absolute()),
                do="write a metadata table with the columns "
                + ", ".join(i.column for i in inputs)
                + ", and name it as dataset_metadata_path",
            )

    def _with_repeats(self, frame: pl.DataFrame, file: Input) -> pl.DataFrame:
        """Add the column `REPEAT` if any row is taken more than once.

        Raises:
            ParameterError: `folder_repeats` names a folder without samples.
        """
        if not self.folder_repeats and not self.is_folder:
            return frame
        paths = pl.col(file.column).list.first() if file.many else pl.col(file.column)
        # As in `os.path.dirname`: everything before the last slash.
        folders = frame.select(paths.str.replace(r"/?[^/]*$", "").alias("folder"))["folder"]
        known = folders.drop_nulls().unique().to_list()
        given = {os.path.normpath(name): count for name, count in self.folder_repeats.items()}
        # The parameter replaces the numbers in folder names, which count only without a table.
        repeats = given or _by_name(known) if self.is_folder else given
        for name in given:
            if not any(_lies_in(os.path.normpath(folder), name) for folder in known):
                hint = nearest(name, {os.path.normpath(folder) for folder in known})
                raise ParameterError(
                    f"no sample lies in the folder '{name}'" + (f"; {hint}" if hint else ""),
                    where="folder_repeats",
                    do="name folders by their paths from dataset_base_path",
                )
        counts = {folder: _repeat_of(os.path.normpath(folder), repeats) for folder in known}
        if set(counts.values()) <= {1}:
            return frame
        numbers = folders.replace_strict(counts, default=1, return_dtype=pl.UInt32)
        return frame.with_columns(numbers.alias(REPEAT))


def _by_name(folders: Sequence[str]) -> dict[str, int]:
    """Folder → how often its samples are taken, for folders with such a number in their names."""
    parsed = {folder: numbered(folder) for folder in folders}
    return {folder: name[0] for folder, name in parsed.items() if name is not None}


def _lies_in(folder: str, name: str) -> bool:
    return name == "." or folder == name or folder.startswith(f"{name}/")


def _repeat_of(folder: str, repeats: dict[str, int]) -> int:
    """The number of the innermost folder that has one and contains `folder`; 1 if there is none."""
    around = [name for name in repeats if _lies_in(folder, name)]
    # The longest path is the innermost; "." is the base, so its length counts as 0.
    return repeats[max(around, key=lambda name: len(name.strip(".")))] if around else 1


def _filled(rows: pl.DataFrame, column: str, prefix: str) -> pl.DataFrame:
    """The rows with the prefix in place of missing or empty captions."""
    value, kind = pl.col(column), rows.schema[column]
    if not kind.is_nested():
        value = value.cast(pl.String)
        empty = value.is_null() | is_blank(value)
        return rows.with_columns(pl.when(empty).then(pl.lit(prefix)).otherwise(value).alias(column))
    if isinstance(kind, pl.List):
        empty = value.is_null() | (value.list.len() == 0)
        alone: Any = pl.lit([prefix], dtype=pl.List(pl.String))
        return rows.with_columns(pl.when(empty).then(alone).otherwise(value).alias(column))
    return rows  # `check_structure` refuses other types


def _prefixed(value: pl.Expr, caption: Input, prefix: str) -> pl.Expr:
    """Put the prefix before every caption."""

    def with_prefix(text: pl.Expr) -> pl.Expr:
        # A caption that equals the prefix was filled in by `_filled`.
        return pl.when(text == prefix).then(text).otherwise(pl.lit(f"{prefix} ") + text)

    if caption.many:
        return value.list.eval(with_prefix(pl.element()))
    return with_prefix(value).alias(caption.column)
