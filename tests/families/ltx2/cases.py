"""LTX-2, tiny: video with sound, from its first frame, without sound, and beside other videos."""

import json
import wave
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import (
    LTX2InContextPipeline,
    LTX2ReferenceCondition,
)
from families.ltx2.original import (
    original_audio,
    original_connectors,
    original_dit,
    original_gemma,
    original_vae,
)
from families.wanvideo.cases import _pictures, write_video
from family_case import Case
from safetensors.torch import save_file
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast

from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.families.ltx2.family import SCHEDULER

FRAMES, SIDE = 9, 64
PLAIN_GUIDANCE: dict[str, Any] = {
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_modality_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_guidance_rescale": 0.0,
    "spatio_temporal_guidance_blocks": None,
}
"""Arguments of the pipeline that leave out its further kinds of guidance."""
TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
TRANSFORMER = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "cross_attention_dim": 128,
    "audio_in_channels": 16,
    "audio_out_channels": 16,
    "audio_num_attention_heads": 1,
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 64,
    "num_layers": 2,
    "caption_channels": 128,
    "rope_type": "split",
}
VAE = {
    "latent_channels": 16,
    "block_out_channels": (16, 16, 16, 16),
    "decoder_block_out_channels": (8, 16, 32),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "decoder_causal": False,
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
CONNECTORS = {
    "caption_channels": 128,
    "text_proj_in_factor": 3,
    "video_connector_num_attention_heads": 1,
    "video_connector_num_layers": 1,
    "audio_connector_num_attention_heads": 1,
    "audio_connector_num_layers": 1,
    "rope_type": "split",
}
VOCODER = {"in_channels": 128, "hidden_channels": 32}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "intermediate_size": 64,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}


def shaken(module: nn.Module) -> Any:
    """With random values where a module begins with zeros or ones."""
    for tensor in (*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())):
        tensor.data += 0.02 * torch.randn_like(tensor)
    return module


def write(folder: Path) -> None:
    torch.manual_seed(0)
    own = folder / "diffusers"
    dit = shaken(LTX2VideoTransformer3DModel(**TRANSFORMER))
    vae = AutoencoderKLLTX2Video(**VAE)
    audio_vae = AutoencoderKLLTX2Audio(base_channels=16, latent_channels=1, num_res_blocks=1)
    for statistics in (vae, audio_vae):
        statistics.latents_mean += 0.1 * torch.randn_like(statistics.latents_mean)
        statistics.latents_std += 0.1 * torch.rand_like(statistics.latents_std)
    connectors = shaken(LTX2TextConnectors(**CONNECTORS))
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    gemma = Gemma3ForConditionalGeneration(config)
    made = {
        "transformer": dit,
        "vae": vae,
        "audio_vae": audio_vae,
        "connectors": connectors,
        "vocoder": LTX2Vocoder(**VOCODER),
        "text_encoder": gemma,
    }
    for name, module in made.items():
        module.save_pretrained(own / name)
    write_tokenizer(own / "tokenizer")
    original = folder / "original"
    original.mkdir()
    save_file(original_dit(dit.state_dict()), original / "transformer.safetensors")
    save_file(
        original_connectors(connectors.state_dict()),
        original / "text_encoder_post_modules.safetensors",
    )
    save_file(original_vae(vae.state_dict()), original / "video_vae.safetensors")
    save_file(original_audio(audio_vae.state_dict()), original / "audio_vae.safetensors")
    save_file(original_gemma(gemma.state_dict()), original / "model-00001-of-00001.safetensors")


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<eos>", "<bos>", "<unk>", " ", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    vocabulary = {word: index for index, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        model_max_length=1024,
        padding_side="left",
    ).save_pretrained(folder)


WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYOUTS = {
    "diffusers": {
        "model_paths": [
            f"diffusers/transformer/{WEIGHTS}",
            "diffusers/text_encoder/model.safetensors",
            f"diffusers/connectors/{WEIGHTS}",
            f"diffusers/vae/{WEIGHTS}",
            f"diffusers/audio_vae/{WEIGHTS}",
        ],
        "tokenizer_path": "diffusers/tokenizer",
    },
    "original": {
        "model_paths": [
            "original/transformer.safetensors",
            "original/model-00001-of-00001.safetensors",
            "original/text_encoder_post_modules.safetensors",
            "original/video_vae.safetensors",
            "original/audio_vae.safetensors",
        ],
        "tokenizer_path": "diffusers/tokenizer",
    },
}


