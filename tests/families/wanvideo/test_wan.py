"""What is peculiar to Wan: its experts, VACE as a part, the files of the authors, refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import keys_of, make_config, record_of, train_to_end, why_refused
from diffusers import FlowMatchEulerDiscreteScheduler, WanVACETransformer3DModel
from families.wanvideo.cases import CASES, FRAMES, MODELS, rows, write
from family_case import Case
from media_support import write_clip
from PIL import Image
from safetensors.torch import load_file

from diffsynth_dagster.cache.row_sets import needed_beside_prompt
from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.data.table.validate import validate
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.export import export_run, verify_export
from diffsynth_dagster.facts import FactCache
from diffsynth_dagster.families.contract import Loaded, SampleRequest, Tensors
from diffsynth_dagster.families.wanvideo import family as wanvideo
from diffsynth_dagster.families.wanvideo import stages
from diffsynth_dagster.families.wanvideo.names import convert_dit
from diffsynth_dagster.preflight import check_config
from diffsynth_dagster.run.record import read_record
from diffsynth_dagster.training.sampling import make_clips
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model, guess_model
from diffsynth_dagster.weights.load import build_empty, load_component

HUB = ModelHub(Path(), skip_download=True)
WAN = {case.name: case for case in CASES}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "model"
    write(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows(tmp_path_factory.mktemp("clips") / "data", vace=True)


def values(
    case: Case, model: Path, clips: Path, folder: Path, layout: str = "diffusers", **overrides: Any
) -> dict[str, Any]:
    """A LoRA training of a case, or a full one of `trainable_models`; None takes a parameter out."""
    lora = {} if "trainable_models" in overrides else {"lora_base_model": case.base, "lora_rank": 4}
    given = {
        "family": "wanvideo",
        "dataset_base_path": str(clips.parent),
        "dataset_metadata_path": str(clips),
        **lora,
        "remove_prefix_in_ckpt": f"pipe.{case.base}.",
        "cache_path": str(folder / "cache"),
        "output_path": str(folder / "run"),
        **case.models(model, layout),
        **case.parameters,
        **overrides,
    }
    return {name: value for name, value in given.items() if value is not None}


def stored(folder: Path) -> set[tuple[str, int]]:
    """Every file of a store, and when it was written."""
    files = [path for path in (folder / "cache").rglob("*") if path.is_file()]
    return {(str(path), path.stat().st_mtime_ns) for path in files}


def test_both_experts_share_one_store(model: Path, clips: Path, tmp_path: Path) -> None:
    high = values(WAN["wan_t2v"], model, clips, tmp_path, max_timestep_boundary=0.417)
    low = values(WAN["wan22_t2v_high"], model, clips, tmp_path)
    low |= {"min_timestep_boundary": 0.417, "max_timestep_boundary": 1.0}
    assert high["model_paths"] != low["model_paths"]
    train_to_end(high, tmp_path / "high")
    before = stored(tmp_path)
    assert any(name.endswith(".safetensors") for name, _ in before)
    train_to_end(low, tmp_path / "low")
    assert {file for file in stored(tmp_path) if file[0].endswith(".safetensors")} == {
        file for file in before if file[0].endswith(".safetensors")
    }
    assert keys_of(tmp_path / "high") == keys_of(tmp_path / "low")


def test_frames_that_are_given_have_keys_of_their_own(
    model: Path, clips: Path, tmp_path: Path
) -> None:
    """One store serves models that are given one frame and models that are given two."""
    keys: list[set[str]] = []
    for name in ("wan_i2v", "wan_flf2v"):
        given = values(WAN[name], model, clips, tmp_path, task="sft:data_process")
        train_to_end(given, tmp_path / name)
        keys.append(keys_of(tmp_path / name))
    # Prompts and videos are the same, what is made of the frames is not.
    assert len(keys[0] & keys[1]) == 2 * 4
    assert len(keys[0] | keys[1]) == 6 * 4


@pytest.mark.parametrize(
    ("bounds", "timesteps"), [((0.0, 0.417), (875, 1000)), ((0.417, 1.0), (0, 875))]
)
def test_timesteps_are_drawn_inside_the_boundaries(
    model: Path,
    clips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bounds: tuple[float, float],
    timesteps: tuple[float, float],
) -> None:
    seen: list[float] = []

    def denoise(
        dit: Any, loaded: Loaded, conditions: Tensors, x_t: Tensors, t: torch.Tensor
    ) -> Tensors:
        seen.extend(t.tolist())
        return stages.denoise(dit, loaded, conditions, x_t, t)

    monkeypatch.setattr(wanvideo, "FAMILY", replace(wanvideo.FAMILY, denoise=denoise))
    low, high = bounds
    given = values(WAN["wan_t2v"], model, clips, tmp_path, num_epochs=8)
    given |= {"min_timestep_boundary": low, "max_timestep_boundary": high}
    train_to_end(given, tmp_path / "run")
    assert len(set(seen)) > 20
    assert all(timesteps[0] <= t <= timesteps[1] for t in seen)


def test_the_schedule_is_the_published_one() -> None:
    path = wanvideo.noising(TrainingConfig(), {})
    assert float(path.timesteps[0]) == 1000
    assert float(path.timesteps[417]) == pytest.approx(875, abs=0.5)
    assert float(path.timesteps[358]) == pytest.approx(900, abs=0.5)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=5.0)
    assert torch.allclose(path.sigmas, scheduler.sigmas[:1000], atol=1e-6)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 5)[:-1].tolist())
    assert torch.allclose(wanvideo.inference_sigmas(4, {}), scheduler.sigmas, atol=1e-6)


def test_vace_is_trained_alone_and_exported_whole(model: Path, clips: Path, tmp_path: Path) -> None:
    given = values(
        WAN["wan_vace"],
        model,
        clips,
        tmp_path,
        trainable_models="vace",
        use_gradient_checkpointing=True,
    )
    train_to_end(given, tmp_path / "run")
    names = load_file(tmp_path / "run" / "epoch-0.safetensors").keys()
    starts = {name.split(".")[0] for name in names}
    assert starts == {"vace_blocks", "vace_patch_embedding"}
    config = make_config(given)
    found, record = find_model(config, HUB), read_record(tmp_path / "run")
    assert record is not None
    (exported,) = export_run(config, record, found)
    verify_export(exported, found)
    before = load_component(found.components["dit"], "cpu", torch.float32).state_dict()
    after = load_file(exported.path)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert changed <= names


def test_parts_of_one_component_make_one_file(model: Path, clips: Path, tmp_path: Path) -> None:
    """With a config.json of the architecture, whatever lies beside the authors' files."""
    case = WAN["wan_vace"]
    given = values(case, model, clips, tmp_path, "original", trainable_models="dit,vace")
    given |= {"remove_prefix_in_ckpt": ""}
    run = train_to_end(given, tmp_path / "run")
    config = make_config({**given, "output_path": str(run)})
    found = find_model(config, HUB)
    record = record_of(run)
    exported, theirs = export_run(config, record, found)
    for item in (exported, theirs):
        verify_export(item, found)
    checkpoint = load_file(run / "epoch-0.safetensors")
    whole = load_file(exported.path)
    assert len(whole) == len(checkpoint)
    # The checkpoint has the names of the files that it was loaded from, the export those of diffusers.
    named = convert_dit({name.split(".", 2)[2]: tensor for name, tensor in checkpoint.items()})
    assert "pipe.dit.blocks.0.self_attn.q.weight" in checkpoint
    for name, tensor in named.items():
        assert torch.equal(whole[name], tensor)
    again = WanVACETransformer3DModel.from_pretrained(exported.path.parent)
    assert again.state_dict().keys() == whole.keys()
    in_their_names = {name.split(".", 2)[2]: tensor for name, tensor in checkpoint.items()}
    assert load_file(theirs.path).keys() == in_their_names.keys()


