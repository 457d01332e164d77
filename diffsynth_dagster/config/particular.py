"""What only some families take. A family lists its own in `Family.parameters`."""

from typing import Literal

from pydantic import BaseModel

from diffsynth_dagster.config.kinds import ModelFolder, parameter


class ParticularParameters(BaseModel):
    """What only some families take: the others refuse it by name."""

    tokenizer_path: ModelFolder | None = parameter(
        None,
        "Folder of the tokenizer: a path or repository:pattern.",
        affects="weights",
        by_content=True,
    )
    tokenizer_1_path: ModelFolder | None = parameter(
        None,
        "Folder of the first tokenizer, of families with two.",
        affects="weights",
        by_content=True,
    )
    tokenizer_2_path: ModelFolder | None = parameter(
        None,
        "Folder of the second tokenizer, of families with two.",
        affects="weights",
        by_content=True,
    )
    processor_path: ModelFolder | None = parameter(
        None, "Folder of the processor of image editing.", affects="weights", by_content=True
    )
    audio_processor_path: ModelFolder | None = parameter(
        None,
        "Folder of the processor of speech.",
        affects="weights",
        by_content=True,
        planned=True,
    )
    # Both say which stage encodes the prompt; `zero_cond_t` is also the denoiser's architecture.
    zero_cond_t: bool = parameter(
        False,
        "Give the latents of edit images the timestep zero, as Qwen-Image-Edit-2511 does.",
        affects="latents",
    )
    edit_plus: bool | None = parameter(
        None,
        "Show also a single edit image to the text encoder as Qwen-Image-Edit-2509 and later, and "
        "FireRed-Image-Edit, do. On by itself with zero_cond_t, and where the model list names one of "
        "these; to be said where its names do not tell the release.",
        affects="latents",
        left_out_as=False,
    )
    zero_terminal_snr: bool = parameter(
        False,
        "Noise schedule that ends in nothing but noise, for models that predict v. On by itself "
        "where the scheduler published with the model says so.",
        affects="training",
        needs="prediction_type",
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = parameter(
        None,
        "What the model predicts: the noise or v. Left out, the scheduler published with it says it.",
        affects="training",
    )
    min_snr_gamma: float | None = parameter(
        None,
        "Bound of the loss weight by the signal-to-noise ratio (Hang et al. 2023), such as 5. Left "
        "out, all timesteps weigh the same.",
        affects="training",
        gt=0,
    )
    audio_loss_weight: float = parameter(
        1.0,
        "What the loss of the sound is multiplied by, beside that of the video.",
        affects="training",
        ge=0.0,
    )
    first_frame_crf: int | None = parameter(
        None,
        "Compress the first frame that is given (input_image) with H.264 at this constant rate "
        "factor before it is encoded, as LTX-2 and 2.3 do with 33 when a video is made. Left out, it "
        "is encoded as it is.",
        affects="latents",
        off_by_default=True,
        ge=1,
        le=51,
    )
    caption_chunks: int = parameter(
        1,
        "Read up to so many chunks of 75 tokens of a caption, each encoded by CLIP with its own begin "
        "and end, as AUTOMATIC1111 and ComfyUI do. With 1, what lies behind 75 tokens is cut off.",
        affects="latents",
        off_by_default=True,
        ge=1,
        le=4,
    )
    align_to_opensource_format: bool = parameter(
        False,
        "Another word for checkpoint_format = kohya.",
        affects="training",
        needs="lora_base_model",
    )
