"""The stages of FLUX.1 and one call of its transformer: tensors in, tensors out."""

from collections.abc import Sequence
from typing import Any

import torch

from diffsynth_dagster.families.contract import Loaded, Sample, Tensors
from diffsynth_dagster.families.shared.clip import encode_text
from diffsynth_dagster.families.shared.latents import encode_scaled
from diffsynth_dagster.families.shared.packing import Grid, grid_of, pack, pack_several, unpack
from diffsynth_dagster.families.shared.stages import encode_column
from diffsynth_dagster.families.shared.t5 import encode_padded

MAX_T5_TOKENS = 512
# FLUX.1-dev is guidance-distilled. With 1 it predicts without guidance, like the training target.
TRAINING_GUIDANCE = 1.0
GUIDANCE = "guidance"
"""The condition with the embedded guidance, if it is not `TRAINING_GUIDANCE` (in samples)."""
KONTEXT, CONTROL, MODE = "kontext_images", "controlnet_image", "controlnet_processor_id"
MODES = ("canny", "tile", "depth", "blur", "pose", "gray", "lq")
"""The kinds of control image of a union ControlNet, in the order of its mode numbers."""


def encode_pooled(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Prompt → CLIP's `pooled_prompt_embeds` (hidden,)."""
    _, outputs = encode_text(loaded, samples, "tokenizer", "text_encoder", hidden=False)
    return [{"pooled_prompt_embeds": embeds} for embeds in outputs.pooler_output]


def encode_prompt(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Prompt → T5's `prompt_embeds` (512, hidden)."""
    tokenizer, t5 = loaded["tokenizer_2"], loaded["text_encoder_2"]
    return [{"prompt_embeds": e} for e in encode_padded(tokenizer, t5, samples, MAX_T5_TOKENS)]


def encode_control(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """`controlnet_image` → `control` (C, H/8, W/8); the name of its mode → `control_mode` ()."""
    encoded = encode_column(loaded, samples, encode_scaled, CONTROL, "control")
    for sample, tensors in zip(samples, encoded, strict=True):
        if MODE in sample:
            tensors["control_mode"] = torch.tensor(MODES.index(sample[MODE].strip()))
    return encoded


def encode_kontext(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """Reference images → `kontext` (L, 4 C), the tokens of all images in order, and their positions
    `kontext_ids` (L, 3).

    A token of the i-th reference image has the position (i, row, column), i from 1. A token of the
    trained image has (0, row, column) (Black Forest Labs 2025, arXiv:2506.15742, section 3).
    DiffSynth-Studio gives all reference images the position (1, row, column).
    """
    # Samples have equal shapes, so their n-th images have equal sizes and can be stacked.
    by_position = zip(*(sample[KONTEXT] for sample in samples), strict=True)
    latents = (encode_scaled(loaded["vae"], torch.stack(images)) for images in by_position)
    tokens, grids = pack_several(latents)
    ids = [position_ids(grid, tokens.device, number) for number, grid in enumerate(grids, 1)]
    all_ids = torch.cat(ids)
    return [{"kontext": sample_tokens, "kontext_ids": all_ids} for sample_tokens in tokens]


def position_ids(grid: Grid, device: torch.device, number: int = 0) -> torch.Tensor:
    """The rotary positions (L, 3) of an image's tokens: image number, row, column."""
    axes = [torch.arange(n, device=device) for n in grid]
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([torch.full_like(rows, number), rows, columns], -1).view(-1, 3)


def denoise(
    dit: Any, loaded: Loaded, conditions: Tensors, x_t: Tensors, t: torch.Tensor
) -> Tensors:
    """The transformer's velocity for `image` (B, C, H, W) at timesteps t (B,) in [0, 1000]."""
    latents = x_t["image"]
    height, width = latents.shape[-2:]
    tokens, ids = pack(latents), position_ids(grid_of(latents), latents.device)
    embeds = conditions["prompt_embeds"]
    guidance = conditions.get(GUIDANCE, torch.full_like(t, TRAINING_GUIDANCE)).to(t)
    shared: dict[str, Any] = {
        "timestep": t / 1000,  # diffusers' FLUX modules multiply it by 1000 again
        "encoder_hidden_states": embeds,
        "pooled_projections": conditions["pooled_prompt_embeds"],
        "txt_ids": ids.new_zeros(embeds.shape[1], 3),
        "return_dict": False,
    }
    double = single = None
    if "control" in conditions:
        controlnet = loaded["controlnet"]
        mode = conditions.get("control_mode")
        double, single = controlnet(
            hidden_states=tokens,
            controlnet_cond=pack(conditions["control"]),
            controlnet_mode=None if mode is None else mode[:, None],
            img_ids=ids,
            guidance=guidance if controlnet.config.guidance_embeds else None,
            **shared,
        )
    count = tokens.shape[1]
    if "kontext" in conditions:
        # Samples of a batch have reference images of equal sizes: the ids of one fit all.
        tokens = torch.cat([tokens, conditions["kontext"]], 1)
        ids = torch.cat([ids, conditions["kontext_ids"][0]])
    velocity = dit(
        hidden_states=tokens,
        img_ids=ids,
        guidance=guidance if dit.config.guidance_embeds else None,
        controlnet_block_samples=double,
        controlnet_single_block_samples=single,
        **shared,
    )[0]
    # The model predicts the reference tokens too. They come last and are dropped.
    return {"image": unpack(velocity[:, :count], height, width)}
