"""diffusers' own pipelines for the rows of the families' table: what each makes of a row."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
)
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import (
    LTX2InContextPipeline,
    LTX2ReferenceCondition,
)
from diffusers.schedulers import EulerDiscreteScheduler
from families.flux import cases as flux
from families.ltx2 import cases as ltx2
from families.qwen_image import cases as qwen
from families.stable_diffusion import cases as sd
from families.stable_diffusion_xl import cases as sdxl
from families.wanvideo import cases as wan
from families.wanvideo.vision import AuthorsProcessor
from PIL import Image
from transformers import CLIPVisionModel

from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.shared.packing import pack
from diffsynth_dagster.objective.noise import generator

STEPS, SCALE = 3, 2.0
Row = Mapping[str, Any]
Size = tuple[int, int]
Sampled = tuple[list[Image.Image], torch.Tensor]
"""The frames that diffusers' pipeline makes, and the timesteps of its steps."""
Published = Callable[[Path, Row, Size], Sampled]
"""(Folder of the model, first row, width and height) → what diffusers' pipeline makes of it."""


def common(row: Row, size: Size) -> dict[str, Any]:
    return {
        "prompt": row["prompt"],
        "width": size[0],
        "height": size[1],
        "num_inference_steps": STEPS,
        "generator": generator(0, "image", 0),
    }


def sampled(pipeline: Any, **call: Any) -> Sampled:
    made = pipeline(**call, output_type="pil")
    frames = made.images if hasattr(made, "images") else made.frames[0]
    return frames, pipeline.scheduler.timesteps


def of_qwen(folder: Path, row: Row, size: Size) -> Sampled:
    pipeline: Any = QwenImagePipeline(**qwen.parts(folder))
    qwen.count_template(pipeline)
    return sampled(pipeline, **common(row, size), negative_prompt="", true_cfg_scale=SCALE)


def of_edit(
    folder: Path, row: Row, size: Size, kind: Any = QwenImageEditPlusPipeline, **transformer: Any
) -> Sampled:
    pipeline = kind(**qwen.parts(folder, **transformer), processor=qwen.processor(folder))
    qwen.with_token_types(pipeline.text_encoder)
    qwen.count_template(pipeline)
    opened = [Image.open(path).convert("RGB") for path in row["edit_image"]]
    call = {"image": opened if len(opened) > 1 else opened[0], "true_cfg_scale": SCALE}
    with qwen.at_small_area():
        return sampled(pipeline, **common(row, size), **call, negative_prompt="")


FLUX_GUIDANCE: dict[str, Any] = {
    "negative_prompt": "",
    "true_cfg_scale": SCALE,
    "guidance_scale": 3.5,
}


def of_flux(folder: Path, row: Row, size: Size) -> Sampled:
    pipeline: Any = FluxPipeline(**flux.parts_of(folder / "diffusers"))
    return sampled(pipeline, **common(row, size), **FLUX_GUIDANCE)


def of_kontext(folder: Path, row: Row, size: Size) -> Sampled:
    pipeline: Any = FluxKontextPipeline(**flux.parts_of(folder / "diffusers"))
    given = {"image": Image.open(row["kontext_images"][0]), "max_area": size[0] * size[1]}
    return sampled(pipeline, **common(row, size), **FLUX_GUIDANCE, **given, _auto_resize=False)


