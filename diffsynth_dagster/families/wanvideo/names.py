"""Maps the authors' names of the transformer's tensors and layers to diffusers' names."""

from collections.abc import Mapping

from diffusers.loaders import single_file_utils

from diffsynth_dagster.families.sampling_types import Tensors
from diffsynth_dagster.families.shared.fused_names import AuthorsNames

_BLOCK = {
    **{f"self_attn.{x}": (f"attn1.to_{x}",) for x in "qkv"},
    "self_attn.o": ("attn1.to_out.0",),
    **{f"cross_attn.{x}": (f"attn2.to_{x}",) for x in "qkv"},
    "cross_attn.o": ("attn2.to_out.0",),
    "cross_attn.k_img": ("attn2.add_k_proj",),
    "cross_attn.v_img": ("attn2.add_v_proj",),
    "ffn.0": ("ffn.net.0.proj",),
    "ffn.2": ("ffn.net.2",),
}
_EMBEDDER = "condition_embedder"
NAMES = AuthorsNames(
    blocks={
        "blocks": ("blocks", _BLOCK),
        "vace_blocks": (
            "vace_blocks",
            {**_BLOCK, "before_proj": ("proj_in",), "after_proj": ("proj_out",)},
        ),
    },
    outside={
        "patch_embedding": "patch_embedding",
        "vace_patch_embedding": "vace_patch_embedding",
        "time_embedding.0": f"{_EMBEDDER}.time_embedder.linear_1",
        "time_embedding.2": f"{_EMBEDDER}.time_embedder.linear_2",
        "time_projection.1": f"{_EMBEDDER}.time_proj",
        "text_embedding.0": f"{_EMBEDDER}.text_embedder.linear_1",
        "text_embedding.2": f"{_EMBEDDER}.text_embedder.linear_2",
        "img_emb.proj.1": f"{_EMBEDDER}.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": f"{_EMBEDDER}.image_embedder.ff.net.2",
        "head.head": "proj_out",
    },
)
"""The authors' layer names. DiffSynth-Studio uses the same."""


def convert_dit(tensors: Tensors) -> Tensors:
    """Rename the tensors of the authors' files to diffusers' names."""
    if not any(".self_attn." in name for name in tensors):
        return tensors
    named = single_file_utils.convert_wan_transformer_to_diffusers(dict(tensors))
    # diffusers' converter does not know the position embedding of first-and-last-frame models.
    positions = "condition_embedder.image_embedder.pos_embed"
    return {name.replace("img_emb.emb_pos", positions): t for name, t in named.items()}


def lora_aliases(blocks: str) -> Mapping[str, tuple[str, ...]]:
    """The authors' names of LoRA targets → globs of diffusers' names in `blocks`."""
    attention = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    # The authors' `q` means the layers of both attentions, self and cross.
    layers = {
        name: tuple(f"{blocks}.*.{attn}.{layer}" for attn in ("attn1", "attn2"))
        for name, layer in attention.items()
    }
    feed = {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
    return layers | {name: (f"{blocks}.*.{layer}",) for name, layer in feed.items()}
