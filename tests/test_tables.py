"""Tables of every format and encoding, and what is wrong in them, with its line or row."""

import codecs
import csv
import io
import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.table import json_rows
from diffsynth_dagster.data.table.read import read_table
from diffsynth_dagster.data.table.values import REASONS, check_structure, require_columns
from diffsynth_dagster.errors import MetadataError, ParameterError

IMAGE = Input("image", "image")
MANY = Input("edits", "image", many=True)
CAPTION = Input("prompt", "text")
SEVERAL = (Input("prompt", "text", many=True), Input("seed", "number"))
ANY = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def check(path: Path, *inputs: Input, encoding: str = "utf-8") -> pl.DataFrame:
    chosen = inputs or (IMAGE, CAPTION)
    table = read_table(path, encoding, chosen)
    require_columns(table, chosen, str(path), "the family")
    return check_structure(table, chosen, str(path))


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def tables(folder: Path, rows: list[str]) -> list[Path]:
    """Rows of JSON text as a list, and one on each line."""
    return [
        write(folder, "t.json", "[" + ",\n".join(rows) + "\n]"),
        write(folder, "t.jsonl", "\n\n".join(rows)),
    ]


CSV = 'image,prompt\na.png,"a ""cat"",\nsitting"\r\nb.png,ein Baer – 熊\n'
PROMPTS = ['a "cat",\nsitting', "ein Baer – 熊"]


