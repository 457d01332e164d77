"""Which Wan model a config trains: its stages, columns, sizes and refusals."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from diffsynth_dagster.config.entries import model_entries
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.geometry import FrameRule, Geometry
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.families.contract import (
    Denoiser,
    Family,
    Output,
    Sampling,
    Shapes,
    Stage,
)
from diffsynth_dagster.families.requirements import (
    MODEL_LIST,
    EntryNamed,
    InputNamed,
    ModelHas,
    ModelListed,
    ParameterSet,
    Refusal,
    column_needs,
    has_start,
    refused_model,
)
from diffsynth_dagster.families.shared.frames import known_frame_stage
from diffsynth_dagster.families.shared.wan_vae import WIDE_LATENTS
from diffsynth_dagster.families.wanvideo import stages
from diffsynth_dagster.families.wanvideo.components import PATCH

WIDE_FACTOR = 32
TEXT_BOUNDARY, FRAME_BOUNDARY = 875.0, 900.0
"""Timestep between the experts of Wan2.2 A14B: of video from text, and of video from a frame."""
MASK_CHANNELS = 4
"""Channels of the mask of given frames: one for each video frame of a latent frame."""
VIDEO = Input("video", "video")
VACE_VIDEO = Input("vace_video", "video", same_size=True)
VACE_REFERENCE = Input("vace_reference_image", "image", same_size=True)
EXTRA_INPUTS = ("input_image", "end_image", "vace_video", "vace_reference_image")

_ENDS = ("patch_embedding.weight", "proj_out.weight")
_EMBEDDER = "condition_embedder.image_embedder."


def _channels(dit: Shapes) -> tuple[int, int]:
    """The numbers of input channels and of predicted channels."""
    return dit["patch_embedding.weight"][1], dit["proj_out.weight"][0] // PATCH**2


def _reads_frames(dit: Shapes) -> bool:
    """Whether the transformer reads given frames, concatenated to x_t."""
    channels, predicted = _channels(dit)
    return channels > predicted


def _is_supported(dit: Shapes) -> bool:
    """Whether the transformer reads x_t alone, or x_t with given frames and their mask."""
    channels, predicted = _channels(dit)
    return channels in (predicted, 2 * predicted + MASK_CHANNELS)


def _has_wide_latents(dit: Shapes) -> bool:
    """Whether it is TI2V-5B, where the first frame is given in the video itself."""
    return _channels(dit) == (WIDE_LATENTS, WIDE_LATENTS)


def _is_frame_expert(dit: Shapes) -> bool:
    """Whether it is an expert of I2V A14B.

    All other models with 16 channels that read given frames also read CLIP's features.
    """
    is_wide = _channels(dit)[1] == WIDE_LATENTS
    return _reads_frames(dit) and not is_wide and not _reads_features(dit)


_reads_features, _has_vace = has_start(_EMBEDDER), has_start("vace_blocks.")
_FIRST, _LAST = InputNamed("input_image"), InputNamed("end_image")
_VACE_INPUTS = (InputNamed("vace_video"), InputNamed("vace_reference_image"))
_FRAMES, _WIDE = ModelHas("dit", _reads_frames), ModelHas("dit", _has_wide_latents)
_VACE, _SECOND = ModelHas("dit", _has_vace), ModelListed("dit2")
# Two ways to recognise an expert of A14B. Text experts have the tensors of Wan2.1: names must tell.
_EXPERT = (
    EntryNamed(r"(?i)high_?noise|low_?noise|transformer_2|A14B.*(?:[:/]transformer/|high|low)"),
    ModelHas("dit", _is_frame_expert),
)
_VACE_NAMED = EntryNamed("(?i)vace")
_SAMPLES = ("sample_prompts", "sample_table", "customized_evaluation")

# The first that applies is shown. In order: unsupported models, given frames, experts, VACE, CLIP.
REFUSALS = (
    column_needs("end_image", "input_image"),
    refused_model(
        "dit",
        lambda shapes: not _is_supported(shapes),
        "the transformer takes more than first and last frames beside the noise (Fun-Control, S2V, "
        "Animate), which is not supported",
        "give a T2V, I2V, FLF2V, TI2V or VACE model",
    ),
    Refusal(
        "input_image is named, but this transformer is given no frame",
        "leave it out, or name the files of an I2V model",
        when=(_FIRST,),
        unless=(_FRAMES, _WIDE),
    ),
    Refusal(
        "end_image is named, but this transformer is given the first frame only",
        "leave it out",
        when=(_LAST, _WIDE),
    ),
    Refusal(
        "the transformer is given the first frame of each video, which is not named",
        "name input_image, and end_image for a model that is given the last frame too",
        when=(_FRAMES,),
        unless=(_FIRST,),
    ),
    Refusal(
        "direct_distill follows the samples through all timesteps with one transformer, and the "
        "model list has the experts of different timesteps",
        "name a model without experts",
        when=(ParameterSet("distills"), _SECOND),
        where="task",
    ),
    Refusal(
        "two experts with VACE blocks are not trained together",
        "name the files of one of them",
        when=(_VACE, _SECOND),
        where=MODEL_LIST,
    ),
    *(
        Refusal(
            "one expert of Wan2.2 A14B alone denoises in its own part of the schedule only, and "
            "samples need all of it",
            "name the files of the other expert in the model list too: it is loaded for samples, "
            "not trained (the high-noise expert is then called dit, the low-noise one dit2); or "
            f"leave {samples} out",
            when=(ParameterSet(samples), expert),
            unless=(_SECOND, _VACE_NAMED),
            where=samples,
        )
        for samples in _SAMPLES
        for expert in _EXPERT
    ),
    *(
        Refusal(
            "one expert of Wan2.2 VACE A14B alone denoises in its own part of the schedule only, "
            "and samples need all of it",
            f"leave {samples} out",
            when=(ParameterSet(samples), expert, _VACE_NAMED),
            where=samples,
        )
        for samples in _SAMPLES
        for expert in _EXPERT
    ),
    *(
        Refusal(
            f"{named.column} is named, but the transformer has no VACE blocks",
            "leave it out, or name the files of a VACE model",
            when=(named,),
            unless=(_VACE,),
        )
        for named in _VACE_INPUTS
    ),
    Refusal(
        "the transformer has VACE blocks, and nothing for them is named",
        "name vace_video or vace_reference_image, or both",
        when=(_VACE,),
        unless=_VACE_INPUTS,
    ),
    Refusal(
        "the transformer takes CLIP's features of the first frame, and CLIP is not named",
        "add models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth, or the folder "
        "image_encoder, to the model list",
        when=(_FIRST, ModelHas("dit", _reads_features)),
        unless=(ModelListed("image_encoder"), ParameterSet("reads_encoded")),
        where=MODEL_LIST,
    ),
)


def _names_wide_vae(config: TrainingConfig) -> bool:
    """Whether the model list names the VAE of TI2V-5B, which compresses sides 16 times."""
    texts = [entry.text for entry in model_entries(config)]
    return any(mark in text for text in texts for mark in ("Wan2.2_VAE", "TI2V-5B"))


def _is_wide(vae: Shapes) -> bool:
    """Whether a VAE is that of TI2V-5B."""
    return vae.get("post_quant_conv.weight", (0,))[0] == WIDE_LATENTS


def _geometry(usual: Geometry, config: TrainingConfig, vae: Shapes) -> Geometry:
    """The size rules: sides are multiples of 16, or of 32 with the VAE of TI2V-5B. If frames are
    given, clips need a second latent frame.

    Rows are checked before the model files are there, so this VAE is recognised by its name.

    Raises:
        ParameterError: the files are this VAE's, their name does not show it, and the config does
            not give a size with multiples of 32.
    """
    named, wide = _names_wide_vae(config), _is_wide(vae)
    sides = (config.height, config.width)
    if wide and not named and any(side is None or side % WIDE_FACTOR for side in sides):
        raise ParameterError(
            f"the sides of a video are multiples of {WIDE_FACTOR} with this VAE",
            where="height, width",
            do=f"give height and width, both multiples of {WIDE_FACTOR}",
        )
    if "input_image" in config.extra_inputs:
        # There must be a second latent frame to predict.
        frames = FrameRule(stages.FRAMES_PER_LATENT, 1, least=1 + stages.FRAMES_PER_LATENT)
        usual = replace(usual, frames=frames)
    if not (wide or named):
        return usual
    return replace(usual, side_factor=WIDE_FACTOR, published_frame_rate=stages.WIDE_RATE)


def variant(family: Family, config: TrainingConfig, given: Mapping[str, Shapes]) -> Family:
    """Wan with the stages, sizes and denoisers that a config needs.

    Raises:
        ParameterError: the size does not fit the VAE, or the two experts do not fit together.
    """
    extra = config.extra_inputs
    dit, vae = given.get("dit", {}), given.get("vae", {})
    last = "end_image" in extra
    reference = (VACE_REFERENCE,) if "vace_reference_image" in extra else ()
    steps = [
        family.stage("prompt"),
        replace(family.stage("video"), reads=(VIDEO, *reference)),
    ]
    if "input_image" in extra:
        # Without the transformer's shapes (a training that only encodes) the VAE decides.
        wide = _has_wide_latents(dit) if dit else _names_wide_vae(config) or _is_wide(vae)
        steps.append(
            known_frame_stage(VIDEO, stages.FRAMES_PER_LATENT) if wide else _given_frames(last)
        )
        if _reads_features(dit) if dit else "image_encoder" in given:
            # Only models with a position embedding for two frames read the last one's features.
            steps.append(_features(last and (not dit or f"{_EMBEDDER}pos_embed" in dit)))
    if reference or "vace_video" in extra:
        # With a reference image alone, `video` gives the size of an empty control video.
        control = VACE_VIDEO if "vace_video" in extra else VIDEO
        output = (Output("vace", "condition"),)
        steps.append(Stage("vace", (control, *reference), ("vae",), output, stages.encode_control))
    both = "dit2" in given
    is_2_2 = both or (bool(dit) and _has_wide_latents(dit))
    return replace(
        family,
        architecture="wan2.2" if is_2_2 else family.architecture,
        stages=tuple(steps),
        geometry=_geometry(family.geometry, config, vae),
        denoisers=_experts(config, dit, given["dit2"]) if both else family.denoisers,
        sampling=_sampling_of_experts(family.sampling, config) if both else family.sampling,
    )


def _sampling_of_experts(usual: Sampling, config: TrainingConfig) -> Sampling:
    """Sampling with the guidance published for the experts of Wan2.2 A14B."""
    if "input_image" in config.extra_inputs:
        return replace(usual, cfg_scale=3.5)
    return replace(usual, cfg_scales={"dit": 4.0, "dit2": 3.0})


def _experts(config: TrainingConfig, high: Shapes, low: Shapes) -> tuple[Denoiser, ...]:
    """The two experts of Wan2.2 A14B, each with its part of the schedule.

    Raises:
        ParameterError: they have different channels.
    """
    if high and low and any(high[name] != low[name] for name in _ENDS):
        raise ParameterError(
            "the two experts are of different models: they take or predict other channels",
            where=MODEL_LIST,
            do="name the high and the low noise expert of one repository",
        )
    boundary = FRAME_BOUNDARY if "input_image" in config.extra_inputs else TEXT_BOUNDARY
    return Denoiser("dit", low=boundary), Denoiser("dit2", high=boundary)


def _given_frames(last: bool) -> Stage:
    """The stage of given frames that are concatenated to x_t: the first, and the last if `last`."""
    name = "first_and_last_frame" if last else "first_frame"
    output = (Output("given_frames", "condition"),)
    return Stage(name, (VIDEO,), ("vae",), output, partial(stages.encode_given_frames, last=last))


def _features(last: bool) -> Stage:
    """The stage of CLIP's features of the first frame, and of the last one if `last`."""
    name = "first_and_last_features" if last else "first_features"
    output = (Output("features", "condition"),)
    run = partial(stages.encode_features, last=last)
    # Version 2 resizes the whole frame. Version 1 cropped it to a square.
    return Stage(name, (VIDEO,), ("image_encoder",), output, run, version=2)
