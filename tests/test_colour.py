"""The colours that a model sees: profiles, depths, transparency; and pictures as thin as a line."""

import io
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from colour_profiles import (
    ADOBE_RGB,
    DISPLAY_P3,
    GREY_LINEAR,
    SRGB,
    SRGB_CURVE,
    cmyk_profile,
    rgb_profile,
)
from conftest import make_config
from PIL import Image, ImageCms
from video_family import CAPTION

from diffsynth_dagster.cache.keys import READ_AS, sample_identity, with_contents
from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.data.columns import Columns, Input
from diffsynth_dagster.data.geometry import Geometry, cover, crop_place
from diffsynth_dagster.data.media import image as media
from diffsynth_dagster.data.media.colour import Look
from diffsynth_dagster.data.media.decoder_pool import DecoderPool
from diffsynth_dagster.data.media.image import fit, image_facts, load_sample_image, read_image
from diffsynth_dagster.data.media.video import load_sample_video, video_facts
from diffsynth_dagster.data.samples import PARTS, files_of, load_files
from diffsynth_dagster.data.table.checked_table import read_checked, write_checked
from diffsynth_dagster.data.table.validate import CheckedTable, validate
from diffsynth_dagster.errors import MetadataError, OutOfMemory, ParameterError
from diffsynth_dagster.facts import FactCache

RED = (220, 30, 40)
PICTURE, MASK = Input("image", "image"), Input("mask", "image", optional=True, weighs=True)
SHOWN = Input("reference", "picture", many=True)


def by_library(image: Image.Image, icc: bytes) -> tuple[int, ...]:
    source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    target: Any = ImageCms.createProfile("sRGB")
    made = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    assert made is not None
    pixel = made.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return pixel


def first_pixel(path: Path, look: Look | None = None) -> tuple[int, ...]:
    return tuple(int(v) for v in np.asarray(read_image(path, look or Look()))[0, 0])


@pytest.mark.parametrize(
    ("mode", "colour", "icc", "right"),
    [
        ("RGB", RED, DISPLAY_P3, (240, 0, 22)),
        ("RGBA", (*RED, 255), DISPLAY_P3, (240, 0, 22)),
        ("RGB", (100, 200, 50), ADOBE_RGB, None),
        ("L", 128, GREY_LINEAR, (188, 188, 188)),  # half of the light
        ("LA", (128, 255), GREY_LINEAR, (188, 188, 188)),
        ("CMYK", (255, 0, 0, 0), cmyk_profile(), None),
        ("CMYK", (0, 0, 0, 0), cmyk_profile(), (255, 255, 255)),
    ],
)
def test_profiles_are_converted_to_srgb(
    tmp_path: Path, mode: str, colour: Any, icc: bytes, right: tuple[int, ...] | None
) -> None:
    image = Image.new(mode, (40, 30), colour)
    path = tmp_path / "x.tif"
    image.save(path, icc_profile=icc)
    wanted = right or by_library(image, icc)
    assert np.abs(np.subtract(first_pixel(path), wanted)).max() <= 1
    assert image_facts(path)["converted"] == "srgb"
    plain = np.asarray(image.convert("RGB"))[0, 0]
    assert np.abs(plain.astype(int) - wanted).max() > 10 or wanted == (255, 255, 255)
    assert first_pixel(path, Look(profile=False)) == tuple(plain)


def test_palettes_turned_pictures_and_wide_ones_are_converted(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), RED).convert("P").save(tmp_path / "p.png", icc_profile=DISPLAY_P3)
    exif = Image.Exif()
    exif[274] = 6
    wide = Image.new("RGB", (1500, 1400), RED)
    wide.save(tmp_path / "turned.png", icc_profile=DISPLAY_P3, exif=exif)
    palette = Image.open(tmp_path / "p.png").convert("RGB")
    wanted = by_library(palette, DISPLAY_P3)
    assert np.abs(np.subtract(first_pixel(tmp_path / "p.png"), wanted)).max() <= 1
    turned = read_image(tmp_path / "turned.png")
    assert turned.size == (1400, 1500)
    assert turned.getcolors() == [(1400 * 1500, (240, 0, 22))]


def test_a_profile_of_srgb_changes_no_byte(tmp_path: Path) -> None:
    """Whatever it is called, and rounded as the smallest of them are."""
    rough = rgb_profile(
        ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7139)), SRGB_CURVE
    )
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    for icc in (SRGB, rough):
        Image.fromarray(pixels).save(tmp_path / "x.png", icc_profile=icc)
        assert np.array_equal(np.asarray(read_image(tmp_path / "x.png")), pixels)
        assert "converted" not in image_facts(tmp_path / "x.png")


