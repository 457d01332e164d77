"""Near copies of pictures and clips: which are found, and that they are on one side only."""

import base64
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from conftest import Values, make_config, record_of, train, train_to_end, why_refused, write_images
from media_support import convert, real_clip
from PIL import Image, ImageEnhance

from assets.metadata import contents_of
from diffsynth_dagster.cache.held_out import parts_of
from diffsynth_dagster.cache.manifest import SIGNATURE, Manifest, read_manifest
from diffsynth_dagster.cache.near_copies import NEAR, near_held_out, near_trained
from diffsynth_dagster.data.media.decoder_pool import DecoderPool
from diffsynth_dagster.data.media.image import image_facts
from diffsynth_dagster.data.media.signature import FLAT, VALUES, picture_signature, vectors_of
from diffsynth_dagster.data.media.video import video_facts
from diffsynth_dagster.data.table.checked_table import read_checked
from diffsynth_dagster.demo.digits import write_new_digits

Picture = Image.Image


def as_jpeg(picture: Picture, quality: int) -> Picture:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)


def resized(picture: Picture, scale: float) -> Picture:
    return picture.resize((round(picture.width * scale), round(picture.height * scale)))


def cropped(picture: Picture, left: float, right: float) -> Picture:
    """Crop parts of the width and height from the left and top, and from the right and bottom."""
    width, height = picture.size
    box = (left * width, left * height, width * (1 - right), height * (1 - right))
    return picture.crop(tuple(round(side) for side in box))


def brighter(picture: Picture, factor: float) -> Picture:
    return ImageEnhance.Brightness(picture).enhance(factor)


CHANGES: dict[str, tuple[Callable[[Picture], Picture], float]] = {
    "JPEG of quality 70": (partial(as_jpeg, quality=70), 1.0),
    "JPEG of quality 95": (partial(as_jpeg, quality=95), 1.0),
    "half the size": (partial(resized, scale=0.5), 1.0),
    "twice the size": (partial(resized, scale=2), 1.0),
    "5 % darker": (partial(brighter, factor=0.95), 1.0),
    "5 % brighter": (partial(brighter, factor=1.05), 1.0),
    "half the size, JPEG of quality 80": (lambda p: as_jpeg(resized(p, 0.5), 80), 1.0),
    "1 % cropped from two sides": (partial(cropped, left=0.01, right=0), 0.99),
    "1 % cropped from all sides": (partial(cropped, left=0.01, right=0.01), 0.9),
}
"""What is done to a picture, and how many of the copies are found at least."""


def photographs(count: int) -> list[Picture]:
    """Parts of the two photographs that come with scikit-learn, each enlarged twice."""
    from sklearn.datasets import load_sample_images

    whole, source = (
        [Image.fromarray(a) for a in load_sample_images().images],
        np.random.default_rng(0),
    )
    found: list[Picture] = []
    for n in range(count):
        width = int(source.integers(150, 420))
        height = int(width * source.uniform(0.7, 1.0))
        left, top = (int(source.integers(0, m + 1)) for m in (640 - width, 427 - height))
        part = whole[n % 2].crop((left, top, left + width, top + height))
        found.append(resized(part, 2))
    return found


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_new_digits(folder)
    return folder


def opened(folder: Path, table: str) -> list[Picture]:
    return [Image.open(folder / name) for name in pl.read_csv(folder / table)["image"]]


def vectors(pictures: list[Picture]) -> Any:
    return vectors_of([picture_signature(picture) for picture in pictures])


def test_copies_are_near_and_other_pictures_are_not(
    digits: Path, show: Callable[[str], None]
) -> None:
    """The demo's digits, the most alike pictures that there are, and photographs."""
    trained, held_out = (opened(digits, f"{name}.csv") for name in ("metadata", "held_out"))
    same = vectors(trained) @ vectors([*trained, *held_out]).T >= NEAR
    assert not same[:, len(trained) :].any()
    pairs = np.triu(same[:, : len(trained)], 1).sum()
    lines = [
        f"{pairs} of {len(trained) * (len(trained) - 1) // 2} pairs of the demo's digits are near"
    ]
    assert pairs <= 1
    for what, pictures in (("digits", trained[::6]), ("photographs", photographs(40))):
        own = vectors(pictures)
        for name, (change, least) in CHANGES.items():
            found = (own * vectors([change(picture) for picture in pictures])).sum(axis=1) >= NEAR
            lines.append(f"{what}, {name}: {found.mean():.0%}")
            assert found.mean() >= least, lines[-1]
    show("\n".join(lines))


def test_pictures_without_structure_are_like_no_other() -> None:
    blank = Image.new("RGB", (64, 64), (200, 30, 30))
    gradient = Image.linear_gradient("L").convert("RGB")
    dots = Image.fromarray(np.tile(np.uint8([[128, 129], [129, 128]]), (32, 32)))
    assert {picture_signature(each) for each in (blank, gradient, dots)} == {FLAT}


