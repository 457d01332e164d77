"""Read sound from audio files and from the tracks of videos into tensors.

PyAV (FFmpeg) decodes and resamples it. The first audio track of a file is used.
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
"""The exceptions that reading a damaged file can raise."""
LAYOUTS = {1: "mono", 2: "stereo"}
"""Number of channels → FFmpeg's name of the layout."""


def audio_facts(path: Path, pool: DecoderPool) -> Facts:
    """Check the sound of a file by decoding all of it.

    Returns:
        `digest`, `channels`, `rate` (samples per second of each channel) and `seconds`, which
        includes the offset that `load_sample_audio` applies; or `status` and `message`.
    """
    try:
        missing = cut_short(path)
        if missing is not None:
            return {"status": "unreadable", "message": f"not readable sound: {missing}"}
        # Checked before decoding, since FFmpeg only says that the data is invalid.
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
    """Whether a WAV file has the sample rate 0 in its header."""
    with path.open("rb") as file:
        if file.read(4) != b"RIFF":
            return False
    try:
        with wave.open(str(path), "rb") as sound:
            return sound.getframerate() == 0
    except (wave.Error, EOFError):
        return False


def load_sample_audio(path: Path, rate: int, channels: int, samples: int) -> torch.Tensor:
    """The first `samples` of the sound of a file, resampled, and padded with silence at the end.

    If the file also has a video, the sound is aligned with its first frame: sound that starts later
    is preceded by silence, and sound before the first frame is cut off.

    Args:
        rate: samples per second of each channel in the result.
        channels: 1 or 2, as many as the file has.

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
            # One second more than needed, and the rest of a long file stays undecoded.
            if sum(piece.shape[1] for piece in pieces) + late >= samples + rate:
                break
        else:
            # `resample(None)` returns what the resampler still holds back.
            pieces += [torch.from_numpy(f.to_ndarray()) for f in resampler.resample(None)]
    # A positive `late` puts silence before the sound, a negative one cuts its beginning off.
    sound = torch.cat([torch.zeros(channels, max(late, 0)), *pieces], dim=1)[:, max(-late, 0) :]
    sound = torch.nn.functional.pad(sound, (0, max(0, samples - sound.shape[1])))
    return sound[:, :samples].clamp(-1.0, 1.0)


def _opened(path: Path) -> InputContainer:
    # A playlist could name addresses in the network; FFmpeg must not open those.
    return av.open(str(path), options={"protocol_whitelist": "file"})


def _start(path: Path) -> float:
    """When the sound starts, in seconds after the first decodable frame of the video in the same
    file. It is negative if the sound starts earlier, and 0 if there is no video."""
    with _opened(path) as container:
        first = next(container.decode(container.streams.audio[0])).time
    # Decode the video instead of reading its start time: a recording may begin with packets that
    # cannot be decoded. The file is opened again to read the video from its beginning.
    with _opened(path) as container:
        video = container.streams.best("video")
        if first is None or not isinstance(video, VideoStream):
            return 0.0
        if video.disposition & Disposition.attached_pic:  # an album cover is not a video
            return 0.0
        shown = next(container.decode(video), None)
        time = None if shown is None else shown.time
        return first - (0.0 if time is None else float(time))