def test_loras_of_two_parts_of_a_component_are_gone_on_from(
    model: Path, clips: Path, tmp_path: Path
) -> None:
    """They are one LoRA of the component in the file, and two parts, each by a start, in the guide's."""
    case = WAN["wan_vace"]
    given = values(case, model, clips, tmp_path, lora_base_model="dit,vace")
    given |= {"lora_target_modules": ["q"], "num_epochs": 1}
    for name in ("comfyui", "guide"):
        run = tmp_path / name
        train_to_end({**given, "checkpoint_format": name}, run)
        start = {"preset_lora_path": str(run / "epoch-0.safetensors"), "preset_lora_model": "dit"}
        train_to_end({**given, **start}, tmp_path / f"again-{name}")
    names = load_file(tmp_path / "guide" / "epoch-0.safetensors")
    assert {name.split(".")[0] for name in names} == {"pipe", "vace_blocks"}
    alone = given | {"lora_base_model": "vace"}
    for name in ("comfyui", "guide"):
        start = {"lora_checkpoint": str(tmp_path / name / "epoch-0.safetensors")}
        train_to_end({**alone, **start}, tmp_path / f"vace-{name}")


def test_a_part_that_the_model_lacks_is_refused(model: Path, clips: Path, tmp_path: Path) -> None:
    given = values(WAN["wan_t2v"], model, clips, tmp_path, trainable_models="vace")
    assert "the model has no 'vace'" in why_refused(
        given | {"remove_prefix_in_ckpt": "pipe.vace."}, tmp_path / "run"
    )


