"""What a training writes: checkpoints, logs, and pictures to look at."""

from typing import Literal

from pydantic import BaseModel

from diffsynth_dagster.config.kinds import Text, Texts, parameter


class OutputParameters(BaseModel):
    """What is written, and where."""

    output_path: str = parameter("./models", "Run folder.", affects="nothing", min_length=1)
    # Training, not exports: it is in the tensor names of every checkpoint.
    remove_prefix_in_ckpt: str = parameter(
        "pipe.dit.", "Prefix removed from the tensor names of saved weights.", affects="training"
    )
    checkpoint_format: Literal["comfyui", "diffusers", "guide", "kohya"] | None = parameter(
        None,
        "Names of a LoRA's tensors in checkpoints: those that ComfyUI and most tools read, those of "
        "diffusers, of DiffSynth-Studio's trainer, or of kohya's scripts. Left out, those that load in "
        "DiffSynth-Studio and in most other tools.",
        affects="training",
        needs="lora_base_model",
    )
    export_formats: list[Literal["comfyui", "diffusers", "guide", "kohya", "peft"]] | None = (
        parameter(
            None,
            "Formats of a LoRA's exports. Left out, diffusers, and kohya for Stable Diffusion 1.5.",
            affects="exports",
            needs="lora_base_model",
            min_length=1,
        )
    )
    export_checkpoint: str | None = parameter(
        None,
        "Which checkpoint is exported: `best`, `last`, or the number of its step. Left out, the best "
        "where it is kept, else the last.",
        affects="exports",
        pattern=r"^(?:best|last|[1-9]\d*)$",
    )
    save_steps: int | None = parameter(
        None,
        "Optimizer steps between two step-N.safetensors; left out, every epoch ends with an "
        "epoch-N.safetensors. With max_train_steps and a small data set these are many.",
        affects="training",
        ge=1,
    )
    save_keep: int | None = parameter(
        None,
        "Checkpoints that are kept, the newest; left out, all.",
        affects="training",
        ge=1,
    )
    state_steps: int | None = parameter(
        None,
        "Optimizer steps between two resumable states, in state/.",
        affects="nothing",
        ge=1,
    )
    state_minutes: float = parameter(
        15.0,
        "Minutes between two resumable states; 0 for none by time.",
        affects="nothing",
        ge=0.0,
    )
    state_keep: int = parameter(
        2, "Resumable states that are kept; at the end, the last one.", affects="nothing", ge=1
    )
    resume: Literal["auto", "same", "must", "never"] = parameter(
        "auto",
        "auto: go on from the newest state in the run folder, if there is one, and refuse one of another "
        "training that is unfinished; same: go on from one of the same training, else train from the "
        "beginning; must: refuse to start without one; never: train from the beginning. A training that is "
        "not gone on with is moved to older/.",
        affects="nothing",
    )
    runs_keep: int | None = parameter(
        None,
        "Older trainings that are kept in older/, the newest; left out, all. The others are removed when "
        "the newest training has ended.",
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
        "Report to MLflow, where MLFLOW_TRACKING_URI says.",
        affects="nothing",
    )
    mlflow_project: str = parameter(
        "DiffSynth-Studio", "Name of the experiment in MLflow.", affects="nothing"
    )


TABLES = (".csv", ".json", ".jsonl", ".parquet")
"""How the names of files end that metadata tables are read from."""


class SamplingParameters(BaseModel):
    """Images made before, during and after training, to look at."""

    # Latents: the prompts are encoded with the captions, and the negative one where there is guidance.
    sample_prompts: Texts = parameter(
        (),
        "Prompts of the sample images; as a flag, a JSON list or one prompt. Or a table (csv, json, "
        "jsonl or parquet) with the columns of the metadata: prompt, and the further inputs; its "
        "paths start at its own folder.",
        affects="latents",
        each_half=True,
    )
    sample_steps: int | None = parameter(
        None,
        "Optimizer steps between two sample pictures; left out, each checkpoint comes with one.",
        affects="training",
        needs="sample_prompts",
        ge=1,
    )
    sample_num_inference_steps: int = parameter(
        20, "Denoising steps of a sample image.", affects="training", ge=1
    )
    sample_cfg_scale: float | None = parameter(
        None,
        "Classifier-free guidance of a sample image; 1 is none. Left out, what the model's authors "
        "publish.",
        affects="latents",
        each_half=True,
        left_out_as=1.0,
        used_with=("sample_prompts", "customized_evaluation"),
        ge=1.0,
    )
    sample_negative_prompt: Text | None = parameter(
        None,
        "Prompt that guidance leads sample images away from. Left out, what the model's authors "
        "publish, or the empty one.",
        affects="latents",
        each_half=True,
        off_by_default=True,
    )
    customized_evaluation: str | None = parameter(
        None,
        "Dotted path of a function that measures the model before and after training "
        "by the images that it makes.",
        affects="training",
    )

    @property
    def sample_table(self) -> str | None:
        """The table that `sample_prompts` names, if it names one."""
        named = self.sample_prompts[0] if len(self.sample_prompts) == 1 else ""
        return named if named.lower().endswith(TABLES) else None

    @property
    def sample_texts(self) -> tuple[str, ...]:
        """The prompts of `sample_prompts`, if it lists some."""
        return self.sample_prompts if self.sample_table is None else ()
