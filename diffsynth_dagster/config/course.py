"""How it is trained, and at what cost in memory and time."""

from typing import Literal

from pydantic import BaseModel

from diffsynth_dagster.config.kinds import CommaList, parameter


class TrainingParameters(BaseModel):
    """How it is trained."""

    # Rows, since distillation reads further columns. Its half has no effect: see `config.effect`.
    task: Literal[
        "sft",
        "sft:data_process",
        "sft:train",
        "direct_distill",
        "direct_distill:data_process",
        "direct_distill:train",
    ] = parameter(
        "sft",
        "sft: supervised training. direct_distill: the student samples from a "
        "teacher's noise in a few steps, and the result is compared with the teacher's. Each "
        "encodes what the store lacks and trains; with :data_process it only encodes, and with "
        ":train it only trains from the store.",
        affects="rows",
        each_half=True,
        set_by_asset=True,
    )
    min_timestep_boundary: float = parameter(
        0.0,
        "Timesteps are drawn from this fraction of the schedule on; 0 is the most noise.",
        affects="training",
        ge=0.0,
        lt=1.0,
    )
    max_timestep_boundary: float = parameter(
        1.0,
        "Timesteps are drawn up to this fraction of the schedule.",
        affects="training",
        gt=0.0,
        le=1.0,
    )
    learning_rate: float = parameter(
        1e-4,
        "Learning rate; 1e-4 is usual for LoRA, 1e-5 for full training.",
        affects="training",
        gt=0.0,
        le=1000.0,
    )
    num_epochs: int = parameter(1, "Number of epochs.", affects="training", ge=1)
    max_train_steps: int | None = parameter(
        None,
        "Optimizer steps of the whole training, in place of num_epochs; it may end within an epoch.",
        affects="training",
        off_by_default=True,
        ge=1,
    )
    # Encoding takes as many at once too, but keys and what is trained do not depend on that.
    batch_size: int = parameter(
        1, "Samples of one shape in a forward pass of one process.", affects="training", ge=1
    )
    seed: int = parameter(
        0,
        "Seed of the order, the noise, the timesteps and the LoRA initialisation.",
        affects="training",
        ge=0,
        le=2**63 - 1,
    )
    # Latents, since what comes of a trained model is not encoded beforehand.
    trainable_models: CommaList = parameter(
        (),
        "Models trained in full, such as dit or text_encoder, separated by commas.",
        affects="latents",
        each_half=True,
    )
    # How gradients are collected decides in which order they are added.
    find_unused_parameters: bool = parameter(
        False,
        "Look in every step for parameters without a gradient, on several GPUs. What a training needs "
        "of this is found out by itself.",
        affects="training",
    )
    weight_decay: float = parameter(
        0.01, "Weight decay of the optimizer.", affects="training", ge=0.0
    )
    customized_optimizer: str | None = parameter(
        None,
        "Dotted path of an optimizer class; torch.optim.AdamW when left out.",
        affects="training",
    )
    lr_scheduler: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
    ] = parameter("constant", "Course of the learning rate over the training.", affects="training")
    lr_warmup_steps: int = parameter(
        0,
        "Optimizer steps over which the learning rate rises from zero.",
        affects="training",
        ge=0,
    )
    max_grad_norm: float | None = parameter(
        None,
        "Norm to which gradients are clipped; no clipping if left out.",
        affects="training",
        gt=0.0,
    )
    # Latents are encoded in it; the two halves of split training may compute in different ones.
    mixed_precision: Literal["no", "fp16", "bf16"] | None = parameter(
        None,
        "Precision of the computation. Left out: that of accelerate, or bf16 on a GPU "
        "where accelerate's is no.",
        affects="latents",
        each_half=True,
    )


class GradientParameters(BaseModel):
    """Memory against time."""

    # Training, not nothing: what is computed a second time may differ in its last bit on a GPU.
    use_gradient_checkpointing: bool | None = parameter(
        None,
        "Recompute activations in the backward pass instead of keeping them. Left out: "
        "what the family does, which is yes for videos.",
        affects="training",
    )
    use_gradient_checkpointing_offload: bool = parameter(
        False,
        "Gradient checkpointing whose kept activations lie in CPU memory; switches "
        "gradient checkpointing on.",
        affects="training",
    )
    gradient_accumulation_steps: int = parameter(
        1,
        "Forward passes of one process for each optimizer step.",
        affects="training",
        ge=1,
    )
