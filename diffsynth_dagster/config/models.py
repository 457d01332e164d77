"""The models that are loaded, and the LoRA that is trained on them."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

from diffsynth_dagster.config.declare import CommaList, ModelList, PathTree, parameter
from diffsynth_dagster.errors import shown


class ModelParameters(BaseModel):
    """The models that are loaded."""

    # By content: every key and identity already holds the family that was recognised.
    family: str | None = parameter(
        None,
        "Model family, such as qwen_image; recognised from the files when left out.",
        affects="weights",
        by_content=True,
    )
    model_paths: PathTree = parameter(
        (),
        "Model files as JSON: a list of paths; a nested list is one sharded model. A path may be a "
        "folder, or a glob with * and ? (unless a file has exactly this name).",
        affects="weights",
        by_content=True,
    )
    model_id_with_origin_paths: CommaList = parameter(
        (),
        "Model files on ModelScope as repository:pattern, separated by commas; repository: alone is all "
        "weights in its folder.",
        affects="weights",
        by_content=True,
    )
    extra_inputs: CommaList = parameter(
        (),
        "Further columns of the metadata that are inputs of the model, separated by commas.",
        affects="rows",
    )
    initialize_model_on_cpu: bool = parameter(
        False,
        "Read weights into CPU memory first, then move them to the device.",
        affects="nothing",
    )
    # By content: it only repeats entries of the model list, and the digest of a model already
    # includes how it is stored.
    fp8_models: ModelList = parameter(
        (),
        "Models that are stored in float8 and computed in the working precision, each written "
        "as in the model list. Not for models that are trained in full.",
        affects="latents",
        by_content=True,
    )
    framewise_decoding: bool = parameter(
        False, "Encode and decode every frame by itself.", affects="latents", planned=True
    )
    offload_models: CommaList = parameter(
        (), "Models kept on disk until split training needs them.", affects="nothing", planned=True
    )
    quant_options: str | None = parameter(
        None, "Quantisation of frozen models.", affects="latents", planned=True
    )
    # Affects training, not latents: the outputs of a trained model are not encoded beforehand.
    resume_from_checkpoint: str | None = parameter(
        None,
        "File with weights of the model that is trained in full, to start from: a checkpoint, an "
        "export, or a file of the model's authors. Only weights: to continue with the optimizer "
        "and the step as well, see `resume`.",
        affects="training",
        by_content=True,
        needs="trainable_models",
    )
    template_model_id_or_path: str | None = parameter(
        None, "Template model.", affects="weights", by_content=True, planned=True
    )
    enable_lora_hot_loading: bool = parameter(
        False, "Hot loading of LoRAs by a template model.", affects="training", planned=True
    )
    enable_model_cpu_offload: bool = parameter(
        False, "Keep idle models in CPU memory.", affects="nothing", planned=True
    )
    offload_idle_denoiser: bool = parameter(
        False,
        "For models whose two experts share the schedule (Wan2.2 A14B): keep the frozen weights of "
        "the expert that is not used in CPU memory.",
        affects="nothing",
    )
    enable_optimizer_cpu_offload: bool = parameter(
        False, "Keep the optimizer state in CPU memory.", affects="nothing", planned=True
    )
    cpu_offload_split_threshold: float | None = parameter(
        None, "Size in MB of an offloaded part.", affects="nothing", planned=True
    )


LoraMethod = Literal["lora", "dora", "lokr", "oft"]
_METHODS = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "oft": "OFT"}


def adapter_text(lora: Mapping[str, Any]) -> str:
    """The adapter in words: `LoRA of rank 16, alpha 8`.

    Args:
        lora: `TrainingConfig.adapter`, or the same from the header of a file.
    """
    method = str(lora.get("method", "lora"))
    sizes = {
        name: shown(lora[name]).removesuffix(".0") for name in ("rank", "alpha") if name in lora
    }
    more = ", ".join(f"{name} {value}" for name, value in sizes.items())
    return _METHODS.get(method, method) + (f" of {more}" if more else "")


class LoraParameters(BaseModel):
    """The LoRA, or an adapter of another kind."""

    # Affects latents: the outputs of a trained model change, so they are not encoded beforehand.
    lora_base_model: CommaList = parameter(
        (),
        "Model that gets a LoRA, such as dit; several, separated by commas, get one each.",
        affects="latents",
        each_half=True,
    )
    lora_target_modules: CommaList | None = parameter(
        None,
        "Layers that get the LoRA, separated by commas: their names, or the ends of these. "
        "Left out: the family's usual ones; empty: every large Linear layer of the repeated blocks.",
        affects="training",
        needs="lora_base_model",
    )
    lora_method: LoraMethod = parameter(
        "lora",
        "What is trained in each layer: lora (W + BA), dora (the same, and the length of each output's "
        "weights), lokr (W + a Kronecker product), or oft (W times a rotation of its inputs).",
        affects="training",
        needs="lora_base_model",
        off_by_default=True,
    )
    lora_rank: int = parameter(
        32,
        "Rank of the LoRA. For lokr: rank of the right factor, if it is smaller than half of the "
        "factor's longer side. Not for oft.",
        affects="training",
        needs="lora_base_model",
        ge=1,
    )
    lora_alpha: float | None = parameter(
        None,
        "Alpha of the LoRA, whose scale is alpha / rank. Left out: the rank. Not for oft.",
        affects="training",
        needs="lora_base_model",
        gt=0.0,
    )
    use_rslora: bool = parameter(
        False,
        "Scale the LoRA by alpha / sqrt(rank) instead of alpha / rank. For lora and dora.",
        affects="training",
        needs="lora_base_model",
        off_by_default=True,
    )
    lokr_decompose_factor: int = parameter(
        -1,
        "Size of lokr's left factor: the largest divisor of a layer's width that is not above this; "
        "-1: the divisor nearest to the square root.",
        affects="training",
        needs="lora_base_model",
        off_by_default=True,
        ge=-1,
    )
    lokr_decompose_both: bool = parameter(
        False,
        "Give lokr's left factor the rank too, if it is smaller than half of the factor's longer side.",
        affects="training",
        needs="lora_base_model",
        off_by_default=True,
    )
    oft_block_size: int = parameter(
        32,
        "How many inputs of a layer each rotation of oft mixes. The width of every layer must be a "
        "multiple of it.",
        affects="training",
        needs="lora_base_model",
        off_by_default=True,
        ge=2,
    )
    lora_dropout: float = parameter(
        0.0,
        "Dropout probability on the input of the LoRA layers. For lora and dora.",
        affects="training",
        needs="lora_base_model",
        ge=0.0,
        lt=1.0,
    )
    lora_checkpoint: str | None = parameter(
        None,
        "LoRA file to start from: a checkpoint, an export, or a LoRA that another tool wrote.",
        affects="training",
        by_content=True,
        needs="lora_base_model",
    )
    # Affects latents: the model that it is fused into may be one that encodes samples.
    preset_lora_path: str | None = parameter(
        None,
        "LoRA file that is fused into the base model before the training, so that only the "
        "difference to it is trained.",
        affects="latents",
        by_content=True,
    )
    preset_lora_model: str | None = parameter(
        None,
        "Model that the preset LoRA is fused into. Left out: dit.",
        affects="latents",
        each_half=True,
        needs="preset_lora_path",
    )
