"""Check that every row of a table has the values that a family reads, without opening the files.

One vectorised query finds the rows that are certainly fine. Each of the others gets the reason of
the first check that it fails. Problems found while reading (an uneven csv row, a json value that is
not text) take precedence.
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
# Names of helper columns. No column of the user has a null character in its name.
_FINE, _CODE, _NOW, _WHY = "\x00fine", "\x00code", "\x00now", "\x00why"
_SPACE = r"\s\x1c-\x1f"
"""Characters of `str.isspace`, for use between the brackets of a regular expression."""
_UNSEEN = _SPACE + r"\p{Cc}\p{Cf}\p{DI}"
"""Characters that cannot be seen, for the same use: space, control and format characters."""
_NUMBER = r"^\s*-?\d+(?:\.\d*)?\s*$"
_PLAIN = r'"[^"\\\x00-\x1f]*"'
_TEXTS = rf"^\[\s*{_PLAIN}(?:\s*,\s*{_PLAIN})*\s*\]$"
"""A JSON list of texts without escapes, which Polars can parse. Others are parsed one by one."""
_Check = tuple[str, str, pl.Expr]
"""Start of the message (the column), reason, and the condition of a row that fails."""


def require_columns(table: Table, inputs: Sequence[Input], source: str, family: str) -> None:
    """Check that a table has the columns of the inputs.

    Args:
        source: the table, for messages.
        family: its name, for messages.

    Raises:
        MetadataError: a column is missing (the message suggests one with a similar name), or the
            table has no columns at all.
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
        `row` (from 1; empty lines of csv do not count), `status` ("ok" or a reason of `REASONS`),
        `message`, and the columns of the inputs: text, or lists of text if the input takes many.

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
    # A comparison with a missing value is null: not certainly fine.
    frame = lazy.with_columns(fine.fill_null(False).alias(_FINE)).collect(engine="streaming")
    frame = with_problems(_with_reasons(frame, checks), table.problems)
    columns = [item.column for item in inputs]
    return frame.select(
        pl.int_range(1, pl.len() + 1, dtype=pl.UInt32).alias("row"), "status", "message", *columns
    )


def _with_reasons(frame: pl.DataFrame, checks: Sequence[_Check]) -> pl.DataFrame:
    """Add the status and message of the first check that each row fails."""
    doubtful = frame.filter(~pl.col(_FINE))
    frame = frame.drop(_FINE).with_columns(
        pl.lit("ok", STATUS).alias("status"), pl.lit("").alias("message")
    )
    if doubtful.height == 0:
        return frame
    code = pl.lit(0, pl.UInt8)
    # From the last check to the first, so that the first one that fails decides.
    for number, (_, _, fails) in reversed(list(enumerate(checks, 1))):
        code = pl.when(fails).then(pl.lit(number, pl.UInt8)).otherwise(code)
    codes = doubtful.select(INDEX, code.alias(_CODE)).filter(pl.col(_CODE) > 0)
    reasons = pl.Series([reason for _, reason, _ in checks], dtype=STATUS)
    messages = pl.Series([f"{column}: {REASONS[reason]}" for column, reason, _ in checks])
    which = codes[_CODE] - 1
    found = codes.select(
        INDEX, reasons.gather(which).alias(_NOW), messages.gather(which).alias(_WHY)
    )
    return replace_problems(frame, found, INDEX)


def _surely_fine(item: Input, dtype: pl.DataType) -> pl.Expr:
    """A quick test that only fine values pass. It may refuse fine values too; `_checks` decides."""
    value = pl.col(item.column)
    if item.many and item.kind == "text":
        # The first character can be seen.
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
    # A path without ":" is not a URL.
    return value.str.contains(rf"^[^{_SPACE}:\x00][^:\x00]*$" if item.is_file else f"^[^{_UNSEEN}]")


def _as_declared(item: Input, dtype: pl.DataType) -> pl.Expr:
    """The column as text, or as lists of text; null if its type cannot be converted."""
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
    # NaN is how pandas writes a missing value.
    text = (value.fill_nan(None) if dtype.is_float() else value).cast(pl.String)
    if item.optional:
        return pl.when(~is_blank(text)).then(text).alias(item.column)
    return text


def _is_plain(dtype: pl.DataType) -> bool:
    """Whether values of a type are text, numbers or dates, which have a text form."""
    return not dtype.is_nested() and not isinstance(dtype, pl.Boolean | pl.Binary | pl.Object)


