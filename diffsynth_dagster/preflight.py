"""All checks before the first step, in one ordered list, `CHECKS`. Each one says what it needs.

Parameters that contradict each other were refused when they were read: see `config.validate`. The
values of weights are checked when they are loaded: see `weights.load`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from diffsynth_dagster.cache.encoded_for import require_encoded_for
from diffsynth_dagster.cache.manifest import Manifest
from diffsynth_dagster.cache.sample_rows import require_sample_rows
from diffsynth_dagster.config.entries import float8_entries
from diffsynth_dagster.config.family_specific import ParticularParameters
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.geometry import clip_rule, size_rule
from diffsynth_dagster.data.table.validate import CheckedTable, check_columns
from diffsynth_dagster.dotted import import_function
from diffsynth_dagster.errors import ParameterError, WeightsError
from diffsynth_dagster.facts import FactCache
from diffsynth_dagster.families.contract import Part
from diffsynth_dagster.families.sampling_types import guidance_of
from diffsynth_dagster.files import require_space
from diffsynth_dagster.training.adapters import adapter_shapes
from diffsynth_dagster.training.checkpoint import check_prefix
from diffsynth_dagster.training.encoded_data import require_stored
from diffsynth_dagster.training.lora import read_start, start_of
from diffsynth_dagster.training.lora_formats import check_formats
from diffsynth_dagster.training.lora_targets import lora_targets
from diffsynth_dagster.training.optimizer import check_optimizer
from diffsynth_dagster.training.overlap import refuse_overlap, refuse_replaced_rows
from diffsynth_dagster.weights.adapter_files import AdapterFile, require_values
from diffsynth_dagster.weights.load import build_empty, require_buildable
from diffsynth_dagster.weights.lora import LoraFile, read_lora, require_fit
from diffsynth_dagster.weights.models import require_component
from diffsynth_dagster.weights.resolved import ResolvedModel
from diffsynth_dagster.weights.whole import require_weights

Needs = Literal["config", "data", "headers", "encoded"]
"""What a check needs: the config and what its family declares; the checked tables of the data set;
the headers of the model files; or the data set that was encoded before."""


@dataclass
class Known:
    """What is known before the first step.

    Attributes:
        model: without files, if a check needs only the config.
        trained_dtype: element type of fully trained weights; a LoRA is float32.
        tables: the checked tables of the trained and the held-out samples.
        manifests: of a data set that was encoded before; the manifest of the trained samples is
            first.
        warn: called with what is unusual, but not refused.
        checkpoint_bytes: size of the trained weights, which the checks of headers add up.
    """

    config: TrainingConfig
    model: ResolvedModel
    trained_dtype: torch.dtype = torch.float32
    tables: Sequence[CheckedTable] = ()
    manifests: Sequence[Manifest] = ()
    fact_cache: FactCache | None = None
    warn: Callable[[str], None] = lambda _: None
    checkpoint_bytes: int = field(default=0, init=False)


@dataclass(frozen=True)
class Check:
    """A check, and what it needs. `run` raises a `UserError`."""

    needs: Needs
    run: Callable[[Known], object]


def refuse_particular(known: Known) -> None:
    """Refuse family-specific parameters that this family does not take. Raises `ParameterError`."""
    family = known.model.family
    for name in ParticularParameters.model_fields:
        if known.config.sets(name) and name not in family.parameters:
            raise ParameterError(
                f"{family.name} takes no {name}",
                where=name,
                do=f"leave it out; {family.name} takes {', '.join(family.parameters)}",
            )


def check_expert_offload(known: Known) -> None:
    """Refuse `offload_idle_denoiser` if no frozen expert is ever idle. Raises `ParameterError`."""
    config, experts = known.config, [d.component for d in known.model.denoisers]
    # Experts that take turns: one is at work at a timestep, the others wait.
    if not config.offload_idle_denoiser:
        return
    if len(experts) < 2:
        raise ParameterError(
            "no denoiser is ever idle: one alone is at work here",
            where="offload_idle_denoiser",
            do="leave it out, or train both experts",
        )
    full = [name for name in experts if name in config.trainable_models]
    if full:
        raise ParameterError(
            f"'{full[0]}' is trained in full, and weights that are trained stay on the device",
            where="offload_idle_denoiser",
            do="leave it out, or train LoRAs",
        )


def check_samples(known: Known) -> None:
    """Refuse prompts for samples if the model needs more than a prompt, and a negative prompt
    without guidance. Raises `ParameterError`."""
    config, family = known.config, known.model.family
    if (config.sample_texts or config.customized_evaluation) and not family.samples_from_text:
        # Sizes are known without a table: see `sampling`.
        reads = (i for stage in family.sample_stages for i in stage.reads)
        needed = dict.fromkeys(i.column for i in reads if i.kind not in ("text", "sizes"))
        listed = ", ".join(needed)
        raise ParameterError(
            f"a prompt alone makes no sample here: the model also needs {listed}",
            where="sample_prompts" if config.sample_texts else "customized_evaluation",
            do=f"give a table with the columns prompt, {listed} as sample_prompts"
            if config.sample_texts
            else "leave it out",
        )
    guided = guidance_of(config, family.sampling).is_on
    if config.sample_negative_prompt is not None and not guided:
        raise ParameterError(
            "a negative prompt is what guidance leads away from, and samples are made without guidance",
            where="sample_negative_prompt",
            do="leave it out, or give a sample_cfg_scale above 1",
        )


def check_functions(known: Known) -> None:
    """Check that the functions that the config names can be imported. Raises `ParameterError`."""
    config = known.config
    if config.customized_dataset is not None:
        import_function(config.customized_dataset, "customized_dataset", "dataset_base_path")
    if config.customized_evaluation is not None:
        import_function(config.customized_evaluation, "customized_evaluation", "generate")


def check_removed_prefix(known: Known) -> None:
    """Check that the prefix to remove belongs to a trained component. Raises `ParameterError`."""
    model = known.model
    check_prefix(known.config.remove_prefix_in_ckpt, model.family, model.trained)


def check_sizes(known: Known) -> None:
    """Check that the family supports this size and number of frames. Raises `ParameterError`."""
    config, family = known.config, known.model.family
    # Only a value other than the default was surely given.
    default = TrainingConfig.model_fields["max_pixels"].default
    if config.height is not None and config.max_pixels != default:
        raise ParameterError(
            "max_pixels has no effect when height and width are given",
            where=f"max_pixels = {config.max_pixels}",
            do="leave max_pixels out, or both sides",
        )
    size_rule(config.height, config.width, config.max_pixels, family.geometry, config.bucket_step)
    clip_rule(config.num_frames, config.frame_rate, family.geometry, family.name)


def refuse_coarse_weights(known: Known) -> None:
    """Refuse float8 for weights that must be exact: those that are fully trained, and those that a
    DoRA takes norms of. Raises `ParameterError`."""
    config, family = known.config, known.model.family
    stored = {name for name in known.model.components if known.model.is_float8(name)}
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


def require_components(known: Known) -> None:
    """Check that the model list has every component that encoding or a step uses. Raises
    `WeightsError`."""
    config, model = known.config, known.model
    names: list[str] = []
    # What is encoded already needs no encoder, and without training no denoiser is loaded.
    if not config.reads_encoded:
        names += [name for stage in model.cached_stages for name in stage.uses]
    if not config.encodes_only:
        names += model.step_components
    for name in dict.fromkeys(names):
        require_component(model, name)


def require_decoders(known: Known) -> None:
    """Check that the model list has the components that decode samples. Raises `WeightsError`."""
    if not (known.config.sample_prompts or known.config.customized_evaluation):
        return
    for name in known.model.family.decoder:
        require_component(known.model, name)
        files = known.model.components[name]
        # Some files hold the encoder of a VAE alone.
        if files.lacks:
            raise WeightsError(
                f"the files of '{name}' hold no {files.lacks[0]}, which sample images need",
                where=files.entry.text,
                do="name the whole files, or leave the samples out",
            )


def require_architectures(known: Known) -> None:
    """Check that each component can be built, and that its files are whole. Raises
    `WeightsError`."""
    for files in known.model.components.values():
        require_buildable(files)


def check_full_training(known: Known) -> None:
    """Check that the model has what `trainable_models` names, and that `resume_from_checkpoint`
    fits it; add up the size of the weights.

    Raises:
        ParameterError: the model lacks a part.
        WeightsError: the checkpoint does not fit.
    """
    config, model = known.config, known.model
    # On the meta device: shapes are enough, and no weight is read.
    for part, module, entry in _with_modules(known, config.trainable_models):
        held = _held(part, module, f"trainable_models; {entry}")
        known.checkpoint_bytes += sum(p.numel() for p in held) * known.trained_dtype.itemsize
        if config.resume_from_checkpoint is not None:
            path = Path(config.resume_from_checkpoint)
            where = f"resume_from_checkpoint = {path.absolute()}"
            require_weights(module, path, model.family, part.name, where)


def check_presets(known: Known) -> None:
    """Check that `preset_lora_path` is a LoRA that fits, and that no checkpoint replaces the
    weights it is fused into.

    Raises:
        ParameterError: all weights of the component come from a checkpoint.
        WeightsError: the LoRA does not fit.
    """
    config, model = known.config, known.model
    in_full = {model.family.part(n).of for n in config.trainable_models}
    for name, preset in model.presets.items():
        if config.resume_from_checkpoint is not None and name in in_full:
            raise ParameterError(
                f"all weights of '{name}' come from a checkpoint, and the LoRA would be lost",
                where="resume_from_checkpoint, preset_lora_path",
                do="give one of the two: a training that started from the LoRA has it in its checkpoints",
            )
        lora = read_lora(preset.path, model.family, preset.name, "preset_lora_path")
        module = build_empty(model.components[name])
        require_fit(module, lora, f"preset_lora_path = {preset.path}")
        _warn_of_rest(known, lora, preset.path, preset.name)


def check_loras(known: Known) -> None:
    """Check that `lora_base_model` and the LoRA's targets are in the model, that `lora_checkpoint`
    fits, and that checkpoints and exports can hold the LoRA; add up the size of its weights.

    Raises:
        ParameterError, TargetError: see `lora_targets`, `check_formats`, `adapter_shapes`.
        WeightsError: `lora_checkpoint` does not fit.
    """
    config, model = known.config, known.model
    for part, module, entry in _with_modules(known, config.lora_base_model):
        base = part.name
        _held(part, module, f"lora_base_model; {entry}")
        targets = lora_targets(config, model.family, module, base)
        start = read_start(config, model.family, module, base, targets)
        if isinstance(start, LoraFile):
            _warn_of_rest(known, start, config.lora_checkpoint, base)
        if config.lora_method in ("lora", "dora"):
            # Only these two are written in formats of other tools.
            layers = {name: module.get_submodule(name) for name in targets}
            check_formats(config, model.family, base, model.components[part.of], layers)
        # Last, since it adds the adapter to the module and so renames its layers.
        shapes = adapter_shapes(config, module, targets)
        if isinstance(start, AdapterFile):
            require_values(start, config.adapter, shapes, start_of(config))
        known.checkpoint_bytes += sum(map(math.prod, shapes.values())) * torch.float32.itemsize


def require_checkpoint_space(known: Known) -> None:
    """Check that a checkpoint fits on the disk. Raises `OutputError`."""
    if not known.config.encodes_only:
        require_space(Path(known.config.output_path), known.checkpoint_bytes, "output_path")


def require_accepted_rows(known: Known) -> None:
    """Check that not too many rows are rejected. Raises `MetadataError`."""
    for table in known.tables:
        table.require_accepted(known.config.max_rejected_fraction)


def require_encoded(known: Known) -> None:
    """Check that the data set was encoded for this training, and that the store has all of it.

    Raises:
        ParameterError: it was encoded for another one.
        StoreError: the store lacks samples.
    """
    config, model = known.config, known.model
    assert known.fact_cache is not None
    for manifest in known.manifests:
        # All compatibility first: it explains more than a count of missing samples.
        require_encoded_for(config, model, manifest, known.fact_cache)
    for manifest in known.manifests:
        require_stored(manifest)
    # Without files, as if the model list had all components.
    components = model.components.keys() or {c.name for c in model.family.components}
    require_sample_rows(config, model.family, known.manifests[0], components)


CHECKS: tuple[Check, ...] = (
    Check("config", refuse_particular),
    Check("config", check_expert_offload),
    Check("config", check_samples),
    Check("config", lambda known: check_optimizer(known.config, known.model)),
    # Raises if `fp8_models` names a model that is not in the list.
    Check("config", lambda known: float8_entries(known.config)),
    Check("config", check_functions),
    Check("config", check_removed_prefix),
    Check("config", check_sizes),
    Check("config", lambda known: check_columns(known.config, known.model.family.columns)),
    Check("config", lambda known: refuse_overlap(known.config)),
    # The data comes before the model files, which may have to be downloaded.
    Check("data", require_accepted_rows),
    Check("data", lambda known: refuse_replaced_rows(known.config, known.tables)),
    # Checked again: the files may show that the model is a variant of the family.
    Check("headers", check_sizes),
    Check("headers", check_samples),
    Check("headers", refuse_coarse_weights),
    Check("headers", require_components),
    Check("headers", require_decoders),
    Check("headers", require_architectures),
    Check("headers", check_full_training),
    Check("headers", check_presets),
    Check("headers", check_loras),
    # After the checks that add up the size of a checkpoint.
    Check("headers", require_checkpoint_space),
    Check("encoded", require_encoded),
)
"""Made in this order."""


def check_config(config: TrainingConfig, model: ResolvedModel) -> None:
    """Make the checks that need no file.

    Args:
        model: see `weights.identify.guess_model`.

    Raises:
        UserError: see `CHECKS`.
    """
    _run("config", Known(config, model))


def check_data(
    config: TrainingConfig, model: ResolvedModel, tables: Sequence[CheckedTable]
) -> None:
    """Make the checks that need the tables of the data set. Raises `UserError`: see `CHECKS`."""
    _run("data", Known(config, model, tables=tables))


def check_headers(
    config: TrainingConfig,
    model: ResolvedModel,
    trained_dtype: torch.dtype,
    warn: Callable[[str], None] = lambda _: None,
) -> int:
    """Make the checks that need the headers of the model files, before anything is encoded.

    Args:
        trained_dtype, warn: see `Known`.

    Returns:
        Size of the trained weights, and so of a checkpoint, in bytes.

    Raises:
        UserError: see `CHECKS`.
    """
    known = Known(config, model, trained_dtype, warn=warn)
    _run("headers", known)
    return known.checkpoint_bytes


def check_encoded(
    config: TrainingConfig,
    model: ResolvedModel,
    manifests: Sequence[Manifest],
    fact_cache: FactCache,
) -> None:
    """Make the checks of a data set that was encoded before. Raises `UserError`: see `CHECKS`.

    Args:
        manifests: of the data set, and of the held-out samples if they have one of their own.
    """
    _run("encoded", Known(config, model, manifests=manifests, fact_cache=fact_cache))


def _run(needs: Needs, known: Known) -> None:
    # The first mistake ends the run: later checks may rely on earlier ones.
    for check in CHECKS:
        if check.needs == needs:
            check.run(known)


def _with_modules(known: Known, names: Sequence[str]) -> Iterator[tuple[Part, nn.Module, str]]:
    """For each named component or part whose files exist: the part, the module of its component on
    the meta device, and the entry of the model list. Parts of a component share its module."""
    modules: dict[str, nn.Module] = {}
    for part in (known.model.family.part(name) for name in names):
        files = known.model.components.get(part.of)
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


def _warn_of_rest(known: Known, lora: LoraFile, path: object, name: str) -> None:
    """Warn if only a part of a LoRA file is used."""
    if lora.left_out:
        others = ", ".join(f"'{other}'" for other in lora.left_out)
        known.warn(f"{path} holds a LoRA of {others} as well; only that of '{name}' is used")
