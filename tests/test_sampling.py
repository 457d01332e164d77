"""Samples are those of the published pipelines, with guidance and with given pictures and clips."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_config, train_to_end
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
)
from published_samples import I2V_EXPERTS, PUBLISHED, SCALE, STEPS
from test_families import HUB, TABLE, Place, place, places, whole_row
from test_family_samples import alone, pixels, write_table

from diffsynth_dagster.families.contract import SampleRequest, Tensors
from diffsynth_dagster.families.sampling_types import Solver
from diffsynth_dagster.training.sampling import Sampler
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.models import Models

__all__ = ["place", "places"]

PUBLISHED_SCALES = ("wan22_t2v_both", "wan22_i2v_both")
"""Sampled with the guidance that is published, which differs between the experts."""
NOT_SAMPLED = ("wan22_t2v_high", "wan22_i2v_low")
"""One expert alone, with which samples are refused."""
SHOWN_BY_ANOTHER = (
    # With given pictures, it is one that is made without, and more.
    *("flux", "wan_t2v", "wan_i2v", "sd15", "sdxl", "ltx2_t2av", "ltx2_silent", "ltx2_i2av"),
    *("wan22_ti2v_5b", "sdxl_controlnet"),
    *("qwen_image_edit", "qwen_image_edit_zero_cond_t", "flux_controlnet", "wan22_i2v_both"),
    "sd15_v",  # has a test of its own
)
TOLERANCE = 1e-4
"""Of latents, relative to their spread. Another prompt or input changes more than ten times that."""
DECODERS = (
    AutoencoderKL,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The latents that are decoded, in order: of the picture or clip, then of its sound."""
    seen: list[torch.Tensor] = []

    def noted(kind: Any) -> Any:
        decode = kind.decode

        def run(self: Any, z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(z)
            return decode(self, z, *args, **kwargs)

        return run

    for kind in DECODERS:
        monkeypatch.setattr(kind, "decode", noted(kind))
    return seen


def noted_timesteps(sampler: Sampler) -> list[torch.Tensor]:
    """Where the timesteps of the next samples are put."""
    seen: list[torch.Tensor] = []
    family, sampling = sampler._family, sampler._family.sampling

    def solver(request: SampleRequest, noise: Tensors) -> Solver:
        made = sampling.solver(request, noise)
        seen.append(made.timesteps.float())
        return made

    sampler._family = replace(family, sampling=replace(sampling, solver=solver))
    return seen


def test_every_row_of_the_table_is_compared() -> None:
    assert {case.name for case in TABLE} - {*PUBLISHED} == {*NOT_SAMPLED}


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(
            case, id=case.name, marks=pytest.mark.soak if case.name in SHOWN_BY_ANOTHER else ()
        )
        for case in (*TABLE, I2V_EXPERTS)
        if case.name in PUBLISHED
    ],
    indirect=True,
)
def test_samples_are_those_of_the_published_pipeline(
    place: Place, tmp_path: Path, decoded: list[torch.Tensor]
) -> None:
    """With equal timesteps, and equal latents before they are decoded.

    Three things that diffusers does otherwise are put right in its pipelines: `evenly`,
    `qwen.with_token_types` and `each_with_its_own_residuals` say what and why.
    """
    models = place.case.models(place.model, "diffusers")["model_paths"]
    given = place.values(
        model_paths=[*models, *(str(place.model / name) for name in place.case.decoders)],
        sample_num_inference_steps=STEPS,
        sample_cfg_scale=None if place.case.name in PUBLISHED_SCALES else SCALE,
        task="sft:data_process",
    )
    found = find_model(make_config(given), HUB)
    given["sample_table"] = str(write_table(place, found.family, place.data.parent / "samples"))
    run = train_to_end(given, tmp_path / "run")
    config = make_config({**given, "output_path": str(run)})
    loaded = Models(found, torch.device("cpu"), torch.float32, False, frozenset())
    sampler = Sampler(config, loaded, torch.no_grad)
    timesteps = noted_timesteps(sampler)
    ours = alone(sampler, run, 0).frames
    mine = decoded.copy()
    decoded.clear()
    row = whole_row(place, 0, found)
    with torch.no_grad():
        theirs, published = PUBLISHED[place.case.name](place.model, row, ours[0].size)
    torch.testing.assert_close(timesteps, [published.float()], atol=1e-2, rtol=0.0)
    for a, b in zip(mine, decoded, strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE * float(b.std()), rtol=0.0)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(pixels(a) - pixels(b)).max() <= 1
