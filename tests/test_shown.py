"""The frames that are trained on are those that a player shows, whatever the container and the codec."""

import os
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import imageio_ffmpeg
import numpy as np
import pytest
from media_support import convert
from PIL import Image
from test_videos import check
from video_family import VIDEO, video_family

from assets.metadata import contents_of
from diffsynth_dagster.data.geometry import FrameRule, frames_at
from diffsynth_dagster.data.media.audio import load_sample_audio
from diffsynth_dagster.data.samples import files_of, load_files

RATE, FRAMES, SIZE = 30, 48, (64, 48)
CORNER = 12
"""Side of the white square in the upper left corner: it shows how a picture is turned."""
H264 = ("-c:v", "libx264", "-qp", "1", "-pix_fmt", "yuv420p", "-bf", "3", "-g", "15")
X264 = "scenecut=0:b-adapt=0"
CODECS: dict[str, tuple[str, ...]] = {
    "h264": (*H264, "-x264-params", X264),
    "open": (*H264, "-x264-params", f"{X264}:open-gop=1"),
    "interlaced": (*H264, "-x264-params", f"{X264}:tff=1:interlaced=1"),
    "hevc": (
        *("-c:v", "libx265", "-qp", "4", "-pix_fmt", "yuv420p", "-preset", "ultrafast"),
        *("-x265-params", "log-level=error:keyint=15:bframes=3:scenecut=0"),
    ),
    "mpeg4": ("-c:v", "mpeg4", "-q:v", "1", "-bf", "2", "-g", "15"),
    "mpeg2": ("-c:v", "mpeg2video", "-q:v", "1", "-bf", "2", "-g", "15"),
    "wmv": ("-c:v", "wmv2", "-q:v", "1"),
    "vp9": ("-c:v", "libvpx-vp9", "-crf", "4", "-b:v", "0", "-cpu-used", "8", "-g", "15"),
    "av1": ("-c:v", "libsvtav1", "-crf", "5", "-preset", "12", "-g", "15"),
}
WHOLE = (
    *("h264.mp4", "h264.mov", "h264.mkv", "h264.avi", "h264.ts", "h264.flv", "h264.h264"),
    *("open.mp4", "open.mkv", "open.ts", "interlaced.mp4", "interlaced.ts"),
    *("hevc.mp4", "hevc.mkv", "hevc.ts", "mpeg4.avi", "mpeg4.mp4", "mpeg2.mpg", "mpeg2.ts"),
    *("wmv.wmv", "vp9.webm", "av1.mp4"),
)
UNEVEN = "setpts=if(lt(N\\,20)\\,N\\,20+(N-20)*1.7)/30/TB"
MADE: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "cut.mp4": ("h264.mp4", ("-ss", "0.7"), ("-c", "copy")),
    "cut.mkv": ("h264.mp4", ("-ss", "0.7"), ("-c", "copy")),
    "cut_open.mkv": ("open.mkv", ("-ss", "0.7"), ("-c", "copy")),
    "cut_open.ts": ("open.ts", ("-ss", "0.7"), ("-c", "copy")),
    "cut_hevc.mp4": ("hevc.mp4", ("-ss", "0.7"), ("-c", "copy")),
    "uneven.mp4": ("h264.mp4", (), ("-vf", UNEVEN, "-fps_mode", "vfr", *CODECS["h264"])),
    "uneven.mkv": ("h264.mp4", (), ("-vf", UNEVEN, "-fps_mode", "vfr", *CODECS["h264"])),
    "turned.mp4": ("h264.mp4", ("-display_rotation", "90"), ("-c", "copy")),
    "upside.mp4": ("h264.mp4", ("-display_rotation", "180"), ("-c", "copy")),
    "mirrored.mp4": ("h264.mp4", ("-display_hflip",), ("-c", "copy")),
    "turned_mirrored.mp4": (
        "h264.mp4",
        ("-display_rotation", "90", "-display_hflip"),
        ("-c", "copy"),
    ),
    "wide.mp4": ("h264.mp4", (), ("-vf", "setsar=3/2", *CODECS["h264"])),
}
"""Name → the clip that it is made of, options of reading it, and of writing."""
CORNERS = {
    "turned.mp4": "lower left",
    "upside.mp4": "lower right",
    "mirrored.mp4": "upper right",
    "turned_mirrored.mp4": "lower right",
}


