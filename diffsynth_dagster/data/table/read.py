"""Metadata tables as Polars frames, one row for each sample.

    csv              every value is text; the first line names the columns
    jsonl, json      objects of one row each, in a list or one after the other
    parquet          typed columns

Text that is not UTF-8 without a byte-order mark is rewritten into a temporary file. A table that
cannot be read is refused with the line or row that is to blame.
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
"""Column of what a csv row has beyond the named columns. No csv header can be called so."""
_CHUNK = 1 << 22
_DELIMITERS = {";": "';'", "\t": "tabs", "|": "'|'"}


@dataclass(frozen=True)
class Table:
    """A table that was read.

    Attributes:
        rows: the wanted columns, and `INDEX`. Those of csv and json are text: what json has as a list is
            its JSON text.
        columns: names of the columns, in order.
        problems: value of `INDEX` → reason and message of a row that cannot be used.
    """

    rows: pl.DataFrame
    columns: tuple[str, ...]
    problems: Mapping[int, tuple[str, str]] = field(default_factory=dict[int, tuple[str, str]])


def read_table(path: Path, encoding: str, inputs: Sequence[Input]) -> Table:
    """Read a metadata table.

    Args:
        encoding: of csv, json and jsonl.
        inputs: the columns to read.

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
    wanted = [item.column for item in inputs]
    with tempfile.TemporaryDirectory(prefix="metadata-") as folder:
        rewritten = Path(folder) / "utf8"
        text = path if suffix == ".parquet" else _as_utf8(path, encoding, rewritten)
        try:
            if suffix == ".parquet":
                return _read_parquet(path, wanted)
            if suffix == ".csv":
                return _read_csv(path, text, wanted)
            rows, columns, problems = read_json(text, inputs)
            return Table(rows.with_row_index(INDEX), columns, problems)
        except (OSError, ValueError, pl.exceptions.PolarsError) as error:
            _refuse(path, " ".join(str(error).split())[:300])


def require_folder(base: Path) -> Path:
    """The folder of the data set. Raises `MetadataError` where it is not there."""
    if not base.is_dir():
        raise MetadataError(
            "the data set's folder does not exist",
            where=f"dataset_base_path = {base.absolute()}",
            do="correct the path",
        )
    return base


def require_file(path: Path) -> None:
    """Refuse a metadata table that is not there. Raises `MetadataError`."""
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
    """The codec of an encoding of text. Raises `ParameterError` where there is none."""
    try:
        codec = codecs.lookup(encoding)
        "a".encode(encoding)  # refuses the codecs that are none of text
    except (LookupError, ValueError) as error:
        raise ParameterError(
            f"there is no text encoding '{encoding}'",
            where="metadata_encoding",
            do="name one that Python knows, such as utf-8, utf-16, gb18030 or latin-1",
        ) from error
    return codec


def _as_utf8(path: Path, encoding: str, rewritten: Path) -> Path:
    """The text of a file in UTF-8 without a byte-order mark: itself, or a rewritten copy."""
    codec = text_codec(encoding)
    with path.open("rb") as source:
        if codec.name == "utf-8" and source.read(3) != codecs.BOM_UTF8:
            return path
        source.seek(0)
        chunks = iter(lambda: source.read(_CHUNK), b"")
        line = 1
        try:
            with rewritten.open("w", encoding="utf-8", newline="") as target:
                for text in codecs.iterdecode(chunks, encoding):
                    target.write(text if line > 1 else text.removeprefix("\ufeff"))
                    line += text.count("\n")
        except UnicodeError as error:
            if isinstance(error, UnicodeDecodeError):
                line += error.object[: error.start].decode(encoding, "ignore").count("\n")
            _refuse(path, f"it is not {encoding} text", f", line {line}")
    return rewritten


def _read_parquet(path: Path, wanted: Sequence[str]) -> Table:
    rows = scan_parquet(path)
    columns = tuple(rows.collect_schema().names())
    read = rows.select(column for column in wanted if column in columns)
    return Table(read.with_row_index(INDEX).collect(engine="streaming"), columns)


def _records(path: Path, text: Path, strict: bool = False) -> Iterator[tuple[int, list[str]]]:
    """(line it begins at, values) of each row of csv, the header first, as Python reads them: slower
    than Polars, but it says where a row is wrong."""
    csv.field_size_limit(sys.maxsize)
    with text.open("rb") as source:
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


def _read_csv(path: Path, text: Path, wanted: Sequence[str]) -> Table:
    _, header = next(_records(path, text), (1, []))
    _check_header(path, header, wanted)
    names = [name if name in wanted else f"\x00{i}" for i, name in enumerate(header)]
    rows = scan_csv(
        text,
        has_header=False,
        skip_rows=1,
        schema={**dict.fromkeys(names, pl.String()), _EXTRA: pl.String()},
        extra_columns="ignore",
        missing_columns="insert",
        empty_string_is_null=False,
        row_index_name=INDEX,
        raise_if_empty=False,
    )
    # By the last column and the extra one, a row may be uneven.
    may_be_uneven = (pl.col(names[-1]).fill_null("") == "") | pl.col(_EXTRA).is_not_null()
    read = [column for column in wanted if column in header]
    try:
        frame = rows.select(INDEX, *read, may_be_uneven.alias(_EXTRA)).collect(engine="streaming")
    except pl.exceptions.PolarsError:
        for _ in _records(path, text, strict=True):  # it names the line
            pass
        raise
    uneven = _uneven(path, text, len(header)) if frame[_EXTRA].any() else {}
    empty = [index for index, why in uneven.items() if not why]
    problems = {index: ("uneven_row", why) for index, why in uneven.items() if why}
    rows = frame.drop(_EXTRA).filter(~pl.col(INDEX).is_in(empty))
    return Table(rows, tuple(header), problems)


def _uneven(path: Path, text: Path, columns: int) -> dict[int, str]:
    """Row index → what is wrong with the number of its values; nothing is said of an empty line.

    Empty values after the last column do not count.
    """
    found: dict[int, str] = {}
    for index, (line, record) in enumerate(_records(path, text)):
        count = len(record)
        while count > columns and not record[count - 1]:
            count -= 1
        if index and count != columns:
            why = f"line {line}: {count} values for {columns} columns"
            found[index - 1] = why if count else ""
    return found


def _check_header(path: Path, header: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a first line that names no columns, one of them twice, or separates them by other marks."""
    if not header:
        _refuse(path, "its first line names no columns", ", line 1")
    twice = next((name for name in wanted if header.count(name) > 1), None)
    if twice is not None:
        _refuse(path, f"two columns are called '{twice}'", ", line 1")
    line, named = ",".join(header), {*header} & {*wanted}
    for mark, shown in _DELIMITERS.items():
        names = {name.strip(' "') for name in line.split(mark)}
        is_one = len(header) == 1 < len(names) and not named
        if is_one or len(names & {*wanted}) > len(named):
            raise MetadataError(
                f"the columns are separated by {shown}, not by ','",
                where=_where(path, ", line 1"),
                do="write the table with commas, and with quotes around values that hold one",
            )