@pytest.mark.parametrize("icc", [b"no profile", DISPLAY_P3[:300], cmyk_profile(), GREY_LINEAR])
def test_what_is_no_profile_of_the_picture_is_left_out(tmp_path: Path, icc: bytes) -> None:
    Image.new("RGB", (9, 9), RED).save(tmp_path / "x.png", icc_profile=icc)
    facts = image_facts(tmp_path / "x.png")
    assert (facts["width"], "converted" in facts) == (9, False)
    assert first_pixel(tmp_path / "x.png") == RED


def test_threads_share_a_profile(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png", icc_profile=DISPLAY_P3)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda n: read_image(tmp_path / "x.png").tobytes(), range(24)))
    assert len(set(read)) == 1
    assert read[0] != pixels.tobytes()


def tiff12(value: int, width: int, height: int) -> bytes:
    """A grey TIFF of 12 bits: two pixels in three bytes."""
    row = bytes([value >> 4, (value & 15) << 4 | value >> 8, value & 255]) * (width // 2)
    data = row * height
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1)]
    tags += [(273, 8 + 2 + 12 * 9 + 4), (277, 1), (278, height), (279, len(data))]
    out = b"II*\0" + struct.pack("<IH", 8, len(tags))
    for tag, number in tags:
        out += struct.pack("<HHII", tag, 4, 1, number)
    return out + bytes(4) + data


def test_grey_is_scaled_by_its_bits(tmp_path: Path) -> None:
    for value, right in ((2048, 128), (4095, 255), (0, 0), (15, 0), (16, 1)):
        (tmp_path / "x.tif").write_bytes(tiff12(value, 8, 6))
        assert first_pixel(tmp_path / "x.tif") == (right,) * 3
    assert image_facts(tmp_path / "x.tif")["converted"] == "bits=12"
    for suffix in ("png", "tif"):  # as it was
        Image.fromarray(np.full((6, 8), 0x8001, np.uint16)).save(tmp_path / f"y.{suffix}")
        assert first_pixel(tmp_path / f"y.{suffix}") == (128,) * 3
        assert "converted" not in image_facts(tmp_path / f"y.{suffix}")


@pytest.mark.parametrize(("kind", "said"), [(np.int32, "integers of 32"), (np.float32, "floating")])
def test_values_without_a_white_are_refused(tmp_path: Path, kind: Any, said: str) -> None:
    Image.fromarray(np.full((60, 80), 1, kind)).save(tmp_path / "x.tif")
    facts = image_facts(tmp_path / "x.tif")
    assert facts["status"] == "unreadable"
    assert said in facts["message"]
    assert "convert it to 8 or 16 bits" in facts["message"]


def save_transparent(path: Path, mode: str) -> None:
    """Left half opaque red, right half transparent."""
    image = Image.new("RGBA", (40, 20), (*RED, 255))
    image.paste((0, 0, 0, 0), (20, 0, 40, 20))
    if mode == "tRNS":
        image = image.convert("RGB")
        image.save(path, transparency=(0, 0, 0))
    elif mode == "P":
        image.quantize(4).save(path)
    else:
        image.convert(mode).save(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "tRNS"])
