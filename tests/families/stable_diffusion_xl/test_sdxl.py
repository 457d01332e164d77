"""Stable Diffusion XL: its loss, size facts, published settings, what is refused, LoRAs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_config, record_of, train_to_end, why_refused
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from families.stable_diffusion.cases import ARCHITECTURE as SD_ARCHITECTURE
from families.stable_diffusion.cases import CONTROL, SCHEDULER, rows, rows_with_control
from families.stable_diffusion.cases import UP as SD_UP
from families.stable_diffusion.test_stable_diffusion import (
    pictures_and_prompts,
    require_settings,
)
from families.stable_diffusion.training import (
    HUB,
    losses_of,
    noise_of,
    published_losses,
    require_equal_computations,
    values_of,
)
from families.stable_diffusion_xl.cases import ARCHITECTURE, CASES, SIZES, UP, parts_of, write
from lora_support import by_module
from PIL import Image
from safetensors.torch import load_file

from diffsynth_dagster.export import export_run, verify_export
from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.contract import SampleRequest, Tensors
from diffsynth_dagster.families.shared.kohya import authors_unet_name
from diffsynth_dagster.families.stable_diffusion_xl.family import encode_pixels, encode_sizes
from diffsynth_dagster.formats.kohya import FORMAT as KOHYA
from diffsynth_dagster.formats.names import lora_of
from diffsynth_dagster.training.lora_targets import lora_targets
from diffsynth_dagster.training.sampling import make_clips
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.load import load_component
from diffsynth_dagster.weights.resolved import ResolvedModel

FAMILY = find_family("stable_diffusion_xl")
CASE = CASES[0]
PUBLISHED: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    write(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows(tmp_path_factory.mktemp("data") / "plain")


def published_unet() -> Any:
    with torch.device("meta"):
        return UNet2DConditionModel(**PUBLISHED, up_block_types=UP)


@pytest.mark.parametrize(
    ("kind", "gamma"),
    [
        ("epsilon", None),
        ("v_prediction", 0.01),
        *(pytest.param("epsilon", gamma, marks=pytest.mark.soak) for gamma in (5.0, 0.01)),
        *(pytest.param("v_prediction", gamma, marks=pytest.mark.soak) for gamma in (None, 5.0)),
    ],
)
def test_loss_is_that_of_the_published_training_example(
    model: Path, data: Path, tmp_path: Path, kind: str, gamma: float | None
) -> None:
    values = values_of(CASE, model, data, prediction_type=kind, min_snr_gamma=gamma)
    _, batch, ours = losses_of(values, tmp_path / "run")
    pipeline: Any = StableDiffusionXLPipeline(**parts_of(model / "diffusers"))
    pictures, prompts = pictures_and_prompts(batch.outputs["image"], data, pipeline.vae)
    with torch.no_grad():
        latents = pipeline.vae.encode(pictures).latent_dist.mode() * 0.13025
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    time_ids = torch.tensor([[number for pair in SIZES.values() for number in pair]] * 4)
    assert torch.equal(batch.outputs["time_ids"], time_ids)
    epsilon, timesteps = noise_of(batch, latents.shape)
    theirs = published_losses(
        DDPMScheduler.from_config({**SCHEDULER, "prediction_type": kind}),
        pipeline.unet,
        latents,
        epsilon,
        timesteps,
        gamma,
        encoder_hidden_states=embeds,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
    )
    assert float((ours - theirs).abs().max()) <= 1e-5


def test_size_facts_are_integers_that_no_type_rounds() -> None:
    (encoded,) = encode_sizes({}, [{"image_sizes": (1365, 2049, 0, 341, 1024, 1024)}])
    assert encoded["time_ids"].tolist() == [1365, 2049, 0, 341, 1024, 1024]
    assert not encoded["time_ids"].is_floating_point()


def test_the_vae_is_not_run_in_float16_where_it_overflows() -> None:
    """Whatever is computed in around it."""
    pixels = torch.randn(1, 3, 16, 16)
    for asks in (True, False):
        vae = AutoencoderKL(force_upcast=asks, shift_factor=0.0, norm_num_groups=4).half()
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            under = encode_pixels(vae, pixels)
        assert vae.dtype == (torch.float32 if asks else torch.float16)
        alone = encode_pixels(vae.float(), pixels)
        assert torch.equal(under, alone) == asks


def test_shapes_alone_give_the_published_settings() -> None:
    require_settings(FAMILY.component("unet"), published_unet())
    with torch.device("meta"):
        net = ControlNetModel(**PUBLISHED)
    require_settings(FAMILY.component("controlnet"), net)


def test_the_guides_targets_reach_its_722_layers() -> None:
    base = {"dataset_base_path": "d", "dataset_metadata_path": "m.csv", "model_paths": ["x"]}
    config = make_config({**base, "lora_base_model": "unet", "lora_target_modules": list(TARGETS)})
    assert len(lora_targets(config, FAMILY, published_unet(), "unet")) == 722


def test_kohya_names_are_those_of_the_unets_authors() -> None:
    """By diffusers' own converter of whole checkpoints."""
    weights = {n: p for n, p in published_unet().named_parameters() if n.endswith(".weight")}
    layers = {n.removesuffix(".weight"): p for n, p in weights.items() if "norm" not in n}
    named = {f"model.diffusion_model.{authors_unet_name(n)}.weight": p for n, p in layers.items()}
    config = {"layers_per_block": 2, "addition_embed_type": "text_time"}
    named |= {n.replace(".weight", ".bias"): p for n, p in named.items()}
    converted = convert_ldm_unet_checkpoint(named, config)
    for layer, parameter in layers.items():
        assert converted[f"{layer}.weight"] is parameter
    lora = lora_of(
        {f"{n}.lora_{half}.weight": torch.ones(1, 1) for n in layers for half in "AB"}, 2.0
    )
    rules = {"unet": FAMILY.lora_rules("unet")}
    opened = KOHYA.write({"unet": lora}, rules).tensors
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight"
    assert name in opened
    assert KOHYA.read(opened, rules)["unet"].down.keys() == lora.down.keys()
    others = {"unet": find_family("stable_diffusion").lora_rules("unet")}
    as_diffusers = KOHYA.write({"unet": lora}, others).tensors
    assert KOHYA.read(as_diffusers, rules)["unet"].down.keys() == lora.down.keys()


