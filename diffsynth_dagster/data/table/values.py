"""Whether every row of a table has the values that a family reads. No file is opened for it.

One vectorised query finds the rows that are surely fine; the others get the first check that they
fail. What reading found (a csv row of uneven length, a json value that is no text) comes before these.
"""

import json
from collections.abc import Mapping, Sequence

import polars as pl

from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.table.read import INDEX, Table
from diffsynth_dagster.errors import MetadataError, nearest

REASONS = {
    "uneven_row": "the csv row has more or fewer values than there are columns",
    "repeated_key": "the JSON object has a key twice",
    "missing_value": "the column has no value",
    "empty_caption": "the caption is empty: it holds nothing that can be seen",
    "no_caption_file": "there is no caption file",
    "unreadable_caption": "the caption file cannot be read",
    "not_a_number": "the value is no number",
    "not_taken": "the value is none that the column takes",
    "wrong_type": "the value is of another type than the column's",
    "url": "the value is a URL; files must be local",
    "bad_path": "the value is no path, or links to a name that is not UTF-8",
    "outside_base_path": "the file lies outside dataset_base_path",
    "file_missing": "the file does not exist",
    "not_a_file": "this is not a regular file but a folder, a pipe, a socket or a device",
    "unreadable": "the file cannot be decoded",
    "too_large": "the image claims more pixels than is safe to decode",
    "too_small": "the image is smaller than the family's smallest size",
    "other_proportions": "the picture has other proportions than the sample",
    "too_short": "the video has fewer frames than the family's shortest clip",
    "bad_frame_rate": "the video's frame rate is not above zero",
    "high_range": "the video is of a high dynamic range (PQ or HLG)",
    "no_audio": "the file has no sound",
    "bad_sample_rate": "the sample rate of the sound is not above zero",
    "wrong_channels": "the sound has more or fewer channels than the model",
    "sound_of_image": "sound is named beside a still image, which has no length",
    "audio_too_short": "the sound is shorter than the picture",
}
STATUS = pl.Enum(["ok", *REASONS])
_URL = r"^\s*(?:[A-Za-z][A-Za-z0-9+.-]+://|data:)"
_FINE, _CODE, _NOW, _WHY = "\x00fine", "\x00code", "\x00now", "\x00why"
_SPACE = r"\s\x1c-\x1f"
"""What `str.isspace` calls space, inside the brackets of a regular expression."""
_UNSEEN = _SPACE + r"\p{Cc}\p{Cf}\p{DI}"
"""What cannot be seen, in the same way: space, control and format characters."""
_NUMBER = r"^\s*-?\d+(?:\.\d*)?\s*$"
_PLAIN = r'"[^"\\\x00-\x1f]*"'
_TEXTS = rf"^\[\s*{_PLAIN}(?:\s*,\s*{_PLAIN})*\s*\]$"
"""A JSON list of texts without escapes. Others are parsed one by one."""
_Check = tuple[str, str, pl.Expr]
"""Column (and what it takes), reason, and where the row fails."""


def require_columns(table: Table, inputs: Sequence[Input], source: str, family: str) -> None:
    """Refuse a table that lacks a column, or has none at all.

    Raises:
        MetadataError: it names the missing column and the nearest that is there.
    """
    if not table.columns:
        raise _no_rows(source)
    for item in inputs:
        if item.column not in table.columns:
            hint = nearest(item.column, table.columns)
            raise MetadataError(
                f"the metadata has no column '{item.column}'" + (f"; {hint}" if hint else ""),
                where=source,
                do=f"its columns are {', '.join(table.columns)}; {family} reads "
                + ", ".join(i.column for i in inputs),
            )


def _no_rows(source: str) -> MetadataError:
    return MetadataError("the metadata has no rows", where=source, do="add one for each sample")


