"""Qwen-Image-Edit, -2509, -2511 and FireRed-Image-Edit: Qwen-Image with pictures beside the prompt.

The column `edit_image` has one picture or several. They are used twice: the text encoder reads them
with the prompt, and their latents follow the noisy latents in the transformer's sequence.

The first release and the later ones prompt the text encoder differently:

    Qwen-Image-Edit    one picture, at the size that the VAE gets, without a name
    later (the "Plus"  each picture is called "Picture 1", "Picture 2", … and has at most
    pipeline)          384 x 384 pixels

Several pictures always use the later way. For a single picture it depends on the release that is
trained: see `release.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.geometry import area_size
from diffsynth_dagster.data.media.image import to_tensor
from diffsynth_dagster.families.contract import (
    Family,
    Loaded,
    Output,
    Sample,
    Shapes,
    Stage,
    Tensors,
    Tokenizer,
)
from diffsynth_dagster.families.qwen_image.release import decide
from diffsynth_dagster.families.qwen_image.stages import encode_pixels
from diffsynth_dagster.families.requirements import InputNamed, ParameterSet, Refusal
from diffsynth_dagster.families.shared.packing import pack_several
from diffsynth_dagster.families.shared.qwen_vl import PICTURE, encode_with_pictures
from diffsynth_dagster.families.shared.stages import PROMPT

COLUMN = "edit_image"
FIRST, LATER = "edit_prompt", "edit_prompt_later"
"""The prompt stage of the first and of the later releases. They have different names so that their
outputs have different cache keys."""
TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, "
    "texture, objects, background), then explain how the user's text instruction should alter or "
    "modify the image. Generate a new image that meets the user's requirements while maintaining "
    "consistency with the original input where appropriate.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
AREA = 1024 * 1024
"""Pixels of a picture for the VAE. `max_pixels` does not apply: it is for the trained image."""
SHOWN_AREA = 384 * 384
"""Pixels of a picture for the text encoder in later releases."""

_EDITS = InputNamed(COLUMN)
# Each of these is a mistake in a training without edit images.
_NEEDS_EDITS = {
    "data_file_keys": InputNamed(COLUMN, "data_file_keys"),
    **{name: ParameterSet(name) for name in ("processor_path", "zero_cond_t", "edit_plus")},
}
REFUSALS = tuple(
    Refusal(
        f"{name} is about edit images, which are not trained on",
        f"name '{COLUMN}' in extra_inputs and data_file_keys, or in neither",
        when=(given,),
        unless=(_EDITS,),
        where=name,
    )
    for name, given in _NEEDS_EDITS.items()
)

PROCESSOR = Tokenizer(
    "processor",
    "processor_path",
    "Qwen/Qwen-Image-Edit:processor/",
    Qwen2VLImageProcessorPil.from_pretrained,
)


def resized(picture: Image.Image, area: int) -> Image.Image:
    """Resize a picture to about this area in pixels, to sides that are multiples of 32. The aspect
    ratio is kept approximately."""
    size = area_size(picture.width, picture.height, area)
    return picture.resize(size, Image.Resampling.LANCZOS)


def shown(pictures: Sequence[Image.Image], later: bool) -> tuple[str, list[Image.Image]]:
    """Prepare the pictures of a row for the text encoder.

    Args:
        later: whether to use the later releases' way for a single picture.

    Returns:
        The text before the prompt, with one `PICTURE` for each picture, and the resized pictures.
    """
    if len(pictures) == 1 and not later:
        return PICTURE, [resized(pictures[0], AREA)]
    named = [f"Picture {number}: {PICTURE}" for number in range(1, len(pictures) + 1)]
    return "".join(named), [resized(picture, SHOWN_AREA) for picture in pictures]


def encode_prompt(loaded: Loaded, samples: Sequence[Sample], later: bool) -> list[Tensors]:
    """Prompt and pictures → `prompt_embeds` (L, hidden): the last hidden states after the
    template's prefix. For `later` see `shown`.

    Encodes one sample at a time, because the sequences are long and differ in length.
    """
    results: list[Tensors] = []
    for sample in samples:
        prefix, pictures = shown(sample[COLUMN], later)
        states = encode_with_pictures(loaded, prefix + sample["prompt"], pictures, TEMPLATE)
        results.append({"prompt_embeds": states})
    return results


def encode_pictures(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
    """N pictures → `edit_tokens` (L, 4 C), the packed latents of all pictures in order, and
    `edit_grids` (N, 2), the rows and columns of tokens of each picture.
    """
    # Samples have equal shapes, so their n-th pictures have equal sizes and can be stacked.
    by_position = zip(*(sample[COLUMN] for sample in samples), strict=True)
    batches = (torch.stack([to_tensor(resized(p, AREA)) for p in nth]) for nth in by_position)
    tokens, grids = pack_several(encode_pixels(loaded["vae"], pixels) for pixels in batches)
    sizes = torch.tensor(grids, device=tokens.device)
    return [{"edit_tokens": sample_tokens, "edit_grids": sizes} for sample_tokens in tokens]


def variant(family: Family, config: TrainingConfig, given: Mapping[str, Shapes]) -> Family:
    """Qwen-Image, or an editing release if `extra_inputs` lists the edit image.

    Raises:
        ParameterError: it is not clear which release is trained.
    """
    if COLUMN not in config.extra_inputs:
        return family
    pictures = Input(COLUMN, "picture", many=True, area=AREA)
    later, warnings = decide(config, FIRST, LATER)
    prompt = Stage(
        LATER if later else FIRST,
        (PROMPT, pictures),
        ("tokenizer", "processor", "text_encoder"),
        family.stage("prompt").yields,
        partial(encode_prompt, later=later),
    )
    latents = Stage(
        "edit_image",
        (pictures,),
        ("vae",),
        (Output("edit_tokens", "condition"), Output("edit_grids", "condition")),
        encode_pictures,
    )
    components = family.components
    if config.zero_cond_t:
        # The transformer gives the edit images the timestep 0. The parameter overrides config.json.
        denoiser = family.component(family.denoiser)
        construction = replace(denoiser.construction, fixed={"zero_cond_t": True})
        with_zero = replace(denoiser, construction=construction)
        components = tuple(with_zero if c is denoiser else c for c in components)
    return replace(
        family,
        architecture="qwen-image-edit",
        components=components,
        tokenizers=(*family.tokenizers, PROCESSOR),
        stages=(family.stage("image"), latents, prompt),
        warnings=warnings,
    )
