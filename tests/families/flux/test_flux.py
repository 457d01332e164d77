"""FLUX.1: names of other tools, LoRAs as a start, several modules at once, and what is refused."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from conftest import make_config, samples_of, train, train_to_end
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from families.flux.cases import ARCHITECTURE, write
from families.flux.training import HUB, Values, exports, make_values
from PIL import Image
from process_support import in_processes
from safetensors.torch import load_file, save_file

from diffsynth_dagster.cache.manifest import read_manifest
from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.errors import UserError
from diffsynth_dagster.export import verify_export
from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.families.flux.family import FAMILY, SCHEDULER, noising
from diffsynth_dagster.training.batches import StepDataset
from diffsynth_dagster.training.step import TrainingStep
from diffsynth_dagster.weights.header import read_metadata
from diffsynth_dagster.weights.identify import find_model, guess_model
from diffsynth_dagster.weights.lora import fuse_lora, read_lora


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    write(folder)
    return folder


@pytest.fixture(scope="session")
def values(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Values:
    return make_values(model, tmp_path_factory.mktemp("data"))


def first_loss(values: dict[str, Any], folder: Path) -> float:
    run = train_to_end(values, folder)
    return float(pl.read_csv(run / "metrics.csv")["loss"][0])


def test_schedule_is_the_shifted_one() -> None:
    sigmas = torch.linspace(1.0, 0.003 / 1.002, 1000, dtype=torch.float64)
    flow = noising(TrainingConfig(), {})
    torch.testing.assert_close(flow.sigmas, (3 * sigmas / (1 + 2 * sigmas)).float())
    torch.testing.assert_close(flow.timesteps, flow.sigmas * 1000)


def test_inference_sigmas_are_those_of_the_pipeline(model: Path) -> None:
    pipeline: Any = FluxPipeline(
        FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER),
        None,
        None,
        None,
        None,
        None,
        FluxTransformer2DModel.from_pretrained(model / "diffusers" / "transformer"),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        prompt_embeds=torch.zeros(1, 2, 64),
        pooled_prompt_embeds=torch.zeros(1, 64),
        height=64,
        width=96,
        num_inference_steps=3,
        output_type="latent",
    )
    assert FAMILY.inference_sigmas is not None
    ours = FAMILY.inference_sigmas(3, {"image": torch.zeros(1, 4, 8, 12)})
    torch.testing.assert_close(ours, pipeline.scheduler.sigmas)


@pytest.fixture(scope="session")
def lora(values: Values, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A run that trained a LoRA of all usual layers, and its files by format."""
    given = values(num_epochs=5, lora_alpha=2.0)
    run = train_to_end(given, tmp_path_factory.mktemp("lora") / "run")
    # diffusers reads the single blocks of this format at the published width only, and a training
    # that asks for what cannot be loaded is refused.
    files = {
        item.format: item.path
        for item in exports({**given, "align_to_opensource_format": True}, run)
    }
    return run, {"checkpoint": run / "epoch-4.safetensors", **files}


def loss_in_the_pipeline(values: dict[str, Any], run: Path, lora: Path, model: Path) -> float:
    """The first step's loss with the LoRA loaded by diffusers."""
    config = make_config({**values, "output_path": str(run)})
    found = find_model(config, HUB)
    dit: Any = FluxTransformer2DModel.from_pretrained(model / "diffusers" / "transformer")
    make: Any = FluxPipeline
    pipeline = make(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, dit)
    pipeline.load_lora_weights(lora)
    step = TrainingStep(found, {"dit": dit}, {}, config)
    (batch,) = StepDataset(config, found, samples_of(run), 0, 1)[0]
    with torch.no_grad():
        return float(step(batch).mean())


