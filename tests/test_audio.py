"""Sound as an input: checked to its end, resampled, and as long as the clip beside it."""

import math
import wave
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import polars as pl
import pytest
import torch
from conftest import make_config
from hypothesis import given, settings
from hypothesis import strategies as st
from media_support import picture, write_clip
from video_family import CAPTION, VIDEO, video_family

from diffsynth_dagster.cache.keys import sample_identity, with_contents
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.media.audio import load_sample_audio
from diffsynth_dagster.data.samples import files_of, load_files
from diffsynth_dagster.data.table.validate import CheckedTable, validate
from diffsynth_dagster.errors import MetadataError
from diffsynth_dagster.facts import FactCache

RATE = 16000
SOUND = Input("sound", "audio", rate=RATE, channels=2, optional=True)
NEEDED = Input("sound", "audio", rate=RATE, channels=2)


def tone(seconds: float, rate: int, channels: int = 2, hertz: float = 440.0) -> np.ndarray:
    """A tone (channels, samples), int16."""
    times = np.arange(round(seconds * rate)) / rate
    wave_ = (np.sin(2 * np.pi * hertz * times) * 12000).astype(np.int16)
    return np.stack([wave_] * channels)


def write_wav(path: Path, seconds: float, rate: int = 44100, channels: int = 2) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(tone(seconds, rate, channels).T.tobytes())
    return path


