"""Checks that model files have what a training needs, told from their headers."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError, WeightsError
from diffsynth_dagster.families.contract import Part
from diffsynth_dagster.training.adapters import adapter_shapes
from diffsynth_dagster.training.lora import read_start, start_of
from diffsynth_dagster.training.lora_formats import check_formats
from diffsynth_dagster.training.lora_targets import lora_targets
from diffsynth_dagster.weights.adapter_files import AdapterFile, require_values
from diffsynth_dagster.weights.load import build_empty
from diffsynth_dagster.weights.lora import LoraFile, read_lora, require_fit
from diffsynth_dagster.weights.models import require_component
from diffsynth_dagster.weights.resolved import ResolvedModel
from diffsynth_dagster.weights.whole import require_weights

Warn = Callable[[str], None]


def refuse_coarse_weights(config: TrainingConfig, model: ResolvedModel) -> None:
    """Refuse float8 for weights that must be exact: those that are fully trained, and those that a
    DoRA takes norms of. Raises `ParameterError`."""
    family = model.family
    stored = {name for name in model.components if model.is_float8(name)}
    for name in sorted({family.part(n).of for n in config.trainable_models} & stored):
        raise ParameterError(
            f"'{name}' is trained, and float8 is too coarse for weights that change",
            where="fp8_models",
            do="leave it out there, or train it through a LoRA",
        )
    under_dora = {family.part(n).of for n in config.lora_base_model if config.lora_method == "dora"}
    for name in sorted(under_dora & stored):
        raise ParameterError(
            f"a DoRA measures the weights of '{name}', which cannot be done in float8",
            where="fp8_models",
            do="leave it out there, or give another lora_method",
        )


def require_components(config: TrainingConfig, model: ResolvedModel) -> None:
    """Check that the model list has every component that encoding or a step uses. Raises
    `WeightsError`."""
    names: list[str] = []
    # What is encoded already needs no encoder, and without training no denoiser is loaded.
    if not config.reads_encoded:
        names += [name for stage in model.cached_stages for name in stage.uses]
    if not config.encodes_only:
        names += model.step_components
    for name in dict.fromkeys(names):
        require_component(model, name)


def require_decoders(config: TrainingConfig, model: ResolvedModel) -> None:
    """Check that the model list has the components that decode samples. Raises `WeightsError`."""
    if not (config.makes_samples or config.customized_evaluation):
        return
    for name in model.family.decoder:
        require_component(model, name)
        files = model.components[name]
        # Some files hold the encoder of a VAE alone.
        if files.lacks:
            raise WeightsError(
                f"the files of '{name}' hold no {files.lacks[0]}, which sample images need",
                where=files.entry.text,
                do="name the whole files, or leave the samples out",
            )


def check_full_training(
    config: TrainingConfig, model: ResolvedModel, trained_dtype: torch.dtype
) -> int:
    """Check that the model has what `trainable_models` names, and that `resume_from_checkpoint`
    fits it.

    Args:
        trained_dtype: element type of the trained weights.

    Returns:
        Size of the trained weights in bytes.

    Raises:
        ParameterError: the model lacks a part.
        WeightsError: the checkpoint does not fit.
    """
    size = 0
    # On the meta device: shapes are enough, and no weight is read.
    for part, module, entry in _with_modules(model, config.trainable_models):
        held = _held(part, module, f"trainable_models; {entry}")
        size += sum(p.numel() for p in held) * trained_dtype.itemsize
        if config.resume_from_checkpoint is not None:
            path = Path(config.resume_from_checkpoint)
            where = f"resume_from_checkpoint = {path.absolute()}"
            require_weights(module, path, model.family, part.name, where)
    return size


def check_presets(model: ResolvedModel, warn: Warn) -> None:
    """Check that `preset_lora_path` is a LoRA that fits. Raises `WeightsError`."""
    for name, preset in model.presets.items():
        lora = read_lora(preset.path, model.family, preset.name, "preset_lora_path")
        module = build_empty(model.components[name])
        require_fit(module, lora, f"preset_lora_path = {preset.path}")
        _warn_of_rest(warn, lora, preset.path, preset.name)


def check_loras(config: TrainingConfig, model: ResolvedModel, warn: Warn) -> int:
    """Check that `lora_base_model` and the LoRA's targets are in the model, that `lora_checkpoint`
    fits, and that checkpoints and exports can hold the LoRA.

    Returns:
        Size of the LoRA's weights in bytes.

    Raises:
        ParameterError, TargetError: see `lora_targets`, `check_formats`, `adapter_shapes`.
        WeightsError: `lora_checkpoint` does not fit.
    """
    size = 0
    for part, module, entry in _with_modules(model, config.lora_base_model):
        base = part.name
        _held(part, module, f"lora_base_model; {entry}")
        targets = lora_targets(config, model.family, module, base)
        start = read_start(config, model.family, module, base, targets)
        if isinstance(start, LoraFile):
            _warn_of_rest(warn, start, config.lora_checkpoint, base)
        if config.lora_method in ("lora", "dora"):
            # Only these two are written in formats of other tools.
            layers = {name: module.get_submodule(name) for name in targets}
            check_formats(config, model.family, base, model.components[part.of], layers)
        # Last, since it adds the adapter to the module and so renames its layers.
        shapes = adapter_shapes(config, module, targets)
        if isinstance(start, AdapterFile):
            require_values(start, config.adapter, shapes, start_of(config))
        size += sum(map(math.prod, shapes.values())) * torch.float32.itemsize
    return size


def _with_modules(
    model: ResolvedModel, names: Sequence[str]
) -> Iterator[tuple[Part, nn.Module, str]]:
    """For each named component or part whose files exist: the part, the module of its component on
    the meta device, and the entry of the model list. Parts of a component share its module."""
    modules: dict[str, nn.Module] = {}
    for part in (model.family.part(name) for name in names):
        files = model.components.get(part.of)
        if files is not None:
            if part.of not in modules:
                modules[part.of] = build_empty(files)
            yield part, modules[part.of], files.entry.text


def _held(part: Part, module: nn.Module, where: str) -> list[nn.Parameter]:
    """The weights of a part of a component. Raises `ParameterError` if the model has none of it."""
    held = [p for n, p in module.named_parameters() if part.holds(n)]
    if not held:
        raise ParameterError(
            f"the model has no '{part.name}'",
            where=where,
            do="leave it out there, or give the files of a model that has it",
        )
    return held


def _warn_of_rest(warn: Warn, lora: LoraFile, path: object, name: str) -> None:
    """Warn if only a part of a LoRA file is used."""
    if lora.left_out:
        others = ", ".join(f"'{other}'" for other in lora.left_out)
        warn(f"{path} holds a LoRA of {others} as well; only that of '{name}' is used")