def test_a_background_fills_what_is_transparent(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x.png"
    save_transparent(path, mode)
    assert image_facts(path)["transparent"] is True
    beneath, laid = read_image(path), read_image(path, Look(background="#00ff80"))
    assert beneath.getpixel((30, 5)) == (0, 0, 0)
    assert laid.getpixel((30, 5)) == (0, 255, 128)
    assert laid.getpixel((5, 5)) == beneath.getpixel((5, 5)) != (0, 0, 0)
    Image.new("RGBA", (9, 9), (*RED, 255)).save(path)
    assert image_facts(path)["transparent"] is False


def test_half_transparent_pixels_are_mixed_in_srgb(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.new("RGBA", (9, 9), (*RED, 128)).save(path, icc_profile=DISPLAY_P3)
    assert first_pixel(path, Look(background="#ffffff")) == (247, 127, 138)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_frames_of_animations_are_converted_and_filled(tmp_path: Path, kind: str) -> None:
    frames: list[Image.Image] = []
    for left in (3, 11, 21):
        frame = Image.new("RGBA", (48, 32), (0, 0, 0, 0))
        frame.paste((*RED, 255), (left, 0, left + 20, 32))
        frames.append(frame)
    path = tmp_path / "x"
    more: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(
        path,
        kind,
        save_all=True,
        append_images=frames[1:],
        duration=100,
        disposal=1 if kind == "PNG" else 2,
        icc_profile=DISPLAY_P3,
        **more,
    )
    with DecoderPool(1) as pool:
        facts = video_facts(path, pool)
    is_converted = kind != "GIF"  # whose profiles neither browsers nor Pillow read
    assert (facts["frames"], facts["transparent"]) == (3, True)
    assert facts.get("converted") == ("srgb" if is_converted else None)
    clip = load_sample_video(path, (48, 32), 3, 1.0, look=Look(background="#ffffff"))
    seen = ((clip + 1) * 127.5).round().to(torch.int64)
    for index, left in enumerate((3, 11, 21)):
        right = [240, 0, 22] if is_converted else RED
        assert seen[:, index, 5, left + 5].tolist() == pytest.approx(right, abs=2)
        assert seen[:, index, 5, 45].tolist() == [255, 255, 255]


def write_data(folder: Path) -> TrainingConfig:
    """A table of three pictures: plain, transparent, of Display P3; each is its own mask too."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (32, 32), RED).save(folder / "plain.png")
    save_transparent(folder / "clear.png", "RGBA")
    Image.new("RGB", (32, 32), RED).save(folder / "p3.png", icc_profile=DISPLAY_P3)
    rows = [f"{name}.png,a cat,{name}.png,{name}.png" for name in ("plain", "clear", "p3")]
    (folder / "rows.csv").write_text("\n".join(["image,prompt,mask,reference", *rows]) + "\n")
    return config_of(folder)


def config_of(folder: Path, **more: Any) -> TrainingConfig:
    return make_config(
        {
            "dataset_base_path": str(folder),
            "dataset_metadata_path": str(folder / "rows.csv"),
            "data_file_keys": "image,reference",
            "model_paths": ["x"],
            "lora_base_model": "dit",
            "output_path": str(folder / "run"),
            **more,
        }
    )


COLUMNS = Columns("test", (CAPTION, PICTURE, MASK, SHOWN), (), Geometry(16))


def checked(config: TrainingConfig) -> CheckedTable:
    cache = Path(config.dataset_base_path) / "facts.sqlite"
    with closing(FactCache(cache)) as facts:
        return validate(config, COLUMNS, facts)


def test_the_check_says_once_what_is_transparent(tmp_path: Path) -> None:
    config = write_data(tmp_path)
    (warning,) = checked(config).warnings()
    assert warning.startswith("row 2 has pictures with transparent pixels")
    assert "background (such as white)" in warning
    assert checked(config_of(tmp_path, background="white")).warnings() == []
    table = (tmp_path / "rows.csv").read_text().replace("p3.png", "clear.png")
    (tmp_path / "rows.csv").write_text(table)
    assert checked(config).warnings()[0].startswith("2 rows, the first is 2, have pictures")


def test_only_what_is_read_otherwise_has_other_keys(tmp_path: Path) -> None:
    config = write_data(tmp_path)
    plain = checked(config).frame
    filled = checked(config_of(tmp_path, background="white")).frame
    assert plain["image:reading"].to_list() == [None, None, "srgb"]
    assert filled["image:reading"].to_list() == [None, "background=#ffffff", "srgb"]
    assert filled["reference:reading"].to_list() == [[None], ["background=#ffffff"], ["srgb"]]
    assert filled["mask:reading"].to_list() == [None] * 3
    made = [
        with_contents(frame, COLUMNS.inputs).select(
            sample_identity(COLUMNS.inputs).alias("identity"), READ_AS + "mask"
        )
        for frame in (plain, filled)
    ]
    assert made[0][READ_AS + "mask"].to_list() == made[1][READ_AS + "mask"].to_list()
    same = made[0]["identity"] == made[1]["identity"]
    assert same.to_list() == [True, False, True]
    before = plain.with_columns(pl.lit(None, pl.String).alias("image:reading"))
    before = before.with_columns(pl.lit(None, pl.List(pl.String)).alias("reference:reading"))
    old = with_contents(before, COLUMNS.inputs).select(sample_identity(COLUMNS.inputs))
    assert (old.to_series() == made[0]["identity"]).to_list() == [True, True, False]


def test_rows_are_read_as_they_were_checked(tmp_path: Path) -> None:
    write_data(tmp_path)
    frame = checked(config_of(tmp_path, background="white")).frame
    corner = [
        load_files(files_of(row, PICTURE), PICTURE, row["row"])[:, 8, -1]
        for row in frame.iter_rows(named=True)
    ]
    seen = [tuple(((c + 1) * 127.5).round().int().tolist()) for c in corner]
    assert seen == [RED, (255, 255, 255), (240, 0, 22)]
    row = frame.row(2, named=True)
    mask = load_files(files_of(row, MASK), MASK, 3)[:, 0, 0]
    assert tuple(((mask + 1) * 127.5).round().int().tolist()) == RED
    (shown,) = load_files(files_of(frame.row(1, named=True), SHOWN), SHOWN, 2)
    assert shown.getpixel((30, 5)) == (255, 255, 255)


def test_a_table_of_an_older_version_is_refused(tmp_path: Path) -> None:
    """It does not say how its files are shown; what was named before a manifest said it is read."""
    table = checked(write_data(tmp_path))
    older = table.rows.select(pl.exclude("^.*:(shown|reading|transparent)$"))
    write_checked(CheckedTable(older, table.source), tmp_path / "run")
    with pytest.raises(MetadataError, match="checked by an older version"):
        read_checked(tmp_path / "run")
    row = table.frame.row(2, named=True)
    named = {part: row[f"image:{part}"] for part in PARTS if part not in ("shown", "reading")}
    picture = load_files(named, PICTURE, 3)
    assert tuple(((picture[:, 0, 0] + 1) * 127.5).round().int().tolist()) == RED


def test_a_background_is_a_colour(tmp_path: Path) -> None:
    write_data(tmp_path)
    assert config_of(tmp_path, background="White").background == "#ffffff"
    assert config_of(tmp_path, background="#12AB00").background == "#12ab00"
    assert config_of(tmp_path, background="").background is None
    with pytest.raises(ParameterError, match=r"'background' = 'whit': is no colour.*mean 'white'"):
        config_of(tmp_path, background="whit")
    with pytest.raises(ParameterError, match="has an alpha"):
        config_of(tmp_path, background="#ffffff80")


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000), (600, 1), (100_000, 3)])
def test_thin_pictures_take_no_memory(tmp_path: Path, size: tuple[int, int]) -> None:
    """Their cover would have up to 80 thousand million pixels."""
    across = np.linspace(0, 255, max(size)).astype(np.uint8)
    pixels = np.broadcast_to(across[None, :, None], (min(size), max(size), 3))
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image = image if size[0] > size[1] else image.transpose(Image.Transpose.ROTATE_90)
    made: list[tuple[int, int]] = []
    original = Image.Image.resize

    def resize(self: Image.Image, size: Any, *rest: Any, **more: Any) -> Image.Image:
        made.append(size)
        return original(self, size, *rest, **more)

    image.save(tmp_path / "x.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", resize)
        picture = load_sample_image(tmp_path / "x.png", (512, 512))
    assert made == [(512, 512)]
    assert ((picture + 1) * 127.5 - 127.5).abs().max() < 3  # the centre


def test_what_is_cropped_before_is_what_was_cropped_after(monkeypatch: pytest.MonkeyPatch) -> None:
    source = np.random.default_rng(0)
    for size, target in (((300, 7), (64, 48)), ((7, 300), (64, 48)), ((90, 31), (32, 32))):
        pixels = source.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        left, top = crop_place(*size, target)
        whole = image.resize(cover(*size, target), Image.Resampling.BILINEAR)
        after = np.asarray(whole.crop((left, top, left + target[0], top + target[1])))
        assert np.array_equal(np.asarray(fit(image, target)), after)
        with monkeypatch.context() as patch:
            patch.setattr(media, "_MANY_PIXELS", 0)
            patch.setattr(media, "_MUCH_LARGER", 1)
            before = np.asarray(fit(image, target))
        assert np.abs(before.astype(int) - after).max() <= 1


def test_where_memory_is_short_no_file_is_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_data(tmp_path)
    row = checked(config).frame.row(0, named=True)

    def short(*given: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", short)
    with pytest.raises(OutOfMemory, match="not enough to read the image") as caught:
        load_files(files_of(row, PICTURE), PICTURE, 1)
    assert "row 1" in str(caught.value)
    assert "decode_megapixels (it is" in str(caught.value)
    (tmp_path / "facts.sqlite").unlink()
    with pytest.raises(OutOfMemory, match="not enough to read the image"):
        checked(config)
    monkeypatch.undo()
    assert checked(config).counts == {"ok": 3}
