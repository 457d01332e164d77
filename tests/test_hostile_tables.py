"""Tables and files that are not what they seem: each is told as what it is, with its row."""

import json
import os
import random
import re
import socket
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from conftest import make_config, write_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.media.image import IMAGE_FORMATS, image_facts
from diffsynth_dagster.data.table.check import CheckedTable, validate
from diffsynth_dagster.data.table.read import open_table
from diffsynth_dagster.data.table.values import check_structure, require_columns
from diffsynth_dagster.errors import MetadataError
from diffsynth_dagster.facts import FactCache
from diffsynth_dagster.families import find_family

READ = (Input("image", "image"), Input("prompt", "text"))
SEVERAL = (Input("prompt", "text", many=True), Input("seed", "number"))
ANY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def structure(path: Path, read: tuple[Input, ...] = READ) -> pl.DataFrame:
    wanted, lists = [i.column for i in read], [i.column for i in read if i.many]
    numbers = [i.column for i in read if i.kind == "number"]
    with open_table(path, "utf-8", wanted, lists, numbers) as table:
        require_columns(table, read, str(path), "the family")
        return check_structure(table, read, str(path))


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def check(folder: Path, rows: list[dict[str, Any]], **more: object) -> CheckedTable:
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = make_config(
        {
            "dataset_base_path": str(folder),
            "dataset_metadata_path": str(folder / "t.jsonl"),
            "model_paths": ["x.safetensors"],
            "lora_base_model": "dit",
            **more,
        }
    )
    facts = FactCache(folder.parent / "facts.sqlite")
    return validate(config, find_family("qwen_image").columns, facts)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv", "image;prompt\na.png;x, y\n", "separated by ';', not by ','.*line 1"),
        ("t.csv", "note;image;prompt, or text\na;b;c\n", "separated by ';'"),
        ("t.csv", '"image"\t"prompt"\na.png\tx\n', "separated by tabs"),
        ("t.csv", "image | prompt\na.png | x\n", r"separated by '\|'"),
        ("t.csv", "file;text\na.png;x\n", "separated by ';'"),
        ("t.csv", "images,prompt\na.png,x\n", "no column 'image'.*did you mean 'images'"),
        ("t.csv", "image,text;prompt\na.png,x\n", "no column 'prompt'"),
        ("t.json", '{"image":"a"}\n{"image":"b"}\n', r"an object on each line.*\.jsonl"),
        ("t.json", '{"image":"a"}', "not a JSON list"),
        ("t.json", '{"image":', "not a JSON list"),
    ],
)
def test_another_form_than_the_name_says(
    tmp_path: Path, name: str, content: str, says: str
) -> None:
    with pytest.raises(MetadataError) as error:
        structure(write(tmp_path, name, content))
    assert re.search(says, str(error.value).replace("\n", " ")), str(error.value)


def test_names_that_hold_a_delimiter(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", "image,prompt,size;weight\na.png,x;y,1\n")
    assert structure(path)["status"].to_list() == ["ok"]


@pytest.mark.timeout(60)
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    """A pipe would wait for its writer for ever."""
    data = write_images(tmp_path / "data", 1)
    (data / "folder.png").mkdir()
    os.mkfifo(data / "pipe.png")
    os.symlink(data / "pipe.png", data / "link.png")
    os.symlink(data / "nothing", data / "broken.png")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(data / "socket.png"))
        names = ["0.png", "folder.png", "pipe.png", "link.png", "socket.png", ".", "/dev/zero"]
        rows = [{"image": name, "prompt": "a"} for name in [*names, "broken.png"]]
        frame = check(data, rows, allow_outside_base_path=True).frame
    assert frame["status"].to_list() == ["ok", *["not_a_file"] * 6, "file_missing"]
    assert str(data / "pipe.png") in frame["message"][2]
    for name in ("pipe.csv", "folder.csv"):
        os.mkfifo(data / name) if name == "pipe.csv" else (data / name).mkdir()
        with pytest.raises(MetadataError, match="not a regular file"):
            structure(data / name)


