"""Another value for every parameter, and what a change of it comes to; for `test_marks.py`."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import torch
from conftest import make_config
from families.flux.cases import CASES as FLUX
from families.qwen_image.cases import CASES as QWEN
from families.stable_diffusion.cases import CASES as SD
from families.wanvideo.cases import CASES as WAN
from family_case import Case

from assets.common import KINDS, code_version
from diffsynth_dagster.cache.held_out import held_out_config
from diffsynth_dagster.cache.keys import Keys
from diffsynth_dagster.cache.layout import SAMPLES_FOLDER
from diffsynth_dagster.cache.manifest import Manifest
from diffsynth_dagster.cache.plan_samples import plan_samples
from diffsynth_dagster.cache.row_sets import sample_set, write_samples_table
from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.config.parameters import MARKS
from diffsynth_dagster.data.prepare import prepare_data
from diffsynth_dagster.data.table.checked_table import PINNED, read_checked
from diffsynth_dagster.facts import FactCache
from diffsynth_dagster.families import find_family
from diffsynth_dagster.preflight import check_config
from diffsynth_dagster.run.start import start_record
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model, guess_model

CASES = [
    case
    for case in (*QWEN, *FLUX, *WAN, *SD)
    if case.name
    in ("qwen_image", "qwen_image_edit", "flux", "flux_kontext", "wan_t2v", "wan22_ti2v_5b", "sd15")
]
SIZES = ("height", "width")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def unchanged(folder: Path) -> None:
    """Makes no data: for `customized_dataset` and `customized_evaluation`."""


@dataclass(frozen=True)
class Outcome:
    """What Dagster and the trainer compare to find out whether something is to be done again."""

    versions: Mapping[str, str]
    keys: frozenset[str]
    identity: str

    def changed_versions(self, other: "Outcome") -> set[str]:
        return {kind for kind in self.versions if self.versions[kind] != other.versions[kind]}


@dataclass
class Place:
    """A case with its model and data, and the outcomes that are known."""

    case: Case
    folder: Path
    hub: ModelHub
    known: dict[str, Outcome] = field(default_factory=dict)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Parameters of the case that stay out, so that others have an effect."""
        sizes = () if "wide" in self.case.layouts["diffusers"]["model_paths"][-1] else SIZES
        return ("align_to_opensource_format", *sizes)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def values(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        case = self.case
        values = {
            "family": case.family,
            "dataset_base_path": str(self.data),
            "dataset_metadata_path": str(self.data / "metadata.csv"),
            "lora_base_model": case.base,
            "cache_path": str(self.folder / "cache"),
            "output_path": str(self.folder / "run"),
            **case.models(self.model, "diffusers"),
            **{k: v for k, v in case.parameters.items() if k not in self.left_out},
        }
        return {k: v for k, v in {**values, **overrides}.items() if v is not None}

    def outcome(self, **overrides: Any) -> Outcome:
        """What a config comes to; nothing is encoded and nothing trained. Raises `UserError`."""
        text = str(sorted(overrides.items()))
        if text not in self.known:
            self.known[text] = outcome_of(make_config(self.values(overrides)), self)
        return self.known[text]


def outcome_of(config: TrainingConfig, place: Place) -> Outcome:
    check_config(config, guess_model(config))
    found = find_model(config, place.hub)
    with closing(FactCache(place.folder / "facts.sqlite")) as fact_cache:
        validated = prepare_data(config, found.family.columns, fact_cache)
        dtype = PRECISIONS.get(config.mixed_precision or "", torch.float32)
        keys_of = Keys(found, fact_cache, dtype)
        manifest, planned = plan_samples(config, found, validated, keys_of), list[Manifest]()
        own = held_out_config(config)
        if own is not None:
            table = prepare_data(own, found.family.columns, fact_cache)
            planned.append(plan_samples(own, found, table, keys_of).publish())
        if config.sample_table is not None:
            rows = sample_set(config, found, Path(config.output_path) / SAMPLES_FOLDER)
            write_samples_table(rows, found.family, fact_cache)
            table = read_checked(rows.folder, PINNED)
            keys_of_rows = Keys(rows.model, fact_cache, dtype)
            listed = plan_samples(rows.config, rows.model, table, keys_of_rows, rows.made_of)
            planned.append(listed.publish())
        identity = start_record(config, found, manifest, fact_cache).identity
    versions = {kind: code_version(config, kind) for kind in KINDS}
    keys = frozenset(k for m in (manifest, *planned) for k in m.keys.collect().to_series())
    return Outcome(versions, keys, identity)


def with_columns(table: Path) -> None:
    """Add the columns that distillation reads, one of them also as weights, and one of no masks."""
    head, *rows = table.read_text(encoding="utf-8").splitlines()
    lines = [
        f"{head},seed,num_inference_steps,mask",
        *(f"{row},{i},4," for i, row in enumerate(rows)),
    ]
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")


Change = Mapping[str, Any] | Callable[[Place], Mapping[str, Any]]


def file_columns(place: Place) -> dict[str, Any]:
    """The same columns in another order, or without the one that the family does not read."""
    given = make_config(place.values({})).data_file_keys
    if given != TrainingConfig().data_file_keys:
        return {"data_file_keys": given[::-1]}
    return {"data_file_keys": [find_family(place.case.family).columns.files[0].column]}


def other_inputs(place: Place) -> dict[str, Any]:
    """No further column for a case that has one, and one for a case that has none."""
    config = make_config(place.values({}))
    if not config.extra_inputs:
        return {"extra_inputs": [find_family(place.case.family).extra_inputs[0]]}
    own = {"data_file_keys": ["image"]} if "data_file_keys" in place.case.parameters else {}
    return {"extra_inputs": [], "processor_path": None, **own}


def preset(place: Place) -> dict[str, Any]:
    return {"preset_lora_path": str(place.folder / "one.safetensors")}


def captions_in_files(place: Place, extension: str) -> dict[str, Any]:
    """A copy of the data set whose captions lie in files beside the others."""
    folder = place.folder / "captioned"
    shutil.copytree(place.data, folder, dirs_exist_ok=True)
    rows = pl.read_csv(place.data / "metadata.csv")
    rows.drop("prompt").write_csv(folder / "metadata.csv")
    for number, name in enumerate(rows[find_family(place.case.family).columns.files[0].column]):
        text = f"{extension} {number}"
        (folder / name).with_suffix(extension).write_text(text, encoding="utf-8")
    named = {"dataset_base_path": folder, "dataset_metadata_path": folder / "metadata.csv"}
    return {**{name: str(path) for name, path in named.items()}, "caption_extension": extension}


BEFORE: dict[str, Change] = {
    "caption_extension": lambda place: captions_in_files(place, ".one"),
    "preset_lora_model": preset,
    "lokr_decompose_factor": {"lora_method": "lokr"},
    "lokr_decompose_both": {"lora_method": "lokr"},
    "oft_block_size": {"lora_method": "oft"},
    "customized_evaluation": {"sample_cfg_scale": 1.0},
    "keep_tags": {"shuffle_tags": True},
    "tag_orders": {"shuffle_tags": True},
    "sample_steps": {"sample_prompts": ["a cat"]},
    "sample_negative_prompt": {"sample_prompts": ["a cat"]},
}
"""Parameter → what a config has before its value is changed."""
ALTERNATIVES: dict[str, Change] = {
    # dataset
    "metadata_encoding": {"metadata_encoding": "utf-8-sig"},
    "caption_extension": lambda place: captions_in_files(place, ".two"),
    "caption_prefix": {"caption_prefix": "sks"},
    "folder_repeats": {"folder_repeats": {".": 2}},
    "dataset_repeat": {"dataset_repeat": 2},
    "dataset_num_workers": {"dataset_num_workers": 1},
    "decode_megapixels": {"decode_megapixels": 1},
    "background": {"background": "white"},
    "data_file_keys": file_columns,
    "allow_outside_base_path": {"allow_outside_base_path": True},
    "verify_content": {"verify_content": True},
    "max_rejected_fraction": {"max_rejected_fraction": 0.5},
    "cache_path": lambda place: {"cache_path": str(place.folder / "elsewhere")},
    "customized_dataset": {"customized_dataset": "parameter_changes.unchanged"},
    "height": {"height": 32, "width": 64},
    "width": {"height": 64, "width": 32},
    "max_pixels": lambda place: {
        "max_pixels": 2 * find_family(place.case.family).geometry.side_factor ** 2
    },
    "bucket_step": {"bucket_step": 32},
    "num_frames": {"num_frames": 9},
    "frame_rate": {"frame_rate": 16.0},
    # models
    "extra_inputs": other_inputs,
    "initialize_model_on_cpu": {"initialize_model_on_cpu": True},
    "zero_cond_t": {"zero_cond_t": True},
    "prediction_type": {"prediction_type": "v_prediction"},
    "zero_terminal_snr": {"zero_terminal_snr": True, "prediction_type": "v_prediction"},
    "min_snr_gamma": {"min_snr_gamma": 3.0},
    "edit_plus": {"edit_plus": True},
    "lora_base_model": {"lora_base_model": "text_encoder"},
    "lora_target_modules": {"lora_target_modules": ["to_q"]},
    "lora_rank": {"lora_rank": 8},
    "lora_alpha": {"lora_alpha": 1.0},
    "lora_dropout": {"lora_dropout": 0.5},
    "lora_method": {"lora_method": "lokr"},
    "use_rslora": {"use_rslora": True},
    "lokr_decompose_factor": {"lora_method": "lokr", "lokr_decompose_factor": 4},
    "lokr_decompose_both": {"lora_method": "lokr", "lokr_decompose_both": True},
    "oft_block_size": {"lora_method": "oft", "oft_block_size": 8},
    "preset_lora_model": lambda place: {**preset(place), "preset_lora_model": "text_encoder"},
    "align_to_opensource_format": {"align_to_opensource_format": True},
    "checkpoint_format": {"checkpoint_format": "guide"},
    "export_formats": {"export_formats": ["peft"]},
    "export_checkpoint": {"export_checkpoint": "1"},
    # course
    "task": {"task": "direct_distill"},
    "min_timestep_boundary": {"min_timestep_boundary": 0.25},
    "max_timestep_boundary": {"max_timestep_boundary": 0.75},
    "timestep_sampling": {"timestep_sampling": "logit_normal"},
    "logit_mean": {"timestep_sampling": "logit_normal", "logit_mean": 1.0},
    "logit_std": {"timestep_sampling": "logit_normal", "logit_std": 2.0},
    "mode_scale": {"timestep_sampling": "mode", "mode_scale": 0.5},
    "timestep_shift": {"timestep_shift": "resolution"},
    "caption_dropout_rate": {"caption_dropout_rate": 0.1},
    "caption_lists": {"caption_lists": True},
    "shuffle_tags": {"shuffle_tags": True},
    "keep_tags": {"shuffle_tags": True, "keep_tags": 1},
    "tag_orders": {"shuffle_tags": True, "tag_orders": 2},
    "sample_weight_column": {"sample_weight_column": "seed"},
    "loss_mask_column": {"loss_mask_column": "mask"},
    "learning_rate": {"learning_rate": 0.5},
    "num_epochs": {"num_epochs": 2},
    "max_train_steps": {"max_train_steps": 3},
    "batch_size": {"batch_size": 2},
    "seed": {"seed": 1},
    "trainable_models": {"trainable_models": ["text_encoder"]},
    "find_unused_parameters": {"find_unused_parameters": True},
    "weight_decay": {"weight_decay": 0.5},
    "customized_optimizer": {"customized_optimizer": "torch.optim.Adam"},
    "lr_scheduler": {"lr_scheduler": "cosine"},
    "lr_warmup_steps": {"lr_warmup_steps": 1},
    "optimizer": {"optimizer": "adafactor"},
    "optimizer_arguments": {"optimizer_arguments": {"eps": 1e-6}},
    "learning_rates": lambda place: {
        "learning_rates": dict.fromkeys(make_config(place.values({})).lora_base_model, 0.5)
    },
    "ema_sigma_rel": {"ema_sigma_rel": 0.1},
    "max_grad_norm": {"max_grad_norm": 1.0},
    "mixed_precision": {"mixed_precision": "bf16"},
    "use_gradient_checkpointing": {"use_gradient_checkpointing": True},
    "use_gradient_checkpointing_offload": {"use_gradient_checkpointing_offload": True},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    # output
    "output_path": lambda place: {"output_path": str(place.folder / "elsewhere")},
    "remove_prefix_in_ckpt": {"remove_prefix_in_ckpt": ""},
    "save_steps": {"save_steps": 1},
    "validation_split": {"validation_split": 1},
    "validation_steps": {"validation_split": 1, "validation_steps": 1},
    "validation_timesteps": {"validation_split": 1, "validation_timesteps": 2},
    "keep_best": {"validation_split": 1, "keep_best": True},
    "early_stopping_patience": {"validation_split": 1, "early_stopping_patience": 1},
    "save_keep": {"save_keep": 1},
    "state_steps": {"state_steps": 1},
    "state_minutes": {"state_minutes": 1.0},
    "state_keep": {"state_keep": 1},
    "resume": {"resume": "never"},
    "runs_keep": {"runs_keep": 1},
    "enable_csv_log": {"enable_csv_log": True},
    "enable_tensorboard_log": {"enable_tensorboard_log": True},
    "enable_swanlab_log": {"enable_swanlab_log": True},
    "swanlab_project": {"swanlab_project": "another"},
    "enable_wandb_log": {"enable_wandb_log": True},
    "wandb_project": {"wandb_project": "another"},
    "enable_trackio_log": {"enable_trackio_log": True},
    "trackio_project": {"trackio_project": "another"},
    "enable_mlflow_log": {"enable_mlflow_log": True},
    "mlflow_project": {"mlflow_project": "another"},
    "sample_prompts": {"sample_prompts": ["a cat"]},
    "sample_num_inference_steps": {"sample_num_inference_steps": 1},
    "sample_steps": {"sample_steps": 1, "sample_prompts": ["a cat"]},
    "sample_cfg_scale": {"sample_cfg_scale": 2.0},
    "sample_negative_prompt": {"sample_prompts": ["a cat"], "sample_negative_prompt": ""},
    "customized_evaluation": {
        "customized_evaluation": "parameter_changes.unchanged",
        "sample_cfg_scale": 1.0,  # the published one counts where something is sampled
    },
    # planned: any other value is refused
    "audio_processor_path": {"audio_processor_path": "a"},
    "framewise_decoding": {"framewise_decoding": True},
    "audio_loss_weight": {"audio_loss_weight": 0.5},
    "first_frame_crf": {"first_frame_crf": 33},
    "caption_chunks": {"caption_chunks": 3},
    "offload_idle_denoiser": {"offload_idle_denoiser": True},
    "offload_models": {"offload_models": ["a"]},
    "quant_options": {"quant_options": "a"},
    "template_model_id_or_path": {"template_model_id_or_path": "a"},
    "enable_lora_hot_loading": {"enable_lora_hot_loading": True},
    "enable_model_cpu_offload": {"enable_model_cpu_offload": True},
    "enable_optimizer_cpu_offload": {"enable_optimizer_cpu_offload": True},
    "cpu_offload_split_threshold": {"cpu_offload_split_threshold": 1.0},
}
"""Parameter → another value of it, with what must go with it."""


STALE = {
    "weights": {"metadata", "latents", "checkpoints"},
    "rows": {"metadata", "latents", "checkpoints"},
    "latents": {"latents", "checkpoints"},
    "training": {"checkpoints"},
    "exports": {"exports"},
    "nothing": set[str](),
}
"""What a parameter affects first → the assets that are out of date, if it counts by value."""
NAMED = {
    "weights": {"metadata"},
    "rows": {"metadata"},
    "latents": {"latents", "checkpoints"},
    "training": {"checkpoints"},
}
"""The same for the name of a file, if it counts by content: where no asset upstream tells it."""
PLANNED = [name for name, mark in MARKS.items() if mark.planned]
BY_VALUE = [n for n, mark in MARKS.items() if not mark.by_content and not mark.planned]
BY_CONTENT = [n for n, mark in MARKS.items() if mark.by_content and not mark.planned]
IMAGES = dict.fromkeys(("num_frames", "frame_rate"), "is trained on images")
NO_SAMPLES = dict.fromkeys(
    ("sample_prompts", "sample_steps", "sample_negative_prompt", "customized_evaluation"),
    "a prompt alone makes no sample here",
)
NO_EDIT = dict.fromkeys(
    ("zero_cond_t", "edit_plus", "processor_path"), "is about edit images, which are not trained on"
)
ALONE = {"offload_idle_denoiser": "no denoiser is ever idle"}
REFUSED: dict[str, dict[str, str]] = {
    "qwen_image": {**ALONE, **IMAGES, **NO_EDIT, "extra_inputs": "not clear which release"},
    "qwen_image_edit": {**ALONE, **IMAGES, **NO_SAMPLES},
    "flux": {
        **ALONE,
        **IMAGES,
        "extra_inputs": "reads files from the column",
        "sample_negative_prompt": "without guidance",
    },
    "flux_kontext": {**ALONE, **IMAGES, **NO_SAMPLES},
    "sd15": {
        **ALONE,
        "timestep_shift": "no sigmas that are shifted",
        **IMAGES,
        "task": "cannot be distilled",
        "extra_inputs": "controlnet_image is given but no ControlNet",
    },
    "wan_t2v": {**ALONE, "extra_inputs": "this transformer is given no frame"},
    "wan22_ti2v_5b": {
        **ALONE,
        **NO_SAMPLES,
        # Its size must be given, since the VAE is not recognised from its name.
        "max_pixels": "has no effect when height and width are given",
        "bucket_step": "has no effect with 'height' and 'width'",
    },
}
"""Case → parameter that it does not take → words of the message."""