def write_coded(
    path: Path, seconds: float, codec: str, rate: int = 44100, starts: float = 0.0
) -> Path:
    """Sound in a container and codec of FFmpeg's, whose first sample is at so many seconds."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(tone(seconds, rate).T).reshape(1, -1), "s16", "stereo"
        )
        frame.sample_rate = rate
        frame.pts, frame.time_base = round(starts * rate), Fraction(1, rate)
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return path


def check(
    folder: Path, sound: str, item: Input = SOUND, video: str = "0.mp4", **more: Any
) -> CheckedTable:
    """A table of one clip of 9 frames at 8 frames per second, and its sound."""
    if not (folder / video).exists():
        write_clip(folder / video, frames=9, rate=8)
    table = folder / "metadata.csv"
    table.write_text(f"video,prompt,sound\n{video},a clip,{sound}\n")
    config = make_config(
        {
            "family": "wanvideo",
            "dataset_base_path": str(folder),
            "dataset_metadata_path": str(table),
            "data_file_keys": ["video", "sound"],
            "model_paths": ["x"],
            "lora_base_model": "dit",
            "height": 32,
            "width": 32,
            "num_frames": 9,
            "output_path": str(folder / "run"),
            **more,
        }
    )
    family = video_family(VIDEO, item)
    return validate(config, family.columns, FactCache(folder / "facts.sqlite"))


def status(table: CheckedTable) -> tuple[str, str]:
    return table.frame["status"][0], table.frame["message"][0]


CODED = [("a.flac", "flac"), ("a.mp3", "libmp3lame"), ("a.ogg", "libopus"), ("a.m4a", "aac")]


@pytest.mark.parametrize(("name", "codec"), CODED)
def test_sound_of_every_kind_is_cut_to_the_clip(tmp_path: Path, name: str, codec: str) -> None:
    write_coded(tmp_path / name, 2.0, codec, rate=48000)
    table = check(tmp_path, name)
    assert status(table) == ("ok", "")
    row = table.frame.row(0, named=True)
    assert row["sound:frames"] == round(9 / 8 * RATE)
    sound = load_files(files_of(row, SOUND), SOUND, 1)
    assert sound.shape == (2, 18000)
    assert sound.dtype == torch.float32
    assert float(sound.abs().max()) == pytest.approx(12000 / 32768, abs=0.05)
    assert "16000x2x18000" in row["shape"]


@settings(max_examples=40, deadline=None)
@given(
    seconds=st.floats(0.01, 2.0),
    rate=st.sampled_from([8000, 11025, 22050, 44100, 48000]),
    wanted=st.sampled_from([16000, 24000, 44100]),
    samples=st.integers(1, 40000),
)
def test_reading_gives_as_many_samples_as_asked(
    tmp_path_factory: pytest.TempPathFactory, seconds: float, rate: int, wanted: int, samples: int
) -> None:
    path = write_wav(tmp_path_factory.mktemp("wav") / "a.wav", seconds, rate)
    sound = load_sample_audio(path, wanted, 2, samples)
    assert sound.shape == (2, samples)
    end = math.ceil(seconds * wanted) + 64
    assert not sound[:, end:].any()


def test_a_tone_keeps_its_frequency(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", 1.0, 44100)
    sound = load_sample_audio(path, RATE, 2, RATE)
    spectrum = torch.fft.rfft(sound[0]).abs()
    assert int(spectrum.argmax()) == 440
    torch.testing.assert_close(sound[0], sound[1])


def test_the_track_of_a_video_is_its_sound(tmp_path: Path) -> None:
    write_clip(tmp_path / "0.mp4", frames=9, rate=8, sound=tone(1.2, 44100))
    assert status(check(tmp_path, "0.mp4")) == ("ok", "")


@pytest.mark.parametrize(
    ("late", "seconds", "begins", "code"),
    [
        (0.5, 0.7, 0.5, "ok"),  # ends with the picture
        (-0.5, 1.7, 0.0, "ok"),
        (-0.5, 1.2, 0.0, "audio_too_short"),  # ends before the picture
    ],
)
def test_sound_stays_beside_its_picture(
    tmp_path: Path, late: float, seconds: float, begins: float, code: str
) -> None:
    """A track that starts later or earlier than the picture in the same file."""
    write_clip(tmp_path / "0.mkv", frames=9, rate=8, sound=tone(seconds, 44100), late=late)
    table = check(tmp_path, "0.mkv", video="0.mkv")
    assert status(table)[0] == code
    if code == "ok":
        sound = load_files(files_of(table.frame.row(0, named=True), SOUND), SOUND, 1)
        heard = (sound[0].abs() > 0.1).nonzero() / RATE
        assert float(heard.min()) == pytest.approx(begins, abs=0.05)
        assert float(heard.max()) == pytest.approx(9 / 8, abs=0.1)


@pytest.mark.parametrize(
    ("name", "codec", "starts"),
    [("a.mp3", "libmp3lame", 0.0), ("a.mka", "aac", 10.0), ("a.webm", "libopus", 10.0)],
)
def test_sound_in_a_file_of_its_own_starts_at_once(
    tmp_path: Path, name: str, codec: str, starts: float
) -> None:
    """Whenever its first sample says that it is: players begin there too."""
    write_coded(tmp_path / name, 2.0, codec, rate=48000, starts=starts)
    sound = load_sample_audio(tmp_path / name, RATE, 2, RATE)
    heard = (sound[0].abs() > 0.1).nonzero() / RATE
    assert float(heard.min()) < 0.005


def test_sound_beside_a_still_image_is_refused(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "still.png")
    write_wav(tmp_path / "a.wav", 2.0)
    code, message = status(check(tmp_path, "a.wav", video="still.png"))
    assert code == "sound_of_image"
    assert message == "sound: video is a still image, and has no length for sound"


def test_a_video_without_a_track_has_no_sound(tmp_path: Path) -> None:
    code, message = status(check(tmp_path, "0.mp4"))
    assert (code, message) == ("no_audio", "sound '0.mp4': the file has no sound")


def test_a_row_may_have_no_sound_where_it_is_optional(tmp_path: Path) -> None:
    silent = check(tmp_path, "")
    assert status(silent) == ("ok", "")
    row = silent.frame.row(0, named=True)
    assert load_files(files_of(row, SOUND), SOUND, 1) is None
    write_wav(tmp_path / "a.wav", 2.0)
    loud = check(tmp_path, "a.wav")
    assert loud.frame["shape"][0] != row["shape"]
    inputs = (VIDEO, CAPTION, SOUND)
    identities = [
        with_contents(t.frame, inputs).select(sample_identity(inputs)).item()
        for t in (silent, loud)
    ]
    assert all(identities)
    assert identities[0] != identities[1]
    code, message = status(check(tmp_path, "", NEEDED))
    assert (code, message) == ("missing_value", "sound: the column has no value")


def test_sound_that_ends_before_the_picture_is_refused(tmp_path: Path) -> None:
    """Less than a frame may be missing: it is silence."""
    write_wav(tmp_path / "short.wav", 0.9)
    code, message = status(check(tmp_path, "short.wav"))
    assert code == "audio_too_short"
    assert message == "sound: 0.9 seconds of sound, but the clip has 1.125"
    write_wav(tmp_path / "nearly.wav", 1.05)
    table = check(tmp_path, "nearly.wav")
    assert status(table) == ("ok", "")
    sound = load_files(files_of(table.frame.row(0, named=True), SOUND), SOUND, 1)
    assert sound.shape == (2, 18000)
    assert not sound[:, 17000:].any()


@pytest.mark.parametrize("frame_rate", [4.0, 8.0])
def test_the_length_follows_the_rate_of_the_frames(tmp_path: Path, frame_rate: float) -> None:
    write_wav(tmp_path / "a.wav", 3.0)
    count = 5
    table = check(tmp_path, "a.wav", num_frames=count, frame_rate=frame_rate)
    assert table.frame["sound:frames"][0] == round(count / frame_rate * RATE)


def test_mono_is_refused_for_a_stereo_model(tmp_path: Path) -> None:
    write_wav(tmp_path / "mono.wav", 2.0, channels=1)
    code, message = status(check(tmp_path, "mono.wav"))
    assert code == "wrong_channels"
    assert "1 channels, and the model takes 2: make both channels of the one" in message


def test_a_rate_of_zero_is_refused(tmp_path: Path) -> None:
    data = bytearray(write_wav(tmp_path / "a.wav", 2.0).read_bytes())
    data[24:28] = bytes(4)
    (tmp_path / "zero.wav").write_bytes(data)
    code, message = status(check(tmp_path, "zero.wav"))
    assert code == "bad_sample_rate"
    assert "the sample rate of the sound is 0" in message


@pytest.mark.parametrize(("name", "codec"), [("a.wav", "pcm_s16le"), *CODED])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, name: str, codec: str) -> None:
    data = write_coded(tmp_path / name, 3.0, codec, rate=48000).read_bytes()
    (tmp_path / f"cut-{name}").write_bytes(data[: len(data) // 2])
    assert status(check(tmp_path, f"cut-{name}"))[0] == "unreadable"


@pytest.mark.parametrize("content", [b"", b"not sound", bytes(1000)])
def test_what_is_no_sound_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    assert status(check(tmp_path, "a.wav"))[0] == "unreadable"


def test_sound_that_changed_after_the_check_is_refused(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", 2.0)
    row = check(tmp_path, "a.wav").frame.row(0, named=True)
    write_wav(tmp_path / "a.wav", 1.9)
    with pytest.raises(MetadataError, match="its content has changed"):
        load_files(files_of(row, SOUND), SOUND, 1)


def test_several_clips_have_a_part_of_the_size(tmp_path: Path) -> None:
    """Each as long as the sample, at its sides divided by a number of the row."""
    factor = Input("factor", "number", pattern=r"^\s*[1-9]\d*\s*$", wants="a whole number")
    context = Input("clips", "video", many=True, same_size=True, divided_by="factor")
    for name, frames in (("0", 9), ("1", 12), ("2", 9), ("short", 5)):
        write_clip(tmp_path / f"{name}.mp4", frames=frames, rate=8)
    rows = [
        {"video": "0.mp4", "prompt": "a", "clips": ["1.mp4", "2.mp4"], "factor": 2},
        {"video": "0.mp4", "prompt": "a", "clips": ["1.mp4"], "factor": 1},
        {"video": "0.mp4", "prompt": "a", "clips": ["1.mp4", "short.mp4"], "factor": 1},
        {"video": "0.mp4", "prompt": "a", "clips": ["1.mp4"], "factor": 8},
    ]
    table = tmp_path / "metadata.json"
    pl.DataFrame(rows).write_json(table)
    config = make_config(
        {
            "family": "wanvideo",
            "dataset_base_path": str(tmp_path),
            "dataset_metadata_path": str(table),
            "data_file_keys": ["video", "clips"],
            "model_paths": ["x"],
            "lora_base_model": "dit",
            "height": 64,
            "width": 96,
            "num_frames": 9,
            "output_path": str(tmp_path / "run"),
        }
    )
    family = video_family(VIDEO, context, factor)
    checked = validate(config, family.columns, FactCache(tmp_path / "facts.sqlite")).frame
    assert checked["status"].to_list() == ["ok", "ok", "too_short", "too_small"]
    assert checked["clips:target"][0].to_list() == [[48, 32], [48, 32]]
    assert checked["clips:target"][1].to_list() == [[96, 64]]
    assert checked["clips:frames"][0].to_list() == [9, 9]
    clips = load_files(files_of(checked.row(0, named=True), context), context, 1)
    assert [tuple(clip.shape) for clip in clips] == [(3, 9, 32, 48)] * 2
