"""Tables of every format and encoding, and what is wrong in them, with its line."""

import codecs
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.table.json_array import json_array_to_lines
from diffsynth_dagster.data.table.read import open_table
from diffsynth_dagster.data.table.values import REASONS, check_structure, require_columns
from diffsynth_dagster.errors import MetadataError, ParameterError

IMAGE = Input("image", "image")
MANY = Input("edits", "image", many=True)
CAPTION = Input("prompt", "text")
ANY = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def check(path: Path, *inputs: Input, encoding: str = "utf-8") -> pl.DataFrame:
    chosen = inputs or (IMAGE, CAPTION)
    lists = [i.column for i in chosen if i.many]
    with open_table(path, encoding, [i.column for i in chosen], lists) as table:
        require_columns(table, chosen, str(path), "the family")
        return check_structure(table, chosen, str(path))


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: Path, encoding: str = "utf-8") -> str:
    with pytest.raises(MetadataError) as error:
        check(path, encoding=encoding)
    return str(error.value)


CSV = 'image,prompt\na.png,"a ""cat"",\nsitting"\r\nb.png,ein Bär – 熊\n'
PROMPTS = ['a "cat",\nsitting', "ein Bär – 熊"]


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", b""),
        ("utf-8", codecs.BOM_UTF8),
        ("UTF8", codecs.BOM_UTF8),
        ("utf-8-sig", codecs.BOM_UTF8),
        ("utf-16", b""),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("gb18030", b""),
        ("utf-32", b""),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_encodings(tmp_path: Path, encoding: str, mark: bytes, suffix: str) -> None:
    rows = [{"image": "a.png", "prompt": prompt} for prompt in PROMPTS]
    text = {
        "csv": CSV,
        "json": json.dumps(rows, ensure_ascii=False, indent=1),
        "jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    }[suffix]
    name = "utf-8" if encoding == "utf-8-sig" else encoding
    text = text.replace("ä", "a").replace("–", "-") if encoding == "gb18030" else text
    path = write(tmp_path, f"t.{suffix}", mark + text.encode(name))
    frame = check(path, encoding=encoding)
    assert frame["status"].to_list() == ["ok", "ok"]
    want = PROMPTS[1] if encoding != "gb18030" else "ein Bar - 熊"
    assert frame["prompt"].to_list() == [PROMPTS[0], want]
    assert frame["row"].to_list() == [1, 2]


@pytest.mark.parametrize(
    ("name", "content", "encoding", "says"),
    [
        ("t.csv", b"image,prompt\na.png,x\nb.png,\xff\n", "utf-8", "not utf-8 text.*line 3"),
        ("t.csv", b"im\xffage,prompt\na.png,x\n", "utf-8", "not utf-8 text.*line 1"),
        ("t.csv", CSV.encode("utf-16"), "utf-8", "not utf-8 text.*line 1"),
        ("t.csv", b"image,prompt\na.png,\x81\x20\n", "gb18030", "not gb18030 text.*line 2"),
        ("t.csv", 'image,prompt\na.png,"x"y\n', "utf-8", "is not csv.*line 2"),
        ("t.csv", 'image,prompt\na.png,x\nb.png,"y\nc.png,z\n', "utf-8", "is not csv.*line 3"),
        ("t.csv", "image,prompt,prompt\na,b,c\n", "utf-8", "two columns are called 'prompt'"),
        ("t.jsonl", b'{"image":"a","prompt":"x"}\n{"image":"\xff"}\n', "utf-8", "line 2"),
        ("t.jsonl", '{"image":"a","prompt":"x"}\n\n{"image":\n', "utf-8", "not JSON.*line 3"),
        ("t.jsonl", '{"image":"a","prompt":"x"}\n["a"]\n', "utf-8", "not an object.*line 2"),
        ("t.jsonl", '{"image":"a","prompt":NaN}\n', "utf-8", "line 1"),
        ("t.json", '[{"image":"a","prompt":"x"},\n{"image":}]', "utf-8", "row 2.*line 2"),
        ("t.json", '[{"image":"a","prompt":"x"}', "utf-8", "no comma"),
        ("t.json", '{"image":"a"}', "utf-8", "not a JSON list"),
        ("t.json", '[{"image":"a","prompt":"x"}] 1', "utf-8", "something follows"),
        ("t.json", "[1]", "utf-8", "cannot be read"),
        ("t.json", "[]", "utf-8", "has no rows"),
        ("t.jsonl", "\n\n", "utf-8", "has no rows"),
        ("t.csv", "image,prompt\n\n\n", "utf-8", "has no rows"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: str | bytes, encoding: str, says: str
) -> None:
    message = refused(write(tmp_path, name, content), encoding).replace("\n", " ")
    assert re.search(says, message), message


@pytest.mark.parametrize("encoding", ["utf8000", "base64", ""])
def test_encodings_that_are_none(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(ParameterError, match="no text encoding"):
        check(write(tmp_path, "t.csv", CSV), encoding=encoding)


def test_uneven_rows_are_told_with_their_lines(tmp_path: Path) -> None:
    content = (
        "image,prompt,note\n"
        "a.png,x,n\n"
        '"b.png","two\nlines",n\n'
        "c.png,a cat, sitting,n\n"  # line 5
        "\n"
        "d.png,x\n"  # line 7
        "e.png,x,\n"
        "f.png,x,n,\n"  # nothing too much
        "g.png,x,n"
    )
    frame = check(write(tmp_path, "t.csv", content))
    uneven = frame.filter(pl.col("status") == "uneven_row")
    assert uneven["message"].to_list() == [
        "line 5: 4 values for 3 columns",
        "line 7: 2 values for 3 columns",
    ]
    assert uneven["image"].to_list() == ["c.png", "d.png"]
    assert frame["status"].to_list() == ["ok", "ok", *["uneven_row"] * 2, "ok", "ok", "ok"]
    assert frame["row"].to_list() == list(range(1, 8))


def test_an_uneven_row_far_down(tmp_path: Path) -> None:
    lines = ["image,prompt", *["a.png,x"] * 60_000, "b.png,y,z", *["a.png,x"] * 60_000]
    frame = check(write(tmp_path, "t.csv", "\n".join(lines)))
    assert frame.height == 120_001
    bad = frame.filter(pl.col("status") != "ok")
    assert bad.select("row", "message").rows() == [(60_001, "line 60002: 3 values for 2 columns")]


def test_values_of_other_types(tmp_path: Path) -> None:
    values: list[tuple[Any, str]] = [
        ("a.png", "ok"),
        (5, "ok"),
        (["a.png"], "wrong_type"),
        ({"path": "a.png"}, "wrong_type"),
        (True, "wrong_type"),
        ("[1] a.png", "ok"),
        ("true", "ok"),
        (None, "missing_value"),
        ("", "missing_value"),
        (" ", "missing_value"),
        ("http://x/a.png", "url"),
        (" S3://x/a.png", "url"),
        ("data:image/png;base64,AA", "url"),
        ("a\x00b", "bad_path"),
        ("a:b/c.png", "ok"),
    ]
    rows = [{"image": value, "prompt": "x"} for value, _ in values]
    for name, text in (
        ("t.json", json.dumps([*rows, {"prompt": "x"}])),
        ("t.jsonl", "\n".join(map(json.dumps, [*rows, {"prompt": "x"}]))),
    ):
        frame = check(write(tmp_path, name, text))
        assert frame["status"].to_list() == [*(want for _, want in values), "missing_value"]


def test_captions_of_other_types(tmp_path: Path) -> None:
    values: list[tuple[Any, str]] = [
        ("[x] {y}", "ok"),
        ("　", "empty_caption"),
        (" x", "ok"),
        (7, "ok"),
        (["x"], "wrong_type"),
        (False, "wrong_type"),
        (None, "empty_caption"),
    ]
    rows = [{"image": "a.png", "prompt": value} for value, _ in values]
    frame = check(write(tmp_path, "t.json", json.dumps(rows)))
    assert frame["status"].to_list() == [want for _, want in values]


@pytest.mark.parametrize(
    ("column", "status"),
    [
        (pl.Series([1.5, float("nan")]), ["ok", "missing_value"]),
        (pl.Series([True, None]), ["wrong_type", "wrong_type"]),
        (pl.Series([b"a", b"b"]), ["wrong_type", "wrong_type"]),
        (pl.Series([["a"], ["b"]]), ["wrong_type", "wrong_type"]),
        (pl.Series([{"a": 1}, {"a": 2}]), ["wrong_type", "wrong_type"]),
        (pl.Series(["a", "b"], dtype=pl.Categorical), ["ok", "ok"]),
        (pl.Series([None, None]), ["missing_value", "missing_value"]),
    ],
)
def test_types_of_parquet(tmp_path: Path, column: pl.Series, status: list[str]) -> None:
    path = tmp_path / "t.parquet"
    pl.DataFrame({"image": column, "prompt": ["x", "y"]}).write_parquet(path)
    assert check(path)["status"].to_list() == status


LISTS: list[tuple[Any, str, list[str | None] | None]] = [
    (["a.png", "b.png"], "ok", ["a.png", "b.png"]),
    ("a.png", "ok", ["a.png"]),
    ([], "missing_value", []),
    (["a.png", None], "missing_value", ["a.png", None]),
    (["a.png", ""], "missing_value", ["a.png", ""]),
    (None, "missing_value", None),
    (["a.png", "https://x/b.png"], "url", ["a.png", "https://x/b.png"]),
    (["a\x00"], "bad_path", ["a\x00"]),
    (["[a, b].png"], "ok", ["[a, b].png"]),
    (['a"b\\c\n.png', "ü熊.png"], "ok", ['a"b\\c\n.png', "ü熊.png"]),
    ("[a, b].png", "ok", ["[a, b].png"]),
]


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet", "one.parquet"])
def test_lists(tmp_path: Path, suffix: str) -> None:
    """A json list in a cell of csv; a single value is a list of one."""
    chosen = [case for case in LISTS if suffix != "parquet" or not isinstance(case[0], str)]
    if suffix == "one.parquet":
        chosen = [case for case in LISTS if case[0] is None or isinstance(case[0], str)]
    values = [case[0] for case in chosen]
    path = tmp_path / f"t.{suffix}"
    rows = [{"edits": value} for value in values]
    if suffix == "csv":
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["edits"])
            cells = [json.dumps(v) if isinstance(v, list) else v for v in values]
            writer.writerows([[cell or " "] for cell in cells])
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        pl.DataFrame({"edits": values}).write_parquet(path)
    frame = check(path, MANY)
    assert frame["status"].to_list() == [case[1] for case in chosen]
    assert frame["edits"].to_list() == [case[2] for case in chosen]


@ANY
@given(st.lists(st.lists(st.none() | st.text(max_size=5), min_size=1, max_size=3), min_size=1))
def test_any_lists_in_cells(tmp_path: Path, values: list[list[str | None]]) -> None:
    """As csv has them; with one cell that is no JSON, and without."""
    for more in ([], ["[x, y].png"]):
        cells = [*map(json.dumps, values), *more]
        frame = pl.DataFrame({"edits": cells})
        frame.write_csv(tmp_path / "t.csv")
        got = check(tmp_path / "t.csv", MANY)["edits"].to_list()
        assert got == [*values, *([m] for m in more)]


def test_lists_of_other_types(tmp_path: Path) -> None:
    values = [["a"], {"a": 1}, True, 5, [["a"]], [{"k": 1}], None, "b"]
    frame = check(write(tmp_path, "t.json", json.dumps([{"edits": v} for v in values])), MANY)
    want = ["ok", "wrong_type", "wrong_type", "ok", "ok", "ok", "missing_value", "ok"]
    assert frame["status"].to_list() == want
    assert frame["edits"].to_list()[3:6] == [["5"], ['["a"]'], ['{"k": 1}']]
    assert "line 2" in refused_lists(write(tmp_path, "t.jsonl", '{"edits": ["a"]}\n{"edits": 5\n'))


def refused_lists(path: Path) -> str:
    with pytest.raises(MetadataError) as error:
        check(path, MANY)
    return str(error.value)


def test_a_column_that_begins_late(tmp_path: Path) -> None:
    rows = [{"prompt": "x"}] * 2000 + [{"prompt": "x", "image": "a.png"}]
    frame = check(write(tmp_path, "t.jsonl", "\n".join(map(json.dumps, rows))))
    assert frame["status"].value_counts().sort("status").rows() == [
        ("ok", 1),
        ("missing_value", 2000),
    ]
    assert "has no column 'image'" in refused(write(tmp_path, "u.jsonl", json.dumps(rows[0])))


cells = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00"), max_size=6
) | st.sampled_from(['"', ",", "\n", '"a,b"', "a", " ", "\x1f", "[", "true"])


@ANY
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=12))
def test_any_csv_is_read_as_written(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([("image", "prompt"), *rows])
    frame = check(write(tmp_path, "t.csv", buffer.getvalue()))
    assert frame.select("image", "prompt").rows() == rows
    for (image, prompt), status in zip(rows, frame["status"], strict=True):
        assert status in ("ok", *REASONS)
        if status == "ok":
            assert image.strip()
            assert prompt.strip()


@ANY
@given(st.binary(max_size=200), st.sampled_from(["csv", "json", "jsonl", "parquet"]))
def test_any_bytes_are_judged(tmp_path: Path, content: bytes, suffix: str) -> None:
    try:
        frame = check(write(tmp_path, f"t.{suffix}", content))
    except MetadataError:
        return
    assert frame.height > 0


@ANY
@given(st.text(alphabet='image,prompt\n\r" \x00ä[]{}:', max_size=60))
@example(",:,,:")
@example("a,b,,\nc,d,")
def test_any_text_under_a_header_is_judged(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, "t.csv", "image,prompt\n" + content)
    try:
        frame = check(path)
    except MetadataError:
        return
    uneven = frame.filter(pl.col("status") == "uneven_row").height
    with path.open(newline="\n", encoding="utf-8") as file:
        if "\r" in content.replace("\r\n", ""):
            return  # Python's reader refuses these unless quoted
        records = [record for record in list(csv.reader(file))[1:] if record]
    records = [record[:2] if not any(record[2:]) else record for record in records]
    assert frame.height == len(records)
    assert uneven == sum(len(record) != 2 for record in records)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=5,
)


