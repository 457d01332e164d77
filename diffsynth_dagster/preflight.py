"""All checks before the first step, in one ordered list, `CHECKS`. Each one says what it needs.

Parameters that contradict each other were refused when they were read: see `config.validate`. The
values of weights are checked when they are loaded: see `weights.load`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from diffsynth_dagster.cache.encoded_for import require_encoded_for
from diffsynth_dagster.cache.row_sets import needed_beside_prompt, require_encodable_samples
from diffsynth_dagster.config.entries import float8_entries
from diffsynth_dagster.config.family_specific import FamilySpecificParameters
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.geometry import clip_rule, size_rule
from diffsynth_dagster.data.table.validate import CheckedTable, check_columns
from diffsynth_dagster.dotted import import_function
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.facts import FactCache
from diffsynth_dagster.families.sampling_types import guidance_of
from diffsynth_dagster.files import require_space
from diffsynth_dagster.training.checkpoint import check_prefix
from diffsynth_dagster.training.encoded_data import Manifests, require_stored
from diffsynth_dagster.training.fit import (
    check_full_training,
    check_loras,
    check_presets,
    refuse_coarse_weights,
    require_components,
    require_decoders,
)
from diffsynth_dagster.training.optimizer import check_optimizer
from diffsynth_dagster.training.overlap import refuse_overlap, refuse_replaced_rows
from diffsynth_dagster.weights.load import require_buildable
from diffsynth_dagster.weights.resolved import ResolvedModel

Needs = Literal["config", "data", "headers", "disk", "encoded"]
"""What a check needs: the config and what its family declares; the checked tables of the data set;
the headers of the model files; the size of a checkpoint, on the machine that writes it; or the data
set that was encoded before."""


@dataclass
class Known:
    """What is known before the first step.

    Attributes:
        model: without files, if a check needs only the config.
        trained_dtype: element type of fully trained weights; a LoRA is float32.
        tables: the checked tables of the trained and the held-out samples.
        manifests: of the row sets of a data set that was encoded before.
        warn: called with what is unusual, but not refused.
        checkpoint_bytes: size of the trained weights, which the checks of headers add up.
    """

    config: TrainingConfig
    model: ResolvedModel
    trained_dtype: torch.dtype = torch.float32
    tables: Sequence[CheckedTable] = ()
    manifests: Manifests | None = None
    fact_cache: FactCache | None = None
    warn: Callable[[str], None] = lambda _: None
    checkpoint_bytes: int = 0


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        needs: what must be known.
        run: raises a `UserError`.
        again: what may change its answer: it is made a second time when this is known.
    """

    needs: Needs
    run: Callable[[Known], object]
    again: Needs | None = None


def refuse_family_specific(known: Known) -> None:
    """Refuse family-specific parameters that this family does not take. Raises `ParameterError`."""
    family = known.model.family
    for name in FamilySpecificParameters.model_fields:
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
    needed = ", ".join(needed_beside_prompt(family))
    if needed and (config.sample_prompts or config.customized_evaluation):
        raise ParameterError(
            f"a prompt alone makes no sample here: the model also needs {needed}",
            where="sample_prompts" if config.sample_prompts else "customized_evaluation",
            do=f"give a table with the columns prompt, {needed} as sample_table"
            if config.sample_prompts
            else "leave it out",
        )
    guided = guidance_of(config, family.sampling).is_on
    if config.sample_negative_prompt is not None and not guided:
        raise ParameterError(
            "a negative prompt is what guidance leads away from, and samples are made without guidance",
            where="sample_negative_prompt",
            do="leave it out, or give a sample_cfg_scale above 1",
        )


def refuse_lost_preset(known: Known) -> None:
    """Refuse a LoRA that is fused into weights that a checkpoint then replaces. Raises
    `ParameterError`."""
    config, family = known.config, known.model.family
    if config.preset_lora_path is None or config.resume_from_checkpoint is None:
        return
    name = family.part(config.preset_lora_model or family.denoiser).of
    if name in {family.part(trained).of for trained in config.trainable_models}:
        raise ParameterError(
            f"all weights of '{name}' come from a checkpoint, and the LoRA would be lost",
            where="resume_from_checkpoint, preset_lora_path",
            do="give one of the two: a training that started from the LoRA has it in its checkpoints",
        )