def check_structure(table: Table, inputs: Sequence[Input], source: str) -> pl.DataFrame:
    """Check the values of every row.

    Returns:
        `row` (from 1; empty lines of csv do not count), `status` ("ok" or a reason), `message`,
        and the columns of the inputs: text, or a list of text where the input takes many.

    Raises:
        MetadataError: the table has no rows.
    """
    if table.rows.height == 0:
        raise _no_rows(source)
    lazy, types = table.rows.lazy(), table.rows.schema
    checks: list[_Check] = []
    for item in inputs:
        lazy = lazy.with_columns(_as_declared(item, types[item.column]))
        checks += _checks(item, types[item.column])
    fine = pl.all_horizontal(_surely_fine(item, types[item.column]) for item in inputs)
    frame = lazy.with_columns(fine.fill_null(False).alias(_FINE)).collect(engine="streaming")
    frame = with_problems(_with_reasons(frame, checks), table.problems)
    columns = [item.column for item in inputs]
    return frame.select(
        pl.int_range(1, pl.len() + 1, dtype=pl.UInt32).alias("row"), "status", "message", *columns
    )


def _with_reasons(frame: pl.DataFrame, checks: Sequence[_Check]) -> pl.DataFrame:
    """Status and message of each row: of the first check that it fails."""
    doubtful = frame.filter(~pl.col(_FINE))
    frame = frame.drop(_FINE).with_columns(
        pl.lit("ok", STATUS).alias("status"), pl.lit("").alias("message")
    )
    if doubtful.height == 0:
        return frame
    code = pl.lit(0, pl.UInt8)
    for number, (_, _, bad) in reversed(list(enumerate(checks, 1))):
        code = pl.when(bad).then(pl.lit(number, pl.UInt8)).otherwise(code)
    codes = doubtful.select(INDEX, code.alias(_CODE)).filter(pl.col(_CODE) > 0)
    reasons = pl.Series([reason for _, reason, _ in checks], dtype=STATUS)
    messages = pl.Series([f"{column}: {REASONS[reason]}" for column, reason, _ in checks])
    which = codes[_CODE] - 1
    found = codes.select(
        INDEX, reasons.gather(which).alias(_NOW), messages.gather(which).alias(_WHY)
    )
    return replace_problems(frame, found, INDEX)


def _surely_fine(item: Input, dtype: pl.DataType) -> pl.Expr:
    """A quick test that only fine values pass; most of them do."""
    value = pl.col(item.column)
    if item.many and item.kind == "text":
        shown = pl.element().str.contains(f"^[^{_UNSEEN}]").fill_null(False)
        return (value.list.len() > 0) & value.list.eval(shown).list.all()
    if item.many or not _is_plain(dtype):
        return pl.lit(False)
    if item.optional:
        return value.is_null()
    if item.pattern:
        return value.str.contains(item.pattern)
    if item.kind == "number":
        return value.str.contains(_NUMBER)
    return value.str.contains(rf"^[^{_SPACE}:\x00][^:\x00]*$" if item.is_file else f"^[^{_UNSEEN}]")


def _as_declared(item: Input, dtype: pl.DataType) -> pl.Expr:
    """The column as text, or as a list of text; null where its type is another."""
    value = pl.col(item.column)
    if item.many:
        if isinstance(dtype, pl.List | pl.Array):
            if dtype.inner.is_nested():
                return pl.lit(None, pl.List(pl.String)).alias(item.column)
            return value.cast(pl.List(pl.String))
        if not _is_plain(dtype):
            return pl.lit(None, pl.List(pl.String)).alias(item.column)
        return value.cast(pl.String).map_batches(
            _lists, return_dtype=pl.List(pl.String), is_elementwise=True
        )
    if not _is_plain(dtype):
        return pl.lit(None, pl.String).alias(item.column)
    text = (value.fill_nan(None) if dtype.is_float() else value).cast(pl.String)
    if item.optional:
        return pl.when(~is_blank(text)).then(text).alias(item.column)
    return text


def _is_plain(dtype: pl.DataType) -> bool:
    return not dtype.is_nested() and not isinstance(dtype, pl.Boolean | pl.Binary | pl.Object)


