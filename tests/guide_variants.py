"""The variants of the guide's command lines; for `test_guide_commands.py`."""

from dataclasses import dataclass, field
from typing import Any

QT = (
    "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1"
)
FT = (
    "a_to_qkv,b_to_qkv,ff_a.0,ff_a.2,ff_b.0,ff_b.2,a_to_out,b_to_out,proj_out,norm.linear,"
    "norm1_a.linear,norm1_b.linear,to_qkv_mlp"
)
WT = "q,k,v,o,ffn.0,ffn.2"
# The guide lists the 722 full names of these layers.
XT = "to_q,to_k,to_v,to_out.0,ff.net.0.proj,ff.net.2,proj_in,proj_out"
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
    repository = more.pop("rest", dit.split(":")[0])
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


def ltx(template: str, model: str, *extra: str, **more: Any) -> Variant:
    sound = "input_audio" in extra
    files = ["transformer", "text_encoder_post_modules", "video_vae_encoder"]
    files += ["audio_vae_encoder"] if sound else []
    components = ["dit", "text_encoder_post_modules", "vae", *(["audio_vae"] if sound else [])]
    keys = ["video", *(name for name in ("input_audio", "in_context_videos") if name in extra)]
    flags = {"--height": "512", "--width": "768", "--num_frames": more.pop("frames", "121")}
    flags |= {"--dataset_repeat": "100", **CHECKPOINTING}
    if extra:
        flags |= {"--extra_inputs": ",".join(extra), "--data_file_keys": ",".join(keys)}
    models = [f"DiffSynth-Studio/{model}-Repackage:{name}.safetensors" for name in files]
    return Variant(
        template,
        "ltx2",
        ",".join([*models, "google/gemma-3-12b-it-qat-q4_0-unquantized:model-*.safetensors"]),
        (*components, "text_encoder"),
        ("prompt", "video", *(["audio"] if sound else []), *more.pop("cached", ())),
        flags,
        targets="to_k,to_q,to_v,to_out.0",
    )


def unet(template: str, family: str, repository: str, side: str, **more: Any) -> Variant:
    control = more.pop("control", False)
    encoders = ("text_encoder", *(["text_encoder_2"] if family.endswith("xl") else []))
    files = [f"{encoder}/model.safetensors" for encoder in encoders]
    files += [f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")]
    flags = {"--height": side, "--width": side, **CHECKPOINTING, **more.pop("flags", {})}
    if control:
        flags["--model_paths"] = '["models/controlnet/diffusion_pytorch_model.safetensors"]'
        flags |= {"--data_file_keys": "image,controlnet_image"}
        flags |= {"--extra_inputs": "controlnet_image"}
    return Variant(
        template,
        family,
        ",".join(f"{repository}:{file}" for file in files),
        ("unet", *encoders, "vae", *(["controlnet"] if control else [])),
        (*more.pop("cached"), *(["control"] if control else [])),
        flags,
        base="unet",
        trained="controlnet" if control else "unet",
        prefix="pipe.unet.",
        **more,
    )


def sd15(template: str, **more: Any) -> Variant:
    return unet(
        template,
        "stable_diffusion",
        "AI-ModelScope/stable-diffusion-v1-5",
        "512",
        flags={"--dataset_repeat": "50"},
        cached=("prompt", "image"),
        targets="",
        **more,
    )


def sdxl(template: str, **more: Any) -> Variant:
    return unet(
        template,
        "stable_diffusion_xl",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "1024",
        flags={"--dataset_repeat": "10"},
        cached=("prompt", "prompt_2", "image", "sizes"),
        targets=XT,
        lora={"--align_to_opensource_format": ""},
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
    *(
        qwen(
            f"firered_image_edit_{version}",
            f"FireRedTeam/FireRed-Image-Edit-{version}",
            edits=True,
            cached=EDIT_PLUS,
        )
        for version in ("1.0", "1.1")
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
        "krea_realtime_video",
        "krea/krea-realtime-video:krea-realtime-video-14b.safetensors",
        None,
        rest=f"{W21}-T2V-14B",
    ),
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
    sd15("sd15"),
    sd15("sd15_controlnet", control=True),
    sdxl("sdxl"),
    sdxl("sdxl_controlnet", control=True),
    ltx("ltx2_t2av", "LTX-2", "input_audio"),
    ltx("ltx2_i2av", "LTX-2", "input_audio", "input_image", cached=("known_frame",)),
    ltx("ltx2_t2v", "LTX-2"),
    ltx(
        "ltx2_ic_lora",
        "LTX-2",
        "input_audio",
        "in_context_videos",
        "in_context_downsample_factor",
        "frame_rate",
        frames="81",
        cached=("context",),
    ),
    ltx("ltx23_t2av", "LTX-2.3", "input_audio"),
    ltx("ltx23_i2av", "LTX-2.3", "input_audio", "input_image", cached=("known_frame",)),
)