def test_a_whole_checkpoint_computes_the_same(model: Path, data: Path) -> None:
    require_equal_computations(CASE, model, data)


def test_families_are_told_by_the_files(model: Path, data: Path) -> None:
    for layout in ("diffusers", "original"):
        values = {**values_of(CASE, model, data), **CASE.models(model, layout)}
        found = find_model(make_config({**values, "family": None}), HUB)
        assert found.family.name == "stable_diffusion_xl"
        assert found.components.keys() == {"unet", "text_encoder", "text_encoder_2", "vae"}


def test_a_vae_of_its_own_takes_the_place_of_the_one_inside(model: Path, data: Path) -> None:
    """In a repository of its own, beside no name that tells it."""
    values = {**values_of(CASE, model, data), **CASE.models(model, "original")}
    other = model / "sdxl-vae-fp16-fix" / "diffusion_pytorch_model.safetensors"
    other.parent.mkdir()
    other.write_bytes((model / "diffusers" / "vae" / other.name).read_bytes())
    values["model_paths"] = [*values["model_paths"], str(other)]
    found = find_model(make_config(values), HUB)
    assert found.components["vae"].files == (other,)


def save_unet(folder: Path, **settings: Any) -> str:
    given = {**ARCHITECTURE, "up_block_types": UP, **settings}
    UNet2DConditionModel(**given).save_pretrained(folder)
    return str(folder / "diffusion_pytorch_model.safetensors")


def save_sd_controlnet(folder: Path) -> str:
    ControlNetModel(**SD_ARCHITECTURE).save_pretrained(folder)
    return str(folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cross_attention_dim": 1280}, "the UNet is that of the refiner"),
        ({"in_channels": 9}, "reads more than the noisy latents"),
        (None, "the file is no component of stable_diffusion_xl"),
    ],
    ids=["refiner", "inpainting", "SD 1.5"],
)
def test_other_models_are_refused(
    model: Path,
    data: Path,
    tmp_path: Path,
    settings: dict[str, Any] | None,
    words: str,
) -> None:
    if settings is None:
        UNet2DConditionModel(**SD_ARCHITECTURE, up_block_types=SD_UP).save_pretrained(tmp_path)
        path = str(tmp_path / "diffusion_pytorch_model.safetensors")
    else:
        path = save_unet(tmp_path / "other", **settings)
    values = values_of(CASE, model, data)
    values["model_paths"] = [path, *values["model_paths"][1:]]
    error = why_refused(values, tmp_path / "run")
    assert words in error
    assert "Traceback" not in error


