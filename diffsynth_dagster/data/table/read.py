"""Read metadata tables as Polars frames, one row for each sample.

    csv              every value is text; the first line names the columns
    jsonl, json      one object for each row, in a list or one after the other
    parquet          typed columns

Text in another encoding, or with a byte-order mark, is converted to UTF-8 in a temporary file. If a
table cannot be read, the error names the line or row.
"""

import codecs
import csv
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import polars as pl

from diffsynth_dagster.config.output import TABLES
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.scan import scan_csv, scan_parquet
from diffsynth_dagster.data.table.json_rows import read_json
from diffsynth_dagster.errors import MetadataError, ParameterError

INDEX = "row"
_EXTRA = "\x00extra"
"""Column for the first value of a csv row beyond the named columns. No csv header has this name."""
_CHUNK = 1 << 22
_DELIMITERS = {";": "';'", "\t": "tabs", "|": "'|'"}


@dataclass(frozen=True)
class Table:
    """A metadata table.

    Attributes:
        rows: the columns that were asked for, and `INDEX`. From csv and json they are text; a list
            in json is its JSON text.
        columns: names of all columns, in order.
        problems: value of `INDEX` → reason and message, for rows that cannot be used.
    """

    rows: pl.DataFrame
    columns: tuple[str, ...]
    problems: Mapping[int, tuple[str, str]] = field(default_factory=dict[int, tuple[str, str]])


def read_table(path: Path, encoding: str, inputs: Sequence[Input]) -> Table:
    """Read a metadata table.

    Args:
        encoding: of csv, json and jsonl files.
        inputs: the columns to read; missing ones are left out.

    Raises:
        MetadataError: the file is missing, of another format, damaged, or not of this encoding.
        ParameterError: there is no such encoding.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLES:
        raise MetadataError(
            f"'{path.suffix or path.name}' is no metadata format",
            where=_where(path),
            do="give a " + ", ".join(s[1:] for s in TABLES) + " file",
        )
    require_file(path)
    names = [item.column for item in inputs]
    with tempfile.TemporaryDirectory(prefix="metadata-") as folder:
        rewritten = Path(folder) / "utf8"
        text = path if suffix == ".parquet" else _as_utf8(path, encoding, rewritten)
        try:
            if suffix == ".parquet":
                return _read_parquet(path, names)
            if suffix == ".csv":
                return _read_csv(path, text, names)
            rows, columns, problems = read_json(text, inputs)
            return Table(rows.with_row_index(INDEX), columns, problems)
        except (OSError, ValueError, pl.exceptions.PolarsError) as error:
            # Polars' messages go on with pages of advice for programmers.
            _refuse(path, " ".join(str(error).split())[:300])


def require_folder(base: Path) -> Path:
    """Check that the folder of the data set exists, and return it. Raises `MetadataError`."""
    if not base.is_dir():
        raise MetadataError(
            "the data set's folder does not exist",
            where=f"dataset_base_path = {base.absolute()}",
            do="correct the path",
        )
    return base


def require_file(path: Path) -> None:
    """Check that a metadata table exists and is a regular file. Raises `MetadataError`."""
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise MetadataError(f"the metadata file {what}", where=_where(path), do="correct the path")


def _where(path: Path, place: str = "") -> str:
    return f"dataset_metadata_path = {path.absolute()}{place}"


def _refuse(path: Path, why: str, place: str = "") -> NoReturn:
    raise MetadataError(
        f"the metadata cannot be read: {why}",
        where=_where(path, place),
        do="make it a table of one row for each sample, in the encoding that metadata_encoding "
        "names",
    )


def text_codec(encoding: str) -> codecs.CodecInfo:
    """The codec of a text encoding. Raises `ParameterError` if Python does not know it."""
    try:
        codec = codecs.lookup(encoding)
        "a".encode(encoding)  # fails for codecs that are not for text, such as base64
    except (LookupError, ValueError) as error:
        raise ParameterError(
            f"there is no text encoding '{encoding}'",
            where="metadata_encoding",
            do="name one that Python knows, such as utf-8, utf-16, gb18030 or latin-1",
        ) from error
    return codec


def _as_utf8(path: Path, encoding: str, rewritten: Path) -> Path:
    """A file with the text in plain UTF-8: `path` itself, or the converted copy `rewritten`.

    Raises:
        MetadataError: the file is not text of this encoding; it names the line.
        ParameterError: there is no such encoding.
    """
    codec = text_codec(encoding)
    with path.open("rb") as source:
        if codec.name == "utf-8" and source.read(3) != codecs.BOM_UTF8:
            return path  # wrong bytes in it are found when it is read
        source.seek(0)
        chunks = iter(lambda: source.read(_CHUNK), b"")
        line = 1
        try:
            with rewritten.open("w", encoding="utf-8", newline="") as target:
                for text in codecs.iterdecode(chunks, encoding):
                    # U+FEFF is the byte-order mark, which some codecs leave in the text.
                    target.write(text if line > 1 else text.removeprefix("\ufeff"))
                    line += text.count("\n")
        except UnicodeError as error:
            if isinstance(error, UnicodeDecodeError):
                # `line` is where the chunk begins; the error is further down in it.
                line += error.object[: error.start].decode(encoding, "ignore").count("\n")
            _refuse(path, f"it is not {encoding} text", f", line {line}")
    return rewritten


def _read_parquet(path: Path, names: Sequence[str]) -> Table:
    rows = scan_parquet(path)
    columns = tuple(rows.collect_schema().names())
    read = rows.select(name for name in names if name in columns)
    return Table(read.with_row_index(INDEX).collect(engine="streaming"), columns)


def _records(path: Path, text: Path, strict: bool = False) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv file, the header first, with the line that each starts at.

    Python's reader is slower than Polars, but its errors say where a row is wrong.
    """
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is too short for some captions
    with text.open("rb") as source:
        # Decoded line by line, so that a decoding error belongs to a line.
        reader = csv.reader((line.decode() for line in source), strict=strict)
        start = 1
        try:
            for record in reader:
                yield start, record
                start = reader.line_num + 1
        except UnicodeDecodeError:
            _refuse(path, "it is not utf-8 text", f", line {reader.line_num + 1}")
        except csv.Error as why:
            _refuse(path, f"a row is not csv: {why}", f", line {start}")