def test_messages_hold_no_control_characters(tmp_path: Path) -> None:
    """Nor anything else that a terminal does not show as it is."""
    data = write_images(tmp_path / "data", 1)
    (data / "a\x1b[31m.png").write_text("no image")
    names = ["a\x1b[31m.png", "b\r\n.png", "c\u202e.png", "d\u2028.png", "e\x9b.png", "熊 é.png"]
    table = check(data, [{"image": name, "prompt": "a"} for name in names])
    messages = table.frame["message"].to_list()
    assert all(message and message.isprintable() for message in messages)
    assert r"a\x1b[31m.png" in messages[0]
    assert r"c\u202e.png" in messages[2]
    assert "熊 é.png" in messages[5]
    assert table.frame["image"].to_list() == names
    with pytest.raises(MetadataError) as error:
        table.require_accepted(0.0)
    assert str(error.value).replace("\n", "").isprintable()


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_keys_that_come_twice(tmp_path: Path, suffix: str) -> None:
    """Of the columns that are read, however the key is written."""
    rows = [
        ('{"image":"a","prompt":"x"}', "ok"),
        ('{"image":"a","prompt":"x","prompt":"y"}', "repeated_key"),
        ('{"image":"a","prompt":"x", "prompt" :"x"}', "repeated_key"),
        (r'{"image":"a","prompt":"x","\u0070rompt":"y"}', "repeated_key"),
        ('{"image":"prompt","prompt":"image"}', "ok"),
        (r'{"image":"a","prompt":"\"prompt\": \"prompt\""}', "ok"),
        ('{"image":"a","prompt":"x","note":1,"note":2}', "ok"),
        ('{"image":"a","prompt":"x","note":{"prompt":1,"prompt":2}}', "ok"),
        ('{"image":"a","prompt":"x","image":"b"}', "repeated_key"),
    ]
    texts = [text for text, _ in rows]
    content = "\n\n".join(texts) if suffix == "jsonl" else f"[{', '.join(texts)}]"
    frame = structure(write(tmp_path, f"t.{suffix}", content))
    assert frame["status"].to_list() == [want for _, want in rows]
    assert frame["message"][1] == "prompt: the row has this key 2 times"


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_lone_surrogates(tmp_path: Path, suffix: str) -> None:
    rows = [
        (r'{"image":"a","prompt":"\ud83d\ude00"}', "ok"),
        (r'{"image":"a","prompt":"\ud83d x"}', "lone_surrogate"),
        (r'{"image":"a","prompt":"\ude00\ud83d"}', "lone_surrogate"),
        (r'{"image":"a","prompt":"\\ud83d"}', "ok"),
        (r'{"image":"a","prompt":"\\\ud83d"}', "lone_surrogate"),
        (r'{"image":"\uDC00","prompt":"x"}', "lone_surrogate"),
        (r'{"image":"a","prompt":"x","note":["\udc00"],"\ud800":1}', "ok"),
        (r'{"image":"a","prompt":"\ud55c 熊"}', "ok"),
    ]
    texts = [text for text, _ in rows]
    content = "\n".join(texts) if suffix == "jsonl" else f"[{', '.join(texts)}]"
    frame = structure(write(tmp_path, f"t.{suffix}", content))
    assert frame["status"].to_list() == [want for _, want in rows]
    fine = frame.filter(pl.col("status") == "ok")["prompt"].to_list()
    assert fine == ["😀", "\\ud83d", "x", "한 熊"]


@ANY
@given(st.lists(st.text(st.characters(exclude_categories=()), max_size=4), min_size=1, max_size=9))
def test_any_text_is_read_as_written_or_rejected(tmp_path: Path, prompts: list[str]) -> None:
    rows = [{"image": "a", "prompt": "x" + prompt} for prompt in prompts]
    frame = structure(write(tmp_path, "t.jsonl", "\n".join(map(json.dumps, rows))))
    for prompt, got, status in zip(prompts, frame["prompt"], frame["status"], strict=True):
        broken = any("\ud800" <= c <= "\udfff" for c in json.loads(json.dumps(prompt)))
        assert status == ("lone_surrogate" if broken else "ok")
        assert broken or got == json.loads(json.dumps("x" + prompt))


def test_odd_rows_far_down_are_found(tmp_path: Path) -> None:
    """In tables longer than what is read at once."""
    rows = ['{"image":"a.png","prompt":"a caption"}'] * 100_000
    odd = random.Random(0).sample(range(len(rows)), 20)
    for index in odd:
        rows[index] = r'{"image":"a.png","prompt":"\ud800","note":"\ud800"}'
    frame = structure(write(tmp_path, "t.jsonl", "\n".join(rows)))
    bad = frame.filter(pl.col("status") != "ok")
    assert [row - 1 for row in bad["row"]] == sorted(odd)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_captions_of_what_cannot_be_seen(tmp_path: Path, suffix: str) -> None:
    empty = [
        "\0",
        "\u200b",
        "\ufeff \u200d",
        "\x01\x7f",
        "\u2060\u00ad",
        "\u202e",
        "\u3164",
        "\ufe0f",
    ]
    fine = ["a\u200db", "\u200bx", "熊", "👍🏽", "\u0301a", "a\x00b", "."]
    path = tmp_path / f"t.{suffix}"
    frame = pl.DataFrame({"image": ["a.png"] * 15, "prompt": [*empty, *fine]})
    if suffix == "jsonl":
        frame.write_ndjson(path)
    elif suffix == "csv":
        frame.write_csv(path)
    else:
        frame.write_parquet(path)
    assert structure(path)["status"].to_list() == ["empty_caption"] * 8 + ["ok"] * 7


