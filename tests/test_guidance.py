"""The guidance of samples: what the authors publish, unless a recipe says otherwise."""

from pathlib import Path
from typing import Any

import pytest
from conftest import Values, make_config, train_to_end

from assets.common import KINDS, code_version
from diffsynth_dagster.cache.layout import SAMPLES_FOLDER
from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.config.affects import AFFECTS, values_that_affect
from diffsynth_dagster.data.table.checked_table import read_checked
from diffsynth_dagster.dry_run import make_plan
from diffsynth_dagster.errors import UserError
from diffsynth_dagster.families.sampling_types import Guidance, guidance_of
from diffsynth_dagster.weights.identify import guess_model

T2V, I2V = (f"Wan-AI/Wan2.2-{kind}-A14B" for kind in ("T2V", "I2V"))
SDXL = "stabilityai/stable-diffusion-xl-base-1.0:unet/*.safetensors"


def config_of(*models: str, **more: Any) -> TrainingConfig:
    data = {"dataset_base_path": "d", "dataset_metadata_path": "m.csv"}
    named = {"model_id_with_origin_paths": list(models), "lora_base_model": "dit"}
    return make_config({**data, **named, "sample_prompts": ["a cat"], **more})


def guidance(config: TrainingConfig) -> Guidance:
    return guidance_of(config, guess_model(config).family.sampling)


def experts(repository: str) -> list[str]:
    return [f"{repository}:{noise}_noise_model/*.safetensors" for noise in ("high", "low")]


@pytest.mark.parametrize(
    ("models", "scale", "scales"),
    [
        (["Qwen/Qwen-Image:transformer/*.safetensors"], 4.0, {}),
        (["DiffSynth-Studio/Qwen-Image-Distill-Full:*", "Qwen/Qwen-Image:vae/*"], 1.0, {}),
        (["black-forest-labs/FLUX.1-dev:transformer/*"], 1.0, {}),
        (["Wan-AI/Wan2.1-T2V-14B:*.safetensors"], 5.0, {}),
        (["krea/krea-realtime-video:krea-realtime-video-14b.safetensors"], 1.0, {}),
        (experts(T2V), 5.0, {"dit": 4.0, "dit2": 3.0}),
        (["Lightricks/LTX-2:ltx-2-19b-dev.safetensors"], 3.0, {}),
        (["Lightricks/LTX-2:ltx-2-19b-distilled.safetensors"], 1.0, {}),
        ([SDXL], 5.0, {}),
        (["AI-ModelScope/stable-diffusion-v1-5:unet/*.safetensors"], 7.5, {}),
    ],
)
def test_what_is_left_out_is_what_is_published(
    models: list[str], scale: float, scales: dict[str, float]
) -> None:
    base = "unet" if ":unet/" in models[0] else "dit"
    found = guidance(config_of(*models, lora_base_model=base))
    assert (found.scale, found.scales) == (scale, scales)
    assert found.is_on == (scale > 1)


def test_a_given_scale_holds_for_every_denoiser() -> None:
    of_frames = guidance(config_of(*experts(I2V), extra_inputs="input_image", sample_prompts=[]))
    assert (of_frames.scale, of_frames.scales) == (3.5, {})
    given = guidance(config_of(*experts(T2V), sample_cfg_scale=6.0))
    assert (given.scale, given.scales) == (6.0, {})
    assert given.negative_prompt.startswith("色调艳丽，过曝，静态")
    own = guidance(config_of(*experts(T2V), sample_negative_prompt=""))
    assert (own.negative_prompt, own.is_on) == ("", True)
    assert not guidance(config_of(*experts(T2V), sample_cfg_scale=1.0)).is_on


def test_what_is_distilled_is_sampled_without() -> None:
    config = config_of("Qwen/Qwen-Image:transformer/*.safetensors", task="direct_distill")
    assert not guidance(config).is_on


def test_recipes_of_before_are_what_they_were() -> None:
    """1 was the default. Without samples nothing says anything of guidance; with them it is another."""
    left_out, one = TrainingConfig(), TrainingConfig(sample_cfg_scale=1.0)
    assert values_that_affect(left_out, *AFFECTS) == values_that_affect(one, *AFFECTS)
    assert values_that_affect(one, "latents")["sample_cfg_scale"] == 1.0
    assert "sample_negative_prompt" not in values_that_affect(one, "latents")
    for kind in KINDS:
        assert code_version(left_out, kind) == code_version(one, kind)
    for samples in ({"sample_prompts": ("a",)}, {"customized_evaluation": "a.b"}):
        guided, plain = (config.model_copy(update=samples) for config in (left_out, one))
        assert values_that_affect(guided, "latents")["sample_cfg_scale"] is None
        assert values_that_affect(plain, "latents")["sample_cfg_scale"] == 1.0
        assert code_version(guided, "latents") != code_version(plain, "latents")


def test_pictures_are_guided_where_nothing_is_said(values: Values, tmp_path: Path) -> None:
    given = values(
        sample_prompts=["a picture"],
        sample_num_inference_steps=2,
        height=32,
        width=32,
        save_steps=2,
    )
    pictures: list[bytes] = []
    changes: list[dict[str, Any]] = [{}, {"sample_cfg_scale": 4}, {"sample_cfg_scale": 1}]
    changes.append({"sample_negative_prompt": "picture number x"})
    for number, more in enumerate(changes):
        run = train_to_end({**given, **more}, tmp_path / f"run-{number}")
        pictures.append((run / "samples" / "step-2.png").read_bytes())
        negative = {"": {0, 1}, "picture number x": {3}}
        table = read_checked(run / SAMPLES_FOLDER).rows.collect()
        expected = {"a picture"} | {n for n, where in negative.items() if number in where}
        assert set(table["prompt"]) == expected
    assert pictures[0] == pictures[1]
    assert len(set(pictures)) == 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"sample_cfg_scale": 1}, "samples are made without guidance"),
        ({"sample_prompts": []}, "no samples are made"),
    ],
)
def test_a_negative_prompt_without_guidance_is_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_plan(config_of("Qwen/Qwen-Image:*", **{"sample_negative_prompt": "grey", **more}))


@pytest.mark.parametrize("listed", [experts(T2V)[:1], experts(T2V)[1:], [f"{T2V}:transformer/*"]])
def test_one_expert_alone_makes_no_samples(listed: list[str]) -> None:
    with pytest.raises(UserError, match="A14B alone denoises in its own part") as refused:
        make_plan(config_of(*listed))
    assert "name the files of the other expert" in str(refused.value)
    make_plan(config_of(*listed, sample_prompts=[]))
    make_plan(config_of(*experts(T2V)))


def test_an_expert_with_vace_blocks_has_no_other_beside_it() -> None:
    with pytest.raises(UserError, match="A14B alone denoises in its own part") as refused:
        make_plan(config_of("PAI/Wan2.2-VACE-Fun-A14B:high_noise_model/*"))
    assert "the other expert" not in str(refused.value)


def test_a_distilled_lora_that_is_fused_in_needs_no_guidance() -> None:
    path = "loras/Qwen-Image-Lightning-8steps-V2.0.safetensors"
    config = config_of("Qwen/Qwen-Image:*", preset_lora_path=path)
    assert not guidance(config).is_on
