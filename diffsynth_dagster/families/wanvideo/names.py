"""The names that Wan's authors give the tensors and layers of the transformer → diffusers' names."""

from collections.abc import Mapping

from diffusers.loaders import single_file_utils

from diffsynth_dagster.families.contract import Tensors


def convert_dit(tensors: Tensors) -> Tensors:
    """The names of `diffusion_pytorch_model*.safetensors` of the authors → those of diffusers."""
    return _renamed(tensors) if any(".self_attn." in name for name in tensors) else tensors


def from_authors(tensors: Tensors) -> Tensors:
    """A LoRA by the authors' names → by those of diffusers.

    A LoRA by diffusers' names stays as it is: the only names that mean another layer there are
    those of norms, and no LoRA is put on a norm.
    """
    return _renamed(tensors)


def _renamed(tensors: Tensors) -> Tensors:
    return {
        name.replace("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"): tensor
        for name, tensor in single_file_utils.convert_wan_transformer_to_diffusers(
            dict(tensors)
        ).items()
    }


def lora_aliases(blocks: str) -> Mapping[str, tuple[str, ...]]:
    """The authors' names of the layers in `blocks` → globs of diffusers' names."""
    attention = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    layers = {
        name: tuple(f"{blocks}.*.{attn}.{layer}" for attn in ("attn1", "attn2"))
        for name, layer in attention.items()
    }
    feed = {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
    return layers | {name: (f"{blocks}.*.{layer}",) for name, layer in feed.items()}
