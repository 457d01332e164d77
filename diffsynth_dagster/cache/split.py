"""Split training: the config of each half, what the second takes over from the first, and what must
agree."""

from pathlib import Path

from diffsynth_dagster.cache.keys import stage_digest
from diffsynth_dagster.cache.manifest import Manifest, read_manifest
from diffsynth_dagster.config.effect import (
    settled_by_checking,
    settled_by_encoding,
    trained_components,
)
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.config.settled import named_data, require_same, take_over
from diffsynth_dagster.data.table.checked import FILE_NAME as CHECKED_TABLE
from diffsynth_dagster.data.table.checked import find_checked, read_checked
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.facts import FactCache
from diffsynth_dagster.weights.identify import FoundModel
from diffsynth_dagster.weights.models import component_digest


def with_settled(config: TrainingConfig) -> TrainingConfig:
    """The config, with what earlier steps have settled in place of what it leaves out.

    The second half of split training takes over what the first encoded; a config that names a
    checked table takes over what that was checked with.

    Raises:
        StoreError: there is no encoded data set.
        ParameterError: the config asks for something else.
    """
    if config.reads_encoded:
        where = f"dataset_base_path = {config.dataset_base_path}"
        settled = read_manifest(Path(config.dataset_base_path)).parameters
        return take_over(config, settled, "the data set was encoded", where)
    if config.dataset_metadata_path is None:
        return config
    checked = find_checked(Path(config.dataset_metadata_path))
    if checked is None:
        return config
    where = f"dataset_metadata_path = {config.dataset_metadata_path}"
    return take_over(config, checked.parameters, "the table was checked", where)


def first_half(config: TrainingConfig) -> TrainingConfig:
    """The config of encoding the checked table of its run folder.

    Raises:
        MetadataError: there is none.
        ParameterError: it is of another data set, or was checked with other parameters.
    """
    config = with_settled(config)
    folder = Path(config.output_path)
    checked = read_checked(folder)
    given = {**named_data(config), **settled_by_checking(config)}
    settled = {**checked.data, **checked.parameters}
    where, do = str(folder / CHECKED_TABLE), "check it again: materialize the metadata first"
    require_same(given, settled, "the table was checked", where, do)
    task = config.task.split(":")[0] + ":data_process"
    table = {"dataset_metadata_path": str(folder / CHECKED_TABLE)}
    return config.model_copy(update={"task": task, **table})


def second_half(config: TrainingConfig) -> TrainingConfig:
    """The config of training on what lies encoded in its run folder, or where it says.

    Raises:
        StoreError: the run folder holds no encoded data set.
        ParameterError: it is of another data set, or was encoded with other parameters.
    """
    task = config.task.split(":")[0] + ":train"
    if config.dataset_metadata_path is None:
        return config.model_copy(update={"task": task})
    config = with_settled(config)
    manifest = read_manifest(Path(config.output_path))
    given = {**named_data(config), **settled_by_encoding(config)}
    settled = {**manifest.data, **manifest.parameters}
    do = "encode it again: materialize the latents first"
    require_same(given, settled, "the data set was encoded", str(manifest.path), do)
    encoded = {"dataset_metadata_path": None, "dataset_base_path": config.output_path}
    return config.model_copy(update={"task": task, **encoded})


def require_encoded_for(
    config: TrainingConfig, found: FoundModel, manifest: Manifest, fact_cache: FactCache
) -> None:
    """Refuse a data set that was encoded for another family, variant or task, or by other weights.

    Raises:
        ParameterError: it was.
    """
    family = found.family
    if manifest.family != family.name:
        raise _refuse(
            config,
            f"the data set was encoded for {manifest.family}",
            f"train {manifest.family}, or encode it for {family.name}",
        )
    known = {stage.name: stage_digest(stage) for stage in family.stages}
    for name, digest in manifest.stages.items():
        if known.get(name, digest) != digest:
            raise _refuse(
                config,
                f"the data set was encoded by another version of the stage '{name}'",
                "encode it again",
            )
    trained = trained_components(config)
    wanted = {f"key:{stage.name}" for stage in family.cached_stages(trained)}
    wanted |= {f"input:{i.column}" for s in family.step_stages(trained) for i in s.reads}
    lacks = sorted(
        name.partition(":")[2] for name in wanted - set(manifest.rows.collect_schema().names())
    )
    if lacks:
        raise _refuse(
            config,
            f"the data set was encoded without what this training reads: {', '.join(lacks)}",
            "give both halves of split training the same models, columns and trained modules",
        )
    for name, digest in manifest.weights.items():
        named = found.components.get(name)
        if named is not None and component_digest(found, name, fact_cache) != digest:
            raise _refuse(
                config,
                f"the data set was encoded with another '{name}' than {named.entry.text}",
                "name the one that it was encoded with, or none",
            )


def _refuse(config: TrainingConfig, what: str, do: str) -> ParameterError:
    return ParameterError(what, where=f"dataset_base_path = {config.dataset_base_path}", do=do)
