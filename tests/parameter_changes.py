"""Another value for every parameter, and what a change of it comes to; for `test_marks.py`."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import make_config
from families.flux.cases import CASES as FLUX
from families.qwen_image.cases import CASES as QWEN
from families.stable_diffusion.cases import CASES as SD
from families.wanvideo.cases import CASES as WAN
from family_case import Case

from assets.common import KINDS, code_version
from diffsynth_dagster.cache.keys import Keys
from diffsynth_dagster.cache.plan import plan_samples
from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.config.parameters import MARKS
from diffsynth_dagster.data.prepare import prepare_data
from diffsynth_dagster.facts import FactCache
from diffsynth_dagster.families import find_family
from diffsynth_dagster.plan import check_plan
from diffsynth_dagster.training.record import start_record
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model, guess_family

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
    check_plan(config, guess_family(config))
    found = find_model(config, place.hub)
    with closing(FactCache(place.folder / "facts.sqlite")) as fact_cache:
        validated = prepare_data(config, found.family.columns, fact_cache)
        dtype = PRECISIONS.get(config.mixed_precision or "", torch.float32)
        manifest = plan_samples(config, found, validated, Keys(found, fact_cache, dtype))
        identity = start_record(config, found, manifest, fact_cache).identity
    versions = {kind: code_version(config, kind) for kind in KINDS}
    keys = frozenset(manifest.keys.collect().to_series())
    return Outcome(versions, keys, identity)


def with_columns(table: Path) -> None:
    """Add the columns that distillation reads."""
    head, *rows = table.read_text(encoding="utf-8").splitlines()
    lines = [f"{head},seed,num_inference_steps", *(f"{row},{i},4" for i, row in enumerate(rows))]
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


BEFORE: dict[str, Change] = {"preset_lora_model": preset}
"""Parameter → what a config has before its value is changed."""
ALTERNATIVES: dict[str, Change] = {
    # dataset
    "metadata_encoding": {"metadata_encoding": "utf-8-sig"},
    "dataset_repeat": {"dataset_repeat": 2},
    "dataset_num_workers": {"dataset_num_workers": 1},
    "decode_megapixels": {"decode_megapixels": 1},
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
    "preset_lora_model": lambda place: {**preset(place), "preset_lora_model": "text_encoder"},
    "align_to_opensource_format": {"align_to_opensource_format": True},
    # course
    "task": {"task": "direct_distill"},
    "min_timestep_boundary": {"min_timestep_boundary": 0.25},
    "max_timestep_boundary": {"max_timestep_boundary": 0.75},
    "learning_rate": {"learning_rate": 0.5},
    "num_epochs": {"num_epochs": 2},
    "batch_size": {"batch_size": 2},
    "seed": {"seed": 1},
    "trainable_models": {"trainable_models": ["text_encoder"]},
    "find_unused_parameters": {"find_unused_parameters": True},
    "weight_decay": {"weight_decay": 0.5},
    "customized_optimizer": {"customized_optimizer": "torch.optim.Adam"},
    "lr_scheduler": {"lr_scheduler": "cosine"},
    "lr_warmup_steps": {"lr_warmup_steps": 1},
    "max_grad_norm": {"max_grad_norm": 1.0},
    "mixed_precision": {"mixed_precision": "bf16"},
    "use_gradient_checkpointing": {"use_gradient_checkpointing": True},
    "use_gradient_checkpointing_offload": {"use_gradient_checkpointing_offload": True},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    # output
    "output_path": lambda place: {"output_path": str(place.folder / "elsewhere")},
    "remove_prefix_in_ckpt": {"remove_prefix_in_ckpt": ""},
    "save_steps": {"save_steps": 1},
    "enable_csv_log": {"enable_csv_log": True},
    "enable_tensorboard_log": {"enable_tensorboard_log": True},
    "enable_swanlab_log": {"enable_swanlab_log": True},
    "swanlab_project": {"swanlab_project": "another"},
    "enable_wandb_log": {"enable_wandb_log": True},
    "wandb_project": {"wandb_project": "another"},
    "sample_prompts": {"sample_prompts": ["a cat"]},
    "sample_num_inference_steps": {"sample_num_inference_steps": 1},
    "sample_cfg_scale": {"sample_cfg_scale": 2.0},
    "customized_evaluation": {"customized_evaluation": "parameter_changes.unchanged"},
    # planned: any other value is refused
    "audio_processor_path": {"audio_processor_path": "a"},
    "framewise_decoding": {"framewise_decoding": True},
    "audio_loss_weight": {"audio_loss_weight": 0.5},
    "offload_idle_denoiser": {"offload_idle_denoiser": True},
    "offload_models": {"offload_models": ["a"]},
    "quant_options": {"quant_options": "a"},
    "resume_from_checkpoint": {"resume_from_checkpoint": "a"},
    "template_model_id_or_path": {"template_model_id_or_path": "a"},
    "enable_lora_hot_loading": {"enable_lora_hot_loading": True},
    "enable_model_cpu_offload": {"enable_model_cpu_offload": True},
    "enable_optimizer_cpu_offload": {"enable_optimizer_cpu_offload": True},
    "cpu_offload_split_threshold": {"cpu_offload_split_threshold": 1.0},
}
"""Parameter → another value of it, with what must go with it."""


@dataclass(frozen=True)
class FileChange:
    """What a parameter names before; the same content under another name; other content."""

    before: Mapping[str, Any]
    renamed: Mapping[str, Any]
    changed: Mapping[str, Any] | None


def copied(source: Path, target: Path, change: Callable[[Path], None] | None = None) -> str:
    """A copy of a folder, or of a file and its neighbours; changed where it is asked for."""
    shutil.copytree(source if source.is_dir() else source.parent, target, dirs_exist_ok=True)
    copy = target if source.is_dir() else target / source.name
    if change is not None:
        change(copy)
    return str(copy)


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def swap_first_file(folder: Path) -> None:
    (first,) = folder.glob("0.*")
    shutil.copy(first.with_stem("1"), first)


def rewrite_captions(table: Path) -> None:
    table.write_text(table.read_text(encoding="utf-8").replace("number", "count"))


def add_file(folder: Path) -> None:
    (folder / "more.json").write_text("{}")


def file_change(place: Place, name: str) -> FileChange:
    """The change of a parameter that counts by content."""
    values, new = place.values({}), place.folder / name
    if name == "family":  # No other family takes these files.
        return FileChange({}, {"family": None}, None)
    if name in ("lora_checkpoint", "preset_lora_path"):
        one, same, two = (str(place.folder / f"{n}.safetensors") for n in ("one", "same", "two"))
        more = {"preset_lora_model": "text_encoder"} if name == "preset_lora_path" else {}
        return FileChange({name: one, **more}, {name: same, **more}, {name: two, **more})
    if name == "model_paths":
        return FileChange({}, *(with_other_vae(place, new / n / "vae", c) for n, c in COPIES))
    if name == "model_id_with_origin_paths":
        return FileChange(*(with_hub_vae(place, f"a/{n}", c) for n, c in (("z", None), *COPIES)))
    if name == "fp8_models":
        (encoder,) = (p for p in values["model_paths"] if "/text_encoder/" in str(p))
        copy = copied(Path(encoder), new)
        paths = [copy if path == encoder else path for path in values["model_paths"]]
        stored = {name: [encoder]}
        return FileChange(stored, {"model_paths": paths, name: [copy]}, {"model_paths": paths})
    changes = {"dataset_base_path": swap_first_file, "dataset_metadata_path": rewrite_captions}
    source = Path(values.get(name) or place.model / "diffusers" / "tokenizer")
    change = changes.get(name, add_file)
    return FileChange(
        {},
        {name: copied(source, new / "renamed")},
        {name: copied(source, new / "changed", change)},
    )


COPIES = (("renamed", None), ("changed", flip_last_byte))


def vae_of(place: Place) -> str:
    (vae,) = (p for p in place.values({})["model_paths"] if "/vae" in str(p))
    return vae


def with_other_vae(
    place: Place, folder: Path, change: Callable[[Path], None] | None
) -> dict[str, Any]:
    """The model list with a copy of the VAE in place of its own."""
    vae = vae_of(place)
    copy = copied(Path(vae), folder, change)
    paths = place.values({})["model_paths"]
    return {"model_paths": [copy if path == vae else path for path in paths]}


def with_hub_vae(
    place: Place, repository: str, change: Callable[[Path], None] | None
) -> dict[str, Any]:
    """The model list with the VAE from a repository."""
    vae = Path(vae_of(place))
    copied(vae, place.folder / "hub" / repository / "vae", change)
    paths = [path for path in place.values({})["model_paths"] if path != str(vae)]
    entry = f"{repository}:vae/{vae.name}"
    return {"model_paths": paths, "model_id_with_origin_paths": [entry]}


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
    ("sample_prompts", "customized_evaluation"), "a prompt alone makes no sample here"
)
NO_EDIT = dict.fromkeys(
    ("zero_cond_t", "edit_plus", "processor_path"), "is about edit images, which are not trained on"
)
ALONE = {"offload_idle_denoiser": "no denoiser is ever idle"}
REFUSED: dict[str, dict[str, str]] = {
    "qwen_image": {**ALONE, **IMAGES, **NO_EDIT, "extra_inputs": "reads files from the column"},
    "qwen_image_edit": {**ALONE, **IMAGES, **NO_SAMPLES},
    "flux": {**ALONE, **IMAGES, "extra_inputs": "reads files from the column"},
    "flux_kontext": {**ALONE, **IMAGES, **NO_SAMPLES},
    "sd15": {
        **ALONE,
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