def test_stages_of_the_step_read_pixels_not_latents(
    model: Path, clips: Path, tmp_path: Path
) -> None:
    """`video` is a column as well as a target: with the VAE trained, frames are frames still."""
    given = values(WAN["wan_i2v"], model, clips, tmp_path, trainable_models="vae,image_encoder")
    train_to_end(given | {"remove_prefix_in_ckpt": ""}, tmp_path / "run")


def test_the_authors_config_is_not_taken_for_that_of_diffusers(
    model: Path, clips: Path, tmp_path: Path
) -> None:
    """The repositories Wan-AI/Wan2.1-… hold one of their own beside the transformer."""
    own = tmp_path / "model"
    shutil.copytree(model / "original", own / "original")
    theirs = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 1536, "in_dim": 16}
    config = own / "original" / "transformer" / "config.json"
    config.write_text(json.dumps(theirs), encoding="utf-8")
    given = make_config(values(WAN["wan_t2v"], own, clips, tmp_path, "original"))
    found = find_model(given, HUB).components["dit"]
    assert found.config is None
    assert build_empty(found).config["num_layers"] == 2


EXTRA = "extra_inputs"
REFUSED = [
    ("wan_t2v", {EXTRA: ["input_image"]}, "this transformer is given no frame"),
    ("wan_t2v", {EXTRA: ["end_image"]}, "end_image is given but not input_image"),
    ("wan_t2v", {EXTRA: ["vace_video"]}, "vace_video is named, but the transformer has no VACE"),
    ("wan_i2v", {EXTRA: None}, "given the first frame of each video, which is not named"),
    ("wan22_ti2v_5b", {EXTRA: ["input_image", "end_image"]}, "given the first frame only"),
    ("wan22_ti2v_5b", {"height": 48}, "height = 48 is not a multiple of 32"),
    ("wan_vace", {EXTRA: None}, "nothing for them is named"),
]


@pytest.mark.parametrize(("name", "overrides", "message"), REFUSED)
def test_inputs_that_do_not_fit_the_model_are_refused(
    model: Path, clips: Path, tmp_path: Path, name: str, overrides: dict[str, Any], message: str
) -> None:
    layout = "original"  # whose VAE is called by its name
    config = make_config(values(WAN[name], model, clips, tmp_path, layout, **overrides))
    with pytest.raises(ParameterError, match=message):
        validate(config, find_model(config, HUB).family.columns, FactCache(tmp_path / "facts"))


def test_clip_is_asked_for(model: Path, clips: Path, tmp_path: Path) -> None:
    given = values(WAN["wan_i2v"], model, clips, tmp_path)
    given["model_paths"] = given["model_paths"][:-1]
    with pytest.raises(ParameterError, match="CLIP is not named"):
        find_model(make_config(given), HUB)


def test_the_size_of_an_unnamed_wide_vae_must_be_given(
    model: Path, clips: Path, tmp_path: Path
) -> None:
    given = values(WAN["wan22_ti2v_5b"], model, clips, tmp_path)
    assert find_model(make_config(given), HUB).family.geometry.side_factor == 32
    free = {name: value for name, value in given.items() if name not in ("height", "width")}
    for config in (make_config(given | {"height": 48}), make_config(free)):
        with pytest.raises(ParameterError, match="multiples of 32"):
            find_model(config, HUB)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_plan_needs_no_files(case: Case, model: Path, clips: Path, tmp_path: Path) -> None:
    """A family guessed from names has the same stages as one recognised from the files."""
    config = make_config(values(case, model, clips, tmp_path, "original"))
    guessed, found = guess_model(config).family, find_model(config, HUB).family
    assert [stage.name for stage in guessed.stages] == [stage.name for stage in found.stages]
    assert [stage.uses for stage in guessed.stages] == [stage.uses for stage in found.stages]
    assert guessed.inputs == found.inputs
    assert guessed.geometry == found.geometry