def rows_of(signatures: list[str | None]) -> pl.LazyFrame:
    numbers = range(1, len(signatures) + 1)
    return pl.LazyFrame(
        {"row": numbers, SIGNATURE: signatures}, schema={"row": pl.UInt32, SIGNATURE: pl.String}
    )


def test_all_near_copies_are_found(digits: Path) -> None:
    held_out = [picture_signature(p) for p in opened(digits, "held_out.csv")]
    copies = [picture_signature(as_jpeg(p, 70)) for p in opened(digits, "held_out.csv")]
    others = [picture_signature(p) for p in opened(digits, "metadata.csv")]
    rows, kept = rows_of([*others, FLAT, None, *copies]), rows_of([FLAT, *held_out, None])
    expected = [(len(others) + 3 + n, n + 2) for n in range(len(copies))]
    assert near_trained(rows, kept).rows() == expected
    assert near_held_out(rows, kept).rows() == [(b, a) for a, b in expected]
    assert near_trained(rows_of([]), kept).is_empty()
    assert near_held_out(rows, rows_of([])).is_empty()


def signatures_near(centre: Any, count: int, apart: float) -> list[str]:
    """Signatures around a vector (VALUES,)."""
    source = np.random.default_rng(1)
    values = centre + apart * source.standard_normal((count, VALUES))
    values *= 127 / np.abs(values).max(axis=1, keepdims=True)
    return [base64.b64encode(v.astype(np.int8).tobytes()).decode() for v in values]


@pytest.mark.timeout(60)
def test_alike_rows_do_not_take_the_square_of_time() -> None:
    """All of them near each other would be 10^9 pairs; all of them different have no long lists."""
    centre = np.random.default_rng(2).standard_normal(VALUES)
    alike = signatures_near(centre, 40_000, 0.02)
    assert near_trained(rows_of(alike[:20_000]), rows_of(alike[20_000:])).height == 20_000
    assert near_held_out(rows_of(alike[:20_000]), rows_of(alike[20_000:])).height == 20_000
    other = signatures_near(0 * centre, 40_000, 1.0)
    assert near_trained(rows_of(other[:20_000]), rows_of(other[20_000:])).is_empty()


def with_copies(folder: Path, count: int) -> Path:
    """The pictures `0.png` … of `write_images`, larger, and beside each `n.png` its copy `n.jpg`."""
    write_images(folder, count, sizes=[(64, 64)])
    lines = (folder / "metadata.csv").read_text().splitlines()
    for n in range(count):
        # Pixels of random colours are grey from afar: pictures of 8 x 8 coarse squares are not.
        coarse = Image.open(folder / f"{n}.png").resize((8, 8), Image.Resampling.NEAREST)
        picture = coarse.resize((64, 64), Image.Resampling.NEAREST)
        picture.save(folder / f"{n}.png")
        resized(picture, 1.5).save(folder / f"{n}.jpg", quality=80)
    copies = [f'{n}.jpg,"picture {n} once more"' for n in range(count)]
    (folder / "with_copies.csv").write_text("\n".join([*lines, *copies]) + "\n")
    (folder / "copies.csv").write_text("\n".join([lines[0], *copies]) + "\n")
    return folder


def small(table: Path) -> dict[str, Any]:
    """The parameters of a small training on a table, with a store beside its folder."""
    return {
        "dataset_base_path": str(table.parent),
        "dataset_metadata_path": str(table),
        "cache_path": str(table.parent.parent / "store"),
        "height": 32,
        "width": 32,
    }


def parts(config: dict[str, Any], run: Path) -> tuple[set[int], set[int], tuple[str, ...]]:
    """The rows that are trained on, those that are held out, and the warnings."""
    found = parts_of(make_config({**config, "output_path": str(run)}), read_manifest(run), run)
    assert found.held_out is not None

    def rows(part: Manifest) -> set[int]:
        return set(part.frame["row"])

    return rows(found.trained), rows(found.held_out), found.warnings


