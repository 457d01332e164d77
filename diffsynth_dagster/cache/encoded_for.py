"""Checks that a data set was encoded for this training: same family, models and trained modules."""

from diffsynth_dagster.cache.keys import stage_digest
from diffsynth_dagster.cache.manifest import Manifest
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError, WeightsError
from diffsynth_dagster.facts import FactCache
from diffsynth_dagster.fingerprint import Fingerprint
from diffsynth_dagster.weights.models import component_digest
from diffsynth_dagster.weights.resolved import ResolvedModel


def require_encoded_for(
    config: TrainingConfig, model: ResolvedModel, manifest: Manifest, fact_cache: FactCache
) -> None:
    """Refuse a data set of another family, variant or task, or encoded with other weights.

    Raises:
        ParameterError: it was.
    """
    require_encoded_as(config, model, manifest)
    # The second half of split training may leave out the models that only encoding needs.
    named = model.components
    now = {n: component_digest(model, n, fact_cache) for n in manifest.weights if n in named}
    for name in Fingerprint(manifest.weights).differs(Fingerprint(now), now):
        raise _refuse(
            config,
            f"the data set was encoded with another '{name}' than {named[name].entry.text}",
            "name the one that it was encoded with, or none",
        )


def require_encoded_as(config: TrainingConfig, model: ResolvedModel, manifest: Manifest) -> None:
    """Refuse a data set that was encoded for another family, variant or task.

    Raises:
        ParameterError: it was.
    """
    family = model.family
    if manifest.family != family.name:
        raise _refuse(
            config,
            f"the data set was encoded for {manifest.family}",
            f"train {manifest.family}, or encode it for {family.name}",
        )
    # A new version of a stage has other outputs under other keys: the stored ones are no use.
    now = {s.name: stage_digest(s) for s in family.stages if s.name in manifest.stages}
    for name in Fingerprint(manifest.stages).differs(Fingerprint(now), now):
        raise _refuse(
            config,
            f"the data set was encoded by another version of the stage '{name}'",
            "encode it again",
        )
    # Training another component moves stages between the cache and the step: the data set then
    # lacks a key, or an input that the step reads.
    required = {f"key:{stage.name}" for stage in model.cached_stages}
    required |= {f"input:{i.column}" for s in model.step_stages for i in s.reads}
    lacks = sorted(
        name.partition(":")[2] for name in required - set(manifest.rows.collect_schema().names())
    )
    if lacks:
        raise _refuse(
            config,
            f"the data set was encoded without what this training reads: {', '.join(lacks)}",
            "give both halves of split training the same models, columns and trained modules",
        )


def require_planned_weights(
    model: ResolvedModel, manifest: Manifest, fact_cache: FactCache
) -> None:
    """Refuse to encode with other weights than the samples were planned for.

    The keys of the planned samples contain the digests of the weights, as the process that planned
    them saw the files.

    Raises:
        WeightsError: the files of this machine differ, or have changed since.
    """
    # What the model list lacks encodes nothing: all that it made is in the store.
    listed = {**model.components, **model.tokenizers}
    planned = {name: digest for name, digest in manifest.weights.items() if name in listed}
    now = {name: component_digest(model, name, fact_cache) for name in planned}
    for name in Fingerprint(planned).differs(Fingerprint(now)):
        raise WeightsError(
            f"the files of '{name}' are not those that the samples were planned for",
            where=str(model.files(name)[0]),
            do="give all machines the same model files, and let nothing write to them meanwhile",
        )


def _refuse(config: TrainingConfig, what: str, do: str) -> ParameterError:
    return ParameterError(what, where=f"dataset_base_path = {config.dataset_base_path}", do=do)