@ANY
@given(
    st.lists(
        st.fixed_dictionaries({}, optional={"image": json_values, "prompt": json_values}),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(["json", "jsonl"]),
)
def test_any_json_is_judged_row_by_row(
    tmp_path: Path, rows: list[dict[str, Any]], suffix: str
) -> None:
    text = (
        json.dumps(rows, ensure_ascii=False)
        if suffix == "json"
        else "\n".join(json.dumps(row) for row in rows)
    )
    path = write(tmp_path, f"t.{suffix}", text)
    if not all(any(row.get(name) is not None for row in rows) for name in ("image", "prompt")):
        return
    frame = check(path)
    assert frame.height == len(rows)
    for row, status in zip(rows, frame["status"], strict=True):
        values = [row.get("image"), row.get("prompt")]
        if any(isinstance(value, list | dict | bool) for value in values):
            assert status in ("wrong_type", "missing_value", "empty_caption", "url", "bad_path")
        if status == "ok":
            assert all(str(value).strip() for value in values)


@ANY
@given(st.lists(json_values, max_size=6), st.sampled_from([None, 0, 2]))
def test_any_array_becomes_lines(tmp_path: Path, values: list[Any], indent: int | None) -> None:
    source = write(tmp_path, "t.json", json.dumps(values, indent=indent, ensure_ascii=False))
    assert json_array_to_lines(source, tmp_path / "lines") == len(values)
    lines = (tmp_path / "lines").read_bytes().decode().split("\n")[:-1]
    assert [json.loads(line) for line in lines] == values


def test_arrays_longer_than_what_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffsynth_dagster.data.table.json_array._CHUNK", 7)
    values = [{"a": 123456, "b": "x" * i, "c": [True, None, -1.5e10]} for i in range(40)]
    source = write(tmp_path, "t.json", json.dumps(values))
    assert json_array_to_lines(source, tmp_path / "lines") == 40
    assert [json.loads(x) for x in (tmp_path / "lines").read_text().splitlines()] == values