@pytest.mark.parametrize(
    ("encoding", "written", "mark"),
    [
        ("utf-8", "utf-8", b""),
        ("UTF8", "utf-8", codecs.BOM_UTF8),
        ("utf-8-sig", "utf-8", codecs.BOM_UTF8),
        ("utf-16", "utf-16", b""),
        ("utf-16-le", "utf-16-le", codecs.BOM_UTF16_LE),
        ("gb18030", "gb18030", b""),
    ],
)
def test_encodings(tmp_path: Path, encoding: str, written: str, mark: bytes) -> None:
    rows = [{"image": "a.png", "prompt": prompt} for prompt in PROMPTS]
    texts = {
        "csv": CSV,
        "json": json.dumps(rows, ensure_ascii=False, indent=1),
        "jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    }
    for suffix, text in texts.items():
        frame = check(
            write(tmp_path, f"t.{suffix}", mark + text.encode(written)), encoding=encoding
        )
        assert frame["status"].to_list() == ["ok", "ok"]
        assert frame["prompt"].to_list() == PROMPTS
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
        ("t.csv", "image;prompt\na.png;x, y\n", "utf-8", "separated by ';', not by ','.*line 1"),
        ("t.csv", "note;image;prompt, or text\na;b;c\n", "utf-8", "separated by ';'"),
        ("t.csv", '"image"\t"prompt"\na.png\tx\n', "utf-8", "separated by tabs"),
        ("t.csv", "image | prompt\na.png | x\n", "utf-8", r"separated by '\|'"),
        ("t.csv", "file;caption\na.png;x\n", "utf-8", "separated by ';', not by ','.*line 1"),
        ("t.csv", "file\tcaption\na.png\tx\n", "utf-8", "separated by tabs"),
        ("t.csv", "caption of the file\nx\n", "utf-8", "no column 'image'"),
        ("t.csv", "images,prompt\na.png,x\n", "utf-8", "no column 'image'.*mean 'images'"),
        ("t.csv", "image,text;prompt\na.png,x\n", "utf-8", "no column 'prompt'"),
        ("t.csv", "", "utf-8", "names no columns"),
        ("t.csv", "image,prompt\n\n\n", "utf-8", "has no rows"),
        ("t.jsonl", b'{"image":"a"}\n{"image":"\xff"}\n', "utf-8", "row 2 is not JSON.*UTF8"),
        ("t.jsonl", '{"image":"a"}\n\n{"image":"b"\n{"image":"c"}', "utf-8", 'row 2 .*near.*"b"'),
        ("t.jsonl", '{"image":"a"}\n["a"]\n', "utf-8", "row 2 is not an object"),
        ("t.jsonl", '{"image":"a","prompt":NaN}\n', "utf-8", "row 1 is not JSON"),
        ("t.jsonl", '{"image":"a","prompt":01.5}\n', "utf-8", "row 1 is not JSON"),
        (
            "t.jsonl",
            r'{"image":"\udc00","prompt":"x"}',
            "utf-8",
            "row 1 is not JSON: 'utf-8' codec",
        ),
        ("t.jsonl", "", "utf-8", "the metadata has no rows"),
        ("t.jsonl", "\r\n" * 5000, "utf-8", "the metadata has no rows"),
        ("t.json", '[{"image":"a","prompt":"x"},\n{"image":}]', "utf-8", "row 2 is not JSON"),
        ("t.json", '[{"image":"a"}\n{"image":"b"}]', "utf-8", "row 2 is not JSON.*I expect ','"),
        ("t.json", '[{"image":"a","prompt":"x"}', "utf-8", "row 2 is not JSON.*premature EOF"),
        ("t.json", '[{"image":"a","prompt":"x"}] 1', "utf-8", "row 2 is not JSON.*trailing"),
        ("t.json", "[1]", "utf-8", "row 1 is not an object"),
        ("t.json", "[]", "utf-8", "has no rows"),
        ("t.parquet", "no parquet", "utf-8", "cannot be read"),
        ("t.xlsx", "x", "utf-8", "is no metadata format"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: str | bytes, encoding: str, says: str
) -> None:
    with pytest.raises(MetadataError) as error:
        check(write(tmp_path, name, content), encoding=encoding)
    message = str(error.value).replace("\n", " ")
    assert re.search(says, message), message
    assert name in message


@pytest.mark.parametrize("encoding", ["utf8000", "base64", ""])
def test_encodings_that_are_none(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(ParameterError, match="no text encoding"):
        check(write(tmp_path, "t.csv", CSV), encoding=encoding)


def test_uneven_rows_are_told_with_their_lines(tmp_path: Path) -> None:
    content = (
        "image,prompt,note;more\n"
        "a.png,x;y,n\n"
        '"b.png","two\nlines",n\n'
        "c.png,a cat, sitting,n\n"  # line 5
        "\n"
        "d.png,x\n"  # line 7
        "e.png,x,\n"
        "f.png,x,n,\n"  # nothing too much
        "g.png,x,n"
    )
    frame = check(write(tmp_path, "t.csv", content))
    assert frame.filter(pl.col("status") == "uneven_row").select("image", "message").rows() == [
        ("c.png", "line 5: 4 values for 3 columns"),
        ("d.png", "line 7: 2 values for 3 columns"),
    ]
    assert frame["status"].to_list() == ["ok", "ok", *["uneven_row"] * 2, "ok", "ok", "ok"]
    assert frame["row"].to_list() == list(range(1, 8))


def test_what_is_wrong_far_down_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["image,prompt", *["a.png,x"] * 60_000, "b.png,y,z", *["a.png,x"] * 60_000]
    frame = check(write(tmp_path, "t.csv", "\n".join(lines)))
    assert frame.height == 120_001
    bad = frame.filter(pl.col("status") != "ok")
    assert bad.select("row", "message").rows() == [(60_001, "line 60002: 3 values for 2 columns")]
    monkeypatch.setattr(json_rows, "_BATCH", 7)
    rows = ['{"image":"a","prompt":"x"}'] * 50 + ['{"prompt":"x","image":true}', '{"image":"b"}']
    for path in tables(tmp_path, rows):
        status = check(path)["status"].to_list()
        assert status == [*["ok"] * 50, "wrong_type", "empty_caption"]


UNSEEN = ["\0", "\u200b", "\ufeff \u200d", "\x01\x7f", "\u2060\u00ad", "\u202e", "\u3164", "\ufe0f"]
SEEN = ["[x] {y}", " x", 7, "a\u200db", "\u200bx", "熊", "👍🏽", "\u0301a", "a\x00b", "."]
TYPED: dict[tuple[str, str], list[Any]] = {
    ("image", "ok"): ["a.png", 5, "[1] a.png", "true", "a:b/c.png"],
    ("image", "wrong_type"): [["a.png"], {"path": "a.png"}, True],
    ("image", "missing_value"): [None, "", " "],
    ("image", "url"): ["http://x/a.png", " S3://x/a.png", "data:image/png;base64,AA"],
    ("image", "bad_path"): ["a\x00b"],
    ("prompt", "ok"): SEEN,
    ("prompt", "wrong_type"): [["x"], False],
    ("prompt", "empty_caption"): [None, "", *UNSEEN],
}
"""Column and status → values that have it."""


def test_values_of_every_kind(tmp_path: Path) -> None:
    cases = [(column, v, want) for (column, want), values in TYPED.items() for v in values]
    rows = [json.dumps({"image": "a", "prompt": "x", column: v}) for column, v, _ in cases]
    for path in tables(tmp_path, [*rows, '{"prompt": "x"}']):
        assert check(path)["status"].to_list() == [*(want for *_, want in cases), "missing_value"]
    for write_as, name in (("write_csv", "t.csv"), ("write_parquet", "t.parquet")):
        texts = [v for v in [*UNSEEN, *SEEN] if v != 7]
        frame = pl.DataFrame({"image": "a.png", "prompt": texts})
        getattr(frame, write_as)(tmp_path / name)
        got = check(tmp_path / name)["status"].to_list()
        assert got == ["empty_caption"] * len(UNSEEN) + ["ok"] * (len(SEEN) - 1)


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


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_lists(tmp_path: Path, suffix: str) -> None:
    """A json list in a cell of csv; a single value is a list of one."""
    chosen = [case for case in LISTS if suffix != "parquet" or not isinstance(case[0], str)]
    values = [case[0] for case in chosen]
    path = tmp_path / f"t.{suffix}"
    if suffix == "csv":
        cells = [json.dumps(v) if isinstance(v, list) else v or " " for v in values]
        pl.DataFrame({"edits": cells}).write_csv(path)
    elif suffix == "jsonl":
        path.write_text("\n".join(json.dumps({"edits": value}) for value in values))
    else:
        pl.DataFrame({"edits": values}).write_parquet(path)
    frame = check(path, MANY)
    assert frame["status"].to_list() == [case[1] for case in chosen]
    assert frame["edits"].to_list() == [case[2] for case in chosen]


elements = st.none() | st.text(max_size=5) | st.integers(-(10**25), 10**25) | st.floats(-1e6, 1e6)


@settings(ANY, max_examples=20)
@given(st.lists(st.lists(elements, min_size=1, max_size=3), min_size=1, max_size=6))
def test_any_lists(tmp_path: Path, values: list[list[Any]]) -> None:
    """As csv and JSON have them, with numbers, and with one cell that is no JSON."""

    def texts(exact: type) -> list[list[Any]]:
        def text(e: Any) -> str | None:
            return e if e is None or isinstance(e, str) else str(exact(json.dumps(e)))

        return [[text(e) for e in v] for v in values]

    cells = [*map(json.dumps, values), "[x, y].png"]
    pl.DataFrame({"edits": cells}).write_csv(tmp_path / "t.csv")
    assert check(tmp_path / "t.csv", MANY)["edits"].to_list() == [*texts(str), ["[x, y].png"]]
    for path in tables(tmp_path, [json.dumps({"edits": v}) for v in values]):
        assert check(path, MANY)["edits"].to_list() == texts(Decimal)


def test_a_string_of_json_is_one_text_whatever_it_looks_like(tmp_path: Path) -> None:
    values = ["[1, 2]", '["q"]', ' ["a"]', "\x1f[]", "[cat] dog", '["a\\', ["[1]", "b"]]
    rows = [json.dumps({"prompt": value, "seed": 1}) for value in values]
    for path in tables(tmp_path, rows):
        frame = check(path, *SEVERAL)
        assert frame["prompt"].to_list() == [*([v] for v in values[:-1]), values[-1]]
        assert set(frame["status"]) == {"ok"}


def test_lists_of_other_types(tmp_path: Path) -> None:
    rows = [json.dumps({"edits": value}) for value in ({"a": 1}, True, 5, [["a"]])]
    frame = check(tables(tmp_path, rows)[0], MANY)
    assert frame["status"].to_list() == ["wrong_type", "wrong_type", "ok", "ok"]
    assert frame["edits"].to_list()[2:] == [["5"], ['["a"]']]


def test_a_column_that_begins_late(tmp_path: Path) -> None:
    rows = ['{"prompt": "x"}'] * 3
    path = write(tmp_path, "t.jsonl", "\n".join([*rows, '{"prompt": "x", "image": "a.png"}']))
    assert check(path)["status"].to_list() == [*["missing_value"] * 3, "ok"]
    with pytest.raises(MetadataError, match="has no column 'image'"):
        check(write(tmp_path, "u.jsonl", "\n".join(rows)))


def test_lines_in_a_file_called_json_are_read(tmp_path: Path) -> None:
    """And a list in one called jsonl."""
    rows = ['{"image":"a","prompt":"x"}', '{"image":"b","prompt":"y"}']
    space = " \n" * 4000
    for name, text in (("t.json", "\n".join(rows)), ("t.jsonl", f"{space}[{','.join(rows)}]")):
        assert check(write(tmp_path, name, text))["prompt"].to_list() == ["x", "y"]


def test_keys_that_come_twice(tmp_path: Path) -> None:
    """Of the columns that are read, however the key is written."""
    cases = [
        ('{"image":"a","prompt":"x"}', "ok"),
        ('{"image":"a","prompt":"x","prompt":"y"}', "repeated_key"),
        (r'{"image":"a","prompt":"x","\u0070rompt" :"x"}', "repeated_key"),
        ('{"image":"prompt","prompt":"image"}', "ok"),
        ('{"image":"a","prompt":"x","note":1,"note":{"prompt":1,"prompt":2}}', "ok"),
        ('{"image":"a","prompt":"x","image":"b","note":1,"note":2}', "repeated_key"),
    ]
    for path in tables(tmp_path, [text for text, _ in cases]):
        frame = check(path)
        assert frame["status"].to_list() == [want for _, want in cases]
        assert frame["message"][1] == "prompt: the row has this key twice"


def test_texts_of_json_are_what_is_written(tmp_path: Path) -> None:
    """Escapes and numbers; half of a character, which no table can hold, is a question mark."""
    written = {
        r'"\ud83d\ude00"': "😀",
        r'"\\ud83d \ud55c"': "\\ud83d 한",
        r'"x \ud83d"': "x ?",
        '"she wrote \\"prompt\\": 2.0, and left"': 'she wrote "prompt": 2.0, and left',
        **{n: n for n in ("2.0", "1.50", "0", "7", "-5", "12345678901234567890123")},
        "1e3": "1E+3",
    }
    rows = [f'{{"image": {each}\t, "other": 3.50, "prompt":\n {each}}}' for each in written]
    for path in tables(tmp_path, rows):
        frame = check(path)
        assert frame["prompt"].to_list() == frame["image"].to_list() == [*written.values()]
        assert set(frame["status"]) == {"ok"}


def test_numbers_of_csv_and_of_a_column_of_numbers(tmp_path: Path) -> None:
    """Cells are text as it stands, also in a list; a number in JSON is a value where numbers are read."""
    cells = ["[2.0, 1e3, -0, 1.50]", '["a, 2.0]", 2.0, "\\"", 1e3]', "1.0", '["a"]', "007"]
    want = [["2.0", "1e3", "-0", "1.50"], ["a, 2.0]", "2.0", '"', "1e3"], ["1.0"], ["a"], ["007"]]
    pl.DataFrame({"prompt": cells, "seed": ["4"] * 5}).write_csv(tmp_path / "t.csv")
    assert check(tmp_path / "t.csv", *SEVERAL)["prompt"].to_list() == want
    rows = [f'{{"prompt": "a", "seed": {n}}}' for n in ("4", "4.0", "2.50", "1e3")]
    for path in tables(tmp_path, rows):
        assert check(path, *SEVERAL)["seed"].to_list() == ["4", "4", "2.5", "1000"]


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
        assert status in REASONS or (image.strip() and prompt.strip())


@ANY
@given(st.binary(max_size=200), st.sampled_from(["csv", "json", "jsonl", "parquet"]))
def test_any_bytes_are_judged(tmp_path: Path, content: bytes, suffix: str) -> None:
    try:
        frame = check(write(tmp_path, f"t.{suffix}", content))
    except MetadataError:
        return
    assert frame.height > 0


plain = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-9, 9) | st.text(max_size=4)
any_value = plain | st.lists(plain, max_size=3) | st.dictionaries(st.text(max_size=3), plain)


@ANY
@given(st.lists(st.tuples(any_value, any_value), min_size=1, max_size=8))
def test_any_json_is_judged_row_by_row(tmp_path: Path, rows: list[tuple[Any, Any]]) -> None:
    lines = [json.dumps({"image": image, "prompt": prompt}) for image, prompt in rows]
    for path in tables(tmp_path, lines):
        frame = check(path)
        for values, status in zip(rows, frame["status"], strict=True):
            typed = any(isinstance(value, list | dict | bool) for value in values)
            assert (status == "wrong_type") == typed
            assert status != "ok" or all(str(value).strip() for value in values)
