"""Every row and file is checked before a weight is loaded."""

import json
import os
import socket
import unicodedata
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from conftest import Values, make_config, train, train_to_end, write_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from media_support import png_of
from PIL import Image

from diffsynth_dagster.data.geometry import Geometry, SizeRule, cover, size_rule
from diffsynth_dagster.data.media.image import (
    IMAGE_FORMATS,
    fit,
    image_facts,
    read_image,
    to_tensor,
)
from diffsynth_dagster.data.table.files import _CHECK
from diffsynth_dagster.data.table.validate import REASONS, CheckedTable, validate
from diffsynth_dagster.errors import MetadataError, ParameterError
from diffsynth_dagster.facts import FactCache
from diffsynth_dagster.families import find_family
from diffsynth_dagster.train import main


def check(
    folder: Path,
    table: str | list[dict[str, Any]],
    fact_cache: FactCache | None = None,
    **more: object,
) -> CheckedTable:
    """Check a table, or these rows, in a folder."""
    if not isinstance(table, str):
        (folder / "t.jsonl").write_text("\n".join(map(json.dumps, table)))
        table = "t.jsonl"
    config = make_config(
        {
            "dataset_base_path": str(folder),
            "dataset_metadata_path": str(folder / table),
            "model_paths": ["x.safetensors"],
            "lora_base_model": "dit",
            **more,
        }
    )
    own = fact_cache or FactCache(folder.parent / "facts.sqlite")
    return validate(config, find_family("qwen_image").columns, own)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data", 3)


