"""The course of a training, and what it costs in memory and time."""

from typing import Literal

from pydantic import BaseModel

from diffsynth_dagster.config.declare import CommaList, parameter


class TrainingParameters(BaseModel):
    """How it is trained."""

    # Affects rows, since distillation reads further columns. The part after the colon (which half
    # of split training it is) does not count: see `config.affects`.
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
        "teacher's noise in a few steps, and its result is compared with the teacher's. Both "
        "encode what the store lacks and then train; with :data_process they only encode, and with "
        ":train they only train from the store.",
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
        "Optimizer steps of the whole training, instead of num_epochs; it may end within an epoch.",
        affects="training",
        off_by_default=True,
        ge=1,
    )
    # Encoding uses this batch size too, but encoded samples do not depend on it.
    batch_size: int = parameter(
        1, "Samples of one shape in a forward pass of one process.", affects="training", ge=1
    )
    seed: int = parameter(
        0,
        "Seed of the order, the noise, the timesteps and the LoRA initialisation.",
        affects="training",
        ge=0,
        le=2**63 - 1,  # the largest number that fits into 64 bits with a sign
    )
    # Affects latents: the outputs of a trained model change, so they are not encoded beforehand.
    trainable_models: CommaList = parameter(
        (),
        "Models trained in full, such as dit or text_encoder, separated by commas.",
        affects="latents",
        each_half=True,
    )
    # Affects training: it changes how gradients are grouped, and so the order of their sums.
    find_unused_parameters: bool = parameter(
        False,
        "With several GPUs, look in every step for parameters without a gradient. Where a training "
        "needs this, it is switched on automatically.",
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
    # Affects latents, which are encoded in it. Each half of split training may use another one.
    mixed_precision: Literal["no", "fp16", "bf16"] | None = parameter(
        None,
        "Precision of the computation. Left out: the one that accelerate is configured with; if that "
        "is no, bf16 on a GPU.",
        affects="latents",
        each_half=True,
    )


class GradientParameters(BaseModel):
    """Trades of memory against time."""

    # Affects training: on a GPU, recomputed activations may differ in the last bit.
    use_gradient_checkpointing: bool | None = parameter(
        None,
        "Recompute activations in the backward pass instead of keeping them. Left out: "
        "the family's default, which is yes for videos.",
        affects="training",
    )
    use_gradient_checkpointing_offload: bool = parameter(
        False,
        "Gradient checkpointing that keeps its activations in CPU memory; switches "
        "gradient checkpointing on.",
        affects="training",
    )
    gradient_accumulation_steps: int = parameter(
        1,
        "Forward passes of one process for each optimizer step.",
        affects="training",
        ge=1,
    )
