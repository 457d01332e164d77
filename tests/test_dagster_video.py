"""A short training on real clips through Dagster, and what the UI shows of it."""

import base64
import io
import shutil
from pathlib import Path

import av
import dagster as dg
import pytest
from conftest import record_of
from dagster_support import executed
from families.wanvideo.cases import CASES
from media_support import real_clip
from PIL import Image

CLIPS = {
    "carphone_pristine.mp4": "a man in a car talks",
    "bikes.mp4": "people on bicycles",
    "bigbuckbunny.mp4": "a rabbit comes out of its burrow",
}


@pytest.mark.soak
def test_real_clips_become_a_lora(tmp_path: Path) -> None:
    case, data = CASES[0], tmp_path / "data"
    case.write(tmp_path / "model")
    data.mkdir()
    for name in CLIPS:
        shutil.copy(real_clip().parent / name, data)
    lines = ["video,prompt", *(f'{name},"{caption}"' for name, caption in CLIPS.items())]
    (data / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = {
        **case.models(tmp_path / "model", "original"),
        "family": case.family,
        "dataset_base_path": str(data),
        "dataset_metadata_path": str(data / "metadata.csv"),
        "height": 48,
        "width": 64,
        "num_frames": 9,
        "lora_base_model": "dit",
        "lora_target_modules": list(case.aliases),
        "lora_rank": 4,
        "num_epochs": 2,
        "sample_prompts": ["a man in a car"],
        "sample_num_inference_steps": 2,
        "cache_path": str(tmp_path / "cache"),
        "output_path": str(tmp_path / "run"),
    }
    with executed(tmp_path, "clips", recipe) as instance:
        metadata = facts(instance, "metadata")
        latents, training = facts(instance, "latents"), facts(instance, "checkpoints")
        exports = facts(instance, "exports")
    assert metadata["status/ok"].value == 3
    assert latents["misses/video"].value == 3
    # Four frames of each clip, eight thumbnails in a row.
    assert picture(metadata["contact_sheet"]).size == (8 * 96, 2 * 96)
    assert str(training["steps"].value).startswith("6 in ")
    # Before and after: the first of two strips of eight frames, each under its title.
    strips = picture(training["samples"])
    assert strips.width == 8 * 64
    assert strips.height > 2 * 48
    with Image.open(tmp_path / "run" / "samples" / "step-6.png") as strip:
        assert strip.size == (8 * 64, 48)
    playing = picture(training["clips"])
    assert (playing.format, playing.size) == ("WEBP", (64, 48))
    assert getattr(playing, "n_frames", 1) == 9
    clip = tmp_path / "run" / "samples" / "step-6-0.mp4"
    assert training["clip/0"] == dg.MetadataValue.path(str(clip))
    with av.open(str(clip)) as container:
        assert len(list(container.decode(video=0))) == 9
    record = record_of(tmp_path / "run")
    assert list(record.clips.values()) == ["step-0-0.mp4", "step-3-0.mp4", "step-6-0.mp4"]
    (file,) = exports["files"].records
    assert Path(file.data["file"]).is_file()


def facts(instance: dg.DagsterInstance, kind: str) -> dict[str, dg.MetadataValue]:
    event = instance.get_latest_materialization_event(dg.AssetKey(["clips", kind]))
    assert event is not None
    assert event.asset_materialization is not None
    return dict(event.asset_materialization.metadata)


def picture(value: dg.MetadataValue) -> Image.Image:
    """The picture inside a markdown value."""
    text = str(value.value)
    data = text.removeprefix("![](data:image/").removesuffix(")").partition("base64,")[2]
    return Image.open(io.BytesIO(base64.b64decode(data)))
