"""Metadata tables as lazy Polars frames, one row for each sample, never whole in memory.

    csv              every value is text; the first line names the columns
    jsonl, json      objects of one row each; a json file is first rewritten line by line
    parquet          typed columns

Text that is not UTF-8 without a byte-order mark is rewritten into a temporary file. A table that
cannot be read is refused with the line that is to blame.
"""

import codecs
import csv
import json
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import polars as pl

from diffsynth_dagster.config.output import TABLES
from diffsynth_dagster.data.frames import scan_csv, scan_lines, scan_parquet
from diffsynth_dagster.data.table.json_array import json_array_to_lines
from diffsynth_dagster.data.table.json_rows import (
    lines_of,
    mended,
    odd_rows,
    with_lists,
    with_written_numbers,
)
from diffsynth_dagster.errors import MetadataError, ParameterError

INDEX = "row"
EXTRA = "\x00extra"
"""Column of what a csv row has beyond the named columns. No csv header can be called so."""
_CHUNK = 1 << 22
_SAMPLED_ROWS = 1000
_DELIMITERS = {";": "';'", "\t": "tabs", "|": "'|'"}
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Uneven:
    """A csv row whose number of values is not that of the columns; 0 values: an empty line.

    Empty values after the last column do not count.
    """

    line: int
    values: int


@dataclass(frozen=True)
class Table:
    """A table that can be scanned.

    Attributes:
        rows: the wanted columns, and `INDEX` from 0; for csv `EXTRA` as well. Columns of csv and
            json are text: a json value that is no string is its JSON text. Those of json that may
            hold lists are lists of text, null where the value is an object or a truth value.
        columns: names of the columns, in order.
        uneven: csv: row index → what is wrong with it; reads the file once more.
        values: json: (row indices) → row index → the row as it stands; reads the file once more.
        odd: json: row index → reason and message of a row that no table can hold.
        fail: raises the `MetadataError` for what Polars could not read.
    """

    rows: pl.LazyFrame
    columns: tuple[str, ...]
    fail: Callable[[Exception], NoReturn]
    uneven: Callable[[], dict[int, Uneven]] | None = None
    values: Callable[[Sequence[int]], dict[int, Mapping[str, Any]]] | None = None
    odd: Mapping[int, tuple[str, str]] = field(default_factory=dict[int, tuple[str, str]])

    def collect(self, rows: pl.LazyFrame) -> pl.DataFrame:
        """Run a query over `rows` in batches.

        Raises:
            MetadataError: the file cannot be read; the line is named where it is known.
        """
        try:
            return rows.collect(engine="streaming")
        except (OSError, pl.exceptions.PolarsError) as error:
            self.fail(error)


