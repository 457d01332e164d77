"""The names that the authors of LTX-2 and of Gemma 3 give the tensors."""

from diffsynth_dagster.families.contract import Tensors


def named(state: Tensors, start: str, *swaps: tuple[str, str]) -> Tensors:
    """Tensors whose names have parts replaced, one after the other, behind a start."""
    renamed: Tensors = {}
    for name, tensor in state.items():
        for ours, theirs in swaps:
            name = name.replace(ours, theirs)
        renamed[start + name] = tensor.contiguous()
    return renamed


def original_dit(state: Tensors) -> Tensors:
    return named(
        state,
        "model.diffusion_model.",
        ("proj_in", "patchify_proj"),
        ("time_embed.", "adaln_single."),
        ("av_cross_attn_video_scale_shift", "av_ca_video_scale_shift_adaln_single"),
        ("av_cross_attn_video_a2v_gate", "av_ca_a2v_gate_adaln_single"),
        ("av_cross_attn_audio_scale_shift", "av_ca_audio_scale_shift_adaln_single"),
        ("av_cross_attn_audio_v2a_gate", "av_ca_v2a_gate_adaln_single"),
        ("video_a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca_video"),
        ("audio_a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca_audio"),
        ("norm_q", "q_norm"),
        ("norm_k", "k_norm"),
    )


def original_connectors(state: Tensors) -> Tensors:
    return named(
        state,
        "",
        ("text_proj_in", "text_embedding_projection.aggregate_embed"),
        ("video_connector", "model.diffusion_model.video_embeddings_connector"),
        ("audio_connector", "model.diffusion_model.audio_embeddings_connector"),
        ("transformer_blocks", "transformer_1d_blocks"),
        ("norm_q", "q_norm"),
        ("norm_k", "k_norm"),
    )


def original_vae(state: Tensors) -> Tensors:
    levels = [
        (f"encoder.down_blocks.{i}.resnets", f"encoder.DOWN.{2 * i}.resnets") for i in range(4)
    ]
    levels += [
        (f"encoder.down_blocks.{i}.downsamplers.0", f"encoder.DOWN.{2 * i + 1}") for i in range(4)
    ]
    levels += [
        (f"decoder.up_blocks.{i}.resnets", f"decoder.UP.{2 * i + 2}.resnets") for i in range(3)
    ]
    levels += [(f"decoder.up_blocks.{i}.upsamplers.0", f"decoder.UP.{2 * i + 1}") for i in range(3)]
    return named(
        state,
        "vae.",
        *levels,
        ("encoder.mid_block", "encoder.DOWN.8"),
        ("decoder.mid_block", "decoder.UP.0"),
        ("DOWN", "down_blocks"),
        ("UP", "up_blocks"),
        ("resnets", "res_blocks"),
        ("latents_mean", "per_channel_statistics.mean-of-means"),
        ("latents_std", "per_channel_statistics.std-of-means"),
    )


def original_audio(state: Tensors) -> Tensors:
    return named(
        state,
        "audio_vae.",
        ("latents_mean", "per_channel_statistics.mean-of-means"),
        ("latents_std", "per_channel_statistics.std-of-means"),
    )


def original_gemma(state: Tensors) -> Tensors:
    untied = {name: tensor for name, tensor in state.items() if not name.startswith("lm_head.")}
    return named(
        untied,
        "",
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    )


_VOCODER = {
    "upsamplers": "ups",
    "resnets": "resblocks",
    "conv_in": "conv_pre",
    "conv_out": "conv_post",
    "act_out": "act_post",
    "downsample": "downsample.lowpass",
}


def authors_vocoder_name(name: str) -> str:
    return ".".join(_VOCODER.get(part, part) for part in name.split("."))