def test_pictures_of_a_format_that_is_not_read(tmp_path: Path) -> None:
    drawing = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    for name, content in (("x.svg", drawing), ("x.eps", "%!PS-Adobe-3.0 EPSF-3.0\n")):
        facts = image_facts(write(tmp_path, name, content))
        assert facts["status"] == "unreadable"
        assert all(known in facts["message"] for known in IMAGE_FORMATS)
        assert str(tmp_path) not in facts["message"]


def test_names_that_are_no_text_are_named(tmp_path: Path) -> None:
    """A file system takes any bytes for a name; a table holds text alone."""
    data = write_images(tmp_path / "data", 2)
    os.rename(data / "1.png", os.fsencode(data) + b"/\xff.png")
    os.symlink(b"\xff.png", os.fsencode(data / "link.png"))
    frame = check(data, [{"image": name, "prompt": "a"} for name in ("0.png", "link.png")]).frame
    assert frame["status"].to_list() == ["ok", "bad_path"]
    assert "links to a name that is not UTF-8" in frame["message"][1]
    os.rename(data, os.fsencode(tmp_path) + b"/\xff")
    os.symlink(b"\xff", os.fsencode(tmp_path / "data"))
    with pytest.raises(MetadataError, match=r"/\\udcff, has a name that is not UTF-8"):
        check(tmp_path / "data", [{"image": "0.png", "prompt": "a"}])


NUMBERS = ["2.0", "1e3", "-0", "0", "1E+05", "1.50", "12345678901234567890123", "7", "1e400", "-5"]


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_a_caption_that_is_a_number_is_what_is_written(tmp_path: Path, suffix: str) -> None:
    """And so is the name of a file."""
    texts = [*NUMBERS, "007"] if suffix == "csv" else NUMBERS
    if suffix == "csv":
        text = "".join(f"{n},{n}\n" for n in ["image,prompt", *texts])
        text = text.replace("image,prompt,image,prompt", "image,prompt")
    else:
        rows = [f'{{"image" : {n}\t,"other": 3.50, "prompt":{n}}}' for n in texts]
        text = "\n".join(rows) if suffix == "jsonl" else "[" + ",\n".join(rows) + "\n]"
        text = text.replace('"prompt":', '"prompt":\n ') if suffix == "json" else text
    frame = structure(write(tmp_path, f"t.{suffix}", text))
    assert frame["prompt"].to_list() == frame["image"].to_list() == texts
    assert set(frame["status"]) == {"ok"}


def test_captions_of_a_list_that_are_numbers(tmp_path: Path) -> None:
    """In lists of JSON, in cells of csv, and alone where a list could be; a number column's numbers
    are values."""
    cells = ["[" + ", ".join(NUMBERS[:8]) + "]", '["a, 2.0]", 2.0, "\\"", 1e3]', "1.0", '["a"]']
    want = [NUMBERS[:8], ["a, 2.0]", "2.0", '"', "1e3"], ["1.0"], ["a"]]
    rows = [f'{{"prompt": {cell}, "seed": 4.0}}' for cell in cells]
    for name, text in (("t.jsonl", "\n".join(rows)), ("t.json", "[" + ",".join(rows) + "]")):
        frame = structure(write(tmp_path, name, text), SEVERAL)
        assert frame["prompt"].to_list() == want
        assert frame["seed"].to_list() == ["4"] * 4
    pl.DataFrame({"prompt": cells, "seed": ["4"] * 4}).write_csv(tmp_path / "t.csv")
    assert structure(tmp_path / "t.csv", SEVERAL)["prompt"].to_list() == want


def test_what_looks_like_a_number_inside_a_text_stays(tmp_path: Path) -> None:
    rows = [
        {"image": "a", "prompt": 'she wrote "prompt": 2.0, and left'},
        {"image": "b", "prompt": '{"prompt": 2.0}', "other": {"prompt": 2.0}},
        {"image": "c", "prompt": "\\", "x": [{"prompt": [1.0]}]},
    ]
    frame = structure(write(tmp_path, "t.jsonl", "\n".join(map(json.dumps, rows))))
    assert frame["prompt"].to_list() == [row["prompt"] for row in rows]
    assert "line 1" in refused_json(write(tmp_path, "u.jsonl", '{"image":"a","prompt":2.}\n'))
    assert "line 1" in refused_json(write(tmp_path, "u.jsonl", '{"image":"a","prompt":01.5}\n'))


def refused_json(path: Path) -> str:
    with pytest.raises(MetadataError) as error:
        structure(path)
    return str(error.value)


_numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**25), 10**25)


@ANY
@given(st.lists(st.lists(_numbers | st.text(max_size=4), min_size=1, max_size=4), min_size=1))
def test_any_list_keeps_its_numbers(tmp_path: Path, values: list[list[Any]]) -> None:
    rows = [{"prompt": each, "seed": 1} for each in values]
    path = write(tmp_path, "t.jsonl", "\n".join(map(json.dumps, rows)))
    want = [[e if isinstance(e, str) else json.dumps(e) for e in each] for each in values]
    assert structure(path, SEVERAL)["prompt"].to_list() == want
