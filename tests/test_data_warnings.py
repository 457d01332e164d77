"""What the check says of rows that are trained on otherwise than people may expect."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from conftest import Values, make_config, train_to_end
from media_support import write_clip
from PIL import Image
from video_family import video_family

from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.data.columns import Columns, Input
from diffsynth_dagster.data.prepare import prepare_data
from diffsynth_dagster.data.table.checked_table import read_checked
from diffsynth_dagster.data.table.validate import CheckedTable
from diffsynth_dagster.data.table.warnings import warnings_about
from diffsynth_dagster.facts import fact_cache_of
from diffsynth_dagster.weights.identify import guess_model

WAN, WIDE = "Wan-AI/Wan2.1-T2V-1.3B:a.safetensors", "Wan-AI/Wan2.2-TI2V-5B:Wan2.2_VAE.pth"


def config_of(folder: Path, rows: list[dict[str, Any]], **more: Any) -> TrainingConfig:
    (folder / "rows.json").write_text(json.dumps([{"prompt": "a", **row} for row in rows]))
    return make_config(
        {
            "dataset_base_path": str(folder),
            "dataset_metadata_path": str(folder / "rows.json"),
            "lora_base_model": "dit",
            "output_path": str(folder / "run"),
            "cache_path": str(folder / "cache"),
            **({} if "model_id_with_origin_paths" in more else {"model_paths": ["x"]}),
            **more,
        }
    )


def told(config: TrainingConfig, columns: Columns | None = None) -> list[str]:
    """The warnings about a data set, and again as the table in its run folder has them."""
    found = guess_model(config).family.columns if columns is None else columns
    warnings = check(config, found).warnings()
    assert read_checked(Path(config.output_path)).warnings() == warnings
    return warnings


def check(config: TrainingConfig, columns: Columns) -> CheckedTable:
    table = prepare_data(config, columns, fact_cache_of(config.cache_path))
    assert table.counts == {"ok": sum(table.counts.values())}
    return table


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of 96x80 pixels, at 16, 24 and 30 frames per second, and a picture."""
    folder = tmp_path_factory.mktemp("clips")
    for rate in (16, 24, 30):
        write_clip(folder / f"{rate}.mp4", 10, rate)
    Image.new("RGB", (96, 80)).save(folder / "still.png")
    return folder


@pytest.mark.parametrize(
    ("models", "rate", "rows"),
    [(WAN, 16, "2 rows, the first is 2, have"), (WIDE, 24, "2 rows, the first is 1, have")],
)
def test_clips_of_another_rate(clips: Path, models: str, rate: int, rows: str) -> None:
    files = [{"video": name} for name in ("16.mp4", "24.mp4", "30.mp4", "still.png")]
    given = {"family": "wanvideo", "model_id_with_origin_paths": models, "num_frames": 5}
    (warning,) = told(config_of(clips, files, **given))
    assert warning.startswith(f"{rows} clips of another frame rate than the {rate} frames")
    assert f"frame_rate: {rate} " in warning
    assert told(config_of(clips, files, **given, frame_rate=24.0)) == []
    own = [{"video": f"{rate}.mp4"}]
    assert told(config_of(clips, own, **given)) == []


def test_a_family_that_resamples_warns_of_no_rate(clips: Path) -> None:
    ltx = {"family": "ltx2", "model_paths": ["x"], "num_frames": 1}
    assert told(config_of(clips, [{"video": "30.mp4"}], **ltx)) == []


def test_a_table_checked_for_another_rate_is_the_same_table(clips: Path) -> None:
    """Tables that were checked before there was this warning are taken as they are."""
    given = {"family": "wanvideo", "model_id_with_origin_paths": WAN, "num_frames": 5}
    config = config_of(clips, [{"video": "30.mp4"}], **given)
    described = guess_model(config).family.columns.described
    assert set(described[2]) == {
        "side_factor",
        "frames",
        "default_frames",
        "default_frame_rate",
        "sample_size",
    }


