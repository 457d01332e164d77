"""FLUX.1's layer names in the authors' single files and in other tools' LoRAs.

diffusers has converters for the same names, but they only work at the widths of the published
model. The tests compare our tables with them at those widths.
"""

from diffsynth_dagster.families.shared.fused_names import AuthorsNames

# Layers of a double-stream block (image and text apart): the authors' names → diffusers'.
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    # Names of the same layers in LoRAs from XLabs' training scripts.
    "processor.qkv_lora1": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "processor.qkv_lora2": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "processor.proj_lora1": ("attn.to_out.0",),
    "processor.proj_lora2": ("attn.to_add_out",),
}
# Layers of a single-stream block (image and text together).
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
    "processor.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "processor.proj": ("proj_out",),
}
_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
PREFIX = "model.diffusion_model."
NAMES = AuthorsNames(
    blocks={
        "double_blocks": ("transformer_blocks", _DOUBLE),
        "single_blocks": ("single_transformer_blocks", _SINGLE),
    },
    outside=_OUTSIDE,
    # `linear1` stacks Q, K, V and the MLP, whose inner width is four times the model's.
    heights={"proj_mlp": 4},
    # The authors store (shift, scale), diffusers' AdaLayerNormContinuous stores (scale, shift).
    swaps=("final_layer.adaLN_modulation.1",),
    prefix=PREFIX,
    # The authors' RMSNorm calls its weight `scale`.
    kinds={"scale": "weight"},
)

# DiffSynth-Studio calls the image stream `a` and the text stream `b`.
GUIDE = AuthorsNames(
    blocks={
        "blocks": (
            "transformer_blocks",
            {
                "attn.a_to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "attn.b_to_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "attn.a_to_out": ("attn.to_out.0",),
                "attn.b_to_out": ("attn.to_add_out",),
                "ff_a.0": ("ff.net.0.proj",),
                "ff_a.2": ("ff.net.2",),
                "ff_b.0": ("ff_context.net.0.proj",),
                "ff_b.2": ("ff_context.net.2",),
                "norm1_a.linear": ("norm1.linear",),
                "norm1_b.linear": ("norm1_context.linear",),
            },
        ),
        "single_blocks": (
            "single_transformer_blocks",
            {
                "to_qkv_mlp": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                "proj_out": ("proj_out",),
                "norm.linear": ("norm.linear",),
            },
        ),
    },
    outside={
        "x_embedder": "x_embedder",
        "context_embedder": "context_embedder",
        "time_embedder.timestep_embedder.0": "time_text_embed.timestep_embedder.linear_1",
        "time_embedder.timestep_embedder.2": "time_text_embed.timestep_embedder.linear_2",
        "guidance_embedder.timestep_embedder.0": "time_text_embed.guidance_embedder.linear_1",
        "guidance_embedder.timestep_embedder.2": "time_text_embed.guidance_embedder.linear_2",
        "pooled_text_embedder.0": "time_text_embed.text_embedder.linear_1",
        "pooled_text_embedder.2": "time_text_embed.text_embedder.linear_2",
        "final_proj_out": "proj_out",
    },
    heights={"proj_mlp": 4},
)
"""DiffSynth-Studio's layer names. The last norm is missing: it is not certain in which order
DiffSynth-Studio stores its shift and scale."""

_IN_DOUBLE, _IN_SINGLE = "transformer_blocks.*.", "single_transformer_blocks.*."
LORA_ALIASES = {
    "a_to_qkv": tuple(f"{_IN_DOUBLE}attn.to_{x}" for x in "qkv"),
    "b_to_qkv": tuple(f"{_IN_DOUBLE}attn.add_{x}_proj" for x in "qkv"),
    "ff_a.0": (f"{_IN_DOUBLE}ff.net.0.proj",),
    "ff_a.2": (f"{_IN_DOUBLE}ff.net.2",),
    "ff_b.0": (f"{_IN_DOUBLE}ff_context.net.0.proj",),
    "ff_b.2": (f"{_IN_DOUBLE}ff_context.net.2",),
    "a_to_out": (f"{_IN_DOUBLE}attn.to_out.0",),
    "b_to_out": (f"{_IN_DOUBLE}attn.to_add_out",),
    "proj_out": (f"{_IN_SINGLE}proj_out",),
    "norm.linear": (f"{_IN_SINGLE}norm.linear",),
    "norm1_a.linear": (f"{_IN_DOUBLE}norm1.linear",),
    "norm1_b.linear": (f"{_IN_DOUBLE}norm1_context.linear",),
    "to_qkv_mlp": (*(f"{_IN_SINGLE}attn.to_{x}" for x in "qkv"), f"{_IN_SINGLE}proj_mlp"),
}
"""DiffSynth-Studio's names of LoRA targets → globs of diffusers' layer names."""
