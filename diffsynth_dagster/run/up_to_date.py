"""Whether a training is up to date: it is finished, nothing that its result depends on has changed,
and its files are as it wrote them.

Imports that only the comparison needs are made there: they take seconds, and a first training has
nothing to compare with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from diffsynth_dagster.cache.manifest import read_manifest
from diffsynth_dagster.cache.split import with_settled
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import OutputError
from diffsynth_dagster.facts import digest_file, fact_cache_of
from diffsynth_dagster.run.record import STARTS, RunRecord, read_record
from diffsynth_dagster.run.resume_point import resume_sentence
from diffsynth_dagster.weights.hub import ModelHub


def why_train(
    config: TrainingConfig, hub: ModelHub, processes: int | None, warm: bool = False
) -> str | None:
    """The reason to train, in words; None if the run folder holds a finished training that a new
    one would only repeat.

    Args:
        config: the config of a training on encoded samples: see `cache.split.second_half`.
        processes: the number of processes of the new training; None to ignore it. The batch of a
            step grows with it.
        warm: whether the training starts from the promoted version. That is another one after each
            training, so a new start is then no reason to train.

    Raises:
        UserError: a model file or the encoded data set is missing or damaged.
    """
    folder = Path(config.output_path)
    record = read_record(folder)
    if record is None:
        return "there is no training in the run folder"
    why: list[str] = []
    if not record.finished or not record.checkpoints:
        why.append("the training in the run folder is not finished")
    starts = {name: digest for name, digest in record.base.items() if name in STARTS}
    now = _record_of(with_settled(config), hub, starts if warm else None)
    changed = _changed_since(record, now)
    if changed:
        why.append(f"changed since: {', '.join(changed)}")
    if processes is not None and processes != len(record.devices):
        why.append(f"on {processes} processes instead of {len(record.devices)}")
    # Only if nothing has changed does it go on from a state; else it begins again.
    if not record.finished and not changed:
        why.append(resume_sentence(config))
    if why:
        return "; ".join(why)
    # Last, because it reads whole files.
    for name, digest in record.checkpoints.items():
        if not (folder / name).is_file() or digest_file(folder / name) != digest:
            return f"checkpoint {name} is missing or was changed"
    return None


def _changed_since(before: RunRecord, now: RunRecord) -> list[str]:
    """The names of what differs between two trainings, of all that their results depend on."""
    if before.identity == now.identity:
        return []
    # Records of older versions have only the digest of the parameters.
    known = bool(before.parameters)
    compared = now if known else replace(now, parameters={})
    names = before.fingerprint.changes(compared.fingerprint)
    if not known and before.config_digest != now.config_digest:
        names.append("its parameters")
    return names or ["what its result depends on"]


def _record_of(
    config: TrainingConfig, hub: ModelHub, starts: Mapping[str, str] | None
) -> RunRecord:
    """The record of a training that would start now; for `starts` see `start_record`."""
    from diffsynth_dagster.run.start import start_record
    from diffsynth_dagster.weights.identify import find_model

    with fact_cache_of(config.cache_path) as fact_cache:
        manifest = read_manifest(Path(config.dataset_base_path))
        return start_record(config, find_model(config, hub), manifest, fact_cache, starts=starts)


def changed_exports(folder: Path, record: RunRecord) -> list[Path]:
    """The logs, pictures and clips of a finished training that are missing or were changed. That is
    no reason to train again, because nothing is made from them."""
    return changed_files(folder, record.beside)


def changed_files(folder: Path, digests: Mapping[str, str]) -> list[Path]:
    """The files that are missing, unreadable or were changed, of some of a folder's (name → digest)."""
    return [folder / name for name in digests if _digest(folder / name) != digests[name]]


def _digest(path: Path) -> str | None:
    try:
        return digest_file(path) if path.is_file() else None
    except OSError:
        return None


def say_changed(paths: Sequence[Path]) -> str:
    """The message for files that are for people to look at: see `changed_exports`."""
    error = OutputError(
        "files that the training wrote for people to look at are missing or were changed since",
        where=", ".join(map(str, paths)),
        do="nothing, if you do not need them: the checkpoints are whole; else train again (in Dagster, "
        "with `retrain`)",
    )
    return str(error)
