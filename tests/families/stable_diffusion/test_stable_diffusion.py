"""Stable Diffusion 1.5: its loss, published settings, what is refused, LoRAs of other tools."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_config, train_to_end
from diffusers import (
    ControlNetModel,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from families.stable_diffusion.cases import (
    CASES,
    SCHEDULER,
    V_SCHEDULER,
    parts_of,
    rows,
    write,
    write_v,
)
from families.stable_diffusion.training import (
    HUB,
    losses_of,
    noise_of,
    published_losses,
    require_equal_computations,
    values_of,
)
from hub_server import serve_hub
from PIL import Image
from safetensors.torch import load_file, save_file

from diffsynth_dagster.dry_run import make_plan
from diffsynth_dagster.errors import UserError
from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.contract import Component, Shapes, Tensors
from diffsynth_dagster.formats.kohya import FORMAT as KOHYA
from diffsynth_dagster.formats.names import lora_of
from diffsynth_dagster.objective.ddpm import DDPMPath
from diffsynth_dagster.objective.noise import generator
from diffsynth_dagster.training.lora_targets import lora_targets
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.load import load_component
from diffsynth_dagster.weights.lora import read_lora

FAMILY = find_family("stable_diffusion")
CASE = CASES[0]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd15")
    write(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows(tmp_path_factory.mktemp("data") / "plain")


@pytest.mark.parametrize("gamma", [None, 5.0, 0.01])
@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        (SCHEDULER, {}),
        ({**SCHEDULER, "prediction_type": "v_prediction"}, {"prediction_type": "v_prediction"}),
        (V_SCHEDULER, {"prediction_type": "v_prediction", "zero_terminal_snr": True}),
    ],
    ids=["epsilon", "v", "v with zero terminal SNR"],
)
def test_loss_is_that_of_the_published_training_example(
    model: Path,
    data: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    parameters: dict[str, Any],
    gamma: float | None,
) -> None:
    values = values_of(CASE, model, data, **parameters, min_snr_gamma=gamma)
    _, batch, ours = losses_of(values, tmp_path / "run")
    pipeline: Any = StableDiffusionPipeline(**parts_of(model / "diffusers"))
    pictures, prompts = pictures_and_prompts(batch.outputs["image"], data, pipeline.vae)
    with torch.no_grad():
        latents = pipeline.vae.encode(pictures).latent_dist.mode() * 0.18215
        embeds, _ = pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
    epsilon, timesteps = noise_of(batch, latents.shape)
    scheduler = DDPMScheduler.from_config(settings)
    theirs = published_losses(
        scheduler, pipeline.unet, latents, epsilon, timesteps, gamma, encoder_hidden_states=embeds
    )
    assert len(set(timesteps.tolist())) == 4
    assert float((ours - theirs).abs().max()) <= 1e-5


def pictures_and_prompts(
    latents: torch.Tensor, data: Path, vae: Any
) -> tuple[torch.Tensor, list[str]]:
    """The rows in the order of a batch of latents, and their pictures (4, 3, 64, 64)."""
    lines = [line.split(",", 1) for line in data.read_text().splitlines()[1:]]
    read: list[torch.Tensor] = []
    for name, _ in lines:
        image = Image.open(data.parent / name).resize((80, 64), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image.crop((8, 0, 72, 64)), dtype=np.float32))
        read.append(pixels.permute(2, 0, 1) / 127.5 - 1)
    pictures = torch.stack(read)
    with torch.no_grad():
        known = vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor
    order = [int((known - own).abs().flatten(1).sum(1).argmin()) for own in latents]
    assert sorted(order) == [0, 1, 2, 3]
    return pictures[order], [lines[i][1].strip('"') for i in order]


def shapes_of(module: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def require_settings(component: Component, module: Any) -> None:
    """Fail unless the shapes alone give the settings of a published model."""
    settings = component.construction.settings(shapes_of(module))
    numbers = {"attention_head_dim", "transformer_layers_per_block"}
    for name, value in settings.items():
        wanted = module.config[name]
        if name in numbers and isinstance(wanted, int) and isinstance(value, tuple):
            assert set(value) == {wanted}
        else:
            assert (list(value) if isinstance(value, tuple) else value) == (
                list(wanted) if isinstance(wanted, list | tuple) else wanted
            ), name


def test_shapes_alone_give_the_published_settings() -> None:
    with torch.device("meta"):
        require_settings(FAMILY.component("unet"), UNet2DConditionModel(cross_attention_dim=768))
        require_settings(FAMILY.component("controlnet"), ControlNetModel(cross_attention_dim=768))


def test_a_whole_checkpoint_computes_the_same(model: Path, data: Path) -> None:
    require_equal_computations(CASE, model, data)


def test_families_are_told_by_the_files(model: Path, data: Path) -> None:
    for layout in ("diffusers", "original"):
        values = {**values_of(CASE, model, data), **CASE.models(model, layout)}
        found = find_model(make_config({**values, "family": None}), HUB)
        assert found.family.name == "stable_diffusion"
        assert found.components.keys() == {"unet", "text_encoder", "vae"}


def test_a_whole_checkpoint_says_what_it_predicts(data: Path, tmp_path: Path) -> None:
    write_v(tmp_path)
    case = CASES[1]
    for layout in ("diffusers", "original"):
        values = {**values_of(case, tmp_path, data), **case.models(tmp_path, layout)}
        path = find_model(make_config(values), HUB).noising
        assert isinstance(path, DDPMPath)
        assert path.prediction == "v_prediction"
        assert path.zero_terminal_snr


@pytest.mark.parametrize(
    "entries",
    [
        ("unet/", "text_encoder/", "vae/"),
        ("unet/*.safetensors", "text_encoder/*.safetensors", "vae/*.safetensors"),
        ("sd.safetensors",),
    ],
    ids=["folders", "files", "whole checkpoint"],
)
def test_the_scheduler_is_downloaded_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: tuple[str, ...]
) -> None:
    """Whatever names the files of a model: it says what the model predicts."""
    write_v(tmp_path)
    repository = tmp_path / "hub" / "author" / "model"
    shutil.copytree(tmp_path / "diffusers", repository)
    whole = load_file(tmp_path / "original" / "sd.safetensors")
    unmarked = {name: t for name, t in whole.items() if name not in ("v_pred", "ztsnr")}
    save_file(unmarked, repository / "sd.safetensors")
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "downloads"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    config = make_config(
        {
            "family": "stable_diffusion",
            "dataset_base_path": "d",
            "dataset_metadata_path": "m.csv",
            "lora_base_model": "unet",
            "model_id_with_origin_paths": [f"author/model:{entry}" for entry in entries],
            "tokenizer_path": str(tmp_path / "diffusers" / "tokenizer"),
        }
    )
    with serve_hub(tmp_path / "hub") as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        path = find_model(config, ModelHub.from_environment()).noising
    assert isinstance(path, DDPMPath)
    assert (path.prediction, path.zero_terminal_snr) == ("v_prediction", True)
    assert (
        "unless the scheduler published with the model says otherwise"
        in make_plan(config)["objective"]
    )


def test_a_checkpoint_with_other_noise_is_refused(data: Path, tmp_path: Path) -> None:
    """CosXL and Playground 2.5 say by a tensor that their noise is not that of a schedule of betas."""
    write(tmp_path)
    values = {**values_of(CASE, tmp_path, data), **CASE.models(tmp_path, "original")}
    (path,) = values["model_paths"]
    whole = load_file(path)
    for mark in ("edm_vpred.sigma_max", "edm_mean"):
        save_file({**whole, mark: torch.ones(1)}, path)
        with pytest.raises(UserError, match="the model's scheduler is not supported"):
            find_model(make_config(values), HUB)


def test_the_old_names_of_the_vae_are_read(model: Path, data: Path, tmp_path: Path) -> None:
    """Those of the published file, from before diffusers 0.17."""
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    values = values_of(CASE, model, data)
    state = load_file(values["model_paths"][2])
    old = dict(state)
    for name in state:
        for ours, theirs in new.items():
            if f"attentions.0.{ours}." in name:
                old[name.replace(ours, theirs)] = old.pop(name)
    assert old.keys() != state.keys()
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(old, path)
    values["model_paths"] = [*values["model_paths"][:2], str(path)]
    vae = load_component(
        find_model(make_config(values), HUB).components["vae"], "cpu", torch.float32
    )
    own = vae.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], state[name]) for name in own)


def test_kohya_names_there_and_back() -> None:
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(cross_attention_dim=768)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj"]
    targets += ["ff.net.2", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "linear_1"]
    targets += ["conv", "conv_in", "conv_out"]
    base = {"dataset_base_path": "d", "dataset_metadata_path": "m.csv", "model_paths": ["x"]}
    config = make_config({**base, "lora_base_model": "unet", "lora_target_modules": targets})
    layers = lora_targets(config, FAMILY, unet, "unet")
    lora = lora_of(
        {f"{n}.lora_{half}.weight": torch.ones(1, 1) for n in layers for half in "AB"}, 2.0
    )
    rules = {"unet": FAMILY.lora_rules("unet")}
    opened = KOHYA.write({"unet": lora}, rules).tensors
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert f"{name}.lora_down.weight" in opened
    assert float(opened[f"{name}.alpha"]) == 2.0
    assert KOHYA.read(opened, rules)["unet"].down.keys() == lora.down.keys()


UNET_LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
TEXT_LAYER = "encoder.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("starts", "ends"),
    [
        (
            [f"lora_unet_{UNET_LAYER}", f"lora_te_text_model_{TEXT_LAYER}"],
            ("lora_down.weight", "lora_up.weight"),
        ),
        (
            [f"unet.{UNET_LAYER}", f"text_encoder.{TEXT_LAYER}"],
            ("lora_A.weight", "lora_B.weight"),
        ),
        (
            [UNET_LAYER, f"pipe.text_encoder.{TEXT_LAYER}"],
            ("lora_A.weight", "lora_B.weight"),
        ),
    ],
    ids=["kohya", "diffusers", "a checkpoint"],
)
def test_a_file_of_several_modules_is_read_by_each(
    tmp_path: Path, starts: list[str], ends: tuple[str, str]
) -> None:
    tensors: Tensors = {}
    for start in starts:
        name = start.replace(".", "_") if start.startswith("lora_") else start
        tensors[f"{name}.{ends[0]}"] = torch.ones(2, 4)
        tensors[f"{name}.{ends[1]}"] = torch.ones(4, 2)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    lora = read_lora(path, FAMILY, "unet", "the test")
    assert lora.down.keys() == {UNET_LAYER}
    assert lora.scale == {UNET_LAYER: 0.5}
    if starts[0] != UNET_LAYER:
        assert read_lora(path, FAMILY, "text_encoder", "the test").down.keys() == {TEXT_LAYER}


def test_samples_are_made_while_it_trains(model: Path, data: Path, tmp_path: Path) -> None:
    values = values_of(
        CASE,
        model,
        data,
        lora_base_model="unet,text_encoder",
        sample_prompts=["a", "b"],
        sample_num_inference_steps=2,
        sample_cfg_scale=3.0,
    )
    run = train_to_end(values, tmp_path / "run")
    pictures = sorted((run / "samples").rglob("*.png"))
    assert pictures
    assert all(Image.open(path).size[1] == 64 for path in pictures)


def test_samples_are_those_of_the_published_pipeline(data: Path, tmp_path: Path) -> None:
    """By the sampler of what the model predicts, which its scheduler's file says."""
    write_v(tmp_path)
    values = values_of(CASES[1], tmp_path, data)
    values |= {"sample_prompts": ["a cat"], "sample_num_inference_steps": 3}
    run = train_to_end({**values, "seed": 3}, tmp_path / "run")
    made = run / "samples" / "step-0.png"
    pipeline = StableDiffusionPipeline(**parts_of(tmp_path / "diffusers"))
    pipeline.scheduler = EulerDiscreteScheduler.from_config(
        V_SCHEDULER, timestep_spacing="trailing"
    )
    first = generator(3, "image", 0)
    call = {"num_inference_steps": 3, "guidance_scale": 7.5, "generator": first}
    (wanted,) = pipeline("a cat", height=64, width=64, **call).images
    difference = np.asarray(Image.open(made), dtype=int) - np.asarray(wanted, dtype=int)
    assert np.abs(difference).max() <= 1