def ffmpeg(*arguments: object, given: bytes | None = None) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error"]
    subprocess.run([*command, *map(str, arguments)], input=given, check=True)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of clips whose frame n is grey 10 + 3n."""
    folder = tmp_path_factory.mktemp("data")
    pictures = np.stack([np.full((*SIZE[::-1], 3), 10 + 3 * n, np.uint8) for n in range(FRAMES)])
    pictures[:, :CORNER, :CORNER] = 255
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "64x48", "-r", RATE, "-i", "-")
    for name in WHOLE:
        ffmpeg(*raw, *CODECS[name.split(".")[0]], folder / name, given=pictures.tobytes())
    for name, (source, before, after) in MADE.items():
        ffmpeg(*before, "-i", folder / source, *after, folder / name)
    return folder


def number(pixels: np.ndarray) -> int:
    """Which frame it is, by its middle."""
    middle = pixels[pixels.shape[0] // 2 - 3 :, pixels.shape[1] // 2 - 3 :][:6, :6]
    return round((float(middle.mean()) - 10) / 3)


@cache
def shown(path: Path) -> tuple[list[float], list[int]]:
    """When each frame of a file is shown, in seconds, and which it is: decoded in order."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        base = float(container.streams.video[0].time_base or 0)
    stamps = [frame.pts for frame in frames]
    times = [index / RATE for index in range(len(frames))]
    if None not in stamps and sorted(stamps) == stamps:  # else a file that says a rate alone
        times = [(stamp - stamps[0]) * base for stamp in stamps]
    return times, [number(frame.to_ndarray(format="rgb24")) for frame in frames]


def wanted(path: Path, rate: float | None, count: int) -> list[int]:
    """The frames that are to be read."""
    times, numbers = shown(path)
    if rate is None:
        return numbers[:count]
    near = 1.5e-3  # stamps are rounded
    return [numbers[bisect_right(times, k / rate + near) - 1] for k in range(count)]


@pytest.mark.parametrize("rate", [None, 24.0])
def test_every_kind_of_clip_is_read_as_it_is_shown(clips: Path, rate: float | None) -> None:
    names = [*WHOLE, *MADE]
    family = video_family(VIDEO, frames=FrameRule(1, 0))
    rows = [{"video": name, "prompt": "a"} for name in names]
    more = {} if rate is None else {"frame_rate": rate}
    frame = check(clips, rows, family, num_frames=150, **more).frame
    assert frame["message"].to_list() == [""] * len(names)
    said = []
    for row in frame.iter_rows(named=True):
        film = load_files(files_of(row, VIDEO), VIDEO, 1)
        pixels = ((film.permute(1, 2, 3, 0).numpy() + 1) * 127.5).round()
        read = [number(picture) for picture in pixels]
        right = wanted(clips / row["video"], rate, len(read))
        times, _ = shown(clips / row["video"])
        seconds = times[-1] + (times[-1] - times[-2])
        long = len(times) if rate is None else min(150.0, seconds * rate)
        assert len(read) == pytest.approx(long, abs=1.1)
        wrong = sum(a != b for a, b in zip(read, right, strict=True))
        by = "decord" if row["video:shown"] is None else "PyAV"
        said.append((row["video"], len(times), len(read), by, wrong))
    print("\nclip, its frames, frames read, by, wrong ones")
    print(*said, sep="\n")
    assert [name for name, *_, wrong in said if wrong] == []
    if rate is None:
        by_decord = {name for name, _, _, by, _ in said if by == "decord"}
        assert {"h264.mp4", "h264.mkv", "hevc.mp4", "vp9.webm"} <= by_decord
        assert by_decord.isdisjoint({"h264.ts", "cut.mp4", "mirrored.mp4", "wide.mp4", "av1.mp4"})


