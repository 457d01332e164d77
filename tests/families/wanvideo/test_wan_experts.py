"""Both experts of Wan2.2 A14B in one training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config, record_of, samples_of, train_to_end
from diffusers import WanPipeline, WanTransformer3DModel
from families.wanvideo.cases import CASES, parts, rows, write
from family_case import first_call
from process_support import two_processes
from safetensors.torch import load_file, save_file

from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.dry_run import make_plan
from diffsynth_dagster.errors import ParameterError, UserError
from diffsynth_dagster.export import export_run, how_to_load, verify_export
from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.contract import SampleRequest, Tensors
from diffsynth_dagster.families.denoiser_schedule import Share, share_of_step
from diffsynth_dagster.families.sampling_types import guide
from diffsynth_dagster.run.record import read_record
from diffsynth_dagster.training.batches import StepDataset
from diffsynth_dagster.training.build import build_step
from diffsynth_dagster.training.sampling import make_clips
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.load import load_component
from diffsynth_dagster.weights.lora import fuse_lora, read_lora
from diffsynth_dagster.weights.models import Models
from diffsynth_dagster.weights.resolved import resolve

BOTH = next(case for case in CASES if case.name == "wan22_t2v_both")
HUB = ModelHub(Path(), skip_download=True)
FILES = {"epoch-3-dit.safetensors", "epoch-3-dit2.safetensors"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts") / "model"
    write(folder)
    return folder


@pytest.fixture(scope="module")
def values(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("values")
    table = rows(folder / "data")
    return {
        "family": "wanvideo",
        "dataset_base_path": str(table.parent),
        "dataset_metadata_path": str(table),
        "cache_path": str(folder / "cache"),
        "output_path": str(folder / "run"),
        "lora_rank": 4,
        "num_epochs": 4,
        "learning_rate": 1e-2,
        **BOTH.models(model, "diffusers"),
        **BOTH.parameters,
    }


@pytest.fixture(scope="module")
def run(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = train_to_end(values, tmp_path_factory.mktemp("run") / "run")
    return folder


def a14b(**more: Any) -> TrainingConfig:
    listed = [f"Wan-AI/Wan2.2-T2V-A14B:{n}_noise_model/*.safetensors" for n in ("high", "low")]
    base = {
        "dataset_base_path": "d",
        "dataset_metadata_path": "m.csv",
        "lora_base_model": "dit,dit2",
        "model_id_with_origin_paths": listed,
    }
    return make_config({**base, **more})


@pytest.mark.parametrize(("first_frame", "count"), [(False, 417), (True, 358)])
def test_the_shares_are_those_of_the_published_commands(first_frame: bool, count: int) -> None:
    """0.417 and 0.358 of the schedule are the fractions with which each is trained alone."""
    config = a14b(extra_inputs="input_image") if first_frame else a14b()
    plan = make_plan(config)
    assert plan["components"].keys() >= {"dit", "dit2"}
    family = find_family("wanvideo")
    assert family.variant is not None
    family = family.variant(family, config, {"dit": {}, "dit2": {}})
    assert resolve(config, family).schedule.shares == (
        Share("dit", 0, count),
        Share("dit2", count, 1000),
    )
    alone = config.model_copy(update={"lora_base_model": ("dit2",)})
    assert resolve(alone, family).schedule.shares == (Share("dit2", count, 1000),)
    assert "by dit2" in plan["objective"]


def test_steps_are_shared_as_timesteps_are() -> None:
    shares = (Share("dit", 0, 417), Share("dit2", 417, 1000))
    drawn = [share_of_step(shares, 0, step).component for step in range(4000)]
    assert drawn == [share_of_step(shares, 0, step).component for step in range(4000)]
    assert drawn.count("dit") / 4000 == pytest.approx(0.417, abs=0.03)


def test_each_expert_is_trained_in_steps_of_its_own(run: Path, values: dict[str, Any]) -> None:
    config = make_config({**values, "output_path": str(run)})
    data = StepDataset(config, find_model(config, HUB), samples_of(run), 0, 1)
    work = {batch.denoiser for step in range(16) for batch in data[step]}
    assert work == {"dit", "dit2"}
    trained = {n: load_file(run / n) for n in FILES}
    high, low = (trained[name] for name in sorted(FILES))
    assert high.keys() == low.keys()
    assert not any(name.startswith("pipe.") for name in high)
    for tensors in (high, low):
        assert all(t.any() for name, t in tensors.items() if "lora_B" in name)
    assert any(not torch.equal(high[name], low[name]) for name in high)
    record = record_of(run)
    assert set(record.newest) == FILES


def test_an_idle_expert_waits_in_cpu_memory_and_nothing_changes(
    run: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    other = train_to_end({**values, "offload_idle_denoiser": True}, tmp_path / "run")
    for name in FILES:
        ours, theirs = load_file(run / name), load_file(other / name)
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    config = make_config({**values, "offload_idle_denoiser": True, "output_path": str(run)})
    found = find_model(config, HUB)
    models = Models(found, torch.device("cpu"), torch.float32, on_cpu_first=False)
    step = build_step(config, models, torch.float32)
    data = StepDataset(config, found, samples_of(run), 0, 1)

    def lent(name: str) -> bool:
        frozen = [p for p in step.components[name].parameters() if not p.requires_grad]
        assert len({p.numel() > 0 for p in frozen}) == 1
        return frozen[0].numel() > 0

    assert (lent("dit"), lent("dit2")) == (False, False)
    for batch in (data[index][0] for index in range(8)):
        step(batch).sum().backward()
        assert lent(batch.denoiser)
        assert lent("dit") != lent("dit2")
        trained = [p for p in step.components[batch.denoiser].parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained)


def test_each_export_loads_into_its_expert(
    run: Path, values: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    config = make_config({**values, "output_path": str(run)})
    record, found = read_record(run), find_model(config, HUB)
    assert record is not None
    exported = export_run(config, record, found)
    assert [item.components for item in exported] == [("dit",), ("dit2",)]
    assert [item.path.parent.name for item in exported] == ["transformer", "transformer_2"]
    for item in exported:
        verify_export(item, found)
    own = model / "diffusers"
    second = WanTransformer3DModel.from_pretrained(own / "transformer_2")
    pipeline: Any = WanPipeline(
        **parts(own, "transformer"), transformer_2=second, boundary_ratio=0.875
    )
    for item in exported:
        exec(how_to_load(item, found.family), {"pipe": pipeline})
    pipeline.set_progress_bar_config(disable=True)
    with first_call(pipeline.transformer) as high, first_call(pipeline.transformer_2) as low:
        pipeline(
            prompt="clip  number 0",
            height=32,
            width=32,
            num_frames=5,
            num_inference_steps=6,
            guidance_scale=1.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )
    for name, seen in (("dit", high), ("dit2", low)):
        ours = load_component(found.components[name], "cpu", torch.float32)
        lora = read_lora(run / f"epoch-3-{name}.safetensors", found.family, name, "the test")
        fuse_lora(ours, lora, "the test")
        with torch.no_grad():
            predicted = ours(*seen["args"], **seen["kwargs"])[0]
        torch.testing.assert_close(predicted, seen["output"], atol=1e-5, rtol=1e-5)


def test_samples_are_made_by_both(values: dict[str, Any]) -> None:
    """Each at its own timesteps."""
    found = find_model(make_config(values), HUB)
    experts = ("dit", "dit2")
    loaded = {n: load_component(found.components[n], "cpu", torch.float32) for n in experts}
    seen: dict[str, list[float]] = {name: [] for name in experts}
    for name, module in loaded.items():

        def note(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
            seen[name].append(float(kwargs["timestep"].max()))

        module.register_forward_pre_hook(note, with_kwargs=True)
    loaded["vae"] = load_component(found.components["vae"], "cpu", torch.float32)
    request = SampleRequest(
        conditions={"prompt_embeds": torch.zeros(1, 7, 64)},
        negative={"prompt_embeds": torch.ones(1, 7, 64)},
        height=32,
        width=32,
        num_frames=5,
        frame_rate=16.0,
        num_inference_steps=6,
        cfg_scale=5.0,
        cfg_scales=found.family.sampling.cfg_scales,
        generators=[torch.Generator().manual_seed(0)],
        noising=found.noising,
    )
    scales: list[float] = []

    def noted(prompted: Tensors, unprompted: Tensors, scale: float) -> Tensors:
        scales.append(scale)
        return guide(prompted, unprompted, scale)

    family = replace(found.family, sampling=replace(found.family.sampling, guide=noted))
    with torch.no_grad():
        (clip,) = make_clips(family, loaded, request)
    assert len(clip.frames) == 5
    # Twice in each step: with the prompt, and without.
    assert len(seen["dit"]) + len(seen["dit2"]) == 12
    assert min(seen["dit"]) >= 875 > max(seen["dit2"])
    first = len(seen["dit"]) // 2
    assert scales == [4.0] * first + [3.0] * (6 - first)


def test_samples_are_made_while_both_take_turns(values: dict[str, Any], tmp_path: Path) -> None:
    more = {"sample_prompts": ["a clip"], "sample_num_inference_steps": 4, "num_epochs": 1}
    run = train_to_end({**values, **more, "offload_idle_denoiser": True}, tmp_path / "run")
    before = (run / "samples" / "step-0.png").read_bytes()
    # One that is trained alone makes samples with the other, of which it changes nothing.
    one = train_to_end({**values, **more, "lora_base_model": "dit2"}, tmp_path / "one")
    assert (one / "samples" / "step-0.png").read_bytes() == before
    record = record_of(one)
    assert (record.trained, list(record.checkpoints)) == (["dit2"], ["epoch-0.safetensors"])


def test_direct_distillation_of_experts_is_refused(values: dict[str, Any]) -> None:
    """A trajectory goes through the timesteps of both."""
    for trained in ("dit,dit2", "dit"):
        words = refusal(values, task="direct_distill", lora_base_model=trained)
        assert "direct_distill follows the samples through all timesteps" in words


@pytest.mark.soak
def test_two_processes_train_both(values: dict[str, Any], tmp_path: Path) -> None:
    """Each step of both processes goes to one expert, whose gradients they share."""
    given = {**values, "offload_idle_denoiser": True}
    config = {**given, "output_path": str(tmp_path / "run")}
    done = two_processes(config, tmp_path / "both.json")
    assert done.returncode == 0, done.stderr
    train_to_end({**values, "gradient_accumulation_steps": 2}, tmp_path / "one")
    for name in FILES:
        two, one = load_file(tmp_path / "run" / name), load_file(tmp_path / "one" / name)
        assert two.keys() == one.keys()
        for tensor in two:
            # But for the few whose gradient is rounding: Adam makes a whole step of it.
            equal = torch.isclose(two[tensor], one[tensor], atol=1e-4, rtol=1e-3)
            assert float(equal.float().mean()) >= 0.99, tensor


def refusal(values: dict[str, Any], **more: Any) -> str:
    with pytest.raises(UserError) as error:
        find_model(make_config({**values, **more}), HUB)
    return str(error.value)


def test_an_expert_named_twice_is_refused(
    values: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    first, second, *others = BOTH.models(model, "diffusers")["model_paths"]
    copied = tmp_path / "high_noise_model" / "diffusion_pytorch_model.safetensors"
    copied.parent.mkdir()
    save_file(load_file(first), copied)
    words = refusal(values, model_paths=[first, str(copied), *others])
    assert "two entries are the component 'dit'" in words
    low = tmp_path / "low_noise_model" / copied.name
    low.parent.mkdir()
    save_file(load_file(first), low)
    assert "two entries are the component 'dit2'" in refusal(
        values, model_paths=[first, second, str(low), *others]
    )


def test_experts_of_different_models_are_refused(values: dict[str, Any], model: Path) -> None:
    other = str(model / "diffusers" / "transformer_i2v_low" / "diffusion_pytorch_model.safetensors")
    _, second, *others = BOTH.models(model, "diffusers")["model_paths"]
    words = refusal(
        values,
        model_paths=[other, second, *others],
        extra_inputs=["input_image"],
    )
    assert "they take or predict other channels" in words


def test_what_leaves_an_expert_nothing_is_refused() -> None:
    with pytest.raises(ParameterError, match="no timestep is left for 'dit2'"):
        make_plan(a14b(max_timestep_boundary=0.3))
    with pytest.raises(ParameterError, match="no denoiser is ever idle"):
        make_plan(a14b(lora_base_model="dit", offload_idle_denoiser=True))
    full = {"lora_base_model": "", "trainable_models": "dit,dit2", "offload_idle_denoiser": True}
    with pytest.raises(ParameterError, match="is trained in full"):
        make_plan(a14b(**full))
