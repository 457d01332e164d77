"""The rows of a data set as they are written: of a table or of a folder, with captions from wherever they
lie. No picture or clip is opened for it."""

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
"""Column of a checked table: how often each pass over the data set takes the row. It is left out where
that is once for all."""


@dataclass(frozen=True)
class RowSource:
    """Where the rows of a data set stand.

    Attributes:
        path: a metadata table, or a folder that is one.
        base: the folder that paths start from.
        encoding: of a table's text and of caption files.
        caption_extension, caption_prefix, folder_repeats: the parameters.
        left_out: files and folders that hold no samples of it.
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
        """That of a config, which names one."""
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
        """Every row with its values checked: see `check_structure`; with `repeat` where rows differ in it.

        Args:
            inputs: the columns that are read.
            reader: who reads them, for messages.

        Raises:
            MetadataError: the table cannot be read, or lacks a column.
            ParameterError: captions are asked for from files, and the table has them; or `folder_repeats`
                names a folder that no sample lies in.
        """
        if self.path == self.base:
            require_folder(self.base)
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
        """The table with the captions of files, and with what a sample without one is told."""
        extension = self.caption_extension or (USUAL if self.is_folder else None)
        if extension is not None and file.column in table.columns:
            if caption.column in table.columns:
                raise ParameterError(
                    f"the table has the column '{caption.column}', and caption_extension asks for "
                    "captions from files",
                    where=str(self.path),
                    do="leave caption_extension out, or take the column out of the table",
                )
            files = CaptionFiles(
                self.base, extension, self.encoding, required=self.caption_prefix is None
            )
            named = class_names(table.rows, file.column) if self.is_folder else {}
            table = files.added(table, file.column, caption, named)
        if self.caption_prefix is None or caption.column not in table.columns:
            return table
        return replace(table, rows=_filled(table.rows, caption.column, self.caption_prefix))

    def _require_known(self, table: Table, inputs: Sequence[Input], reader: str) -> None:
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
        """The rows with how often each is taken, if any is more than once.

        Raises:
            ParameterError: `folder_repeats` names a folder that no sample lies in.
        """
        if not self.folder_repeats and not self.is_folder:
            return frame
        paths = pl.col(file.column).list.first() if file.many else pl.col(file.column)
        folders = frame.select(paths.str.replace(r"/?[^/]*$", "").alias("folder"))["folder"]
        known = folders.drop_nulls().unique().to_list()
        given = {os.path.normpath(name): often for name, often in self.folder_repeats.items()}
        repeats = given or _by_name(known) if self.is_folder else given
        for name in given:
            if not any(_lies_in(os.path.normpath(folder), name) for folder in known):
                hint = nearest(name, {os.path.normpath(folder) for folder in known})
                raise ParameterError(
                    f"no sample lies in the folder '{name}'" + (f"; {hint}" if hint else ""),
                    where="folder_repeats",
                    do="name folders by their paths from dataset_base_path",
                )
        each = {folder: _repeat_of(os.path.normpath(folder), repeats) for folder in known}
        if set(each.values()) <= {1}:
            return frame
        numbers = folders.replace_strict(each, default=1, return_dtype=pl.UInt32)
        return frame.with_columns(numbers.alias(REPEAT))


def _by_name(folders: Sequence[str]) -> dict[str, int]:
    """How often the samples of folders are taken, by what their names say."""
    found = {folder: numbered(folder) for folder in folders}
    return {folder: says[0] for folder, says in found.items() if says is not None}


def _lies_in(folder: str, name: str) -> bool:
    return name == "." or folder == name or folder.startswith(f"{name}/")


def _repeat_of(folder: str, repeats: dict[str, int]) -> int:
    """That of the innermost folder that says one."""
    around = [name for name in repeats if _lies_in(folder, name)]
    return repeats[max(around, key=lambda name: len(name.strip(".")))] if around else 1


def _filled(rows: pl.DataFrame, column: str, prefix: str) -> pl.DataFrame:
    """The rows with the prefix in the place of captions that are missing or empty."""
    value, kind = pl.col(column), rows.schema[column]
    if not kind.is_nested():
        value = value.cast(pl.String)
        empty = value.is_null() | is_blank(value)
        return rows.with_columns(pl.when(empty).then(pl.lit(prefix)).otherwise(value).alias(column))
    if isinstance(kind, pl.List):
        empty = value.is_null() | (value.list.len() == 0)
        alone: Any = pl.lit([prefix], dtype=pl.List(pl.String))
        return rows.with_columns(pl.when(empty).then(alone).otherwise(value).alias(column))
    return rows  # which is refused


def _prefixed(value: pl.Expr, caption: Input, prefix: str) -> pl.Expr:
    """Captions with the prefix before them; one that is the prefix stays."""

    def one(text: pl.Expr) -> pl.Expr:
        return pl.when(text == prefix).then(text).otherwise(pl.lit(f"{prefix} ") + text)

    return value.list.eval(one(pl.element())) if caption.many else one(value).alias(caption.column)