def _lists(values: pl.Series) -> pl.Series:
    """Cells → lists of text: a JSON list as it says, any other text as the only element."""
    text = values.str.strip_chars()
    listed = text.str.starts_with("[").fill_null(False)
    single = pl.select(
        pl.when((text == "").fill_null(True)).then(None).otherwise(pl.concat_list(values))
    ).to_series()
    if not listed.any():
        return single.alias(values.name)
    cells = values.filter(listed)
    if not cells.str.contains(_TEXTS).all():
        cells = pl.Series([_list_of_texts(cell) for cell in cells])
    parts = cells.str.json_decode(pl.List(pl.String))
    where = listed.cast(pl.Int64).cum_sum() - 1
    return (
        pl.select(pl.when(listed).then(parts.gather(where.clip(0))).otherwise(single))
        .to_series()
        .alias(values.name)
    )


def _list_of_texts(cell: str) -> str:
    """A cell that begins with a bracket → a JSON list of texts and nulls."""
    try:
        elements: list[object] = json.loads(cell, parse_float=str, parse_int=str)
    except ValueError:
        return json.dumps([cell])  # a name that begins with a bracket
    return json.dumps([e if e is None or isinstance(e, str) else json.dumps(e) for e in elements])


def is_blank(text: pl.Expr, blank: str = _SPACE) -> pl.Expr:
    """Whether a text is empty or nothing but space, or of other such characters."""
    return ~text.str.contains(f"[^{blank}]")


def _checks(item: Input, dtype: pl.DataType) -> list[_Check]:
    name, value = item.column, pl.col(item.column)
    listed = isinstance(dtype, pl.List | pl.Array) and item.many and not dtype.inner.is_nested()
    if not _is_plain(dtype) and not listed:
        return [(name, "wrong_type", pl.lit(True))]
    taken: list[_Check] = []
    if item.pattern:
        taken = [(f"{name} takes {item.wants}", "not_taken", ~value.str.contains(item.pattern))]
    if item.kind == "number":
        number = value.str.contains(_NUMBER)
        return [
            (name, "missing_value", value.is_null()),
            (name, "not_a_number", ~number),
            *taken,
        ]

    def anywhere(test: pl.Expr) -> pl.Expr:
        return value.list.eval(test).list.any() if item.many else test

    each = pl.element() if item.many else value
    if item.kind == "text":
        unseen = anywhere(is_blank(each, _UNSEEN).fill_null(True))
        none = value.list.len() == 0 if item.many else pl.lit(False)
        return [(name, "empty_caption", value.is_null() | none | unseen), *taken]
    blank = anywhere(is_blank(each).fill_null(True))
    empty = value.is_null() | (value.list.len() == 0) if item.many else value.is_null()
    missing = pl.lit(False) if item.optional else empty | blank
    return [
        (name, "missing_value", missing),
        (name, "url", anywhere(each.str.contains(_URL).fill_null(False))),
        (name, "bad_path", anywhere(each.str.contains("\x00", literal=True).fill_null(False))),
    ]


def with_problems(frame: pl.DataFrame, problems: Mapping[int, tuple[str, str]]) -> pl.DataFrame:
    """Give rows (by their `INDEX`) a reason and a message, whatever they had."""
    found = pl.DataFrame(
        {
            INDEX: pl.Series(list(problems), dtype=frame[INDEX].dtype),
            _NOW: pl.Series([reason for reason, _ in problems.values()], dtype=STATUS),
            _WHY: pl.Series([why for _, why in problems.values()], dtype=pl.String),
        }
    )
    return replace_problems(frame, found, INDEX)


def replace_problems(frame: pl.DataFrame, found: pl.DataFrame, on: str) -> pl.DataFrame:
    """The frame with the status and message that `found` has for a row, where it has one."""
    if found.height == 0:
        return frame
    joined = frame.join(found, on=on, how="left", maintain_order="left")
    return joined.with_columns(
        pl.coalesce(_NOW, "status").alias("status"), pl.coalesce(_WHY, "message").alias("message")
    ).drop(_NOW, _WHY)
