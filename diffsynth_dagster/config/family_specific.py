"""Parameters that only some families have. Each family lists its own in `Family.parameters`."""

from typing import Literal

from pydantic import BaseModel

from diffsynth_dagster.config.declare import ModelFolder, parameter


class FamilySpecificParameters(BaseModel):
    """Parameters that only some families have; the others refuse them."""

    tokenizer_path: ModelFolder | None = parameter(
        None,
        "Folder of the tokenizer: a path or repository:pattern.",
        affects="weights",
        by_content=True,
    )
    tokenizer_1_path: ModelFolder | None = parameter(
        None,
        "Folder of the first tokenizer, for families with two.",
        affects="weights",
        by_content=True,
    )
    tokenizer_2_path: ModelFolder | None = parameter(
        None,
        "Folder of the second tokenizer, for families with two.",
        affects="weights",
        by_content=True,
    )
    processor_path: ModelFolder | None = parameter(
        None, "Folder of the processor for image editing.", affects="weights", by_content=True
    )
    audio_processor_path: ModelFolder | None = parameter(
        None,
        "Folder of the processor for speech.",
        affects="weights",
        by_content=True,
        planned=True,
    )
    # Both decide which stage encodes the prompt. `zero_cond_t` changes the denoiser as well.
    zero_cond_t: bool = parameter(
        False,
        "Give the latents of edit images the timestep zero, as Qwen-Image-Edit-2511 does.",
        affects="latents",
    )
    edit_plus: bool | None = parameter(
        None,
        "Show an edit image to the text encoder in the way of Qwen-Image-Edit-2509 and later, and of "
        "FireRed-Image-Edit, even if it is the only one. Switched on automatically with zero_cond_t, and "
        "if the model list names one of these models; give it if the names do not show the release.",
        affects="latents",
        left_out_as=False,  # the default before None was allowed
    )
    zero_terminal_snr: bool = parameter(
        False,
        "Noise schedule that ends in pure noise, for models that predict v. Switched on automatically "
        "if the scheduler published with the model says so.",
        affects="training",
        needs="prediction_type",
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = parameter(
        None,
        "What the model predicts: the noise or v. Left out: what the scheduler published with it says.",
        affects="training",
    )
    min_snr_gamma: float | None = parameter(
        None,
        "Gamma of min-SNR loss weighting, the bound of the signal-to-noise ratio (Hang et al. 2023), "
        "such as 5. Left out: all timesteps weigh the same.",
        affects="training",
        gt=0,
    )
    audio_loss_weight: float = parameter(
        1.0,
        "Factor of the loss of the sound, which is added to the loss of the video.",
        affects="training",
        ge=0.0,
    )
    first_frame_crf: int | None = parameter(
        None,
        "Compress the given first frame (input_image) with H.264 at this constant rate factor before "
        "it is encoded, as LTX-2 and 2.3 do with 33 when they generate a video. Left out: it is "
        "encoded as it is.",
        affects="latents",
        off_by_default=True,
        ge=1,
        le=51,
    )
    caption_chunks: int = parameter(
        1,
        "Read up to this many chunks of 75 tokens of a caption, each encoded by CLIP with its own begin "
        "and end tokens, as AUTOMATIC1111 and ComfyUI do. With 1, everything after 75 tokens is cut off.",
        affects="latents",
        off_by_default=True,
        ge=1,
        le=4,
    )
    align_to_opensource_format: bool = parameter(
        False,
        "Another name for checkpoint_format = kohya.",
        affects="training",
        needs="lora_base_model",
    )
