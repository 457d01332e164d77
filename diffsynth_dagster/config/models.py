"""Which weights are loaded, and the LoRA that is trained on them."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

from diffsynth_dagster.config.kinds import CommaList, ModelList, PathTree, parameter
from diffsynth_dagster.errors import shown


class ModelParameters(BaseModel):
    """Which weights are loaded."""

    # By content: every key and identity holds the family that the files turn out to be.
    family: str | None = parameter(
        None,
        "Model family, such as qwen_image; recognised from the files when left out.",
        affects="weights",
        by_content=True,
    )
    model_paths: PathTree = parameter(
        (),
        "Model files as JSON: a list of paths; a nested list is one sharded model. A path may be a "
        "folder, or have * and ? for any characters where no file is called so.",
        affects="weights",
        by_content=True,
    )
    model_id_with_origin_paths: CommaList = parameter(
        (),
        "Model files on ModelScope as repository:pattern, or repository: for all weights in its folder, "
        "separated by commas.",
        affects="weights",
        by_content=True,
    )
    extra_inputs: CommaList = parameter(
        (),
        "Further columns that the model takes as inputs, separated by commas.",
        affects="rows",
    )
    initialize_model_on_cpu: bool = parameter(
        False,
        "Read weights into CPU memory first, then move them to the device.",
        affects="nothing",
    )
    # By content: it repeats entries of the model list, and how a model is stored is in its digest.
    fp8_models: ModelList = parameter(
        (),
        "Models stored in float8 and computed in the working precision, each written "
        "as in the model list. Not for models whose own weights are trained.",
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
    resume_from_checkpoint: str | None = parameter(
        None,
        "File with the weights of the one model that is trained in full, to go on from: a "
        "checkpoint, an export, or a file of the model's authors. Weights only: for the optimizer "
        "and the step as well see `resume`.",
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
        "Keep the frozen weights of the expert that is not at work in CPU memory, where two experts "
        "share the schedule (Wan2.2 A14B).",
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
    """What was put into the layers, in words: `LoRA of rank 16, alpha 8`.

    Args:
        lora: `TrainingConfig.adapter`, or what the header of a file has of it.
    """
    method = str(lora.get("method", "lora"))
    own = {name: shown(lora[name]).removesuffix(".0") for name in ("rank", "alpha") if name in lora}
    more = ", ".join(f"{name} {value}" for name, value in own.items())
    return _METHODS.get(method, method) + (f" of {more}" if more else "")


class LoraParameters(BaseModel):
    """The LoRA, when one is trained, or what takes its place."""

    # Latents, since what comes of a trained model is not encoded beforehand.
    lora_base_model: CommaList = parameter(
        (),
        "Model that gets the LoRA, such as dit; several, separated by commas, get one each.",
        affects="latents",
        each_half=True,
    )
    lora_target_modules: CommaList | None = parameter(
        None,
        "Layers that get the LoRA, separated by commas: names or the ends of names. "
        "Left out: the family's usual ones; empty: every large Linear of the repeated blocks.",
        affects="training",
        needs="lora_base_model",
    )
    lora_method: LoraMethod = parameter(
        "lora",
        "What is trained in each layer: lora (W + BA), dora (its length for each output as well), "
        "lokr (W + a Kronecker product), or oft (W times a rotation of its inputs).",
        affects="training",
        needs="lora_base_model",
        off_by_default=True,
    )
    lora_rank: int = parameter(
        32,
        "Rank of the LoRA; of lokr, that of its right factor, where that is smaller than half of "
        "the factor's longer side. Not for oft.",
        affects="training",
        needs="lora_base_model",
        ge=1,
    )
    lora_alpha: float | None = parameter(
        None,
        "Scale of the LoRA times its rank; the rank when left out. Not for oft.",
        affects="training",
        needs="lora_base_model",
        gt=0.0,
    )
    use_rslora: bool = parameter(
        False,
        "Scale the LoRA by alpha / sqrt(rank) and not by alpha / rank. For lora and dora.",
        affects="training",
        needs="lora_base_model",
        off_by_default=True,
    )
    lokr_decompose_factor: int = parameter(
        -1,
        "Size of lokr's left factor: the divisor of a layer's width that is nearest to it from "
        "below; -1: nearest to the square root.",
        affects="training",
        needs="lora_base_model",
        off_by_default=True,
        ge=-1,
    )
    lokr_decompose_both: bool = parameter(
        False,
        "Give lokr's left factor the rank too, where that is smaller than half of its longer side.",
        affects="training",
        needs="lora_base_model",
        off_by_default=True,
    )
    oft_block_size: int = parameter(
        32,
        "How many inputs of a layer each rotation of oft mixes; the width of every layer must be a "
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
        "LoRA file to start from: a checkpoint, any file that is exported, or a LoRA "
        "that another tool wrote.",
        affects="training",
        by_content=True,
        needs="lora_base_model",
    )
    preset_lora_path: str | None = parameter(
        None,
        "LoRA file that is fused into the base before training, so that what is "
        "trained is the difference to it.",
        affects="latents",
        by_content=True,
    )
    preset_lora_model: str | None = parameter(
        None,
        "Model that the preset LoRA is fused into; dit when left out.",
        affects="latents",
        each_half=True,
        needs="preset_lora_path",
    )
