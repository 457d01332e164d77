"""The size facts that some models are told: original size, crop, trained size."""

from pathlib import Path
from typing import Any

import numpy as np
from conftest import make_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from video_family import CAPTION, video_family

from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.geometry import crop_place
from diffsynth_dagster.data.media.image import fit
from diffsynth_dagster.data.samples import parse_value
from diffsynth_dagster.data.table.validate import CheckedTable, validate
from diffsynth_dagster.facts import FactCache

IMAGE = Input("image", "image")
SIZES = Input("image_sizes", "sizes")


def check(folder: Path, **more: Any) -> CheckedTable:
    config = make_config(
        {
            "family": "qwen_image",
            "dataset_base_path": str(folder),
            "dataset_metadata_path": str(folder / "metadata.csv"),
            "model_paths": ["x"],
            "lora_base_model": "dit",
            "output_path": str(folder / "run"),
            **more,
        }
    )
    family = video_family(IMAGE, SIZES, frames=None)
    assert CAPTION in family.columns.named
    assert SIZES not in family.columns.named
    return validate(config, family.columns, FactCache(folder / "facts.sqlite"))


def test_they_are_those_of_the_first_image(tmp_path: Path) -> None:
    lines = ["image,prompt"]
    for index, size in enumerate([(100, 64), (64, 100), (32, 32), (8, 8)]):
        Image.new("RGB", size).save(tmp_path / f"{index}.png")
        lines.append(f"{index}.png,a picture")
    turned = Image.Exif()
    turned[0x0112] = 6  # on its side
    Image.new("RGB", (100, 64)).save(tmp_path / "4.jpg", exif=turned)
    lines += ["4.jpg,a picture", "missing.png,a picture"]
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    own = check(tmp_path).frame
    assert own["status"].to_list() == ["ok", "ok", "ok", "too_small", "ok", "file_missing"]
    facts = [parse_value(t, SIZES) for t in own.filter(status="ok")["image_sizes"]]
    assert facts == [
        (64, 100, 0, 2, 64, 96),
        (100, 64, 2, 0, 96, 64),
        (32, 32, 0, 0, 32, 32),
        (100, 64, 2, 0, 96, 64),
    ]
    fixed = check(tmp_path, height=32, width=32).frame
    assert parse_value(fixed["image_sizes"][0], SIZES) == (64, 100, 0, 9, 32, 32)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(8, 90), st.integers(8, 90)),
    target=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_the_crop_is_the_one_that_is_made(size: tuple[int, int], target: tuple[int, int]) -> None:
    """A picture whose every pixel says where it is tells where it was cropped, to a pixel."""
    width, height = size
    wanted = (target[0] * 16, target[1] * 16)
    x, y = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    picture = Image.fromarray(np.stack([x, y, x * 0], -1).__mul__(255).astype(np.uint8))
    shown = np.asarray(fit(picture, wanted)).astype(float) / 255
    left, top = crop_place(width, height, wanted)
    scale = max(wanted[0] / width, wanted[1] / height)
    assert abs(shown[:, wanted[0] // 2, 0].mean() * width * scale - left - wanted[0] // 2) <= (
        2 * scale + 2
    )
    assert abs(shown[wanted[1] // 2, :, 1].mean() * height * scale - top - wanted[1] // 2) <= (
        2 * scale + 2
    )
