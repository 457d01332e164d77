"""Read a metadata table and check every row before a training loads anything.

Every row keeps a `status` ("ok" or one of `REASONS`) and a message.
"""

from dataclasses import dataclass, field
from typing import Any

import polars as pl

from diffsynth_dagster.config.affects import settled_by_checking
from diffsynth_dagster.config.inherited import named_data
from diffsynth_dagster.config.parameters import DatasetParameters, TrainingConfig
from diffsynth_dagster.data.columns import Columns, Input, described_inputs
from diffsynth_dagster.data.geometry import clip_rule, size_rule
from diffsynth_dagster.data.table.rows import REPEAT, RowSource
from diffsynth_dagster.data.table.shapes import (
    with_length_of,
    with_same_aspect,
    with_same_size,
    with_shape,
    with_size_facts,
)
from diffsynth_dagster.data.table.values import REASONS
from diffsynth_dagster.data.table.warnings import warnings_about
from diffsynth_dagster.errors import MetadataError, ParameterError, nearest, printable
from diffsynth_dagster.facts import FactCache, Progress

BOOKKEEPING = ("row", "status", "message", "width", "height", "frames", "shape", REPEAT)
"""Columns of a checked table that the check adds to those of the family."""

MEND_ROWS = "mend or remove these rows, or allow some to be left out with max_rejected_fraction"
_SHOWN_ROWS = 5
_SLIP = 0.9
"""Similarity above which an unknown column name counts as a misspelling: see `nearest`."""
_UNPRINTABLE = r"[\p{C}\p{Z}--\x20]"
"""A regular expression of the characters that `str.isprintable` calls unprintable."""


