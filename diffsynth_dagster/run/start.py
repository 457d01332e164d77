"""The record of a training that is about to start, with everything that its result depends on."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffsynth_dagster.cache.held_out import held_out_manifest, left_out_digest
from diffsynth_dagster.cache.layout import SAMPLES_FOLDER
from diffsynth_dagster.cache.manifest import Manifest, read_manifest
from diffsynth_dagster.cache.row_sets import find_samples
from diffsynth_dagster.config.affects import values_that_affect
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import StoreError, WeightsError
from diffsynth_dagster.facts import FactCache, digest_of
from diffsynth_dagster.run.record import LIBRARIES, STARTS, RunRecord
from diffsynth_dagster.versions import TRAINING
from diffsynth_dagster.weights.models import component_digest
from diffsynth_dagster.weights.resolved import ResolvedModel


def parameters_of(config: TrainingConfig) -> dict[str, Any]:
    """The parameters that affect the result by their value.

    Paths of models and data are not among them: the record has digests of those files instead.
    """
    return values_that_affect(config, "weights", "rows", "latents", "training")


def config_digest(config: TrainingConfig) -> str:
    """Digest of `parameters_of` a config."""
    return digest_of(parameters_of(config))


def start_record(
    config: TrainingConfig,
    model: ResolvedModel,
    manifest: Manifest,
    fact_cache: FactCache,
    devices: Sequence[str] = (),
    mixed_precision: str = "no",
    starts: Mapping[str, str] | None = None,
) -> RunRecord:
    """The record of a training that is about to start.

    Args:
        devices: the name of each process's device.
        mixed_precision: the precision that is computed in. Neither it nor `devices` is part of the
            identity.
        starts: parameter in `STARTS` → digest of its file. If given, the files that the config
            names are not looked for.

    Raises:
        WeightsError: the file of `lora_checkpoint` or `resume_from_checkpoint` is missing; or a
            file has changed since it was found.
        StoreError: see `held_out_manifest`.
    """
    used = {name: component_digest(model, name, fact_cache) for name in model.step_components}
    base = manifest.weights | used
    base |= starts or {}
    for parameter, path in _starts(config).items() if starts is None else ():
        if not path.is_file():
            raise WeightsError(
                "the file to start from does not exist",
                where=f"{parameter} = {path.absolute()}",
                do="correct the path",
            )
        # The content counts, not the path: a copy of the file is the same start.
        (base[parameter],) = model.contents.digests(parameter, (path,), fact_cache)
    rows = _rows(config, model, manifest)
    lora = config.adapter if config.lora_base_model else None
    settings = config_digest(config)
    stages = [stage.name for stage in model.family.stages]
    path = model.noising.description
    # Devices, precision and library versions change the rounding, but are no reason to train again.
    return RunRecord(
        identity=digest_of([TRAINING, settings, rows.value, base, stages, path]),
        family=model.family.name,
        trained=[*config.trainable_models, *config.lora_base_model],
        base=dict(sorted(base.items())),
        samples=manifest.samples,
        samples_digest=manifest.digest,
        config_digest=settings,
        parameters=parameters_of(config),
        lora=lora,
        held_out_digest=rows.held_out,
        sampled_digest=rows.sampled,
        left_out_digest=rows.left_out,
        devices=list(devices),
        mixed_precision=mixed_precision,
        architecture=model.family.architecture,
        libraries={name: version(name) for name in LIBRARIES},
    )


@dataclass(frozen=True)
class _Rows:
    """The rows of a training.

    Attributes:
        value: what the identity has of them, as a JSON value.
        held_out, sampled, left_out: digests of rows beside those that are trained on: see
            `RunRecord`.
    """

    value: Any
    held_out: str | None
    sampled: str | None
    left_out: str | None


def _rows(config: TrainingConfig, model: ResolvedModel, manifest: Manifest) -> _Rows:
    held_out = held_out_manifest(config, manifest)
    held_out_digest = None if held_out is None else held_out.digest
    sampled = _table_digest(config, model, manifest)
    left_out = left_out_digest(config, manifest)
    # Each counts only where it is there: trainings without it keep their identity.
    value: Any = manifest.digest if held_out is None else [manifest.digest, held_out_digest]
    if sampled is not None:
        value = [manifest.digest, held_out_digest, sampled]
    if left_out is not None:
        value = [value, left_out]
    return _Rows(value, held_out_digest, sampled, left_out)


def _table_digest(config: TrainingConfig, model: ResolvedModel, manifest: Manifest) -> str | None:
    """Digest of the rows of `sample_table`; None if samples are made of prompts, which the
    parameters name, or not at all."""
    if config.sample_table is None:
        return None
    found = find_samples(config, model.family, manifest)
    if found is None:  # the second half of split training encodes its own
        with suppress(StoreError):
            found = read_manifest(Path(config.output_path) / SAMPLES_FOLDER)
    return None if found is None else found.digest


def require_starts(config: TrainingConfig, model: ResolvedModel) -> None:
    """Require that the files to start from have not changed since `start_record`. Raises
    `WeightsError`."""
    for parameter, path in _starts(config).items():
        model.contents.require_unchanged(parameter, lambda path=path: (path,))


def _starts(config: TrainingConfig) -> dict[str, Path]:
    """Parameter in `STARTS` → its file, for those that are set."""
    given = {parameter: getattr(config, parameter) for parameter in STARTS}
    return {parameter: Path(path) for parameter, path in given.items() if path is not None}