def _lists(values: pl.Series) -> pl.Series:
    """Cells → lists of text. A JSON list is parsed; any other text is the only element."""
    text = values.str.strip_chars()
    listed = text.str.starts_with("[").fill_null(False)
    single = pl.select(
        pl.when((text == "").fill_null(True)).then(None).otherwise(pl.concat_list(values))
    ).to_series()
    if not listed.any():  # the usual case
        return single.alias(values.name)
    cells = values.filter(listed)
    if not cells.str.contains(_TEXTS).all():
        cells = pl.Series([_list_of_texts(cell) for cell in cells])
    parts = cells.str.json_decode(pl.List(pl.String))
    # `parts` has the JSON lists only: the number of each such cell is its index in `parts`.
    index = listed.cast(pl.Int64).cum_sum() - 1
    return (
        pl.select(pl.when(listed).then(parts.gather(index.clip(0))).otherwise(single))
        .to_series()
        .alias(values.name)
    )


def _list_of_texts(cell: str) -> str:
    """A cell that begins with a bracket → JSON of a list of texts and nulls."""
    try:
        # Numbers stay text, with the digits that the user wrote.
        elements: list[object] = json.loads(cell, parse_float=str, parse_int=str)
    except ValueError:
        return json.dumps([cell])  # not JSON: a text or file name such as "[1] cat.png"
    return json.dumps([e if e is None or isinstance(e, str) else json.dumps(e) for e in elements])


def is_blank(text: pl.Expr, blank: str = _SPACE) -> pl.Expr:
    """Whether a text is empty, or has only the characters of `blank`."""
    return ~text.str.contains(f"[^{blank}]")


def _checks(item: Input, dtype: pl.DataType) -> list[_Check]:
    """The checks of an input's values, the most important first."""
    name, value = item.column, pl.col(item.column)
    listed = isinstance(dtype, pl.List | pl.Array) and item.many and not dtype.inner.is_nested()
    if not _is_plain(dtype) and not listed:
        return [(name, "wrong_type", pl.lit(True))]
    by_pattern: list[_Check] = []
    if item.pattern:
        message = f"{name} takes {item.wants}"
        by_pattern = [(message, "not_taken", ~value.str.contains(item.pattern))]
    if item.kind == "number":
        number = value.str.contains(_NUMBER)
        return [
            (name, "missing_value", value.is_null()),
            (name, "not_a_number", ~number),
            *by_pattern,
        ]

    def any_element(test: pl.Expr) -> pl.Expr:
        return value.list.eval(test).list.any() if item.many else test

    element = pl.element() if item.many else value
    if item.kind == "text":
        unseen = any_element(is_blank(element, _UNSEEN).fill_null(True))
        none = value.list.len() == 0 if item.many else pl.lit(False)
        return [(name, "empty_caption", value.is_null() | none | unseen), *by_pattern]
    blank = any_element(is_blank(element).fill_null(True))
    empty = value.is_null() | (value.list.len() == 0) if item.many else value.is_null()
    missing = pl.lit(False) if item.optional else empty | blank
    return [
        (name, "missing_value", missing),
        (name, "url", any_element(element.str.contains(_URL).fill_null(False))),
        (
            name,
            "bad_path",
            any_element(element.str.contains("\x00", literal=True).fill_null(False)),
        ),
    ]


def with_problems(frame: pl.DataFrame, problems: Mapping[int, tuple[str, str]]) -> pl.DataFrame:
    """Replace the status and message of some rows.

    Args:
        problems: value of `INDEX` → reason and message.
    """
    found = pl.DataFrame(
        {
            INDEX: pl.Series(list(problems), dtype=frame[INDEX].dtype),
            _NOW: pl.Series([reason for reason, _ in problems.values()], dtype=STATUS),
            _WHY: pl.Series([why for _, why in problems.values()], dtype=pl.String),
        }
    )
    return replace_problems(frame, found, INDEX)


def replace_problems(frame: pl.DataFrame, found: pl.DataFrame, on: str) -> pl.DataFrame:
    """Replace the status and message of the rows that `found` has.

    Args:
        found: the column `on`, and the new status and message as `_NOW` and `_WHY`.
        on: the column that identifies a row.
    """
    if found.height == 0:
        return frame
    # The order of the rows is the user's, and decides the order of samples.
    joined = frame.join(found, on=on, how="left", maintain_order="left")
    return joined.with_columns(
        pl.coalesce(_NOW, "status").alias("status"), pl.coalesce(_WHY, "message").alias("message")
    ).drop(_NOW, _WHY)