def test_what_looks_like_a_held_out_row_is_not_trained_on(
    values: Values, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = with_copies(tmp_path / "data", 12)
    config = values(
        **small(data / "with_copies.csv"),
        validation_split=0.2,
    )
    run = train_to_end(config, tmp_path / "run")
    trained, out, warnings = parts(config, run)
    # Row n shows the same as row n + 12.
    assert out
    assert {(row - 1) % 12 for row in trained}.isdisjoint({(row - 1) % 12 for row in out})
    single = {row for row in out if (row + 11) % 24 + 1 not in out}
    assert len(trained) == 24 - len(out) - len(single)
    assert record_of(run).samples == len(trained)
    first = min((row + 11) % 24 + 1 for row in single)
    said = f"{len(single)} rows are near copies of held-out rows, and not trained on: {first} (of"
    assert warnings[0].startswith(said)
    assert f"warning: {said}" in capfd.readouterr().err

    # They stay the same when others are added, of which some look like them.
    with (data / "with_copies.csv").open("a") as table:
        for n in range(12):
            resized(Image.open(data / f"{n}.png"), 2).save(data / f"{n}.webp", quality=90)
            table.write(f"{n}.webp,the same a third time\n")
    run = train_to_end(config, tmp_path / "run-2")
    trained, later, _ = parts(config, run)
    assert out <= later
    assert {(row - 1) % 12 for row in trained}.isdisjoint({(row - 1) % 12 for row in later})


def test_a_data_set_of_nothing_but_copies_is_refused(values: Values, tmp_path: Path) -> None:
    data = with_copies(tmp_path / "data", 1)
    for n in range(9):
        Image.open(data / "0.png").resize((64 + n, 64)).save(data / f"{n}.png")
    names = "\n".join(f"{n}.png,a picture" for n in range(9))
    (data / "metadata.csv").write_text(f"image,prompt\n{names}\n")
    config = values(
        **small(data / "metadata.csv"),
        validation_split=2,
    )
    said = why_refused(config, tmp_path / "run")
    assert "of 9 samples 2 are held out, and 7 more are near copies of these: 0 would be" in said


def test_a_held_out_row_that_looks_like_a_trained_one_is_not_measured(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = with_copies(tmp_path / "data", 8)
    rows = (data / "metadata.csv").read_text().splitlines()
    (data / "trained.csv").write_text("\n".join(rows[:5]) + "\n")
    # Of the rows 1 to 4, and of two that are not trained on.
    (data / "held.csv").write_text("\n".join([rows[0], *rows[6:8]]) + "\n1.jpg,a\n3.jpg,b\n")
    config = values(
        **small(data / "trained.csv"),
        validation_metadata_path=str(data / "held.csv"),
    )
    code, _ = train(config, tmp_path / "dry", "--dry_run")
    plan = capsys.readouterr()
    assert (code, json.loads(plan.out)["data"]["held_out"]) == (0, 2)
    said = "2 rows are held out, but near copies of trained rows, and not measured: 3 (of trained row 2), 4"
    assert said in plan.out + plan.err
    run = train_to_end(config, tmp_path / "run")
    trained, out, warnings = parts(config, run)
    assert (trained, out) == ({1, 2, 3, 4}, {1, 2})
    assert warnings[0].startswith(said)
    assert said in capsys.readouterr().err
    (data / "held.csv").write_text("image,prompt\n1.jpg,a\n3.jpg,b\n")
    said = why_refused(config, tmp_path / "run")
    assert "all of its rows are near copies of rows that are trained on" in said


def test_facts_of_before_are_found_out_anew_only_where_something_is_held_out(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older version kept no signatures: its cache and its tables are used as they are."""
    data, seen = with_copies(tmp_path / "data", 8), list[Path]()

    def of_before(path: Path) -> dict[str, Any]:
        seen.append(path)
        return {name: fact for name, fact in image_facts(path).items() if name != SIGNATURE}

    def now(path: Path) -> dict[str, Any]:
        seen.append(path)
        return image_facts(path)

    config = values(
        **small(data / "with_copies.csv"),
        task="sft:data_process",
    )
    facts = "diffsynth_dagster.data.table.files.image_facts"
    monkeypatch.setattr(facts, of_before)
    run = train_to_end(config, tmp_path / "run")
    before = read_manifest(run)
    monkeypatch.setattr(facts, now)
    assert train_to_end(config, tmp_path / "run") == run
    assert len(seen) == 16
    assert not any(SIGNATURE in name for name in contents_of(read_checked(run)))
    assert before.frame[SIGNATURE].null_count() == 16
    held_out = {"validation_split": 4, "task": "sft:train"}
    *_, warnings = parts({**config, **held_out}, run)
    assert warnings[0].startswith("16 rows were checked by a version that could not tell near")
    train_to_end({**config, "validation_split": 4}, tmp_path / "run")
    assert len(seen) == 32
    after = read_manifest(run)
    assert after.digest == before.digest
    assert after.frame[SIGNATURE].null_count() == 0
    *_, warnings = parts({**config, **held_out}, run)
    assert "near copies of held-out rows, and not trained on" in warnings[0]


def test_clips_that_look_alike_are_near(tmp_path: Path) -> None:
    """Compressed again and larger, but not a mirrored one."""
    with DecoderPool(2) as pool:
        paths = [real_clip(), convert(tmp_path / "a.mp4", "-vf", "scale=320:-2", "-crf", "32")]
        paths.append(convert(tmp_path / "b.mp4", "-vf", "hflip"))
        one, again, other = vectors_of([video_facts(path, pool)[SIGNATURE] for path in paths])
    assert one @ again >= NEAR
    assert one @ other < NEAR