def test_clips_are_turned_and_mirrored_and_have_square_pixels(clips: Path) -> None:
    names = [*CORNERS, "wide.mp4", "h264.mp4"]
    rows = [{"video": name, "prompt": "a"} for name in names]
    frame = check(clips, rows, video_family(VIDEO), num_frames=5).frame
    sizes = dict(zip(frame["video"], frame.select("width", "height").rows(), strict=True))
    assert sizes["wide.mp4"] == (96, 48)
    assert sizes["turned.mp4"] == sizes["turned_mirrored.mp4"] == (48, 64)
    assert sizes["mirrored.mp4"] == sizes["h264.mp4"] == (64, 48)
    for row in frame.iter_rows(named=True):
        film = load_files(files_of(row, VIDEO), VIDEO, 1)
        white = film[:, 2].mean(0).numpy() > 0.8
        rows_of, columns_of = np.nonzero(white)
        upper, left = rows_of.mean() < len(white) / 2, columns_of.mean() < white.shape[1] / 2
        where = f"{'upper' if upper else 'lower'} {'left' if left else 'right'}"
        assert where == CORNERS.get(row["video"], "upper left"), row["video"]
    wide = load_files(files_of(frame.row(len(CORNERS), named=True), VIDEO), VIDEO, 1)
    white = wide[:, 2].mean(0).numpy() > 0.8
    high, broad = (np.ptp(np.nonzero(white)[axis]) + 1 for axis in (0, 1))
    assert (high, broad) == (pytest.approx(CORNER, abs=1), pytest.approx(CORNER * 1.5, abs=1))


def flashing(path: Path, times: Sequence[float]) -> Path:
    """A clip with frames at these times, black before one second and white from then, and a click in
    its sound at one second."""
    rate = 48_000
    base = Fraction(1, 90_000)
    sound = np.zeros(2 * rate, np.float32)
    sound[rate : rate + 96] = 0.9
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream(
            "libx264", rate=60, options={"qp": "8", "bf": "2", "g": "24"}
        )
        video.width, video.height, video.pix_fmt, video.time_base = 64, 64, "yuv420p", base
        video.codec_context.time_base = base
        track: Any = container.add_stream("mp2", rate=rate, layout="mono")
        for time in times:
            level = 235 if time > 1 - 1e-6 else 16
            shown = av.VideoFrame.from_image(Image.new("RGB", (64, 64), (level,) * 3))
            shown.pts, shown.time_base = round(time * 90_000), base
            container.mux(video.encode(shown))
        container.mux(video.encode(None))
        samples = (sound * 32767).astype(np.int16).reshape(1, -1)
        heard = av.AudioFrame.from_ndarray(samples, "s16", "mono")
        heard.sample_rate, heard.pts, heard.time_base = rate, 0, Fraction(1, rate)
        container.mux(track.encode(heard))
        container.mux(track.encode(None))
    return path


