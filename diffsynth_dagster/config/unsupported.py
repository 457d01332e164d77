"""Recognises models of the DiffSynth-Studio guide that cannot be trained here yet.

They are recognised by the names of their repositories, and by parameters that only they have. So
the user learns that the model is not supported before any other error, and before any download.
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
"""Family → globs of its repositories' names, in lower case."""
_MODELS: Mapping[str, str] = {
    "meituan-longcat/longcat-video*": "LongCat-Video",
    "ostris/flex.2*": "FLEX.2",
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
"""Glob of a repository's name in lower case → its model, which looks like a supported one."""
_REASONS: Mapping[str, str] = {
    "LongCat-Video": "it is no Wan",
    "FLEX.2": "it is given more than the noise",
}
"""Model in `_MODELS` → why it cannot be trained like the supported one that it looks like."""
_SHARED = re.compile(
    r"(^|/)(text_encoder|tokenizer|vae|processor|scheduler)(_\d)?/|models_(t5|clip)|_VAE\.|(^|/)ae\."
)
"""Files in repositories of `_MODELS` that are the same as those of a supported model."""
_VAE = re.compile(r"(^|/)(vae/|ae\.)|_vae\.", re.I)
_WITH_SHARED_VAE = ("z_image", "krea2", "anima")
"""Families that use the VAE of FLUX.1 or Qwen-Image. To train FLUX.1 or Qwen-Image, the VAE may be
taken from their repositories. Other families, such as FLUX.2, have a VAE of their own."""
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
"""Glob of a parameter of the guide → the only family that has it."""
_DO = "docs/families.md lists the models that are trained"


def refuse_unsupported(values: Mapping[str, Any], where: str) -> None:
    """Raise a `ParameterError` if a family or a repository is named that is not supported yet.

    Args:
        values: parameter name → unchecked value.
        where: where the values come from, for messages.
    """
    named = values.get("family")
    if isinstance(named, str) and named in FAMILIES:
        raise ParameterError(f"the family '{named}' is not supported yet", where="family", do=_DO)
    entries = [text.partition(":") for text in _entries(values.get("model_id_with_origin_paths"))]
    families = {_family_of(repository) for repository, _, _ in entries}
    # Local files may be of any family: they count as a supported model that a VAE is borrowed for.
    if values.get("model_paths"):
        families.add(None)
    for repository, _, pattern in entries:
        family = _family_of(repository)
        # A VAE from there is fine beside a supported model. Alone it means that the unsupported
        # family's own samples are to be encoded.
        is_borrowed = family in _WITH_SHARED_VAE and families != {family} and _VAE.search(pattern)
        if family is not None and not is_borrowed:
            what = f"'{repository}' is of the family '{family}', which is not supported yet"
            raise ParameterError(what, where=where, do=_DO)
        model = next((m for glob, m in _MODELS.items() if _fits(repository, (glob,))), None)
        if model is not None and not _SHARED.search(pattern):
            what = f"'{repository}' is {model}, and is not supported yet"
            why = f" ({_REASONS[model]})" if model in _REASONS else ""
            raise ParameterError(what + why, where=where, do=_DO)


def family_with(name: str) -> str | None:
    """The unsupported family that is the only one to have a parameter; None if there is none."""
    return next((f for glob, f in _PARAMETERS.items() if fnmatchcase(name, glob)), None)


def _family_of(repository: str) -> str | None:
    """The unsupported family that a repository belongs to; None if it belongs to none."""
    return next((f for f, globs in FAMILIES.items() if _fits(repository, globs)), None)


def _fits(repository: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(repository.lower(), glob) for glob in globs)


def _entries(value: object) -> list[str]:
    """The entries of an unchecked model list: a list, or a text with commas."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    listed = cast("list[object]", value) if isinstance(value, (list, tuple)) else []
    return [item for item in listed if isinstance(item, str)]