def test_every_row_keeps_its_reason(data: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.png").write_bytes((data / "0.png").read_bytes())
    os.symlink(tmp_path / "outside.png", data / "link.png")
    (data / "text.jpg").write_text("not an image")
    (data / "empty.png").write_bytes(b"")
    (data / "half.png").write_bytes((data / "1.png").read_bytes()[:-40])
    (data / "bomb.png").write_bytes(png_of(50_000, 50_000))
    Image.new("RGB", (8, 40)).save(data / "small.png")
    cases = [
        ("0.png", "fine", "ok"),
        ("0.png", "  ", "empty_caption"),
        ("", "a", "missing_value"),
        ("nothing.png", "a", "file_missing"),
        ("../outside.png", "a", "outside_base_path"),
        (str(tmp_path / "outside.png"), "a", "outside_base_path"),
        ("link.png", "a", "outside_base_path"),
        ("https://example.com/a.png", "a", "url"),
        ("text.jpg", "a", "unreadable"),
        ("empty.png", "a", "unreadable"),
        ("half.png", "a", "unreadable"),
        ("bomb.png", "a", "too_large"),
        ("small.png", "a", "too_small"),
        ("a" * 5000, "a", "bad_path"),
        (str(data / "1.png"), "absolute, but inside", "ok"),
    ]
    pl.DataFrame(cases, schema=["image", "prompt", "want"], orient="row").write_csv(data / "t.csv")
    validated = check(data, "t.csv")
    got = validated.frame["status"].to_list()
    assert got == [want for _, _, want in cases]
    assert all(message for message in validated.rejected.collect()["message"])
    told = dict(
        zip(
            validated.rejected.collect()["row"],
            validated.rejected.collect()["message"],
            strict=True,
        )
    )
    assert told[4] == f"image 'nothing.png': the file does not exist: {data / 'nothing.png'}"
    outside = "the file lies outside dataset_base_path"
    allowed = "move it there, or set allow_outside_base_path if the table may name such files"
    there = tmp_path / "outside.png"
    assert told[5] == f"image '../outside.png': {outside}: it is {there}: {allowed}"
    assert told[7] == f"image 'link.png': {outside}: a link leads to {there}: {allowed}"
    assert validated.frame["row"].to_list() == list(range(1, len(cases) + 1))


def test_names_in_another_unicode_form_are_said_so(data: Path) -> None:
    """Whether the name of the file or of a folder is, and whichever form it has."""
    composed, apart = (unicodedata.normalize(form, "\u00e9t\u00e9") for form in ("NFC", "NFD"))
    picture = (data / "0.png").read_bytes()
    (data / f"{apart}.png").write_bytes(picture)
    (data / f"{composed}2.png").write_bytes(picture)
    (data / apart).mkdir()
    (data / apart / "a.png").write_bytes(picture)
    rows = [f"{composed}.png", f"{apart}2.png", f"{composed}/a.png", f"{apart}.png"]
    rows += [f"{composed}3.png", f"{composed}/b.png"]
    pl.DataFrame({"image": rows, "prompt": ["a"] * len(rows)}).write_csv(data / "t.csv")
    frame = check(data, "t.csv").frame
    if (data / rows[0]).exists():
        pytest.skip("the file system takes both forms for one name")
    assert frame["status"].to_list() == [*["file_missing"] * 3, "ok", *["file_missing"] * 2]
    said = (
        "there is a file whose name looks the same in another Unicode form (the table's is {}, the"
    )
    for row, forms in ((0, ("NFC", "NFD")), (1, ("NFD", "NFC")), (2, ("NFC", "NFD"))):
        assert said.format(forms[0]) + f" file's {forms[1]}): rename it" in frame["message"][row]
    assert all("Unicode" not in frame["message"][row] for row in (4, 5))


paths = st.text(max_size=20) | st.sampled_from(
    ["../x", "/etc/passwd", "a/../../b", "\x00", ".", "..", "0.png", "./0.png", "file:///x", "~"]
)

captions = st.none() | st.sampled_from(["", " ", "\u200b", "x", " 熊"])


@settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(st.lists(st.tuples(st.none() | paths, captions), min_size=1, max_size=8))
def test_any_table_is_judged_row_by_row(
    data: Path, rows: list[tuple[str | None, str | None]]
) -> None:
    """No crash and no silent acceptance: only the one file that is there passes."""
    frame = pl.DataFrame(rows, schema={"image": pl.String, "prompt": pl.String}, orient="row")
    frame.write_parquet(data / "t.parquet")
    validated = check(data, "t.parquet")
    assert validated.frame.height == len(rows)
    for (image, prompt), status in zip(rows, validated.frame["status"], strict=True):
        assert status == "ok" or status in REASONS
        good = image is not None and (data / image.replace("\x00", "?")).resolve() == data / "0.png"
        assert (status == "ok") == (good and prompt in ("x", " 熊"))


def test_unchanged_files_are_not_read_again(data: Path, tmp_path: Path) -> None:
    fact_cache = FactCache(tmp_path / "facts.sqlite")
    first = check(data, "metadata.csv", fact_cache)
    # What it knows is made to differ from the file: the cache must be what answers.
    facts = {"digest": first.frame["image:digest"][0], "width": 64, "height": 48}
    fact_cache.look_up(f"image:{_CHECK}", [data / "0.png"], lambda path: facts, again=True)
    known = check(data, "metadata.csv", fact_cache).frame
    assert known.select("image:width", "image:height").row(0) == (64, 48)
    verified = check(data, "metadata.csv", fact_cache, verify_content=True)
    assert verified.frame.equals(first.frame)
    # Another content of the same length and time is noticed.
    stat = (data / "0.png").stat()
    (data / "0.png").write_bytes(b"x" * stat.st_size)
    os.utime(data / "0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert check(data, "metadata.csv", fact_cache).frame["status"].to_list()[0] == "unreadable"


def test_rejected_rows_stop_the_run_before_a_model_file_is_read(
    values: Values, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "1.png").write_bytes(b"damaged")
    config = values(
        dataset_base_path=str(data),
        dataset_metadata_path=str(data / "metadata.csv"),
        model_paths=["not-there.safetensors"],
    )
    code, run = train(config, tmp_path / "run")
    assert code == 2
    assert "row 2: image '1.png': not a readable image" in capsys.readouterr().err
    assert (run / "rejected.csv").read_text().startswith("row,status,message\n2,unreadable")


def test_some_rows_may_be_left_out(values: Values, data: Path, tmp_path: Path) -> None:
    (data / "1.png").write_bytes(b"damaged")
    config = values(
        dataset_base_path=str(data),
        dataset_metadata_path=str(data / "metadata.csv"),
        max_rejected_fraction=0.34,
    )
    run = train_to_end(config, tmp_path / "run")
    assert pl.read_parquet(run / "samples.parquet")["row"].to_list() == [1, 3]


def test_duplicates_are_counted(data: Path) -> None:
    (data / "t.csv").write_text("image,prompt\n0.png,a\n0.png,a\n0.png,b\n1.png,a\n")
    assert check(data, "t.csv").duplicates() == 1


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
    os.mkfifo(data / "pipe.csv")
    with pytest.raises(MetadataError, match="not a regular file"):
        check(data, "pipe.csv")


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


def test_pictures_of_a_format_that_is_not_read(tmp_path: Path) -> None:
    drawing = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    for name, content in (("x.svg", drawing), ("x.eps", "%!PS-Adobe-3.0 EPSF-3.0\n")):
        (tmp_path / name).write_text(content)
        facts = image_facts(tmp_path / name)
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


RULE = SizeRule(None, None, 1024 * 1024, 16)


@given(st.integers(1, 9000), st.integers(1, 9000))
def test_trained_sizes(width: int, height: int) -> None:
    w, h = RULE.target(width, height)
    assert w % 16 == h % 16 == 0
    assert w * h <= max(1024 * 1024, 0)
    assert w <= width
    assert h <= height
    if width * height <= 1024 * 1024:
        assert (w, h) == (width // 16 * 16, height // 16 * 16)
    if w and h:
        covered = cover(width, height, (w, h))
        assert covered[0] >= w
        assert covered[1] >= h


def test_sizes_of_the_guide() -> None:
    """Worked by hand from the rule: 2000x1500 has 2.861 times the pixels, a side 1.6915 times."""
    assert RULE.target(2000, 1500) == (1168, 880)
    assert RULE.target(1024, 1024) == (1024, 1024)
    assert RULE.target(1023, 1000) == (1008, 992)
    assert size_rule(64, 32, 100000, Geometry(16)).target(999, 5) == (32, 64)


def test_every_kind_of_image_becomes_rgb(tmp_path: Path) -> None:
    wide = Image.new("RGB", (4, 2), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the picture is upright after a quarter turn
    kinds = {
        "turned.jpg": (wide, {"exif": exif}),
        "grey.png": (Image.new("L", (4, 2), 128), {}),
        "palette.png": (wide.convert("P"), {}),
        "alpha.png": (Image.new("RGBA", (4, 2), (255, 0, 0, 0)), {}),
        "cmyk.jpg": (wide.convert("CMYK"), {}),
        "sixteen.png": (Image.new("I;16", (4, 2), 0x8000), {}),
        "bits.png": (Image.new("1", (4, 2), 1), {}),
    }
    expected = {"grey.png": 128, "sixteen.png": 128, "bits.png": 255, "alpha.png": 255}
    for name, (image, options) in kinds.items():
        image.save(tmp_path / name, **options)
        got = read_image(tmp_path / name)
        assert got.mode == "RGB"
        assert got.size == ((2, 4) if name == "turned.jpg" else (4, 2))
        if name in expected:
            assert got.getpixel((0, 0))[0] == expected[name]


def test_images_cover_the_target_and_are_cropped_in_the_middle() -> None:
    image = Image.new("RGB", (60, 20), "white")
    image.paste("black", (20, 0, 40, 20))
    tensor = to_tensor(fit(image, (20, 20)))
    assert tensor.shape == (3, 20, 20)
    assert float(tensor.max()) == -1.0
    assert float(to_tensor(Image.new("RGB", (1, 1), "white")).min()) == 1.0


def test_an_output_folder_that_cannot_be_written(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values(output_path=str(tmp_path / "file" / "run"))))
    assert main(["--recipe", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert "the folder cannot be written" in error
    assert f"output_path = {tmp_path / 'file' / 'run'}" in error
    assert "Traceback" not in error


@given(st.integers(16, 3000), st.integers(16, 3000), st.sampled_from([32, 64, 128]))
def test_bucket_step_makes_sizes_agree(width: int, height: int, step: int) -> None:
    plain = RULE.target(width, height)
    w, h = SizeRule(None, None, 1024 * 1024, 16, step).target(width, height)
    for got, side in ((w, plain[0]), (h, plain[1])):
        assert 0 < got <= side
        assert got % (step if side >= step else 16) == 0
        assert side - got < step


def test_bucket_step_is_a_multiple_of_the_factor() -> None:
    with pytest.raises(ParameterError, match="bucket_step = 40 is not a multiple of 16"):
        size_rule(None, None, 1024 * 1024, Geometry(16), 40)
