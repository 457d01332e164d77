"""Samples are those of the published pipelines, with guidance and with given frames."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_config, train_to_end
from diffusers import (
    FluxPipeline,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    QwenImagePipeline,
    WanImageToVideoPipeline,
    WanPipeline,
)
from families.flux import cases as flux
from families.ltx2 import cases as ltx2
from families.qwen_image import cases as qwen
from families.wanvideo import cases as wan
from families.wanvideo.vision import AuthorsProcessor
from PIL import Image
from test_families import HUB, TABLE, Place, place, places
from test_family_samples import alone, pixels, write_table
from transformers import CLIPVisionModel

from diffsynth_dagster.families import find_family
from diffsynth_dagster.objective.noise import generator
from diffsynth_dagster.training.sampling import Sampler
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.models import Models

__all__ = ["place", "places"]

STEPS, SCALE = 3, 2.0
Published = Callable[[Path, Mapping[str, Any]], list[Image.Image]]
"""(Folder of the model, first row) → the frames that diffusers' pipeline makes of it."""


def common(row: Mapping[str, Any]) -> dict[str, Any]:
    first = generator(0, "image", 0)
    return {"prompt": row["prompt"], "num_inference_steps": STEPS, "generator": first}


def of_qwen(folder: Path, row: Mapping[str, Any]) -> list[Image.Image]:
    pipeline: Any = QwenImagePipeline(**qwen.parts(folder))
    qwen.count_template(pipeline)
    size = {"height": 32, "width": 32}
    guided = {"negative_prompt": "", "true_cfg_scale": SCALE}
    return pipeline(**common(row), **size, **guided).images


def of_flux(folder: Path, row: Mapping[str, Any]) -> list[Image.Image]:
    pipeline: Any = FluxPipeline(**flux.parts_of(folder / "diffusers"))
    size = {"height": 32, "width": 32}
    guided = {"negative_prompt": "", "true_cfg_scale": SCALE, "guidance_scale": 3.5}
    return pipeline(**common(row), **size, **guided).images


def evenly(pipeline: Any) -> None:
    """The sigmas of Wan's authors, as in `wan.sampled`."""
    choose = pipeline.scheduler.set_timesteps

    def chosen(steps: int, device: Any = None) -> None:
        choose(sigmas=np.linspace(1.0, 1 / steps, steps), device=device)

    pipeline.scheduler.set_timesteps = chosen


def of_wan(
    folder: Path, row: Mapping[str, Any], transformer: str, vae: str = "vae", side: int = 32
) -> list[Image.Image]:
    own = folder / "diffusers"
    parts, given, kind = wan.parts(own, transformer, vae), {}, WanPipeline
    if transformer != "transformer":
        kind, given = WanImageToVideoPipeline, wan.first_frame(row, side)
        parts["expand_timesteps"] = vae == "vae_wide"
        if vae == "vae":
            encoder = CLIPVisionModel.from_pretrained(own / "image_encoder")
            parts |= {"image_encoder": encoder, "image_processor": AuthorsProcessor()}
    pipeline: Any = kind(**parts)
    evenly(pipeline)
    size = {"height": side, "width": side, "num_frames": wan.FRAMES, "output_type": "pil"}
    negative = find_family("wanvideo").sampling.negative_prompt
    call = {"negative_prompt": negative, "guidance_scale": SCALE, **size, **given}
    return pipeline(**common(row), **call).frames[0]


def of_ltx(folder: Path, row: Mapping[str, Any], kind: Any) -> list[Image.Image]:
    pipeline = ltx2.pipeline_of(folder, kind)
    given = {}
    if kind is LTX2ImageToVideoPipeline:
        # The pipeline compresses it with its default, 33, as `first_frame_crf` of the case does.
        given = {"image": wan._pictures(row["video"], ltx2.SIDE, ltx2.FRAMES)[0]}
    return pipeline(
        **common(row),
        **given,
        negative_prompt=find_family("ltx2").sampling.negative_prompt,
        height=ltx2.SIDE,
        width=ltx2.SIDE,
        num_frames=ltx2.FRAMES,
        frame_rate=24.0,
        guidance_scale=SCALE,
        audio_guidance_scale=SCALE,
        **ltx2.PLAIN_GUIDANCE,
        output_type="pil",
    ).frames[0]


PUBLISHED: dict[str, Published] = {
    "qwen_image": of_qwen,
    "flux": of_flux,
    "wan_t2v": lambda folder, row: of_wan(folder, row, "transformer"),
    "wan_i2v": lambda folder, row: of_wan(folder, row, "transformer_i2v"),
    "wan22_ti2v_5b": lambda f, row: of_wan(f, row, "transformer_ti2v", "vae_wide", 64),
    "ltx2_t2av": lambda folder, row: of_ltx(folder, row, LTX2Pipeline),
    "ltx2_i2av": lambda folder, row: of_ltx(folder, row, LTX2ImageToVideoPipeline),
}


@pytest.mark.parametrize(
    "place",
    [
        # With a given frame, it is one that is made without, and more.
        pytest.param(case, marks=pytest.mark.soak if case.name == "ltx2_t2av" else ())
        for case in TABLE
        if case.name in PUBLISHED
    ],
    ids=lambda c: c.name,
    indirect=True,
)
def test_samples_are_those_of_the_published_pipeline(place: Place, tmp_path: Path) -> None:
    models = place.case.models(place.model, "diffusers")["model_paths"]
    given = place.values(
        model_paths=[*models, *(str(place.model / name) for name in place.case.decoders)],
        sample_num_inference_steps=STEPS,
        sample_cfg_scale=SCALE,
        task="sft:data_process",
    )
    found = find_model(make_config(given), HUB)
    given["sample_table"] = str(write_table(place, found.family, place.data.parent / "samples"))
    run = train_to_end(given, tmp_path / "run")
    config = make_config({**given, "output_path": str(run)})
    loaded = Models(found, torch.device("cpu"), torch.float32, False, frozenset())
    ours = alone(Sampler(config, loaded, torch.no_grad), run, 0)
    row = dict(place.rows[0])
    for item in found.family.file_inputs:
        row[item.column] = str(place.data.parent / row[item.column])
    with torch.no_grad():
        theirs = PUBLISHED[place.case.name](place.model, row)
    assert len(ours.frames) == len(theirs)
    for a, b in zip(ours.frames, theirs, strict=True):
        assert np.abs(pixels(a) - pixels(b)).max() <= 1