@contextmanager
def open_table(
    path: Path,
    encoding: str,
    wanted: Sequence[str],
    lists: Sequence[str] = (),
    numbers: Sequence[str] = (),
) -> Generator[Table]:
    """Open a metadata table; what it keeps beside the file is removed at the end.

    Args:
        encoding: of csv, json and jsonl.
        wanted: the columns to read.
        lists: those of them that may hold lists.
        numbers: those of them whose numbers are values; elsewhere a number keeps its text.

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
    with tempfile.TemporaryDirectory(prefix="metadata-") as folder:
        if suffix == ".parquet":
            yield _open_parquet(path, wanted)
            return
        text = _as_utf8(path, encoding, Path(folder) / "utf8")
        if suffix == ".json":
            lines = Path(folder) / "lines.jsonl"
            with _reading(path):
                json_array_to_lines(text, lines)
            yield _open_lines(path, lines, Path(folder), wanted, lists, numbers)
        elif suffix == ".jsonl":
            yield _open_lines(path, text, Path(folder), wanted, lists, numbers)
        else:
            yield _open_csv(path, text, wanted)


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


@contextmanager
def _reading(path: Path) -> Generator[None]:
    try:
        yield
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        _refuse(path, " ".join(str(error).split())[:300])


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
    if codec.name == "utf-8":
        with path.open("rb") as source:
            if not source.read(3).startswith(_MARKS):
                return path
    make = codecs.lookup("utf-8-sig" if codec.name == "utf-8" else encoding).incrementaldecoder
    assert make is not None
    decoder = make("strict")
    line = 1
    with path.open("rb") as source, rewritten.open("w", encoding="utf-8", newline="") as target:
        first = True
        while True:
            chunk = source.read(_CHUNK)
            try:
                text = decoder.decode(chunk, final=not chunk)
                target.write(text.removeprefix("\ufeff") if first else text)
            except UnicodeError as error:
                start = error.start if isinstance(error, UnicodeDecodeError) else 0
                before = error.object[:start] if isinstance(error, UnicodeDecodeError) else b""
                line += before.decode(encoding, "ignore").count("\n")
                _refuse(path, f"it is not {encoding} text", f", line {line}")
            line += text.count("\n")
            first = first and not text
            if not chunk:
                return rewritten


def _refuse_bytes(path: Path, text: Path) -> None:
    """Name the first line of a file that is not UTF-8, if there is one."""
    with text.open("rb") as source:
        for number, line in enumerate(source, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                _refuse(path, "it is not utf-8 text", f", line {number}")


def _open_parquet(path: Path, wanted: Sequence[str]) -> Table:
    with _reading(path):
        rows = scan_parquet(path)
        columns = tuple(rows.collect_schema().names())

    def fail(error: Exception) -> NoReturn:
        _refuse(path, " ".join(str(error).split())[:300])

    read = [column for column in wanted if column in columns]
    return Table(rows.select(read).with_row_index(INDEX), columns, fail)


@dataclass(frozen=True)
class _Csv:
    """A csv file and its text in UTF-8, read once more with Python's reader where Polars does not
    say enough."""

    path: Path
    text: Path

    def records(self, strict: bool = False) -> Iterator[tuple[int, list[str]]]:
        """(line it begins at, values) of each row, the header first."""
        # Lines end as they do for Polars: a carriage return alone ends none.
        with self.text.open(encoding="utf-8", newline="\n") as source:
            reader = csv.reader(source, strict=strict)
            start = 1
            for record in reader:
                yield start, record
                start = reader.line_num + 1

    def fail(self, error: Exception) -> NoReturn:
        """Name the line that is no csv."""
        _refuse_bytes(self.path, self.text)
        line = 1
        try:
            for start, record in self.records(strict=True):
                line = start + sum(value.count("\n") for value in record) + 1
        except csv.Error as why:
            _refuse(self.path, f"a row is not csv: {why}", f", line {line}")
        _refuse(self.path, " ".join(str(error).split())[:300])

    def header(self) -> list[str]:
        """The names of the columns."""
        try:
            found = next(self.records(), (1, []))[1]
        except (UnicodeDecodeError, csv.Error) as error:
            self.fail(error)
        if not found:
            _refuse(self.path, "its first line names no columns", ", line 1")
        return found

    def uneven(self) -> dict[int, Uneven]:
        """Row index → what is wrong with the number of its values."""
        columns = len(self.header())
        found: dict[int, Uneven] = {}
        line = 1
        try:
            for index, (line, record) in enumerate(self.records()):
                count = len(record)
                while count > columns and not record[count - 1]:
                    count -= 1
                if index and count != columns:
                    found[index - 1] = Uneven(line, count)
        except csv.Error as why:
            _refuse(self.path, f"a row is not csv: {why}", f", after line {line}")
        return found


def _other_delimiter(header: Sequence[str], wanted: Sequence[str]) -> str | None:
    """What separates the columns, as a message shows it, if it is not the comma."""
    line, named = ",".join(header), len({*header} & {*wanted})
    for mark, shown in _DELIMITERS.items():
        names = [name.strip(' "') for name in line.split(mark)]
        if len({*names} & {*wanted}) > named or (len(header) == 1 < len(names) and not named):
            return shown
    return None


def _open_csv(path: Path, text: Path, wanted: Sequence[str]) -> Table:
    csv.field_size_limit(sys.maxsize)
    file = _Csv(path, text)
    header = file.header()
    mark = _other_delimiter(header, wanted)
    if mark is not None:
        raise MetadataError(
            f"the columns are separated by {mark}, not by ','",
            where=_where(path, ", line 1"),
            do="write the table with commas, and with quotes around values that hold one",
        )
    twice = next((name for name in wanted if header.count(name) > 1), None)
    if twice is not None:
        _refuse(path, f"two columns are called '{twice}'", ", line 1")
    names = [name if name in wanted else f"\x00{i}" for i, name in enumerate(header)]
    rows = scan_csv(
        text,
        has_header=False,
        skip_rows=1,
        schema={**dict.fromkeys(names, pl.String()), EXTRA: pl.String()},
        extra_columns="ignore",
        missing_columns="insert",
        empty_string_is_null=False,
        row_index_name=INDEX,
        raise_if_empty=False,
    )
    # By the last column and the extra one, a row may be uneven.
    last = pl.col(names[-1]).fill_null("") == ""
    more = pl.col(EXTRA).is_not_null()  # empty it may stand before others that are not
    read = [column for column in wanted if column in header]
    rows = rows.select(INDEX, *read, (last | more).alias(EXTRA))
    return Table(rows, tuple(header), file.fail, file.uneven)


def _refuse_line(path: Path, text: Path, unit: str, error: Exception) -> NoReturn:
    """Name the first line of a jsonl file that is no row."""
    for number, line in lines_of(text):
        place = f", {unit} {number}"
        try:
            value = json.loads(line, parse_constant=_no_constant)
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeError:
            _refuse(path, "it is not utf-8 text", place)
        except (ValueError, RecursionError) as why:
            _refuse(path, f"it is not JSON: {why}", place)
        if not isinstance(value, dict):
            _refuse(path, "it is not an object of column names and values", place)
    _refuse(path, " ".join(str(error).split())[:300])


def _open_lines(
    path: Path,
    text: Path,
    folder: Path,
    wanted: Sequence[str],
    lists: Sequence[str],
    numbers: Sequence[str],
) -> Table:
    unit = "line" if path.suffix.lower() == ".jsonl" else "row"

    def fail(error: Exception) -> NoReturn:
        _refuse_line(path, text, unit, error)

    def values(indices: Sequence[int]) -> dict[int, Mapping[str, Any]]:
        asked = set(indices)
        return {i: json.loads(line) for i, (_, line) in enumerate(lines_of(text)) if i in asked}

    odd = odd_rows(text, wanted)
    if odd.broken:
        text = mended(text, folder / "mended.jsonl", odd.broken)
    texts = [name for name in wanted if name not in numbers]
    text = with_written_numbers(text, folder / "numbers.jsonl", texts)
    columns: dict[str, None] = {}
    for count, (_, line) in enumerate(lines_of(text)):
        try:
            columns |= dict.fromkeys(json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            fail(error)
        if count == _SAMPLED_ROWS:
            break
    types = {name: pl.List(pl.String) if name in lists else pl.String() for name in wanted}
    rows = scan_lines(text, types, INDEX)
    table = Table(rows, tuple(columns), fail, values=values)
    if columns and lists:
        try:
            rows.select(pl.col(*lists).null_count()).collect(engine="streaming")
        except pl.exceptions.PolarsError as error:
            try:
                listed = with_lists(text, folder / "lists.jsonl", lists)
            except (ValueError, AttributeError, RecursionError):
                fail(error)
            rows = scan_lines(listed, types, INDEX)
    late = [name for name in wanted if name not in columns]
    if columns and late:
        found = table.collect(rows.select(pl.col(name).is_not_null().any() for name in late))
        columns |= dict.fromkeys(name for name in late if found[name].item())
    return Table(rows, tuple(columns), fail, values=values, odd=odd.problems)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")