def test_a_controlnet_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    values = values_of(CASE, model, rows_with_control(tmp_path / "data"), **CONTROL)
    values["model_paths"] = [*values["model_paths"], save_sd_controlnet(tmp_path / "other")]
    assert "the ControlNet is not one for Stable Diffusion XL" in why_refused(
        values, tmp_path / "run"
    )


def test_loras_of_all_modules_are_one_file_that_the_pipeline_loads(
    model: Path, data: Path, tmp_path: Path
) -> None:
    modules = ("unet", "text_encoder", "text_encoder_2")
    values = values_of(CASE, model, data, lora_base_model=",".join(modules), num_epochs=4)
    values["learning_rate"] = 1e-2
    run = train_to_end(values, tmp_path / "run")
    config = make_config({**values, "output_path": str(run)})
    found = find_model(config, HUB)
    record = record_of(run)
    file = run / "epoch-3.safetensors"
    trained = {name: by_module(file, CASE.family, name) for name in modules}
    read: dict[str, Tensors] = {}
    for exported in export_run(config, record, found):
        verify_export(exported, found)
        assert exported.components == modules
        pipeline: Any = StableDiffusionXLPipeline(**parts_of(model / "diffusers"))
        pipeline.load_lora_weights(exported.path)
        for name in modules:
            loaded = {n: p for n, p in getattr(pipeline, name).named_parameters() if ".lora_" in n}
            assert len(loaded) == len(trained[name]) > 0
            for layer, tensor in loaded.items():
                given = trained[name][layer.replace(".default_0.", ".")]
                assert torch.equal(given, tensor)
                # Of the first encoder the last layer is not used.
                assert given.any() or layer.startswith("encoder.layers.1.")
        read[exported.format] = load_file(exported.path)
    kohya = {n.split("_", 2)[1] for n in read["kohya"]}
    assert kohya == {"unet", "te1", "te2"}


def request(found: ResolvedModel, conditions: Tensors, scale: float) -> SampleRequest:
    return SampleRequest(
        conditions=conditions,
        negative=conditions if scale > 1 else None,
        height=64,
        width=96,
        num_frames=1,
        frame_rate=None,
        num_inference_steps=2,
        cfg_scale=scale,
        generators=[torch.Generator().manual_seed(0)],
        noising=found.noising,
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_samples_are_those_of_the_published_pipeline(
    model: Path, data: Path, prediction: str
) -> None:
    """Which gives zeros for the empty prompt, and the size facts of what is made."""
    values = values_of(CASE, model, data, prediction_type=prediction)
    found = find_model(make_config(values), HUB)
    loaded: dict[str, Any] = {
        n: load_component(f, "cpu", torch.float32) for n, f in found.components.items()
    }
    for tokenizer in FAMILY.tokenizers:
        loaded[tokenizer.name] = tokenizer.load(str(found.tokenizers[tokenizer.name]))
    conditions: Tensors = {}
    with torch.no_grad():
        for stage in (s for s in FAMILY.stages if all(i.kind == "text" for i in s.reads)):
            (outputs,) = stage.run(loaded, [{"prompt": "a cat"}])
            conditions |= {name: tensor[None] for name, tensor in outputs.items()}
        conditions["time_ids"] = torch.tensor([[64, 96, 0, 0, 64, 96]])
        for scale, negative in ((1.0, None), (3.0, None), (3.0, "a cat")):
            asked = request(found, conditions, scale)
            # A negative prompt that is given is encoded: here it is the prompt itself.
            asked = replace(asked, negative_prompt=negative or "")
            (clip,) = make_clips(FAMILY, loaded, asked)
            pipeline: Any = StableDiffusionXLPipeline(**parts_of(model / "diffusers"))
            pipeline.scheduler = EulerDiscreteScheduler.from_config(
                SCHEDULER, prediction_type=prediction, timestep_spacing="leading"
            )
            (wanted,) = pipeline(
                "a cat",
                negative_prompt=negative,
                height=64,
                width=96,
                num_inference_steps=2,
                guidance_scale=scale,
                generator=torch.Generator().manual_seed(0),
            ).images
            assert isinstance(clip.frames[0], Image.Image)
            assert clip.frames[0].size == (96, 64)
            difference = np.asarray(clip.frames[0], dtype=int) - np.asarray(wanted, dtype=int)
            assert np.abs(difference).max() <= 1