@dataclass(frozen=True)
class CheckedTable:
    """A checked table.

    Attributes:
        rows: a lazy frame, since a table may be larger than memory. It has one row for each row of
            the metadata, and the columns
            `row` (from 1), `status` ("ok" or one of `REASONS`), `message`;
            the columns that the family reads;
            for each file column the columns that `FileCheck.check` adds;
            `width`, `height` (pixels) and `frames` at which the first file is trained, 0 in a
            rejected row;
            `shape`, equal for rows whose files are all trained at equal sizes;
            `repeat`, how often a pass over the data set takes the row; missing if that is once for
            all rows.
        source: the metadata table that was checked.
        parameters: the parameters that determine the rows, as JSON values.
        data: the data set that was checked, as absolute paths: see `config.inherited.named_data`.
        read_as: the columns and sizes that it was checked for: see `Columns.described`.
        published_frame_rate: see `Geometry`.
    """

    rows: pl.LazyFrame
    source: str
    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    data: dict[str, str] = field(default_factory=dict[str, str])
    read_as: list[Any] = field(default_factory=list[Any])
    published_frame_rate: float | None = None

    @property
    def frame(self) -> pl.DataFrame:
        """Every row, in memory."""
        return self.rows.collect()

    @property
    def accepted(self) -> pl.LazyFrame:
        """The rows that can be trained on."""
        return self.rows.filter(pl.col("status") == "ok")

    @property
    def rejected(self) -> pl.LazyFrame:
        """The rows that cannot be trained on."""
        return self.rows.filter(pl.col("status") != "ok")

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows by status."""
        table = self.rows.group_by("status").len().sort("status").collect()
        return dict(zip(table["status"], table["len"], strict=True))

    def duplicates(self) -> int:
        """How many accepted rows repeat the content and caption of an earlier one."""
        names = self.rows.collect_schema().names()
        # Compare file columns by digest, since a file may have copies under other names.
        files = {c for c in names if c.endswith(":digest")}
        texts = {c for c in names if ":" not in c and f"{c}:digest" not in files}
        content = self.accepted.select(sorted(files | texts - set(BOOKKEEPING)))
        # Both counts in one query.
        all_rows, distinct = (rows.select(pl.len()) for rows in (content, content.unique()))
        counts = pl.concat([all_rows, distinct]).collect().to_series()
        return int(counts[0] - counts[1])

    def summary(self, max_rejected_fraction: float) -> str:
        """How many rows are usable, how many are rejected and why, and how many may be rejected."""
        rejected = {name: count for name, count in self.counts.items() if name != "ok"}
        total = sum(self.counts.values())
        usable = f"{total - sum(rejected.values())} of {total} rows are usable"
        if not rejected:
            return usable
        most_first = sorted(rejected.items(), key=lambda item: -item[1])
        why = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in most_first)
        verb = "is" if sum(rejected.values()) == 1 else "are"
        allowed = f"allowed: {100 * max_rejected_fraction:.4g} %"
        return f"{usable}; {sum(rejected.values())} {verb} rejected: {why} ({allowed})"

    def first_rejected(self) -> list[str]:
        """The first rejected rows, each with its number and message."""
        first = self.rejected.select("row", "message").head(_SHOWN_ROWS).collect()
        return [f"row {row}: {message}" for row, message in first.iter_rows()]

    def warnings(self) -> list[str]:
        """Sentences about rows that are trained on in an unexpected way: see `warnings_about`."""
        inputs = described_inputs(self.read_as)
        return warnings_about(self.accepted, inputs, self.parameters, self.published_frame_rate)

    def is_accepted(self, max_rejected_fraction: float) -> bool:
        """Whether at least one row is accepted, and no more rows are rejected than allowed."""
        accepted, total = self.counts.get("ok", 0), sum(self.counts.values())
        return total - accepted <= max_rejected_fraction * total and accepted > 0

    def require_accepted(self, max_rejected_fraction: float) -> None:
        """Refuse a table with too many rejected rows: see `is_accepted`.

        Raises:
            MetadataError: its message lists the first rejected rows with their reasons.
        """
        if self.is_accepted(max_rejected_fraction):
            return
        shown = self.first_rejected()
        more = self.rejected.select(pl.len()).collect().item() - len(shown)
        raise MetadataError(
            f"{self.summary(max_rejected_fraction)}: "
            + "; ".join([*shown, *([f"and {more} more"] if more else [])]),
            where=self.source,
            do=MEND_ROWS,
        )


def check_columns(config: TrainingConfig, columns: Columns) -> tuple[Input, ...]:
    """Check the parameters that name columns, and return the columns that are read.

    Raises:
        ParameterError: the family does not read a named column, or one of its file columns is not
            named.
    """
    known = {i.column: i for i in columns.named}
    extra = [*known, *columns.optional]
    default = DatasetParameters.model_fields["data_file_keys"].default
    for parameter in ("data_file_keys", "extra_inputs"):
        named: tuple[str, ...] = getattr(config, parameter)
        for column in named if named != default else ():
            if parameter == "extra_inputs" and column in extra:
                continue
            if column not in known or not known[column].is_file:
                # Suggest misspellings only: a name that is merely similar may be a column of
                # another variant of the model.
                hint = "" if column in extra else nearest(column, extra, _SLIP)
                raise ParameterError(
                    f"{columns.reader} reads no {'file' if 'file' in parameter else ''} column "
                    f"'{column}'".replace("  ", " ")
                    + (f"; {hint}" if hint else ""),
                    where=parameter,
                    do=f"{columns.reader} knows {', '.join(dict.fromkeys(extra))}",
                )
    for column, item in known.items():
        if item.is_file and not item.weighs and column not in config.data_file_keys:
            raise ParameterError(
                f"{columns.reader} reads files from the column '{column}'",
                where="data_file_keys",
                do=f"name '{column}' there",
            )
    return tuple(known.values())


def validate(
    config: TrainingConfig,
    columns: Columns,
    fact_cache: FactCache,
    progress: Progress = lambda n: None,
    signed: bool = False,
) -> CheckedTable:
    """Check every row of the metadata table, and every file that it names.

    Args:
        signed: see `FileCheck`.

    Raises:
        MetadataError: the table cannot be read or lacks a column.
        ParameterError: see `check_columns`, `size_rule` and `clip_rule`.
    """
    # Imported here because it imports torch, which reading a checked table does not need.
    from diffsynth_dagster.data.table.files import FileCheck, TrainedShape

    geometry, reader = columns.geometry, columns.reader
    rules = TrainedShape(
        size_rule(config.height, config.width, config.max_pixels, geometry, config.bucket_step),
        clip_rule(config.num_frames, config.frame_rate, geometry, reader),
        config.background,
    )
    inputs = check_columns(config, columns)
    source = RowSource.of(config)
    frame = source.read(inputs, reader)
    with FileCheck(config, rules, fact_cache, progress, signed) as files:
        for item in columns.files:
            checked = files.check(frame, item)
            # A folder has no column that says which clips have sound. If sound is optional, take
            # clips without a sound track as samples without sound instead of rejecting them.
            if item.kind == "audio" and item.optional and source.is_folder:
                silent = pl.col("row").is_in(checked.filter(pl.col("status") == "no_audio")["row"])
                sound = pl.when(silent).then(None).otherwise(item.column).alias(item.column)
                checked = files.check(frame.with_columns(sound), item)
            frame = checked
            # The first file column comes first, so its sizes are known here.
            if item.same_size:
                frame = with_same_size(frame, columns.files[0], item, geometry.side_factor)
            if item.weighs:
                frame = with_same_aspect(frame, columns.files[0], item)
            if item.kind == "audio":
                frame = with_length_of(frame, columns.files[0], item)
    for item in (i for i in columns.inputs if i.kind == "sizes"):
        frame = with_size_facts(frame, columns.files[0], item)
    return CheckedTable(
        _with_printable_messages(with_shape(frame, columns.files)).lazy(),
        str(source.path),
        settled_by_checking(config),
        named_data(config),
        columns.described,
        geometry.published_frame_rate,
    )


def _with_printable_messages(frame: pl.DataFrame) -> pl.DataFrame:
    """Escape unprintable characters in the messages, which quote values of the table."""
    # Few distinct messages have any: the rows themselves are not looped over.
    unprintable = frame["message"].unique()
    unprintable = unprintable.filter(unprintable.str.contains(_UNPRINTABLE))
    return frame.with_columns(pl.col("message").replace({m: printable(m) for m in unprintable}))


__all__ = [
    "BOOKKEEPING",
    "REASONS",
    "CheckedTable",
    "check_columns",
    "validate",
]
