"""The second half of split training: what it takes over from the first, and what must agree."""

from pathlib import Path

from diffsynth_dagster.cache.manifest import Manifest, read_manifest
from diffsynth_dagster.config.effect import settled_by_encoding, trained_components
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.facts import FactBook
from diffsynth_dagster.weights.identify import FoundModel
from diffsynth_dagster.weights.models import component_digest


def as_encoded(config: TrainingConfig) -> TrainingConfig:
    """The config, and for the second half what the first has settled: see
    `config.effect.settled_by_encoding`.

    Raises:
        StoreError: there is no encoded data set.
        ParameterError: the config asks for something else.
    """
    if not config.reads_encoded:
        return config
    settled = read_manifest(Path(config.dataset_base_path)).parameters
    default = settled_by_encoding(TrainingConfig.model_validate({}))
    for name, value in settled_by_encoding(config).items():
        if name in settled and value not in (settled[name], default[name]):
            raise _refuse(
                config,
                f"the data set was encoded with {name} = {settled[name]}, not {value}",
                "leave it out, or encode the data set with it",
            )
    return TrainingConfig.model_validate({**config.model_dump(), **settled})


def require_encoded_for(
    config: TrainingConfig, found: FoundModel, manifest: Manifest, book: FactBook
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
    trained = trained_components(config)
    wanted = {f"key:{stage.name}" for stage in family.cached_stages(trained)}
    wanted |= {f"input:{i.column}" for s in family.step_stages(trained) for i in s.reads}
    lacks = sorted(name.partition(":")[2] for name in wanted - set(manifest.frame.columns))
    if lacks:
        raise _refuse(
            config,
            f"the data set was encoded without what this training reads: {', '.join(lacks)}",
            "give both halves of split training the same models, columns and trained modules",
        )
    for name, digest in manifest.weights.items():
        named = found.components.get(name)
        if named is not None and component_digest(found, name, book) != digest:
            raise _refuse(
                config,
                f"the data set was encoded with another '{name}' than {named.entry.text}",
                "name the one that it was encoded with, or none",
            )


def _refuse(config: TrainingConfig, what: str, do: str) -> ParameterError:
    return ParameterError(what, where=f"dataset_base_path = {config.dataset_base_path}", do=do)