def check_functions(known: Known) -> None:
    """Check that the functions that the config names can be imported. Raises `ParameterError`."""
    config = known.config
    # Training on what was encoded makes no data set: the function may not even be on that machine.
    if config.customized_dataset is not None and not config.trains_only:
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


def require_architectures(known: Known) -> None:
    """Check that each component can be built, and that its files are whole. Raises
    `WeightsError`."""
    for files in known.model.components.values():
        require_buildable(files)


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
    assert known.manifests is not None
    found = known.manifests
    # All compatibility first: it explains more than a count of missing samples.
    for manifest in (found.train, found.held_out):
        if manifest is not None:
            require_encoded_for(config, model, manifest, known.fact_cache)
    for manifest in found.all:
        require_stored(manifest)
    # Without files, as if the model list had all components.
    components = model.components.keys() or {c.name for c in model.family.components}
    require_encodable_samples(config, model.family, found.train, components)


def count_full_training(known: Known) -> None:
    """Check full trainings, and add up the size of their weights: see `check_full_training`."""
    size = check_full_training(known.config, known.model, known.trained_dtype)
    known.checkpoint_bytes += size


def count_loras(known: Known) -> None:
    """Check LoRAs, and add up the size of their weights: see `check_loras`."""
    known.checkpoint_bytes += check_loras(known.config, known.model, known.warn)


CHECKS: tuple[Check, ...] = (
    # `again`: the files may show another variant of the family than their names.
    Check("config", refuse_family_specific, again="headers"),
    Check("config", check_expert_offload, again="headers"),
    Check("config", refuse_lost_preset),
    Check("config", check_samples, again="headers"),
    Check("config", lambda known: check_optimizer(known.config, known.model), again="headers"),
    # Raises if `fp8_models` names a model that is not in the list.
    Check("config", lambda known: float8_entries(known.config)),
    Check("config", check_functions),
    Check("config", check_removed_prefix, again="headers"),
    Check("config", check_sizes, again="headers"),
    Check(
        "config",
        lambda known: check_columns(known.config, known.model.family.columns),
        again="headers",
    ),
    Check("config", lambda known: refuse_overlap(known.config)),
    # The data comes before the model files, which may have to be downloaded.
    Check("data", require_accepted_rows),
    Check("data", lambda known: refuse_replaced_rows(known.config, known.tables)),
    Check("headers", lambda known: refuse_coarse_weights(known.config, known.model)),
    Check("headers", lambda known: require_components(known.config, known.model)),
    Check("headers", lambda known: require_decoders(known.config, known.model)),
    Check("headers", require_architectures),
    Check("headers", count_full_training),
    Check("headers", lambda known: check_presets(known.model, known.warn)),
    Check("headers", count_loras),
    # After the checks that add up the size of a checkpoint.
    Check("disk", require_checkpoint_space),
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


def check_disk(config: TrainingConfig, model: ResolvedModel, checkpoint_bytes: int) -> None:
    """Make the checks of the disk that checkpoints are written to. Raises `UserError`: see `CHECKS`.

    Args:
        checkpoint_bytes: what `check_headers` returned.
    """
    _run("disk", Known(config, model, checkpoint_bytes=checkpoint_bytes))


def check_encoded(
    config: TrainingConfig,
    model: ResolvedModel,
    manifests: Manifests,
    fact_cache: FactCache,
) -> None:
    """Make the checks of a data set that was encoded before. Raises `UserError`: see `CHECKS`.

    Args:
        manifests: of its row sets.
    """
    _run("encoded", Known(config, model, manifests=manifests, fact_cache=fact_cache))


def _run(needs: Needs, known: Known) -> None:
    # The first mistake ends the run: later checks may rely on earlier ones.
    for check in CHECKS:
        if needs in (check.needs, check.again):
            check.run(known)
