"""The first frame that LTX-2 is given: compressed as when a video is made, and not counted in the loss."""

import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import keys_of, train_to_end
from diffusers import AutoencoderKLLTX2Video
from families.ltx2.cases import CASES, rows, write
from PIL import Image, ImageDraw

from diffsynth_dagster.cache.keys import stage_digest
from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.contract import Family, Stage
from diffsynth_dagster.families.ltx2.family import variant
from diffsynth_dagster.families.shared.frames import compressed
from diffsynth_dagster.families.shared.ltx_vae import VIDEO_STAGE

I2AV = next(case for case in CASES if case.name == "ltx2_i2av")
HEIGHT, WIDTH = 64, 96


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ltx2") / "model"
    write(folder)
    return folder


def picture() -> np.ndarray:
    """A drawing with sharp edges and some noise (H, W, 3), grey: of colours half the resolution is
    lost at any factor."""
    image = Image.new("L", (WIDTH, HEIGHT), 180)
    draw = ImageDraw.Draw(image)
    draw.ellipse((10, 8, 60, 56), fill=60)
    draw.line((0, 63, 95, 0), fill=230, width=2)
    noise = np.random.default_rng(0).integers(-12, 13, (HEIGHT, WIDTH))
    grey = (np.asarray(image).astype(int) + noise).astype(np.uint8)
    return np.stack([grey] * 3, axis=-1)


def frame(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def levels(one: torch.Tensor) -> np.ndarray:
    return ((one + 1) * 127.5).permute(1, 2, 0).double().numpy()


def by_ffmpeg(pixels: np.ndarray, crf: int, folder: Path) -> np.ndarray:
    """The picture through FFmpeg's command line, with the encoder's settings of the authors."""
    ffmpeg, film = imageio_ffmpeg.get_ffmpeg_exe(), folder / "one.mp4"
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24"]
    quiet = [ffmpeg, "-y", "-loglevel", "error"]
    write_it = [*quiet, *raw, "-s", f"{WIDTH}x{HEIGHT}", "-r", "1", "-i", "-", "-c:v", "libx264"]
    write_it += ["-preset", "veryfast", "-crf", str(crf), "-pix_fmt", "yuv420p", str(film)]
    subprocess.run(write_it, input=pixels.tobytes(), check=True)
    read_it = [*quiet, "-i", str(film), *raw, "-"]
    left = subprocess.run(read_it, check=True, capture_output=True).stdout
    return np.frombuffer(left, np.uint8).reshape(HEIGHT, WIDTH, 3).astype(float)


@pytest.mark.parametrize("crf", [18, 33, 45])
def test_it_is_what_h264_leaves_of_the_frame(tmp_path: Path, crf: int) -> None:
    pixels = picture()
    ours, theirs = levels(compressed(frame(pixels), crf)), by_ffmpeg(pixels, crf, tmp_path)
    lost = np.abs(theirs - pixels).mean()
    assert lost > 1
    assert np.abs(ours - theirs).mean() < 0.02 * lost


def test_a_higher_factor_leaves_less() -> None:
    pixels = picture()
    lost = [np.abs(levels(compressed(frame(pixels), crf)) - pixels).mean() for crf in (1, 33, 51)]
    assert lost == sorted(lost)
    assert lost[0] < 0.5 * lost[1]


def used(**parameters: Any) -> Family:
    config = TrainingConfig().model_copy(update={"extra_inputs": ["input_image"], **parameters})
    return variant(find_family("ltx2"), config, {})


def encoded(stage: Stage, model: Path, videos: list[torch.Tensor]) -> list[torch.Tensor]:
    vae = AutoencoderKLLTX2Video.from_pretrained(model / "diffusers" / "vae").eval()
    with torch.no_grad():
        found = stage.run({"vae": vae}, [{"video": video} for video in videos])
    return [each["video"] for each in found]


def test_only_the_first_latent_frame_is_another(model: Path) -> None:
    still = frame(picture())
    noise = torch.Generator().manual_seed(0)
    video = torch.stack([still, *torch.rand(8, *still.shape, generator=noise) * 2 - 1], dim=1)
    other = video.flip(-1)
    on, off = used(first_frame_crf=33).stage("video"), used().stage("video")
    (plain,) = encoded(off, model, [video])
    left, second = encoded(on, model, [video, other])
    replaced = torch.cat([compressed(still, 33).unsqueeze(1), video[:, 1:]], dim=1)
    (whole,) = encoded(off, model, [replaced])
    # A latent frame of a causal VAE: the first is made of the first frame alone.
    torch.testing.assert_close(left[:, :1], whole[:, :1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(left[:, 1:], plain[:, 1:], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(left[:, :1], plain[:, :1], atol=1e-3)
    torch.testing.assert_close(second, encoded(on, model, [other])[0], atol=1e-5, rtol=1e-4)


def test_stored_samples_are_told_apart_by_it_alone() -> None:
    off, usual = used(), VIDEO_STAGE
    assert stage_digest(off.stage("video")) == stage_digest(usual)
    digests = {stage_digest(used(first_frame_crf=crf).stage("video")) for crf in (18, 33)}
    assert len(digests | {stage_digest(usual)}) == 3
    on = used(first_frame_crf=33)
    assert [s.name for s in on.stages] == [s.name for s in off.stages]
    others = [s.name for s in off.stages if s.name != "video"]
    assert others
    assert all(stage_digest(on.stage(n)) == stage_digest(off.stage(n)) for n in others)


def test_it_goes_with_a_column_of_frame_rates() -> None:
    """Both change what the stage is."""
    stage = used(first_frame_crf=33, extra_inputs=["input_image", "frame_rate"]).stage("video")
    assert [i.column for i in stage.reads] == ["video", "frame_rate"]
    assert stage.settings == (("first_frame_crf", 33),)


def test_a_training_stores_the_compressed_frame(model: Path, tmp_path: Path) -> None:
    """Videos alone are encoded again when it is switched on; the second half takes it over."""
    data = rows(tmp_path / "data")
    given = {
        "family": "ltx2",
        "dataset_base_path": str(data.parent),
        "dataset_metadata_path": str(data),
        "cache_path": str(tmp_path / "cache"),
        "lora_base_model": "dit",
        "lora_rank": 4,
        **I2AV.models(model, "diffusers"),
        **I2AV.parameters,
        "task": "sft:data_process",
    }
    keys: list[set[str]] = []
    for crf in (None, 33):
        folder = tmp_path / str(crf)
        train_to_end(given | {"first_frame_crf": crf}, folder)
        keys.append(keys_of(folder))
    assert len(keys[1] - keys[0]) == 4
    half = {n: v for n, v in given.items() if n not in ("dataset_metadata_path", "first_frame_crf")}
    half |= {"task": "sft:train", "dataset_base_path": str(tmp_path / "33")}
    run = train_to_end(half, tmp_path / "run")
    assert (run / "epoch-0.safetensors").exists()