def write_sound(path: Path, seed: int) -> None:
    """A second of stereo noise at 44.1 kHz."""
    noise = np.random.default_rng(seed).integers(-9000, 9000, (44100, 2)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(44100)
        file.writeframes(noise.tobytes())


def rows(folder: Path, sound: bool = True, context: bool = False) -> Path:
    """Four clips with captions, sound, and clips beside them where they are wanted."""
    folder.mkdir(parents=True)
    table: list[dict[str, Any]] = []
    rate = 25 if context else 24
    for index in range(4):
        write_video(folder / f"{index}.mp4", index, SIDE, FRAMES, rate)
        row: dict[str, Any] = {"video": f"{index}.mp4", "prompt": f"clip {'x' * index} {index}"}
        if sound:
            write_sound(folder / f"{index}.wav", index)
            row["input_audio"] = f"{index}.wav"
        if context:
            write_video(folder / f"beside{index}.mp4", index + 10, SIDE // 2, FRAMES, rate)
            row |= {"in_context_videos": [f"beside{index}.mp4"], "frame_rate": rate}
            row["in_context_downsample_factor"] = 2
        table.append(row)
    (folder / "metadata.json").write_text(json.dumps(table))
    return folder / "metadata.json"


def pipeline_of(folder: Path, kind: Any) -> Any:
    from transformers import AutoTokenizer

    own = folder / "diffusers"
    pipeline = kind(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER),
        vae=AutoencoderKLLTX2Video.from_pretrained(own / "vae"),
        audio_vae=AutoencoderKLLTX2Audio.from_pretrained(own / "audio_vae"),
        text_encoder=Gemma3ForConditionalGeneration.from_pretrained(own / "text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(own / "tokenizer"),
        connectors=LTX2TextConnectors.from_pretrained(own / "connectors"),
        transformer=LTX2VideoTransformer3DModel.from_pretrained(own / "transformer"),
        vocoder=LTX2Vocoder.from_pretrained(own / "vocoder"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def published(
    folder: Path,
    row: Mapping[str, Any],
    x_t: Tensors,
    lora: Path | None,
    kind: Any = LTX2Pipeline,
    first_frame: bool = False,
    context: bool = False,
) -> tuple[Tensors, float]:
    """What the transformer of a pipeline predicts in its first step for video and sound."""
    pipeline = pipeline_of(folder, kind)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    seen: dict[str, Any] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not seen:
            seen.update(kwargs=kwargs, output=[tensor.clone() for tensor in output])

    def isolate(module: nn.Module, args: Any, kwargs: Any) -> Any:
        # No pipeline makes a silent clip: one that keeps both apart makes the same video.
        return args, kwargs | {"isolate_modalities": True}

    pipeline.transformer.register_forward_hook(note, with_kwargs=True)
    if "audio" not in x_t:
        pipeline.transformer.register_forward_pre_hook(isolate, with_kwargs=True)
    more = _clean_latents(pipeline, x_t)
    if first_frame:
        more["image"] = _pictures(row["video"], SIDE, FRAMES)[0]
    if context:
        frames = _pictures(row["in_context_videos"][0], SIDE // 2, FRAMES)
        more["reference_conditions"] = [LTX2ReferenceCondition(frames=frames)]
        more |= {"reference_downscale_factor": 2, "noise_scale": 0.0}
    with torch.no_grad():
        pipeline(
            prompt=row["prompt"],
            frame_rate=float(row.get("frame_rate", 24.0)),
            height=SIDE,
            width=SIDE,
            num_frames=FRAMES,
            num_inference_steps=2,
            guidance_scale=1.0,
            audio_guidance_scale=1.0,
            **PLAIN_GUIDANCE,
            output_type="latent",
            **more,
        )
    grid = x_t["video"].shape[1:]
    tokens = seen["output"][0][0, : grid.numel()]
    predicted = {"video": tokens.T.unflatten(1, grid)}
    if "audio" in x_t:
        predicted["audio"] = seen["output"][1][0]
    sigma = seen["kwargs"].get("sigma")
    timestep = seen["kwargs"]["timestep"] if sigma is None else sigma
    return predicted, float(timestep.max())


def _clean_latents(pipeline: Any, x_t: Tensors) -> dict[str, Any]:
    """The pipelines take clean latents, which they bring to the transformer's scale."""
    clean = x_t["video"][None] * _column(pipeline.vae.latents_std)
    clean = clean / pipeline.vae.config.scaling_factor + _column(pipeline.vae.latents_mean)
    if "audio" not in x_t:
        return {"latents": clean}
    # (L, C M) → (C, L, M), with one channel here.
    audio = x_t["audio"] * pipeline.audio_vae.latents_std + pipeline.audio_vae.latents_mean
    return {"latents": clean, "audio_latents": audio[None, None]}


def _column(values: torch.Tensor) -> torch.Tensor:
    return values.view(1, -1, 1, 1, 1)


def _case(name: str, parameters: Mapping[str, Any] | None = None, **others: Any) -> Case:
    given = {"height": SIDE, "width": SIDE, "num_frames": FRAMES}
    sound = {"data_file_keys": ["video", "input_audio"], "extra_inputs": ["input_audio"]}
    return Case(
        **{
            "name": name,
            "family": "ltx2",
            "write": write,
            "layouts": LAYOUTS,
            "rows": rows,
            "parameters": {**given, **sound, **(parameters or {})},
            "targets": TARGETS,
            "aliases": TARGETS,
            "published": published,
            "decoders": (f"diffusers/vocoder/{WEIGHTS}",),
            **others,
        }
    )


CASES = (
    _case("ltx2_t2av"),
    _case(
        "ltx2_i2av",
        {"extra_inputs": ["input_audio", "input_image"], "first_frame_crf": 33},
        published=partial(published, kind=LTX2ImageToVideoPipeline, first_frame=True),
    ),
    _case(
        "ltx2_silent",
        {"extra_inputs": [], "data_file_keys": ["video"]},
        rows=partial(rows, sound=False),
    ),
    _case(
        "ltx2_ic_lora",
        {
            "data_file_keys": ["video", "input_audio", "in_context_videos"],
            "extra_inputs": [
                "input_audio",
                "in_context_videos",
                "in_context_downsample_factor",
                "frame_rate",
            ],
            "frame_rate": 25,
        },
        rows=partial(rows, context=True),
        published=partial(published, kind=LTX2InContextPipeline, context=True),
    ),
)