def test_picture_and_sound_stay_together(tmp_path: Path) -> None:
    """A flash and a click at one second: frame 24 of 24 a second, and sample 1.000 s."""
    uneven = [0.0]
    gaps = [1 / 30, 1 / 30, 1 / 15, 1 / 60, 0.1, 1 / 25]
    while uneven[-1] < 2:
        gap = gaps[len(uneven) % len(gaps)]
        before = uneven[-1]
        uneven.append(1.0 if before < 1 <= before + gap else before + gap)
    folder = tmp_path / "data"
    folder.mkdir()
    made = {
        "30.mp4": [n / 30 for n in range(60)],
        "60.mp4": [n / 60 for n in range(120)],
        "30.ts": [n / 30 for n in range(60)],
        "uneven.mp4": uneven,
        "uneven.mkv": uneven,
    }
    for name, times in made.items():
        flashing(folder / name, times)
    rows = [{"video": name, "prompt": "a"} for name in made]
    family = video_family(VIDEO, frames=FrameRule(1, 0))
    for row in check(folder, rows, family, num_frames=41, frame_rate=24.0).frame.iter_rows(
        named=True
    ):
        assert (row["message"], row["frames"]) == ("", 41)
        film = load_files(files_of(row, VIDEO), VIDEO, 1)
        bright = film.mean((0, 2, 3)).numpy() > 0
        sound = load_sample_audio(folder / row["video"], 48_000, 1, 80_000)[0].abs().numpy()
        click = int(np.argmax(sound > 0.3)) / 48_000
        print(row["video"], int(np.argmax(bright)), round(click, 4))
        assert int(np.argmax(bright)) == 24, row["video"]
        assert click == pytest.approx(1.0, abs=0.002), row["video"]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_are_read_by_their_delays(tmp_path: Path, kind: str) -> None:
    """In steps of 200 ms; those of 10 ms and less count for 100."""
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / f"x.{kind.lower()}"
    stills = [Image.new("RGB", (64, 64), (10 + 40 * n,) * 3) for n in range(5)]
    first, *others = stills
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    delays = [200, 400, 10, 100, 200]
    first.save(path, kind, save_all=True, append_images=others, duration=delays, **options)
    row = check(
        folder,
        [{"video": path.name, "prompt": "a"}],
        video_family(VIDEO, frames=FrameRule(1, 0)),
        num_frames=9,
        frame_rate=5.0,
    ).frame.row(0, named=True)
    film = load_files(files_of(row, VIDEO), VIDEO, 1)
    read = [round((float(f.mean() + 1) * 127.5 - 10) / 40) for f in film.unbind(1)]
    assert read == [0, 1, 1, 2, 4]
    assert row["video:rate"] == pytest.approx(5 / 1.0)


