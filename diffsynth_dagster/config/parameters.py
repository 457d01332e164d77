"""Every parameter of a training, once, grouped by concern.

The command-line flags, the keys of a recipe and the Dagster run config are derived from these
fields: name, type, default, range and description are written nowhere else. The names are those of
the DiffSynth-Studio training guide; parameters that the guide lacks carry the field's usual names.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from diffsynth_dagster.config.kinds import (
    CommaList,
    ModelList,
    PathTree,
    Texts,
    particular,
    planned,
)

LR_SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)


class DatasetParameters(BaseModel):
    """What is trained on."""

    dataset_base_path: str = Field("", description="Root folder of the data set.")
    dataset_metadata_path: str | None = Field(
        None, description="Metadata table of the data set: csv, json, jsonl or parquet."
    )
    metadata_encoding: str = Field(
        "utf-8", description="Encoding of a csv, json or jsonl table; a byte-order mark is skipped."
    )
    dataset_repeat: int = Field(
        1, ge=1, description="How many times an epoch goes through the data set."
    )
    dataset_num_workers: int = Field(
        0, ge=0, description="Worker processes that read samples, for each training process."
    )
    data_file_keys: CommaList = Field(
        ("image", "video"),
        description="Columns of the metadata that name files, separated by commas.",
    )
    allow_outside_base_path: bool = Field(
        False, description="Accept files that lie outside dataset_base_path."
    )
    verify_content: bool = Field(
        False,
        description="Read and check every file again, also those whose path, size and time of "
        "modification did not change.",
    )
    max_rejected_fraction: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Largest fraction of rows that may be left out because they are unusable.",
    )
    cache_path: str = Field(
        "./cache",
        min_length=1,
        description="Folder of the store of encoded samples, shared by all trainings.",
    )
    customized_dataset: str | None = Field(
        None,
        description="Dotted path of a function that is called with dataset_base_path before the "
        "metadata is read, to make or refresh the data set.",
    )


class ModelParameters(BaseModel):
    """Which weights are loaded."""

    family: str | None = Field(
        None, description="Model family, such as qwen_image; told from the files when left out."
    )
    model_paths: PathTree = Field(
        (), description="Model files as JSON: a list of paths; a nested list is one sharded model."
    )
    model_id_with_origin_paths: CommaList = Field(
        (),
        description="Model files on ModelScope as repository:pattern, separated by commas.",
    )
    tokenizer_path: str | None = particular(
        None, "Folder of the tokenizer: a path or repository:pattern."
    )
    tokenizer_1_path: str | None = particular(
        None, "Folder of the first tokenizer, of families with two."
    )
    tokenizer_2_path: str | None = particular(
        None, "Folder of the second tokenizer, of families with two."
    )
    processor_path: str | None = particular(None, "Folder of the processor of image editing.")
    audio_processor_path: str | None = planned(None, "Folder of the processor of speech.")
    extra_inputs: CommaList = Field(
        (), description="Further columns that the model takes as inputs, separated by commas."
    )
    initialize_model_on_cpu: bool = Field(
        False, description="Read weights into CPU memory first, then move them to the device."
    )
    zero_cond_t: bool = particular(
        False, "Give the latents of edit images the timestep zero, as Qwen-Image-Edit-2511 does."
    )
    edit_plus: bool = particular(
        False,
        "Show also a single edit image to the text encoder as Qwen-Image-Edit-2509 and later do. "
        "On by itself with zero_cond_t, and for a transformer from a repository of these.",
    )
    fp8_models: ModelList = Field(
        (),
        description="Models stored in float8 and computed in the working precision, each written "
        "as in the model list. Not for models whose own weights are trained.",
    )
    framewise_decoding: bool = planned(False, "Encode and decode every frame by itself.")
    offload_models: CommaList = planned((), "Models kept on disk until split training needs them.")
    quant_options: str | None = planned(None, "Quantisation of frozen models.")
    resume_from_checkpoint: str | None = planned(None, "Weights of one model to go on from.")
    template_model_id_or_path: str | None = planned(None, "Template model.")
    enable_lora_hot_loading: bool = planned(False, "Hot loading of LoRAs by a template model.")
    enable_model_cpu_offload: bool = planned(False, "Keep idle models in CPU memory.")
    enable_optimizer_cpu_offload: bool = planned(False, "Keep the optimizer state in CPU memory.")
    cpu_offload_split_threshold: float | None = planned(None, "Size in MB of an offloaded part.")


class TrainingParameters(BaseModel):
    """How it is trained."""

    task: Literal[
        "sft",
        "sft:data_process",
        "sft:train",
        "direct_distill",
        "direct_distill:data_process",
        "direct_distill:train",
    ] = Field(
        "sft",
        description="sft: supervised training. direct_distill: the student samples from a "
        "teacher's noise in a few steps, and the result is compared with the teacher's. Each "
        "encodes what the store lacks and trains; with :data_process it only encodes, and with "
        ":train it only trains from the store.",
    )
    min_timestep_boundary: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Timesteps are drawn from this fraction of the schedule on; 0 is the most "
        "noise.",
    )
    max_timestep_boundary: float = Field(
        1.0, gt=0.0, le=1.0, description="Timesteps are drawn up to this fraction of the schedule."
    )
    learning_rate: float = Field(
        1e-4, gt=0.0, description="Learning rate; 1e-4 is usual for LoRA, 1e-5 for full training."
    )
    num_epochs: int = Field(1, ge=1, description="Number of epochs.")
    batch_size: int = Field(
        1, ge=1, description="Samples of one shape in a forward pass of one process."
    )
    seed: int = Field(
        0,
        ge=0,
        le=2**63 - 1,
        description="Seed of the order, the noise, the timesteps and the LoRA initialisation.",
    )
    trainable_models: CommaList = Field(
        (), description="Models trained in full, such as dit or text_encoder, separated by commas."
    )
    find_unused_parameters: bool = Field(
        False,
        description="For multi-GPU training of models that have parameters without a gradient.",
    )
    weight_decay: float = Field(0.01, ge=0.0, description="Weight decay of the optimizer.")
    customized_optimizer: str | None = Field(
        None, description="Dotted path of an optimizer class; torch.optim.AdamW when left out."
    )
    lr_scheduler: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
    ] = Field("constant", description="Course of the learning rate over the training.")
    lr_warmup_steps: int = Field(
        0, ge=0, description="Optimizer steps over which the learning rate rises from zero."
    )
    max_grad_norm: float | None = Field(
        None, gt=0.0, description="Norm to which gradients are clipped; no clipping if left out."
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = Field(
        None,
        description="Precision of the computation. Left out: that of accelerate, or bf16 on a GPU "
        "where accelerate's is no.",
    )


class LoraParameters(BaseModel):
    """The LoRA, when one is trained."""

    lora_base_model: str | None = Field(None, description="Model that gets the LoRA, such as dit.")
    lora_target_modules: CommaList | None = Field(
        None,
        description="Layers that get the LoRA, separated by commas: names or the ends of names. "
        "Left out: the family's usual ones; empty: every large Linear of the repeated blocks.",
    )
    lora_rank: int = Field(32, ge=1, description="Rank of the LoRA.")
    lora_alpha: float | None = Field(
        None, gt=0.0, description="Scale of the LoRA times its rank; the rank when left out."
    )
    lora_dropout: float = Field(
        0.0, ge=0.0, lt=1.0, description="Dropout probability on the input of the LoRA layers."
    )
    lora_checkpoint: str | None = Field(
        None,
        description="LoRA file to start from: a checkpoint, any file that is exported, or a LoRA "
        "that another tool wrote.",
    )
    preset_lora_path: str | None = Field(
        None,
        description="LoRA file that is fused into the base before training, so that what is "
        "trained is the difference to it.",
    )
    preset_lora_model: str | None = Field(
        None, description="Model that the preset LoRA is fused into; dit when left out."
    )
    align_to_opensource_format: bool = particular(
        False, "Write LoRAs also in the key format that other tools read (kohya)."
    )


class GradientParameters(BaseModel):
    """Memory against time."""

    use_gradient_checkpointing: bool | None = Field(
        None,
        description="Recompute activations in the backward pass instead of keeping them. Left out: "
        "what the family does, which is yes for videos.",
    )
    use_gradient_checkpointing_offload: bool = Field(
        False,
        description="Gradient checkpointing whose kept activations lie in CPU memory; switches "
        "gradient checkpointing on.",
    )
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Forward passes of one process for each optimizer step."
    )


class SizeParameters(BaseModel):
    """The size of what is trained on."""

    height: int | None = Field(
        None, ge=1, description="Height in pixels; leave both sides out for the image's own size."
    )
    width: int | None = Field(
        None, ge=1, description="Width in pixels; leave both sides out for the image's own size."
    )
    max_pixels: int = Field(
        1048576,
        ge=1,
        description="Largest area in pixels when height and width are left out: larger images are "
        "scaled down to it, smaller ones stay as they are.",
    )
    bucket_step: int | None = Field(
        None,
        ge=1,
        description="Round sides down to multiples of this many pixels, so that more images have "
        "the same size and form batches; for height and width left out.",
    )
    num_frames: int | None = Field(
        None,
        ge=1,
        description="Frames of a video sample: its first ones. A shorter clip is cut to the "
        "longest length that the family takes; the family's usual number when left out.",
    )
    frame_rate: float | None = Field(
        None,
        gt=0.0,
        description="Frames per second that videos are resampled to; the family's usual rate, or "
        "else each video's own, when left out.",
    )


class OutputParameters(BaseModel):
    """What is written, and where."""

    output_path: str = Field("./models", min_length=1, description="Run folder.")
    remove_prefix_in_ckpt: str = Field(
        "pipe.dit.", description="Prefix removed from the tensor names of saved weights."
    )
    save_steps: int | None = Field(
        None,
        ge=1,
        description="Optimizer steps between two step-N.safetensors; left out, every epoch "
        "ends with an epoch-N.safetensors.",
    )
    enable_csv_log: bool = Field(
        False, description="Write loss.csv (step, loss) beside metrics.csv."
    )
    enable_tensorboard_log: bool = Field(False, description="Report to TensorBoard.")
    enable_swanlab_log: bool = Field(False, description="Report to SwanLab.")
    swanlab_project: str = Field("DiffSynth-Studio", description="Project name in SwanLab.")
    enable_wandb_log: bool = Field(False, description="Report to Weights & Biases.")
    wandb_project: str = Field("DiffSynth-Studio", description="Project name in W&B.")


class SamplingParameters(BaseModel):
    """Images made before training, and whenever a checkpoint is written, to look at."""

    sample_prompts: Texts = Field(
        (), description="Prompts of the sample images; as a flag, a JSON list or one prompt."
    )
    sample_num_inference_steps: int = Field(
        20, ge=1, description="Denoising steps of a sample image."
    )
    sample_cfg_scale: float = Field(
        1.0, ge=1.0, description="Classifier-free guidance of a sample image; 1 is none."
    )
    customized_evaluation: str | None = Field(
        None,
        description="Dotted path of a function that measures the model before and after training "
        "by the images that it makes.",
    )


def _is_text(field: FieldInfo) -> bool:
    kind: Any = field.annotation
    return kind == str | None


class TrainingConfig(
    DatasetParameters,
    ModelParameters,
    TrainingParameters,
    LoraParameters,
    GradientParameters,
    SizeParameters,
    OutputParameters,
    SamplingParameters,
):
    """All parameters of one training, flat. Made by `read_config`, which checks what belongs
    together and words the errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_empty_texts(cls, values: dict[str, Any]) -> dict[str, Any]:
        """An empty text leaves out a parameter that may be left out."""
        fields = cls.model_fields
        left_out = {n for n, v in values.items() if v == "" and n in fields and _is_text(fields[n])}
        return {name: None if name in left_out else value for name, value in values.items()}

    @property
    def checkpoints_gradients(self) -> bool | None:
        """Whether activations are recomputed, wherever the kept ones lie; None: as usual."""
        return self.use_gradient_checkpointing_offload or self.use_gradient_checkpointing

    @property
    def distills(self) -> bool:
        """Whether the loss is that of direct distillation."""
        return self.task.startswith("direct_distill")

    @property
    def encodes_only(self) -> bool:
        """Whether nothing is trained: the first half of split training."""
        return self.task.endswith(":data_process")

    @property
    def trains_only(self) -> bool:
        """Whether nothing is encoded: the second half of split training."""
        return self.task.endswith(":train")

    @property
    def reads_encoded(self) -> bool:
        """Whether the data set is a folder that the first half wrote, and no metadata is read."""
        return self.trains_only and self.dataset_metadata_path is None

    @property
    def alpha(self) -> float:
        """The LoRA's alpha: the update is scaled by alpha / rank."""
        return float(self.lora_rank) if self.lora_alpha is None else self.lora_alpha


GROUPS: tuple[type[BaseModel], ...] = (
    DatasetParameters,
    ModelParameters,
    TrainingParameters,
    LoraParameters,
    GradientParameters,
    SizeParameters,
    OutputParameters,
    SamplingParameters,
)

ENCODING = (
    "data_file_keys",
    "extra_inputs",
    "edit_plus",
    "height",
    "width",
    "max_pixels",
    "bucket_step",
    "num_frames",
    "frame_rate",
)
"""Parameters that say what is encoded of a row: the second half of split training takes them over
from the first."""

TOKENIZERS = ("tokenizer_path", "tokenizer_1_path", "tokenizer_2_path", "processor_path")
"""Parameters that name a folder of what turns inputs into tokens."""
