"""Sound, from audio files and from the tracks of videos, to tensors.

Read and resampled with PyAV, that is FFmpeg. Of a file with several tracks the first is taken.
"""

import wave
from pathlib import Path

import av
import torch
from av.audio.resampler import AudioResampler
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from diffsynth_dagster.data.media.containers import cut_short
from diffsynth_dagster.data.media.decoder_pool import DecoderPool
from diffsynth_dagster.data.media.image import IMAGE_ERRORS, media_problem
from diffsynth_dagster.facts import Facts, digest_file

AUDIO_ERRORS = (*IMAGE_ERRORS, av.FFmpegError)
"""What reading a damaged file raises."""
LAYOUTS = {1: "mono", 2: "stereo"}
"""Channels → what FFmpeg calls them."""


def audio_facts(path: Path, pool: DecoderPool) -> Facts:
    """What a check of the sound of a file finds, all of it decoded.

    Returns:
        `digest`, `channels`, `rate` (samples of each channel per second) and `seconds`, counted as
        `load_sample_audio` reads it; or `status` and `message`.
    """
    try:
        missing = cut_short(path)
        if missing is not None:
            return {"status": "unreadable", "message": f"not readable sound: {missing}"}
        if _has_no_rate(path):
            return {"status": "bad_sample_rate", "message": "the sample rate of the sound is 0"}
        found = pool.decode(path, "audio")
        if "error" in found:
            why = " ".join(str(found["error"]).split())[:300]
            return {"status": "unreadable", "message": f"not readable sound: {why}"}
        if not found["tracks"]:
            return {"status": "no_audio", "message": "the file has no sound"}
        if not found["rate"]:
            return {"status": "bad_sample_rate", "message": "the sample rate of the sound is 0"}
        late = _start(path)
        facts = {"channels": found["channels"], "rate": found["rate"]}
        return {"digest": digest_file(path), **facts, "seconds": found["seconds"] + late}
    except AUDIO_ERRORS as error:
        return media_problem(error, "audio file")


def _has_no_rate(path: Path) -> bool:
    """Whether a WAV file says that its sample rate is 0, which FFmpeg calls invalid data."""
    with path.open("rb") as file:
        if file.read(4) != b"RIFF":
            return False
    try:
        with wave.open(str(path), "rb") as sound:
            return sound.getframerate() == 0
    except (wave.Error, EOFError):
        return False


def load_sample_audio(path: Path, rate: int, channels: int, samples: int) -> torch.Tensor:
    """The first `samples` of the sound of a file, resampled; silence where it ends before.

    Where there is a video beside it, sound that starts later is preceded by silence, and what comes
    earlier is left out.

    Args:
        rate: samples of each channel per second, of the result.
        channels: 1 or 2; the file has as many.

    Returns:
        float32 (channels, samples) in [-1, 1].

    Raises:
        OSError, av.FFmpegError, …: see `AUDIO_ERRORS`.
    """
    resampler = AudioResampler(format="fltp", layout=LAYOUTS[channels], rate=rate)
    pieces: list[torch.Tensor] = []
    late = round(_start(path) * rate)
    with _opened(path) as container:
        for frame in container.decode(container.streams.audio[0]):
            pieces += [torch.from_numpy(f.to_ndarray()) for f in resampler.resample(frame)]
            if sum(piece.shape[1] for piece in pieces) + late >= samples + rate:
                break
        else:
            pieces += [torch.from_numpy(f.to_ndarray()) for f in resampler.resample(None)]
    sound = torch.cat([torch.zeros(channels, max(late, 0)), *pieces], dim=1)[:, max(-late, 0) :]
    sound = torch.nn.functional.pad(sound, (0, max(0, samples - sound.shape[1])))
    return sound[:, :samples].clamp(-1.0, 1.0)


def _opened(path: Path) -> InputContainer:
    # A playlist must not make it ask the network.
    return av.open(str(path), options={"protocol_whitelist": "file"})


def _start(path: Path) -> float:
    """When the sound starts, in seconds after the first frame that `shown` reads of the video that is in
    the file too; 0 where there is none."""
    with _opened(path) as container:
        first = next(container.decode(container.streams.audio[0])).time
    # Opened again: a recording may begin with packets of frames that cannot be decoded, which are
    # not shown.
    with _opened(path) as container:
        video = container.streams.best("video")
        if first is None or not isinstance(video, VideoStream):
            return 0.0
        if video.disposition & Disposition.attached_pic:  # a cover
            return 0.0
        shown = next(container.decode(video), None)
        time = None if shown is None else shown.time
        return first - (0.0 if time is None else float(time))