def test_the_picture_for_those_that_show_no_animation_is_no_frame(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    stills = [Image.new("RGB", (64, 64), (40 * n,) * 3) for n in range(4)]
    stills[0].save(
        folder / "x.png", save_all=True, append_images=stills[1:], duration=100, default_image=True
    )
    family = video_family(VIDEO, frames=FrameRule(1, 0))
    row = check(folder, [{"video": "x.png", "prompt": "a"}], family).frame.row(0, named=True)
    film = load_files(files_of(row, VIDEO), VIDEO, 1)
    assert [round((float(f.mean()) + 1) * 127.5 / 40) for f in film.unbind(1)] == [1, 2, 3]


def test_a_high_dynamic_range_is_named(clips: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, transfer in (("pq.mp4", "smpte2084"), ("hlg.mp4", "arib-std-b67")):
        colours = f"log-level=error:colorprim=bt2020:colormatrix=bt2020nc:transfer={transfer}"
        form = ("-frames:v", "5", "-pix_fmt", "yuv420p10le", "-x265-params", colours)
        ffmpeg("-i", clips / "h264.mp4", "-c:v", "libx265", *form, folder / name)
    rows = [{"video": name, "prompt": "a"} for name in ("pq.mp4", "hlg.mp4")]
    frame = check(folder, rows, video_family(VIDEO)).frame
    assert frame["status"].to_list() == ["high_range"] * 2
    assert "PQ" in frame["message"][0]
    assert "HLG" in frame["message"][1]


def test_samples_that_were_right_keep_their_keys(clips: Path) -> None:
    """Only what was read wrongly, or could have been, says how it is read now."""
    rows = [{"video": name, "prompt": "a"} for name in ("h264.mp4", "h264.ts", "cut.mp4")]
    family = video_family(VIDEO)
    frame = check(clips, rows, family, num_frames=5).frame
    assert [taken is None for taken in frame["video:shown"]] == [True, False, False]
    frame = check(clips, rows, family, num_frames=5, frame_rate=15.0).frame
    assert frame["video:shown"].to_list() == [[0, 2, 4, 6, 8]] * 3


def test_a_frame_that_is_left_out_is_no_rounding(tmp_path: Path) -> None:
    """In AVI a unit of time is as long as a frame."""
    folder = tmp_path / "data"
    folder.mkdir()
    stamps = [*range(5), *range(6, 41)]
    with av.open(str(folder / "gap.avi"), "w") as container:
        video: Any = container.add_stream("mjpeg", rate=RATE)
        video.width, video.height, video.pix_fmt = 64, 64, "yuvj420p"
        for index, stamp in enumerate(stamps):
            still = av.VideoFrame.from_image(Image.new("RGB", (64, 64), (10 + 3 * index,) * 3))
            still.pts, still.time_base = stamp, Fraction(1, RATE)
            container.mux(video.encode(still))
        container.mux(video.encode(None))
    rows = [{"video": "gap.avi", "prompt": "a"}]
    family = video_family(VIDEO, frames=FrameRule(1, 0))
    row = check(folder, rows, family, frame_rate=float(RATE)).frame.row(0, named=True)
    assert row["video:shown"][:8] == [0, 1, 2, 3, 4, 4, 5, 6]
    assert row["frames"] == 41


def test_rates_that_are_a_clips_own_change_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    convert(folder / "square.mp4", "-vf", "setsar=1", "-c:v", "libx264", "-frames:v", "40")
    still = Image.new("RGB", (64, 64))
    others = [Image.new("RGB", (64, 64), (2 * n,) * 3) for n in range(1, 93)]
    still.save(folder / "x.gif", save_all=True, append_images=others, duration=40)
    rows = [{"video": name, "prompt": "a"} for name in ("square.mp4", "x.gif")]
    family = video_family(VIDEO, frames=FrameRule(1, 0))
    for rate, row in zip((29.97, 25.0), (0, 1), strict=True):
        frame = check(folder, rows[row : row + 1], family, frame_rate=rate).frame
        assert frame["video:shown"].to_list() == [None]
    assert frame["video:stride"].to_list() == [1.0]
    assert "video:shown" not in contents_of(check(folder, rows, family))
    assert "video:shown" in contents_of(check(folder, rows, family, frame_rate=12.0))


def test_sound_goes_with_the_picture_that_is_trained(tmp_path: Path) -> None:
    """The larger of two, though the other comes first in the file and later in time."""
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams: list[Any] = []
        for size in (64, 128):
            video: Any = container.add_stream("libx264", rate=RATE, options={"bf": "0"})
            video.width, video.height, video.pix_fmt = size, size, "yuv420p"
            streams.append(video)
        track: Any = container.add_stream("pcm_s16le", rate=48_000, layout="mono")
        heard = av.AudioFrame.from_ndarray(np.full((1, 96_000), 9000, np.int16), "s16", "mono")
        heard.sample_rate, heard.pts, heard.time_base = 48_000, 0, Fraction(1, 48_000)
        container.mux(track.encode(heard))
        for stamp in range(60):
            for video, first in zip(streams, (30, 0), strict=True):
                if stamp >= first:
                    still = av.VideoFrame.from_image(Image.new("RGB", (video.width,) * 2))
                    still.pts, still.time_base = stamp, Fraction(1, RATE)
                    container.mux(video.encode(still))
        for stream in (*streams, track):
            container.mux(stream.encode(None))
    sound = load_sample_audio(path, 48_000, 1, 90_000)
    assert (sound[0, 100:] > 0.1).all()


PEAK = """
import sys
from pathlib import Path
from diffsynth_dagster.data.media.video import load_sample_video, read_frames

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

before = peak()
load_sample_video(Path(sys.argv[1]), (64, 64), 20, 1.0)
read_frames(Path(sys.argv[1]), range(20), most_side=64)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_frames_are_brought_to_their_size_one_by_one(tmp_path: Path) -> None:
    """Twenty frames of an animation take no more than one: thirteen bytes a pixel, most of them
    Pillow's."""
    side = 1500
    stills = [Image.new("P", (side, side), n) for n in range(20)]
    stills[0].save(tmp_path / "x.gif", save_all=True, append_images=stills[1:], duration=100)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "x.gif")]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    taken = subprocess.run(command, check=True, capture_output=True, env=env).stdout
    assert 1024 * int(taken) < 24 * side**2


def test_moments_between_frames() -> None:
    times = [0.0, 0.1, 0.5, 0.9, 1.0]
    assert frames_at(times, 10, 99) == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert frames_at(times, 2, 99) == [0, 2]
    assert frames_at(times, 10, 3) == [0, 1, 1]