def test_every_exported_format_is_a_start(
    values: Values, lora: tuple[Path, dict[str, Path]], model: Path, tmp_path: Path
) -> None:
    """At step 0 the loss is that of the trained model; and the same when it is fused."""
    run, files = lora
    assert files.keys() == {"checkpoint", "diffusers", "kohya"}
    wanted = loss_in_the_pipeline(values(), run, files["diffusers"], model)
    for name, file in files.items():
        start = values(lora_checkpoint=str(file), lora_alpha=2.0)
        assert first_loss(start, tmp_path / name) == pytest.approx(wanted, rel=1e-5)
    fused = values(preset_lora_path=str(files["kohya"]), preset_lora_model="dit")
    assert first_loss(fused, tmp_path / "fused") == pytest.approx(wanted, rel=1e-5)
    assert first_loss(values(), tmp_path / "none") != pytest.approx(wanted, rel=1e-5)
    # Another alpha scales the start.
    other = values(lora_checkpoint=str(files["kohya"]), lora_alpha=8.0)
    assert first_loss(other, tmp_path / "alpha") == pytest.approx(wanted, rel=1e-5)


def refusal(values: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    code, _ = train(values, folder)
    assert code == 2
    return capsys.readouterr().err


def test_a_lora_that_does_not_fit_is_refused(
    values: Values,
    lora: tuple[Path, dict[str, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = str(lora[1]["kohya"])
    said = refusal(values(lora_checkpoint=file, lora_rank=8), tmp_path / "a", capsys)
    assert "(4, 64) in the file, not (8, 64)" in said
    assert "lora_rank" in said
    fewer = values(lora_checkpoint=file, lora_target_modules=["a_to_qkv"])
    said = refusal(fewer, tmp_path / "b", capsys)
    assert "the LoRA file has besides" in said
    assert "lora_target_modules" in said
    said = refusal(values(remove_prefix_in_ckpt="pipe.vae."), tmp_path / "c", capsys)
    assert "no trained tensor starts with 'pipe.vae.'" in said
    assert "pipe.dit." in said
    foreign = tmp_path / "foreign.safetensors"
    tensors = {f"lora_te9_x.lora_{n}.weight": torch.ones(4, 4) for n in ("down", "up")}
    save_file({**load_file(file), **tensors}, foreign)
    said = refusal(values(preset_lora_path=str(foreign)), tmp_path / "d", capsys)
    assert "the names of layers start in two ways, '' (lora_te9_x" in said
    wrong = values(lora_base_model="text_encoder_2")
    assert "no tool loads a LoRA into the 'text_encoder_2'" in refusal(
        wrong, tmp_path / "e", capsys
    )


def test_a_lora_of_clip_loads_in_the_pipeline(values: Values, tmp_path: Path) -> None:
    given = values(lora_base_model="text_encoder", remove_prefix_in_ckpt="pipe.text_encoder.")
    run = train_to_end(given, tmp_path / "run")
    (exported,) = exports(given, run)
    verify_export(exported, find_model(make_config({**given, "output_path": str(run)}), HUB))
    assert exported.tensors == 2 * 4 * 2


def test_float8_for_what_is_not_trained(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dit = values()["model_paths"][0]
    loss = first_loss(values(fp8_models=[dit]), tmp_path / "lora")
    exact = first_loss(values(), tmp_path / "exact")
    assert loss != exact
    assert loss == pytest.approx(exact, rel=0.1)
    full = values(fp8_models=[dit], lora_base_model=None, lora_rank=None, trainable_models=["dit"])
    assert "'dit' is trained, and float8 is too coarse" in refusal(full, tmp_path / "b", capsys)


def test_shapes_alone_give_the_same_encodings(values: Values, model: Path, tmp_path: Path) -> None:
    """The single files have no config.json: what no shape shows is as published."""
    without = tmp_path / "t5"
    without.mkdir()
    for file in (model / "diffusers" / "text_encoder_2").glob("*.safetensors"):
        (without / file.name).symlink_to(file)
    given = values(layout="original", cache_path=str(tmp_path / "cache"))
    given["model_paths"][2] = str(without / "*.safetensors")
    outputs: list[Tensors] = []
    for index, config in enumerate((values(), given)):
        run = train_to_end({**config, "task": "sft:data_process"}, tmp_path / str(index))
        manifest = read_manifest(run)
        store = Store(Path(manifest.store))
        row = manifest.frame.sort("row").row(0, named=True)
        outputs.append({})
        for column in (c for c in row if c.startswith("key:")):
            outputs[-1] |= store.read(row[column])
    assert outputs[0].keys() == {"image", "prompt_embeds", "pooled_prompt_embeds"}
    assert outputs[0]["prompt_embeds"].shape == (512, 64)
    for name, tensor in outputs[0].items():
        torch.testing.assert_close(outputs[1][name], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["lora", "lora in bf16 on float8", "full in bf16"])
def test_images_are_sampled_on_the_way(values: Values, kind: str, tmp_path: Path) -> None:
    given = values(
        sample_prompts=["a cat"], sample_num_inference_steps=2, sample_cfg_scale=2, save_steps=1
    )
    if "bf16" in kind:
        given["mixed_precision"] = "bf16"
    if "float8" in kind:
        given["fp8_models"] = given["model_paths"][:1]
    if "full" in kind:
        del given["lora_base_model"], given["lora_rank"]
        given["trainable_models"] = ["dit"]
    run = tmp_path / "run"
    # A process of its own: accelerate's precision is one for each process.
    done = in_processes(1, {**given, "output_path": str(run)}, tmp_path / "recipe.json")
    assert done.returncode == 0, done.stderr
    pictures = sorted((run / "samples").rglob("*.png"))
    assert pictures
    with Image.open(pictures[0]) as picture:
        assert picture.size >= (32, 32)


def test_align_to_opensource_format_writes_checkpoints_in_kohyas_names(
    values: Values, tmp_path: Path
) -> None:
    targets = {
        "lora_target_modules": ["a_to_qkv", "x_embedder"],
        "align_to_opensource_format": True,
    }
    run = train_to_end(values(**targets), tmp_path / "run")
    names = {n.partition(".")[0] for n in load_file(run / "epoch-0.safetensors")}
    assert names == {
        "lora_unet_img_in",
        *(f"lora_unet_double_blocks_{i}_img_attn_qkv" for i in range(2)),
    }


def test_the_family_is_recognised_by_files_and_by_repository(values: Values) -> None:
    for layout in ("diffusers", "original"):
        assert (
            find_model(make_config(values(layout=layout, family=None)), HUB).family.name == "flux"
        )
    named = values(family=None, model_paths=None)
    named["model_id_with_origin_paths"] = [
        "black-forest-labs/FLUX.1-Krea-dev:flux1-krea-dev.safetensors",
        "black-forest-labs/FLUX.1-dev:text_encoder_2/*.safetensors",
    ]
    assert guess_model(make_config(named)).family.name == "flux"
    named["model_id_with_origin_paths"] = ["black-forest-labs/FLUX.2-dev:transformer/*.safetensors"]
    with pytest.raises(UserError):
        guess_model(make_config(named))


def test_the_kohya_file_says_where_it_comes_from(lora: tuple[Path, dict[str, Path]]) -> None:
    assert "samples_digest" in read_metadata(lora[1]["kohya"])["diffsynth_dagster"]
    found = read_lora(lora[1]["kohya"], find_family("flux"), "dit", "the test")
    assert {round(scale, 6) for scale in found.scale.values()} == {1.0}  # s is in B
    with torch.device("meta"):
        dit = FluxTransformer2DModel(**ARCHITECTURE, num_layers=1, num_single_layers=1)
    with pytest.raises(UserError, match="layers that the model lacks"):
        fuse_lora(dit, found, "the test")


def test_each_layer_has_its_own_alpha(tmp_path: Path) -> None:
    """Also in a file whose names begin with the module's, as other trainers write them."""
    layer = "transformer_blocks.0.attn.to_q"
    tensors = {"lora_A.weight": torch.ones(8, 4), "lora_B.weight": torch.ones(4, 8)}
    for prefix in ("", "transformer.", "pipe.dit."):
        named = {f"{prefix}{layer}.{name}": tensor for name, tensor in tensors.items()}
        named[f"{prefix}{layer}.alpha"] = torch.tensor(2.0)
        save_file(named, tmp_path / "lora.safetensors")
        found = read_lora(tmp_path / "lora.safetensors", find_family("flux"), "dit", "the test")
        assert found.scale == {layer: 0.25}
