"""How FLUX.1 encodes the columns of a row: its stages."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.families.contract import (
    Loaded,
    Output,
    Sample,
    Shapes,
    Stage,
    Tensors,
)
from diffsynth_dagster.families.shared.support import PATCH, pack

MAX_T5_TOKENS = 512
KONTEXT, CONTROL, MODE = "kontext_images", "controlnet_image", "controlnet_processor_id"
MODES = ("canny", "tile", "depth", "blur", "pose", "gray", "lq")
"""What a union ControlNet is given, in the order of its modes."""


def _tokens(tokenizer: Any, samples: Sequence[Sample], length: int) -> torch.Tensor:
    """Prompts → tokens (B, length). The transformer attends to the padding."""
    prompts = [sample["prompt"] for sample in samples]
    return tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def encode_pooled(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Prompt → `pooled_prompt_embeds` (hidden,) of CLIP."""
    clip = loaded["text_encoder"]
    tokens = _tokens(loaded["tokenizer"], samples, clip.config.max_position_embeddings)
    pooled = clip(tokens.to(clip.device)).pooler_output
    return [{"pooled_prompt_embeds": embeds} for embeds in pooled]


def encode_prompt(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Prompt → `prompt_embeds` (512, hidden) of T5."""
    t5 = loaded["text_encoder_2"]
    tokens = _tokens(loaded["tokenizer_2"], samples, MAX_T5_TOKENS)
    return [{"prompt_embeds": e} for e in t5(tokens.to(t5.device)).last_hidden_state]


def _latents(vae: AutoencoderKL, images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Images (3, H, W) → (B, C, H/8, W/8): the mode of the VAE's posterior, normalised."""
    config: Any = vae.config
    pixels = torch.stack(list(images)).to(vae.device, vae.dtype)
    posterior: Any = vae.encode(pixels)
    latents = posterior.latent_dist.mode().float()
    return (latents - config.shift_factor) * config.scaling_factor


def encode_image(
    loaded: Loaded, samples: Sequence[Sample], column: str = "image", name: str = "image"
) -> list[Tensors]:
    """Image (3, H, W) of a column → latents (C, H/8, W/8) called `name`."""
    images = [sample[column] for sample in samples]
    return [{name: latents} for latents in _latents(loaded["vae"], images)]


def encode_control(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """`controlnet_image` → `control` (C, H/8, W/8); its mode's name → `control_mode` ()."""
    encoded = encode_image(loaded, samples, CONTROL, "control")
    for sample, tensors in zip(samples, encoded, strict=True):
        if MODE in sample:
            tensors["control_mode"] = torch.tensor(MODES.index(sample[MODE].strip()))
    return encoded


def encode_kontext(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Reference images → `kontext` (L, 4 C), the tokens of all one after another, and their
    `kontext_ids` (L, 3), whose first axis counts the images from 1."""
    tokens: list[torch.Tensor] = []
    ids: list[torch.Tensor] = []
    for number, images in enumerate(zip(*(s[KONTEXT] for s in samples), strict=True), 1):
        latents = _latents(loaded["vae"], images)
        tokens.append(pack(latents))
        ids.append(position_ids(latents, number))
    together = torch.cat(ids)
    return [{"kontext": t, "kontext_ids": together} for t in torch.cat(tokens, 1)]


def position_ids(latents: torch.Tensor, number: int = 0) -> torch.Tensor:
    """Rotary positions of the tokens of latents (B, C, H, W): `number`, row, column (L, 3)."""
    height, width = (side // PATCH for side in latents.shape[-2:])
    axes = [torch.arange(n, device=latents.device) for n in (height, width)]
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([torch.full_like(rows, number), rows, columns], -1).view(-1, 3)


KONTEXT_STAGE = Stage(
    "kontext",
    (Input(KONTEXT, "image", many=True),),
    ("vae",),
    (Output("kontext", "condition"), Output("kontext_ids", "condition")),
    encode_kontext,
)


_MODE_INPUT = Input(
    MODE, "text", pattern=rf"^\s*(?:{'|'.join(MODES)})\s*$", wants=f"one of {', '.join(MODES)}"
)


def control_stage(is_union: bool) -> Stage:
    """The stage of the ControlNet's image, and of its mode where it is a union of several."""
    modes = (Output("control_mode", "condition"),) if is_union else ()
    return Stage(
        "control",
        (
            Input(CONTROL, "image", same_size=True),
            *((_MODE_INPUT,) if is_union else ()),
        ),
        ("vae",),
        (Output("control", "condition"), *modes),
        encode_control,
    )


def check_control(config: TrainingConfig, given: Mapping[str, Shapes]) -> None:
    """Check that a ControlNet and its columns go together, as far as the models are known.

    Raises:
        ParameterError: they do not, or are of a kind that is not supported.
    """
    extra = config.extra_inputs
    all_told = len(given) == len(config.model_paths) + len(config.model_id_with_origin_paths)
    shapes = given.get("controlnet")
    is_union = "controlnet_mode_embedder.weight" in (shapes or ())

    def refuse(what: str, do: str) -> None:
        raise ParameterError(what, where="extra_inputs", do=do)

    if CONTROL in extra and shapes is None and all_told and not config.encodes_only:
        refuse(f"{CONTROL} is given but no ControlNet", "add its files to the model list")
    if CONTROL not in extra and shapes is not None:
        refuse(f"the model list has a ControlNet, but {CONTROL} is not given", f"name {CONTROL}")
    if CONTROL not in extra and MODE in extra:
        refuse(f"{MODE} is given but not {CONTROL}", f"name {CONTROL} as well")
    if CONTROL in extra and KONTEXT in extra:
        refuse(f"{KONTEXT} and {CONTROL} do not go together", "name one of them")
    if shapes and any(name.startswith("input_hint_block.") for name in shapes):
        refuse(
            "the ControlNet reads its image with layers of its own, which is not supported",
            "give one that reads latents, such as those of InstantX, Shakker Labs or Jasper",
        )
    dit = given.get("dit")
    if dit and dit["x_embedder.weight"][1] != dit["proj_out.weight"][0]:
        refuse(
            "the transformer is given an image beside the noise (Fill, Depth, Canny), which is not "
            "supported",
            "give FLUX.1-dev, Krea-dev or Kontext-dev",
        )
    if shapes and shapes["controlnet_x_embedder.weight"] != shapes["x_embedder.weight"]:
        refuse(
            "the ControlNet reads more than an image (an inpainting one, with a mask), which is "
            "not supported",
            "give one that reads an image alone",
        )
    if shapes and is_union and MODE not in extra:
        refuse(f"the ControlNet is a union of several, and {MODE} is not given", f"name {MODE}")
    if shapes and not is_union and MODE in extra:
        refuse(f"{MODE} is given, but the ControlNet has no modes", "leave it out")