@pytest.mark.parametrize("name", ["wan22_ti2v_5b", "wan_i2v", "wan_flf2v"])
def test_a_given_first_frame_is_not_all(
    model: Path, clips: Path, tmp_path: Path, name: str
) -> None:
    """With one frame, which is given, there would be nothing to predict."""
    config = make_config(values(WAN[name], model, clips, tmp_path, num_frames=1))
    with pytest.raises(ParameterError, match=r"num_frames = 1 is no length .* has 5 frames"):
        check_config(config, find_model(config, HUB))


def test_one_frame_is_a_picture_where_none_is_given(
    model: Path, clips: Path, tmp_path: Path
) -> None:
    from_text = make_config(
        values(WAN["wan22_ti2v_5b"], model, clips, tmp_path, num_frames=1, extra_inputs=None)
    )
    check_config(from_text, find_model(from_text, HUB))


@pytest.mark.parametrize(
    ("extra", "models"),
    [
        ("input_image", "Wan-AI/Wan2.1-I2V-14B-480P:Wan2.1_VAE.pth"),
        ("input_image,end_image", "Wan-AI/Wan2.1-FLF2V-14B-720P:Wan2.1_VAE.pth"),
        ("input_image", "Wan-AI/Wan2.2-TI2V-5B:Wan2.2_VAE.pth"),
        ("", "Wan-AI/Wan2.1-T2V-14B:Wan2.1_VAE.pth"),
    ],
)
def test_clips_whose_given_frame_is_all_are_rejected(
    tmp_path: Path, extra: str, models: str
) -> None:
    for frames in (4, 5):
        write_clip(tmp_path / f"{frames}.mp4", frames, 16)
    Image.new("RGB", (96, 80)).save(tmp_path / "still.png")
    lines = ["video,prompt", *(f"{name},a" for name in ("4.mp4", "5.mp4", "still.png"))]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    given = {"model_id_with_origin_paths": models, "extra_inputs": extra, "family": "wanvideo"}
    data = {
        "dataset_base_path": str(tmp_path),
        "dataset_metadata_path": str(tmp_path / "t.csv"),
        "lora_base_model": "dit",
    }
    config = make_config({**given, **data})
    frame = validate(
        config, guess_model(config).family.columns, FactCache(tmp_path / "f.sqlite")
    ).frame
    if not extra:
        assert frame["frames"].to_list() == [1, 5, 1]
        return
    assert frame["status"].to_list() == ["too_short", "ok", "too_short"]
    assert "4 frames give less than the 5" in frame["message"][0]
    assert "a still image is one frame" in frame["message"][2]
    assert all("there is nothing to predict" in frame["message"][at] for at in (0, 2))


@pytest.mark.parametrize(
    ("name", "transformer"), [("wan_t2v", "transformer"), ("wan22_ti2v_5b", "transformer_ti2v")]
)
def test_samples_are_videos(
    model: Path, clips: Path, tmp_path: Path, name: str, transformer: str
) -> None:
    overrides = {EXTRA: None, "height": 64, "width": 64}
    found = find_model(make_config(values(WAN[name], model, clips, tmp_path, **overrides)), HUB)
    assert not needed_beside_prompt(found.family)
    loaded = {
        name: load_component(found.components[name], "cpu", torch.float32)
        for name in ("dit", "vae")
    }
    assert isinstance(loaded["dit"], MODELS[transformer][0])
    source = torch.Generator().manual_seed(0)
    request = SampleRequest(
        conditions={"prompt_embeds": torch.randn(2, 7, 64, generator=source)},
        negative={"prompt_embeds": torch.randn(2, 3, 64, generator=source)},
        height=64,
        width=64,
        num_frames=FRAMES,
        frame_rate=16.0,
        num_inference_steps=2,
        cfg_scale=2.0,
        generators=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        noising=found.noising,
    )
    with torch.no_grad():
        videos = [clip.frames for clip in make_clips(found.family, loaded, request)]
    assert [len(frames) for frames in videos] == [FRAMES, FRAMES]
    assert videos[0][0].size == (64, 64)
    assert videos[0][0].tobytes() != videos[1][0].tobytes()


def test_every_model_can_be_stored_in_float8(model: Path, clips: Path, tmp_path: Path) -> None:
    """Though UMT5 casts the input of one of its layers to the type of that layer's weight."""
    given = values(WAN["wan_i2v"], model, clips, tmp_path)
    train_to_end(given | {"fp8_models": given["model_paths"]}, tmp_path / "run")
