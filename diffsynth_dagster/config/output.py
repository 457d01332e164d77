"""What a training writes: checkpoints, logs, and pictures to look at."""

from pydantic import BaseModel

from diffsynth_dagster.config.kinds import Texts, parameter


class OutputParameters(BaseModel):
    """What is written, and where."""

    output_path: str = parameter("./models", "Run folder.", affects="nothing", min_length=1)
    # Training, not exports: it is in the tensor names of every checkpoint.
    remove_prefix_in_ckpt: str = parameter(
        "pipe.dit.", "Prefix removed from the tensor names of saved weights.", affects="training"
    )
    save_steps: int | None = parameter(
        None,
        "Optimizer steps between two step-N.safetensors; left out, every epoch "
        "ends with an epoch-N.safetensors.",
        affects="training",
        ge=1,
    )
    enable_csv_log: bool = parameter(
        False, "Write loss.csv (step, loss) beside metrics.csv.", affects="nothing"
    )
    enable_tensorboard_log: bool = parameter(False, "Report to TensorBoard.", affects="nothing")
    enable_swanlab_log: bool = parameter(False, "Report to SwanLab.", affects="nothing")
    swanlab_project: str = parameter(
        "DiffSynth-Studio", "Project name in SwanLab.", affects="nothing"
    )
    enable_wandb_log: bool = parameter(False, "Report to Weights & Biases.", affects="nothing")
    wandb_project: str = parameter("DiffSynth-Studio", "Project name in W&B.", affects="nothing")


class SamplingParameters(BaseModel):
    """Images made before training, and whenever a checkpoint is written, to look at."""

    # Latents: the prompts are encoded with the captions, and the empty one where there is guidance.
    sample_prompts: Texts = parameter(
        (),
        "Prompts of the sample images; as a flag, a JSON list or one prompt.",
        affects="latents",
        each_half=True,
    )
    sample_num_inference_steps: int = parameter(
        20, "Denoising steps of a sample image.", affects="training", ge=1
    )
    sample_cfg_scale: float = parameter(
        1.0,
        "Classifier-free guidance of a sample image; 1 is none.",
        affects="latents",
        each_half=True,
        ge=1.0,
    )
    customized_evaluation: str | None = parameter(
        None,
        "Dotted path of a function that measures the model before and after training "
        "by the images that it makes.",
        affects="training",
    )
