"""What a training writes: checkpoints, logs, and pictures to look at."""

from typing import Literal

from pydantic import BaseModel

from diffsynth_dagster.config.declare import parameter


class OutputParameters(BaseModel):
    """What is written, and where."""

    output_path: str = parameter("./models", "Run folder.", affects="nothing", min_length=1)
    # Affects training, not exports: it changes the tensor names in every checkpoint.
    remove_prefix_in_ckpt: str = parameter(
        "pipe.dit.", "Prefix removed from the tensor names of saved weights.", affects="training"
    )
    checkpoint_format: Literal["comfyui", "diffusers", "guide", "kohya"] | None = parameter(
        None,
        "Names of a LoRA's tensors in checkpoints: comfyui: those that ComfyUI and most tools read; "
        "diffusers: those of diffusers; guide: those of DiffSynth-Studio's trainer; kohya: those of "
        "kohya's scripts. Left out: names that load in DiffSynth-Studio and in most other tools.",
        affects="training",
        needs="lora_base_model",
    )
    export_formats: list[Literal["comfyui", "diffusers", "guide", "kohya", "peft"]] | None = (
        parameter(
            None,
            "Formats of a LoRA's exports. Left out: diffusers, and for Stable Diffusion 1.5 kohya.",
            affects="exports",
            needs="lora_base_model",
            min_length=1,
        )
    )
    export_checkpoint: str | None = parameter(
        None,
        "Which checkpoint is exported: `best`, `last`, or the number of its step. Left out: the best "
        "if it is kept, else the last.",
        affects="exports",
        pattern=r"^(?:best|last|[1-9]\d*)$",
    )
    # Affects training: the checkpoints are its result.
    save_steps: int | None = parameter(
        None,
        "Optimizer steps between two checkpoints step-N.safetensors. Left out: every epoch ends with a "
        "checkpoint epoch-N.safetensors; with max_train_steps and a small data set these are many.",
        affects="training",
        ge=1,
    )
    save_keep: int | None = parameter(
        None,
        "How many of the newest checkpoints are kept. Left out: all.",
        affects="training",
        ge=1,
    )
    # States affect nothing: they only decide how much is lost when a training is stopped.
    state_steps: int | None = parameter(
        None,
        "Optimizer steps between two resumable states, in state/.",
        affects="nothing",
        ge=1,
    )
    state_minutes: float = parameter(
        15.0,
        "Minutes between two resumable states, which are also written with each checkpoint; 0: no state, but for state_steps.",
        affects="nothing",
        ge=0.0,
    )
    state_keep: int = parameter(
        2,
        "How many of the newest resumable states are kept; after the end of the training only the last.",
        affects="nothing",
        ge=1,
    )
    resume: Literal["auto", "same", "must", "never"] = parameter(
        "auto",
        "auto: resume from the newest state in the run folder, if there is one, but refuse to start if it "
        "is of another, unfinished training; same: resume from a state of the same training, else train "
        "from the beginning; must: refuse to start without a state; never: train from the beginning. A "
        "training that is not resumed is moved to older/.",
        affects="nothing",
    )
    runs_keep: int | None = parameter(
        None,
        "How many of the newest older trainings are kept in older/. Left out: all. The others are removed "
        "when a new training has ended.",
        affects="nothing",
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
    enable_trackio_log: bool = parameter(False, "Report to Trackio.", affects="nothing")
    trackio_project: str = parameter(
        "DiffSynth-Studio", "Project name in Trackio.", affects="nothing"
    )
    enable_mlflow_log: bool = parameter(
        False,
        "Report to MLflow, at MLFLOW_TRACKING_URI.",
        affects="nothing",
    )
    mlflow_project: str = parameter(
        "DiffSynth-Studio", "Name of the experiment in MLflow.", affects="nothing"
    )


TABLES = (".csv", ".json", ".jsonl", ".parquet")
"""File name extensions of metadata tables."""
