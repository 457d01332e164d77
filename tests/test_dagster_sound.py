"""A short training of LTX-2 on real clips with sound, through Dagster."""

import shutil
from pathlib import Path
from typing import Any

import av
import dagster as dg
import numpy as np
import pytest
from dagster_support import executed
from families.ltx2.cases import CASES
from media_support import real_clip

BUNNY, BIKES = "bigbuckbunny.mp4", "bikes.mp4"
RATE = 48000


def stereo_of(clip: Path, target: Path) -> None:
    """The first two channels of a clip's sound."""
    with av.open(str(clip)) as source:
        frames = [frame.to_ndarray() for frame in source.decode(source.streams.audio[0])]
    sound = np.ascontiguousarray(np.concatenate(frames, axis=1)[:2], dtype=np.float32)
    with av.open(str(target), "w") as container:
        stream: Any = container.add_stream("flac", rate=RATE, layout="stereo")
        heard = av.AudioFrame.from_ndarray(sound, "fltp", "stereo")
        heard.sample_rate = RATE
        container.mux(stream.encode(heard))
        container.mux(stream.encode(None))


@pytest.mark.soak
def test_real_clips_with_sound_become_a_lora(tmp_path: Path) -> None:
    """One with its sound and one that is silent; a third whose sound has six channels is told."""
    case, data, model = CASES[0], tmp_path / "data", tmp_path / "model"
    case.write(model)
    data.mkdir()
    for name in (BUNNY, BIKES):
        shutil.copy(real_clip().parent / name, data)
    stereo_of(data / BUNNY, data / "bunny.flac")
    lines = ["video,input_audio,prompt", f"{BUNNY},bunny.flac,a rabbit comes out of its burrow"]
    lines += [f"{BIKES},,people on bicycles", f"{BUNNY},{BUNNY},a rabbit"]
    (data / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    named = case.models(model, "diffusers")
    vocoder = model / "diffusers" / "vocoder" / "diffusion_pytorch_model.safetensors"
    recipe = {
        **named,
        "model_paths": [*named["model_paths"], str(vocoder)],
        "family": case.family,
        **case.parameters,
        "dataset_base_path": str(data),
        "dataset_metadata_path": str(data / "metadata.csv"),
        "max_rejected_fraction": 0.5,
        "lora_base_model": "dit",
        "lora_rank": 4,
        "num_epochs": 2,
        "sample_prompts": ["a rabbit"],
        "sample_num_inference_steps": 2,
        "cache_path": str(tmp_path / "cache"),
        "output_path": str(tmp_path / "run"),
    }
    with executed(tmp_path, "sound", recipe) as instance:
        metadata, training = facts(instance, "metadata"), facts(instance, "checkpoints")
    assert metadata["status/ok"].value == 2
    assert metadata["status/wrong_channels"].value == 1
    assert str(training["steps"].value).startswith("4 in ")
    assert str(training["clips"].value).startswith("![](data:image/webp;base64,")
    clip = Path(str(training["clip/0"].value))
    with av.open(str(clip)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        assert (video.width, video.height, float(video.average_rate or 0)) == (64, 64, 24.0)
        assert sound.channels == 2
    with av.open(str(clip)) as container:
        heard = sum(frame.samples for frame in container.decode(audio=0)) / sound.rate
    assert heard == pytest.approx(9 / 24, abs=0.1)


def facts(instance: dg.DagsterInstance, kind: str) -> dict[str, dg.MetadataValue]:
    event = instance.get_latest_materialization_event(dg.AssetKey(["sound", kind]))
    assert event is not None
    assert event.asset_materialization is not None
    return dict(event.asset_materialization.metadata)
