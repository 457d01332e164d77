"""The command line of each variant of the guide prints a plan, with no file there.

And each template in recipes/examples/ asks for the same as its command line.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from diffsynth_dagster.config import read_recipe
from diffsynth_dagster.config.flags import read_arguments
from diffsynth_dagster.plan import make_plan
from diffsynth_dagster.train import main

QT = (
    "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1"
)
FT = (
    "a_to_qkv,b_to_qkv,ff_a.0,ff_a.2,ff_b.0,ff_b.2,a_to_out,b_to_out,proj_out,norm.linear,"
    "norm1_a.linear,norm1_b.linear,to_qkv_mlp"
)
WT = "q,k,v,o,ffn.0,ffn.2"
QWEN_REST = (
    "Qwen/Qwen-Image:text_encoder/model*.safetensors,"
    "Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors"
)
FLUX_REST = ",".join(
    f"black-forest-labs/FLUX.1-dev:{file}"
    for file in ("text_encoder/model.safetensors", "text_encoder_2/*.safetensors", "ae.safetensors")
)
CHECKPOINTING = {"--use_gradient_checkpointing": ""}
EDIT = ("edit_prompt", "image", "edit_image")
EDIT_PLUS = ("edit_prompt_later", "image", "edit_image")
FULL_LORA = {"--lora_rank": "32", "--learning_rate": "1e-4", "--num_epochs": "5"}
FULL = {"--learning_rate": "1e-5", "--num_epochs": "2"}


@dataclass(frozen=True)
class Variant:
    """A row of the guide's summary.

    Attributes:
        flags: of its commands, without those of the LoRA or of full training.
        lora, full: flags of either; None where there is no such command.
        components: what the plan must know by name.
        cached: the stages of the plan.
    """

    template: str
    family: str
    models: str
    components: tuple[str, ...]
    cached: tuple[str, ...]
    flags: dict[str, str] = field(default_factory=dict[str, str])
    lora: dict[str, str] = field(default_factory=dict[str, str])
    full: dict[str, str] | None = field(default_factory=dict[str, str])
    base: str = "dit"
    trained: str = "dit"
    targets: str = QT
    prefix: str = "pipe.dit."


def qwen(template: str, dit: str, edits: bool = False, **more: Any) -> Variant:
    flags = {"--max_pixels": "1048576", "--dataset_repeat": "50", **CHECKPOINTING}
    flags |= {"--find_unused_parameters": ""}
    if edits:
        flags |= {"--data_file_keys": "image,edit_image", "--extra_inputs": "edit_image"}
    flags |= more.pop("flags", {})
    return Variant(
        template,
        "qwen_image",
        f"{dit}:transformer/diffusion_pytorch_model*.safetensors,{QWEN_REST}",
        ("dit", "text_encoder", "vae"),
        more.pop("cached", ("prompt", "image")),
        flags,
        **more,
    )


def flux(template: str, dit: str, column: str = "", **more: Any) -> Variant:
    flags = {"--max_pixels": "1048576", "--dataset_repeat": "400" if column else "50"}
    flags |= CHECKPOINTING
    if column:
        flags |= {"--data_file_keys": f"image,{column}", "--extra_inputs": column}
    flags |= more.pop("flags", {})
    models = f"black-forest-labs/{dit},{FLUX_REST}"
    extra = more.pop("controlnet", "")
    return Variant(
        template,
        "flux",
        models + (f",{extra}" if extra else ""),
        ("dit", "text_encoder", "text_encoder_2", "vae", *(["controlnet"] if extra else [])),
        ("pooled_prompt", "prompt", "image", *more.pop("cached", ())),
        flags,
        {"--align_to_opensource_format": "", **more.pop("lora", {})},
        targets=FT,
        **more,
    )


def wan(template: str, dit: str, frames: str | None, *extra: str, **more: Any) -> Variant:
    repository = dit.split(":")[0]
    size = more.pop("size", ("480", "832"))
    vae = "Wan2.2_VAE.pth" if "TI2V" in dit else "Wan2.1_VAE.pth"
    files = [dit, f"{repository}:models_t5_umt5-xxl-enc-bf16.pth", f"{repository}:{vae}"]
    components = ["dit", "text_encoder", "vae"]
    clip = more.pop("clip", False)
    if clip:
        files.append(
            f"{repository}:models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        )
        components.append("image_encoder")
    flags = {"--height": size[0], "--width": size[1], "--dataset_repeat": "100"}
    # The guide's trainer forces this on for the family.
    flags |= (
        {} if "--use_gradient_checkpointing_offload" in more.get("flags", {}) else CHECKPOINTING
    )
    if frames is not None:
        flags["--num_frames"] = frames
    if extra:
        flags["--extra_inputs"] = ",".join(extra)
    flags |= more.pop("flags", {})
    return Variant(
        template,
        "wanvideo",
        ",".join(files),
        tuple(components),
        more.pop("cached", ("prompt", "video")),
        flags,
        targets=WT,
        **more,
    )


I2V = ("prompt", "video", "first_frame")
TI2V = ("prompt", "video", "known_frame")
CLIP = (*I2V, "first_features")
FLF = ("prompt", "video", "first_and_last_frame", "first_and_last_features")
VACE = {"--data_file_keys": "video,vace_video,vace_reference_image"}
VACE |= {"--use_gradient_checkpointing_offload": ""}
HIGH_T2V = {"--max_timestep_boundary": "0.417", "--min_timestep_boundary": "0"}
LOW_T2V = {"--max_timestep_boundary": "1", "--min_timestep_boundary": "0.417"}
HIGH_I2V = {"--max_timestep_boundary": "0.358", "--min_timestep_boundary": "0"}
LOW_I2V = {"--max_timestep_boundary": "1", "--min_timestep_boundary": "0.358"}
DIT = "diffusion_pytorch_model*.safetensors"
W21, W22 = "Wan-AI/Wan2.1", "Wan-AI/Wan2.2"


def vace(template: str, size: str, lora_frames: str, full_frames: str) -> Variant:
    return wan(
        template,
        f"{W21}-VACE-{size}:{DIT}",
        None,
        "vace_video",
        "vace_reference_image",
        cached=("prompt", "video", "vace"),
        flags=VACE,
        lora={"--num_frames": lora_frames},
        full={"--num_frames": full_frames, "--learning_rate": "5e-5"},
        base="vace",
        trained="vace",
        prefix="pipe.vace.",
    )


VARIANTS = (
    qwen("qwen_image", "Qwen/Qwen-Image"),
    qwen("qwen_image_2512", "Qwen/Qwen-Image-2512"),
    qwen("qwen_image_edit", "Qwen/Qwen-Image-Edit", edits=True, cached=EDIT),
    qwen("qwen_image_edit_2509", "Qwen/Qwen-Image-Edit-2509", edits=True, cached=EDIT_PLUS),
    qwen(
        "qwen_image_edit_2511",
        "Qwen/Qwen-Image-Edit-2511",
        edits=True,
        cached=EDIT_PLUS,
        flags={"--zero_cond_t": ""},
    ),
    flux("flux_dev", "FLUX.1-dev:flux1-dev.safetensors"),
    flux("flux_krea_dev", "FLUX.1-Krea-dev:flux1-krea-dev.safetensors"),
    flux(
        "flux_kontext",
        "FLUX.1-Kontext-dev:flux1-kontext-dev.safetensors",
        "kontext_images",
        cached=("kontext",),
    ),
    flux(
        "flux_controlnet_upscaler",
        "FLUX.1-dev:flux1-dev.safetensors",
        "controlnet_image",
        cached=("control",),
        controlnet="jasperai/Flux.1-dev-Controlnet-Upscaler:diffusion_pytorch_model.safetensors",
        lora={"--dataset_repeat": "50"},
        full={"--num_epochs": "1"},
        trained="controlnet",
    ),
    flux(
        "flux_controlnet_union",
        "FLUX.1-dev:flux1-dev.safetensors",
        "controlnet_image",
        cached=("control",),
        controlnet="InstantX/FLUX.1-dev-Controlnet-Union-alpha:diffusion_pytorch_model.safetensors",
        flags={"--extra_inputs": "controlnet_image,controlnet_processor_id"},
        lora={"--dataset_repeat": "50"},
        full={"--num_epochs": "1"},
        trained="controlnet",
    ),
    wan("wan21_t2v_1.3b", f"{W21}-T2V-1.3B:{DIT}", None),
    wan("wan21_t2v_14b", f"{W21}-T2V-14B:{DIT}", None),
    wan(
        "wan21_i2v_14b_480p",
        f"{W21}-I2V-14B-480P:{DIT}",
        None,
        "input_image",
        clip=True,
        cached=CLIP,
    ),
    wan(
        "wan21_i2v_14b_720p",
        f"{W21}-I2V-14B-720P:{DIT}",
        None,
        "input_image",
        clip=True,
        cached=CLIP,
        size=("720", "1280"),
        full={"--num_frames": "49"},
    ),
    wan(
        "wan21_flf2v_14b",
        f"{W21}-FLF2V-14B-720P:{DIT}",
        None,
        "input_image",
        "end_image",
        clip=True,
        cached=FLF,
    ),
    wan("wan22_t2v_a14b_high", f"{W22}-T2V-A14B:high_noise_model/{DIT}", "49", flags=HIGH_T2V),
    wan("wan22_t2v_a14b_low", f"{W22}-T2V-A14B:low_noise_model/{DIT}", "49", flags=LOW_T2V),
    wan(
        "wan22_i2v_a14b_high",
        f"{W22}-I2V-A14B:high_noise_model/{DIT}",
        "49",
        "input_image",
        flags=HIGH_I2V,
        cached=I2V,
    ),
    wan(
        "wan22_i2v_a14b_low",
        f"{W22}-I2V-A14B:low_noise_model/{DIT}",
        "49",
        "input_image",
        flags=LOW_I2V,
        cached=I2V,
    ),
    wan("wan22_ti2v_5b", f"{W22}-TI2V-5B:{DIT}", "49", "input_image", cached=TI2V),
    vace("wan21_vace_1.3b", "1.3B", "81", "49"),
    vace("wan21_vace_14b", "14B", "17", "17"),
)


def command(variant: Variant, kind: str) -> list[str]:
    flags = {
        "--dataset_base_path": "data/example",
        "--dataset_metadata_path": "data/example/metadata.csv",
        "--model_id_with_origin_paths": variant.models,
        "--output_path": "./models/train/example",
        **variant.flags,
    }
    if kind == "lora":
        flags |= {**FULL_LORA, "--lora_base_model": variant.base}
        flags |= {
            "--lora_target_modules": variant.targets,
            "--remove_prefix_in_ckpt": variant.prefix,
        }
        flags |= variant.lora
    else:
        assert variant.full is not None
        prefix = variant.prefix
        if variant.trained == "controlnet":
            prefix = "pipe.controlnet.models.0."
        flags |= {**FULL, "--trainable_models": variant.trained, "--remove_prefix_in_ckpt": prefix}
        flags |= variant.full
    return [word for name, value in flags.items() for word in ([name, value] if value else [name])]


COMMANDS = [
    pytest.param(variant, kind, id=f"{variant.template}_{kind}")
    for variant in VARIANTS
    for kind in ("lora", "full")
]


@pytest.mark.parametrize(("variant", "kind"), COMMANDS)
def test_the_command_prints_a_plan(
    variant: Variant,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main([*command(variant, kind), "--dry_run"])
    output = capsys.readouterr()
    assert code == 0, output.err
    plan = json.loads(output.out)
    assert plan["family"] == variant.family
    assert set(variant.components) <= set(plan["components"])
    stages = plan["stages"]["cached"] + plan["stages"]["in_step"]
    assert sorted(stages) == sorted(variant.cached)
    assert plan["stages"]["in_step"] == []
    if kind == "lora":
        assert plan["trained"]["lora"]["base_model"] == variant.base
    else:
        assert plan["trained"]["full"] == [variant.trained]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("variant", "kind"), COMMANDS)
def test_the_template_asks_for_the_same(variant: Variant, kind: str) -> None:
    (path,) = (ROOT / "recipes" / "examples").rglob(f"{variant.template}_{kind}.yaml")
    recipe = read_recipe(path)
    theirs = read_arguments(command(variant, kind)).config
    own, flags = recipe.config.model_dump(), theirs.model_dump()
    # Where the data and the results lie, and what is told from the files or by accelerate.
    free = {"dataset_base_path", "dataset_metadata_path", "output_path", "family"}
    free |= {"mixed_precision", "data_file_keys"}
    if own["lora_target_modules"] is None:
        free.add("lora_target_modules")  # the family's usual ones, which are these
    assert {n: v for n, v in own.items() if n not in free} == {
        n: v for n, v in flags.items() if n not in free
    }
    plans = [make_plan(config) for config in (recipe.config, theirs)]
    assert plans[0]["stages"] == plans[1]["stages"]
    assert plans[0]["family"] == variant.family


BY_NAME = {variant.template: variant for variant in VARIANTS}
ACCEPTED = [
    ("qwen_image", "--tokenizer_path", "a"),
    ("qwen_image", "--initialize_model_on_cpu", ""),
    ("qwen_image_edit", "--processor_path", "a"),
    ("qwen_image_edit", "--zero_cond_t", ""),
    ("flux_dev", "--tokenizer_1_path", "a"),
    ("flux_dev", "--tokenizer_2_path", "a"),
    ("flux_dev", "--align_to_opensource_format", ""),
    ("wan21_t2v_1.3b", "--tokenizer_path", "a"),
    ("wan21_t2v_1.3b", "--max_timestep_boundary", "0.417"),
    ("wan21_t2v_1.3b", "--min_timestep_boundary", "0.417"),
    ("wan21_t2v_1.3b", "--initialize_model_on_cpu", ""),
    ("wan21_t2v_1.3b", "--num_frames", "49"),
]
REFUSED = [
    ("qwen_image", "--tokenizer_1_path", "a", "qwen_image takes no tokenizer_1_path"),
    ("qwen_image", "--align_to_opensource_format", "", "takes no align_to_opensource_format"),
    ("qwen_image", "--zero_cond_t", "", "zero_cond_t"),
    ("qwen_image", "--processor_path", "a", "processor_path"),
    ("qwen_image", "--num_frames", "49", "num_frames = 49 is given"),
    ("flux_dev", "--tokenizer_path", "a", "flux takes no tokenizer_path"),
    ("flux_dev", "--zero_cond_t", "", "flux takes no zero_cond_t"),
    ("flux_dev", "--extra_inputs", "controlnet_inpaint_mask", "'controlnet_inpaint_mask'"),
    ("wan21_t2v_1.3b", "--audio_processor_path", "a", "--audio_processor_path is not supported"),
    ("wan21_t2v_1.3b", "--framewise_decoding", "", "--framewise_decoding is not supported"),
    ("wan21_t2v_1.3b", "--extra_inputs", "control_video", "'control_video'"),
    ("wan21_t2v_1.3b", "--extra_inputs", "input_audio", "'input_audio'"),
    ("wan21_t2v_1.3b", "--num_frames", "50", "num_frames = 50 is no length"),
    ("wan21_t2v_1.3b", "--min_timestep_boundary", "1", "--min_timestep_boundary"),
    *(
        ("wan21_t2v_1.3b", flag, value, f"{flag} is not supported yet")
        for flag, value in (
            ("--offload_models", "a:b"),
            ("--resume_from_checkpoint", "a"),
            ("--quant_options", "a:bitsandbytes_nf4"),
            ("--template_model_id_or_path", "a"),
            ("--enable_lora_hot_loading", ""),
            ("--enable_model_cpu_offload", ""),
            ("--enable_optimizer_cpu_offload", ""),
            ("--cpu_offload_split_threshold", "100"),
        )
    ),
]


@pytest.mark.parametrize(("template", "flag", "value"), ACCEPTED)
def test_flags_of_the_family_are_accepted(template: str, flag: str, value: str) -> None:
    argv = [*command(BY_NAME[template], "lora"), flag, *([value] if value else [])]
    config = read_arguments(argv).config
    make_plan(config)
    without = [w for w in command(BY_NAME[template], "lora") if w != flag]
    assert getattr(config, flag[2:]) != getattr(read_arguments(without).config, flag[2:])


@pytest.mark.parametrize(("template", "flag", "value", "message"), REFUSED)
def test_what_the_family_does_not_do_is_refused_by_name(
    template: str, flag: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*command(BY_NAME[template], "lora"), flag, *([value] if value else []), "--dry_run"]
    assert main(argv) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""
