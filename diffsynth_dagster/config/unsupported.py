"""Models of the DiffSynth-Studio guide that cannot be trained here yet, told by the names of their
repositories and by parameters that only they have: so that they are named before anything else is
found fault with, and before anything is downloaded.
"""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, cast

from diffsynth_dagster.errors import ParameterError

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "flux2": ("black-forest-labs/flux.2*",),
    "z_image": ("tongyi-mai/z-image*", "pai/z-image*"),
    "ace_step": ("ace-step/*",),
    "anima": ("circlestone-labs/anima*",),
    "boogu_image": ("boogu/boogu-image*",),
    "joyai_image": ("jd-opensource/joyai-image*",),
    "ernie_image": ("paddlepaddle/ernie-image*", "baidu/ernie-image*"),
    "ideogram4": ("ideogram-ai/ideogram-4*", "diffsynth-studio/ideogram-4*"),
    "hidream_o1_image": ("hidream-ai/hidream-o1*",),
    "krea2": ("krea/krea-2*",),
    "lingbot_video": ("robbyant/lingbot-video*",),
    "minimax_h3": ("minimax/minimax-h3*", "minimaxai/minimax-h3*", "diffsynth-studio/minimax-h3*"),
    "mova": ("openmoss/mova*",),
}
"""Family → how the names of its repositories look, in small letters."""
_MODELS: Mapping[str, str] = {
    "meituan-longcat/longcat-video*": "LongCat-Video, which is no Wan,",
    "ostris/flex.2*": "FLEX.2, which is given more than the noise,",
    "black-forest-labs/flux.1-redux*": "FLUX.1 Redux",
    "black-forest-labs/flux.1-fill*": "FLUX.1 Fill",
    "black-forest-labs/flux.1-canny*": "FLUX.1 Canny",
    "black-forest-labs/flux.1-depth*": "FLUX.1 Depth",
    "alimama-creative/flux.1-dev-controlnet-inpainting*": "a ControlNet that is given a mask",
    "instantx/flux.1-dev-ip-adapter*": "an IP-Adapter",
    "bytedance/infiniteyou*": "InfiniteYou",
    "huanjue/insert-anything*": "Insert-Anything",
    "stepfun-ai/step1x-edit*": "Step1X-Edit",
    "diffsynth-studio/nexus-gen*": "Nexus-Gen",
    "diffsynth-studio/attrictrl*": "AttriCtrl",
    "diffsynth-studio/lora-encoder*": "a LoRA encoder",
    "qwen/qwen-image-layered*": "Qwen-Image-Layered",
    "diffsynth-studio/qwen-image-layered*": "Qwen-Image-Layered",
    "diffsynth-studio/qwen-image-blockwise-controlnet*": "a blockwise ControlNet of Qwen-Image",
    "pai/wan2*-fun-*control*": "Wan Fun-Control",
    "wan-ai/wan2.2-s2v*": "Wan S2V",
    "wan-ai/wan*animate*": "Wan Animate",
    "wan-ai/wan*dance*": "Wan Dancer",
    "bytedance/video-as-prompt*": "Video-As-Prompt",
    "diffsynth-studio/wan2.1-1.3b-speedcontrol*": "speed control of Wan",
}
"""How the name of a repository looks, in small letters → its model, which looks like one of a
supported family."""
_SHARED = re.compile(
    r"(^|/)(text_encoder|tokenizer|vae|processor|scheduler)(_\d)?/|models_(t5|clip)|_VAE\.|(^|/)ae\."
)
"""Files in such repositories that are those of a supported model."""
_PARAMETERS: Mapping[str, str] = {
    "dmd2_*": "flux2",
    "enable_npu_patch": "z_image",
    "first_frame_as_condition": "lingbot_video",
    "max_audio_duration": "ace_step",
    "noise_scale": "hidream_o1_image",
    "processor_config": "hidream_o1_image",
    "silence_latent_path": "ace_step",
    "silent_on_missing_audio": "minimax_h3",
    "tokenizer_t5xxl_path": "anima",
}
"""How a parameter of the guide looks that one family alone takes → the family."""
_DO = "docs/families.md lists the models that are trained"


def refuse_unsupported(values: Mapping[str, Any], where: str) -> None:
    """Raise a `ParameterError` where a family or a repository is named that is not supported yet.

    Args:
        values: parameter name → value as it is given, unchecked.
        where: where the values come from, for messages.
    """
    if values.get("family") in FAMILIES:
        raise ParameterError(
            f"the family '{values['family']}' is not supported yet", where="family", do=_DO
        )
    for text in _entries(values.get("model_id_with_origin_paths")):
        repository, _, pattern = text.partition(":")
        family = next((f for f, globs in FAMILIES.items() if _fits(repository, globs)), None)
        if family is not None:
            what = f"'{repository}' is of the family '{family}', which is not supported yet"
            raise ParameterError(what, where=where, do=_DO)
        model = next((m for glob, m in _MODELS.items() if _fits(repository, (glob,))), None)
        if model is not None and not _SHARED.search(pattern):
            what = f"'{repository}' is {model}".rstrip(",") + ", and is not supported yet"
            raise ParameterError(what, where=where, do=_DO)


def family_with(name: str) -> str | None:
    """The unsupported family that alone takes a parameter; None where there is none."""
    return next((f for glob, f in _PARAMETERS.items() if fnmatchcase(name, glob)), None)


def _fits(repository: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(repository.lower(), glob) for glob in globs)


def _entries(value: object) -> list[str]:
    """The texts of a model list that may be written with commas."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    listed = cast("list[object]", value) if isinstance(value, (list, tuple)) else []
    return [item for item in listed if isinstance(item, str)]