def of_flux_control(folder: Path, row: Row, size: Size, net: str) -> Sampled:
    controlnet = FluxControlNetModel.from_pretrained(folder / net / "controlnet")
    pipeline: Any = FluxControlNetPipeline(
        **flux.parts_of(folder / "diffusers"), controlnet=controlnet
    )
    each_with_its_own_residuals(pipeline)
    call = common(row, size)
    # The pipeline draws the control picture's latents first, from the same generator.
    noise = torch.randn(1, 4, size[1] // 8, size[0] // 8, generator=call["generator"])
    mode = row.get("controlnet_processor_id")
    return sampled(
        pipeline,
        **call,
        **FLUX_GUIDANCE,
        latents=pack(noise),
        control_image=Image.open(row["controlnet_image"]),
        control_mode=None if mode is None else flux.MODES.index(mode),
    )


def each_with_its_own_residuals(pipeline: Any) -> None:
    """Have the ControlNet read the negative prompt for the prediction with it, as in a training step.

    diffusers' pipeline of FLUX (not those of Stable Diffusion) runs it once, with the prompt, and adds
    the result to both predictions: what is to be guided away from then has the prompt in it.
    """
    controlnet, seen = pipeline.controlnet, {}
    prompts = ("encoder_hidden_states", "pooled_projections", "txt_ids")

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    def exchange(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # `forward` calls no hook.
        double, single = controlnet.forward(**{**seen, **{name: kwargs[name] for name in prompts}})
        kwargs["controlnet_block_samples"] = double
        kwargs["controlnet_single_block_samples"] = single
        return args, kwargs

    controlnet.register_forward_pre_hook(note, with_kwargs=True)
    pipeline.transformer.register_forward_pre_hook(exchange, with_kwargs=True)


def of_sd(folder: Path, row: Row, size: Size, cases: Any, plain: Any, controlled: Any) -> Sampled:
    own, given, kind = folder / "diffusers", {}, plain
    parts = cases.parts_of(own)
    if "controlnet_image" in row:
        kind, given = controlled, {"image": sd.control_image(row)}
        parts["controlnet"] = ControlNetModel.from_pretrained(folder / "controlnet" / "controlnet")
    pipeline = kind(**parts)
    settings = dict(pipeline.scheduler.config)
    spacing = "trailing" if settings["rescale_betas_zero_snr"] else "leading"
    pipeline.scheduler = EulerDiscreteScheduler.from_config(settings, timestep_spacing=spacing)
    return sampled(pipeline, **common(row, size), **given, guidance_scale=SCALE)


def evenly(pipeline: Any) -> None:
    """The sigmas of Wan's authors, as in `wan.sampled`."""
    choose = pipeline.scheduler.set_timesteps

    def chosen(steps: int, device: Any = None) -> None:
        choose(sigmas=np.linspace(1.0, 1 / steps, steps), device=device)

    pipeline.scheduler.set_timesteps = chosen


def of_wan(
    folder: Path,
    row: Row,
    size: Size,
    dit: str,
    kind: Any = WanPipeline,
    given: Callable[[Row], dict[str, Any]] = lambda row: {},
    vae: str = "vae",
    clip: bool = False,
    **parts: Any,
) -> Sampled:
    own = folder / "diffusers"
    if clip:
        encoder = CLIPVisionModel.from_pretrained(own / "image_encoder")
        parts |= {"image_encoder": encoder, "image_processor": AuthorsProcessor()}
    pipeline: Any = kind(**{**wan.parts(own, dit, vae), **parts})
    evenly(pipeline)
    negative = find_family("wanvideo").sampling.negative_prompt
    call = {"negative_prompt": negative, "guidance_scale": SCALE, "num_frames": wan.FRAMES}
    return sampled(pipeline, **common(row, size), **{**call, **given(row)})


def of_experts(
    folder: Path, row: Row, size: Size, high: str, low: str, boundary: float, **more: Any
) -> Sampled:
    first, second = (
        WanTransformer3DModel.from_pretrained(folder / "diffusers" / name) for name in (high, low)
    )
    both = {"transformer": first, "transformer_2": second, "boundary_ratio": boundary}
    return of_wan(folder, row, size, "transformer", **both, **more)


def of_ltx(folder: Path, row: Row, size: Size, kind: Any = LTX2Pipeline) -> Sampled:
    pipeline = ltx2.pipeline_of(folder, kind)
    call = common(row, size)
    if kind is LTX2ImageToVideoPipeline:
        # The pipeline compresses it with its default, 33, as `first_frame_crf` of the case does.
        call["image"] = wan._pictures(row["video"], ltx2.SIDE, ltx2.FRAMES)[0]
    if kind is LTX2InContextPipeline:
        frames = wan._pictures(row["in_context_videos"][0], ltx2.SIDE // 2, ltx2.FRAMES)
        call["reference_conditions"] = [LTX2ReferenceCondition(frames=frames)]
        call["reference_downscale_factor"] = row["in_context_downsample_factor"]
        # It would draw noise for the tokens of the reference videos too, and leave it.
        call |= ltx2._clean_latents(pipeline, ltx_noise(call["generator"])) | {"noise_scale": 0.0}
    return sampled(
        pipeline,
        **call,
        negative_prompt=find_family("ltx2").sampling.negative_prompt,
        num_frames=ltx2.FRAMES,
        frame_rate=float(row.get("frame_rate", 24.0)),
        guidance_scale=SCALE,
        audio_guidance_scale=SCALE,
        **ltx2.PLAIN_GUIDANCE,
    )


def ltx_noise(source: torch.Generator) -> dict[str, torch.Tensor]:
    """The noise of the tiny model's clip at 25 frames per second."""
    grid = (1 + (ltx2.FRAMES - 1) // 8, ltx2.SIDE // 32, ltx2.SIDE // 32)
    # There are 25 latents of sound in a second, too.
    shapes = {"video": (16, *grid), "audio": (ltx2.FRAMES, 16)}
    return {name: torch.randn(shape, generator=source) for name, shape in shapes.items()}


FRAME: dict[str, Any] = {"kind": WanImageToVideoPipeline, "given": wan.first_frame}
OF_SD = partial(
    of_sd, cases=sd, plain=StableDiffusionPipeline, controlled=StableDiffusionControlNetPipeline
)
OF_SDXL = partial(
    of_sd,
    cases=sdxl,
    plain=StableDiffusionXLPipeline,
    controlled=StableDiffusionXLControlNetPipeline,
)
PUBLISHED: dict[str, Published] = {
    "qwen_image": of_qwen,
    "qwen_image_edit": partial(of_edit, kind=QwenImageEditPipeline),
    "qwen_image_edit_plus": of_edit,
    "qwen_image_edit_zero_cond_t": partial(of_edit, zero_cond_t=True),
    "flux": of_flux,
    "flux_kontext": of_kontext,
    "flux_controlnet": partial(of_flux_control, net="controlnet"),
    "flux_controlnet_union": partial(of_flux_control, net="union"),
    "wan_t2v": partial(of_wan, dit="transformer"),
    "wan_i2v": partial(of_wan, dit="transformer_i2v", clip=True, **FRAME),
    "wan_flf2v": partial(
        of_wan,
        dit="transformer_flf2v",
        kind=WanImageToVideoPipeline,
        given=wan.both_frames,
        clip=True,
    ),
    "wan22_t2v_both": partial(
        of_experts,
        high="transformer",
        low="transformer_2",
        boundary=0.875,
        given=lambda row: {"guidance_scale": 4.0, "guidance_scale_2": 3.0},
    ),
    "wan22_i2v_both": partial(
        of_experts,
        high="high_noise_i2v",
        low="low_noise_i2v",
        boundary=0.9,
        kind=WanImageToVideoPipeline,
        given=lambda row: {**wan.first_frame(row), "guidance_scale": 3.5},
    ),
    "wan22_ti2v_5b": partial(
        of_wan,
        dit="transformer_ti2v",
        kind=WanImageToVideoPipeline,
        given=partial(wan.first_frame, side=64),
        vae="vae_wide",
        expand_timesteps=True,
    ),
    "wan_vace": partial(of_wan, dit="transformer_vace", kind=WanVACEPipeline, given=wan.control),
    "sd15": OF_SD,
    "sd15_v": OF_SD,
    "sd15_controlnet": OF_SD,
    "sdxl": OF_SDXL,
    "sdxl_controlnet": OF_SDXL,
    "ltx2_t2av": of_ltx,
    "ltx2_i2av": partial(of_ltx, kind=LTX2ImageToVideoPipeline),
    "ltx2_silent": of_ltx,
    "ltx2_ic_lora": partial(of_ltx, kind=LTX2InContextPipeline),
}


def write_experts(folder: Path) -> None:
    """The models of Wan, and both experts of I2V A14B."""
    wan.write(folder)
    own = folder / "diffusers"
    expert = WanTransformer3DModel.from_pretrained(own / "transformer_i2v_low")
    for name in ("low_noise_i2v", "high_noise_i2v"):
        expert.save_pretrained(own / name)
        for parameter in expert.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)


I2V_EXPERTS = replace(
    next(case for case in wan.CASES if case.name == "wan22_t2v_both"),
    name="wan22_i2v_both",
    write=write_experts,
    layouts=wan.layouts("high_noise_i2v", second="low_noise_i2v"),
    parameters={"height": 32, "width": 32, "num_frames": wan.FRAMES, **wan.FIRST},
)