def save(folder: Path, *sizes: tuple[int, int]) -> list[dict[str, Any]]:
    for width, height in sizes:
        Image.new("RGB", (width, height)).save(folder / f"{width}x{height}.png")
    return [{"image": f"{width}x{height}.png"} for width, height in sizes]


def test_pictures_that_a_fixed_size_enlarges_or_crops(tmp_path: Path) -> None:
    columns = video_family(Input("image", "image"), frames=None).columns
    rows = save(tmp_path, (64, 64), (40, 64), (400, 300), (63, 63), (400, 120), (120, 400))
    enlarged, cropped = told(config_of(tmp_path, rows, height=64, width=64), columns)
    assert enlarged.startswith("row 2 has pictures or clips that are smaller than the size they")
    assert "max_pixels" in enlarged
    assert cropped.startswith("3 rows, the first is 2, have pictures or clips of which more than a")
    # Each in its own size: rounding down, and scaling down, neither enlarges nor crops much.
    assert told(config_of(tmp_path, rows, max_pixels=5000), columns) == []
    assert told(config_of(tmp_path, rows, max_pixels=5000, bucket_step=32), columns) == []


def test_the_command_line_shows_them(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = values(height=32, width=64, task="sft:data_process")
    train_to_end(given, tmp_path / "run")
    said = capsys.readouterr().err
    assert "warning: 8 rows, the first is 1, have pictures or clips that are smaller" in said
    assert "warning: 8 rows, the first is 1, have pictures or clips of which more than a" in said


def test_edit_pictures_and_what_has_the_size_of_the_sample(tmp_path: Path) -> None:
    edit = Input("edit", "picture", many=True, area=256 * 256)
    control = Input("control", "image", same_size=True, optional=True)
    columns = video_family(Input("image", "image"), edit, control, frames=None).columns
    save(tmp_path, (256, 256), (100, 80), (250, 262), (32, 32), (128, 32))
    rows: list[dict[str, Any]] = [
        {"image": "256x256.png", "edit": ["256x256.png", "250x262.png"], "control": "32x32.png"},
        {"image": "256x256.png", "edit": ["256x256.png", "100x80.png"]},
        {"image": "256x256.png", "edit": "100x80.png", "control": "256x256.png"},
    ]
    keys = {"data_file_keys": "image,edit,control"}
    (warning,) = told(config_of(tmp_path, rows, **keys), columns)
    assert warning.startswith("2 rows, the first is 2, have pictures in edit that are enlarged to")
    assert "256x256 pixels" in warning
    rows[0]["control"] = "128x32.png"
    warnings = told(config_of(tmp_path, rows, **keys, height=256, width=256), columns)
    assert len(warnings) == 2
    assert warnings[1].startswith("row 1 has pictures or clips of which more than a third is")


def test_rejected_rows_warn_of_nothing_and_tables_without_columns_neither(tmp_path: Path) -> None:
    rows = pl.LazyFrame({"row": [1], "status": ["unreadable"], "video:transparent": [True]})
    assert CheckedTable(rows, "t").warnings() == []
    assert warnings_about(rows.select("row"), [], {}, 16.0) == []


def test_every_kind_is_counted_in_one_pass_of_many_rows(tmp_path: Path) -> None:
    """Lists and single files, with rows that name none: a count of each kind is what they hold."""
    count = 200_000
    table = pl.select(row=pl.int_range(1, count + 1, dtype=pl.UInt32)).with_columns(
        pl.when(pl.col("row") % 10 > 0).then(pl.lit(30.0)).alias("video:rate"),
        pl.lit(100).alias("video:width"),
        pl.lit(100).alias("video:height"),
        pl.concat_list(pl.lit(96), pl.when(pl.col("row") % 4 == 0).then(192).otherwise(96)).alias(
            "video:target"
        ),
    )
    path = tmp_path / "t.parquet"
    table.write_parquet(path)
    inputs = [Input("video", "video")]
    warnings = warnings_about(pl.scan_parquet(path), inputs, {"height": 192}, 16.0)
    starts = [warning.split(",")[0] for warning in warnings]
    assert starts == [f"{count * 9 // 10} rows", f"{count // 4} rows", f"{count // 4} rows"]