def _read_csv(path: Path, text: Path, names: Sequence[str]) -> Table:
    """Read the named columns of a csv file.

    Args:
        path: the user's file, for messages.
        text: the same in UTF-8.
    """
    _, header = next(_records(path, text), (1, []))
    _check_header(path, header, names)
    # Polars refuses two columns of one name, so the columns that nobody reads are renamed.
    columns = [name if name in names else f"\x00{i}" for i, name in enumerate(header)]
    # Polars neither counts a row's values nor refuses uneven rows: extra values are dropped, and
    # missing ones are null. The column `_EXTRA` catches the first extra value.
    rows = scan_csv(
        text,
        has_header=False,
        skip_rows=1,
        schema={**dict.fromkeys(columns, pl.String()), _EXTRA: pl.String()},
        extra_columns="ignore",
        missing_columns="insert",
        empty_string_is_null=False,
        row_index_name=INDEX,
        raise_if_empty=False,
    )
    # Only a row with an empty last value or an extra value can be uneven.
    may_be_uneven = (pl.col(columns[-1]).fill_null("") == "") | pl.col(_EXTRA).is_not_null()
    read = [name for name in names if name in header]
    try:
        frame = rows.select(INDEX, *read, may_be_uneven.alias(_EXTRA)).collect(engine="streaming")
    except pl.exceptions.PolarsError:
        for _ in _records(path, text, strict=True):  # raises an error that names the line
            pass
        raise
    # The slow reader counts the values, but only if some row may be uneven.
    uneven = _uneven(path, text, len(header)) if frame[_EXTRA].any() else {}
    empty = [index for index, message in uneven.items() if not message]
    problems = {index: ("uneven_row", message) for index, message in uneven.items() if message}
    rows = frame.drop(_EXTRA).filter(~pl.col(INDEX).is_in(empty))
    return Table(rows, tuple(header), problems)


def _uneven(path: Path, text: Path, columns: int) -> dict[int, str]:
    """Row index → message, for rows with too many or too few values; "" for an empty line.

    Empty values after the last column are ignored.
    """
    found: dict[int, str] = {}
    for index, (line, record) in enumerate(_records(path, text)):
        count = len(record)
        while count > columns and not record[count - 1]:
            count -= 1
        if index and count != columns:  # record 0 is the header
            message = f"line {line}: {count} values for {columns} columns"
            found[index - 1] = message if count else ""
    return found


def _check_header(path: Path, header: Sequence[str], names: Sequence[str]) -> None:
    """Check the first line: it must name columns, each of `names` at most once, separated by
    commas. Raises `MetadataError`."""
    if not header:
        _refuse(path, "its first line names no columns", ", line 1")
    twice = next((name for name in names if header.count(name) > 1), None)
    if twice is not None:
        _refuse(path, f"two columns are called '{twice}'", ", line 1")
    # Another delimiter is recognised if it gives more of the names than the comma does.
    line, by_comma = ",".join(header), {*header} & {*names}
    for mark, shown in _DELIMITERS.items():
        by_mark = {name.strip(' "') for name in line.split(mark)}
        is_one_column = len(header) == 1 < len(by_mark) and not by_comma
        if is_one_column or len(by_mark & {*names}) > len(by_comma):
            raise MetadataError(
                f"the columns are separated by {shown}, not by ','",
                where=_where(path, ", line 1"),
                do="write the table with commas, and with quotes around values that hold one",
            )
