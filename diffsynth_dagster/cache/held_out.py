"""The samples that are held out: they are not trained on, the held-out loss is computed on them.

They are either a second data set (`validation_metadata_path`), checked and encoded in a folder
inside the run folder, or a part of the training's own data set (`validation_split`).
"""

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from diffsynth_dagster.cache.manifest import (
    CONTENT_NUMBER,
    FILE_NAME,
    PLANNED,
    Manifest,
    read_manifest,
)
from diffsynth_dagster.cache.near_copies import near_held_out, near_trained, unsigned
from diffsynth_dagster.config.inherited import require_same
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.scan import scan_parquet
from diffsynth_dagster.data.table.checked_table import FILE_NAME as CHECKED
from diffsynth_dagster.data.table.checked_table import PINNED
from diffsynth_dagster.errors import MetadataError, ParameterError, StoreError
from diffsynth_dagster.facts import digest_of
from diffsynth_dagster.files import remove, write_whole

FOLDER = "held_out"
"""The folder of the held-out data set inside the run folder."""
_OF_PARTS = re.compile(r"\.(?:trained|held_out|compared)\.(?:parquet|records|bin|captions|json)")
"""The names of the files that `parts_of` and `resolve` write for the parts."""
_OF_SAMPLES = re.compile(r"\.sampled(?:\.(?:records|bin|json))?|\.prompts")
_OF_EVALUATION = re.compile(r"\.evaluated(?:\.(?:records|bin|json))?")
"""The names of the folders of these row sets, and of the files that `resolve` writes for them. Older
versions had the rows of samples in `.prompts`."""
_HELD_OUT = ".held_out.parquet"
"""The manifest of the held-out samples, if it is not that of their own data set."""
_SHOWN = 5
"""Rows that a message names."""
_UNSIGNED = (
    "{} rows were checked by a version that could not tell near copies, so that held-out rows may "
    "have some among those that are trained on; verify_content checks and encodes the data set anew"
)
_NUMBERS = 2**64
"""Number of different values of `CONTENT_NUMBER`."""


@dataclass(frozen=True)
class Parts:
    """The samples of a training, divided.

    Attributes:
        trained: the samples that are trained on.
        held_out: the samples of the held-out loss; None if nothing is held out.
        compared: some of the trained samples, as many as are held out if there are enough. If their
            loss is far below the held-out loss, the model memorises. None if nothing is held out.
        warnings: see `Division`.
    """

    trained: Manifest
    held_out: Manifest | None = None
    compared: Manifest | None = None
    warnings: tuple[str, ...] = ()


def held_out_config(config: TrainingConfig) -> TrainingConfig | None:
    """The config with which the held-out data set is checked and encoded; None if there is no
    `validation_metadata_path`."""
    if config.validation_metadata_path is None:
        return None
    folder = str(Path(config.output_path) / FOLDER)
    # Whatever is about the training's own data set is switched off.
    changed = {
        "dataset_metadata_path": config.validation_metadata_path,
        "validation_metadata_path": None,
        "customized_dataset": None,
        "folder_repeats": {},
        "sample_prompts": (),
        "sample_table": None,
        "output_path": folder,
    }
    return config.model_copy(update=changed)


def held_out_manifest(config: TrainingConfig, manifest: Manifest) -> Manifest | None:
    """The manifest of the held-out data set; None if there is no `validation_metadata_path`.

    Args:
        manifest: the manifest of the training's own data set, in whose folder the other one is.

    Raises:
        StoreError: the data set was encoded without a held-out data set.
        ParameterError: it was encoded with another `validation_metadata_path`.
    """
    path = config.validation_metadata_path
    if path is None:
        return None
    try:
        held_out = read_manifest(manifest.folder / FOLDER)
    except StoreError as error:
        raise StoreError(
            "the data set was encoded without the samples that are held out",
            where=f"validation_metadata_path = {config.validation_metadata_path}",
            do="encode it again: materialize the latents, or run the task with :data_process with "
            "this parameter",
        ) from error
    # The path may also name the checked copy of the table, as `split.first_half` does.
    if Path(path).absolute() != (held_out.folder / CHECKED).absolute():
        require_same(
            {"validation_metadata_path": str(Path(path).absolute())},
            {"validation_metadata_path": held_out.data["dataset_metadata_path"]},
            "the data set was encoded",
            str(held_out.path),
            "encode it again with this one: materialize the latents, or run the task with "
            ":data_process",
        )
    return held_out


def forget_held_out(config: TrainingConfig) -> None:
    """Remove the held-out data set of a run folder, because its data set is encoded without one."""
    folder = Path(config.output_path) / FOLDER
    for name in (FILE_NAME, PLANNED, CHECKED, PINNED, "rejected.csv", "long_captions.parquet"):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # the folder does not exist, or holds files that are not ours
        folder.rmdir()


def forget_parts(config: TrainingConfig, folder: Path) -> None:
    """Remove the files that an earlier training left in the run folder for rows that this one does
    not have, held out or of samples: see `parts_of` and `resolve`."""
    unused = [] if config.holds_out else [_OF_PARTS]
    unused += [] if config.makes_samples else [_OF_SAMPLES]
    unused += [] if config.customized_evaluation else [_OF_EVALUATION]
    for path in folder.glob(".*"):
        if any(pattern.fullmatch(path.name) for pattern in unused):
            remove(path)


def parts_of(config: TrainingConfig, manifest: Manifest, folder: Path) -> Parts:
    """Divide the samples of a training into those that are trained on and those that are held out.

    Args:
        folder: the manifests of the parts are written here.

    Raises:
        ParameterError: no sample would be held out, or none be left to train on.
        MetadataError: a sample is both held out and trained on.
        StoreError: see `held_out_manifest`; or the manifest is of an older version.
        OutputError: the folder cannot be written.
    """
    if not config.holds_out:
        return Parts(manifest)
    if CONTENT_NUMBER not in manifest.rows.collect_schema().names():
        raise StoreError(
            "the data set was encoded by a version that could hold nothing out",
            where=str(manifest.path),
            do="encode it again: nothing that the store holds is lost",
        )
    own = held_out_manifest(config, manifest)
    found = divided(config, manifest.rows, None if own is None else own.rows)
    held_out, trained = own, manifest
    path = folder / _HELD_OUT
    if own is None:
        held_out = _part(manifest, found.held_out, path)
        trained = _part(manifest, found.trained, folder / ".trained.parquet")
    elif found.left_out:
        held_out = _part(own, found.held_out, path)
    else:
        path.unlink(missing_ok=True)  # of an earlier training: see `export.judged`
    assert held_out is not None
    # Those with the smallest content numbers: a random choice that is always the same.
    count = min(held_out.samples, trained.samples)
    numbers = trained.rows.select(pl.col(CONTENT_NUMBER).bottom_k(count).max())
    last = numbers.collect(engine="streaming").item()
    of_smallest = trained.rows.filter(pl.col(CONTENT_NUMBER) <= last)
    compared = _part(trained, of_smallest, folder / ".compared.parquet")
    return Parts(trained, held_out, compared, found.warnings)


@dataclass(frozen=True)
class Division:
    """Rows, divided.

    Attributes:
        trained: the rows that are trained on.
        held_out: the rows that are held out; None if nothing is held out.
        left_out: how many rows are neither trained on nor held out, though their table names them.
        warnings: which they are, and why.
    """

    trained: pl.LazyFrame
    held_out: pl.LazyFrame | None = None
    left_out: int = 0
    warnings: tuple[str, ...] = ()


def divided(config: TrainingConfig, rows: pl.LazyFrame, held_out: pl.LazyFrame | None) -> Division:
    """Divide rows as `parts_of` does, without writing anything.

    Near copies are on one side only. What `validation_split` holds out follows from its content
    alone, so that its near copies are not trained on. A training with a held-out table of its own is
    the same as without one, so that rows of that table which are near copies are not measured.

    Args:
        rows: the rows of the data set, with their `CONTENT_NUMBER` and `SIGNATURE`.
        held_out: those of the held-out data set; None if there is no `validation_metadata_path`.

    Raises:
        ParameterError, MetadataError: see `parts_of`.
    """
    if not config.holds_out:
        return Division(rows)
    old = unsigned(rows) + (0 if held_out is None else unsigned(held_out))
    warnings = [_UNSIGNED.format(old)] if old else []
    if held_out is None:
        held_out, rest = split_off(config, rows)
        near = near_trained(rest, held_out)
        rows = rest if near.is_empty() else rest.filter(~pl.col("row").is_in(near["row"].implode()))
        _require_some(config, _count(held_out), _count(rows), near.height)
        what = ("near copies of held-out rows, and not trained on", "held-out row")
    else:
        _require_disjoint(rows, held_out, config)
        near = near_held_out(rows, held_out)
        if not near.is_empty():
            held_out = held_out.filter(~pl.col("row").is_in(near["row"].implode()))
            _require_measured(config, held_out)
        what = ("held out, but near copies of trained rows, and not measured", "trained row")
    if not near.is_empty():
        warnings.append(_said_of(near, *what))
    return Division(rows, held_out, near.height, tuple(warnings))


def split_off(config: TrainingConfig, rows: pl.LazyFrame) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    """The rows that `validation_split` holds out, and the others, near copies among them."""
    is_held_out = pl.col(CONTENT_NUMBER) <= last_held_out(config, rows)
    return rows.filter(is_held_out), rows.filter(~is_held_out)


def left_out_digest(config: TrainingConfig, manifest: Manifest) -> str | None:
    """Digest of the samples that `validation_split` leaves out as near copies; None if there are
    none. A data set that is checked anew may show more of them with the same samples."""
    if config.validation_split is None or CONTENT_NUMBER not in manifest.rows.collect_schema():
        return None
    held_out, rest = split_off(config, manifest.rows)
    near = near_trained(rest, held_out)
    if near.is_empty():
        return None
    left_out = manifest.rows.join(near.lazy(), on="row", how="semi").select("sample")
    return digest_of(sorted(left_out.collect(engine="streaming")["sample"]))


def last_held_out(config: TrainingConfig, rows: pl.LazyFrame) -> int:
    """The bound of `validation_split`: samples with a `CONTENT_NUMBER` up to it are held out.

    The number depends on the content alone, so equal files are never divided. If the split is a
    fraction, a sample stays where it is when the table grows.
    """
    split = config.validation_split
    assert split is not None
    if split < 1:  # a fraction: content numbers are spread evenly over all 64-bit values
        return min(int(split * _NUMBERS), _NUMBERS - 1)
    numbers = rows.select(pl.col(CONTENT_NUMBER).bottom_k(int(split)).max())
    return numbers.collect(engine="streaming").item()


def _part(manifest: Manifest, rows: pl.LazyFrame | None, path: Path) -> Manifest:
    """Write rows of a manifest as a manifest of their own. Raises `OutputError`."""
    assert rows is not None
    write_whole(path, lambda staged: rows.sink_parquet(staged, compression="lz4"))
    return replace(manifest, path=path, samples=_count(scan_parquet(path)))


def _count(rows: pl.LazyFrame) -> int:
    return int(rows.select(pl.len()).collect(engine="streaming").item())


def _said_of(near: pl.DataFrame, what: str, of: str) -> str:
    """The warning about rows that are left out.

    Args:
        near: see `near_trained` and `near_held_out`.
    """
    shown = [f"{row} (of {of} {copied})" for row, copied in near.head(_SHOWN).iter_rows()]
    more = f" and {near.height - _SHOWN} more" if near.height > _SHOWN else ""
    return f"{near.height} rows are {what}: {', '.join(shown)}{more}"


def _require_some(config: TrainingConfig, held_out: int, trained: int, near: int) -> None:
    """Refuse a split that leaves no sample on one side, or that takes more than half of the others
    from the training as near copies. Raises `ParameterError`."""
    whole = held_out + trained + near
    where = f"validation_split = {config.validation_split:g}"
    if near > trained:
        raise ParameterError(
            f"of {whole} samples {held_out} are held out, and {near} more are near copies of these: "
            f"{trained} would be left to train on",
            where=where,
            do="name other pictures as a table of their own, validation_metadata_path, or leave "
            "near copies out of the data set",
        )
    if not held_out or not trained:
        raise ParameterError(
            f"of {whole} samples none is {'left to train on' if held_out else 'held out'}",
            where=where,
            do="give a number of samples, or a fraction that fits these",
        )


def _require_measured(config: TrainingConfig, held_out: pl.LazyFrame) -> None:
    """Refuse a held-out table whose rows are all near copies. Raises `MetadataError`."""
    if not _count(held_out):
        raise MetadataError(
            "all of its rows are near copies of rows that are trained on",
            where=f"validation_metadata_path = {config.validation_metadata_path}",
            do="hold out other pictures: the loss of these says nothing about new ones",
        )


def _require_disjoint(rows: pl.LazyFrame, held_out: pl.LazyFrame, config: TrainingConfig) -> None:
    """Refuse samples that are both held out and trained on: their loss would say nothing about new
    samples.

    Raises:
        MetadataError: there are some.
    """
    # Compared by content, so that a copy under another name is found, too.
    numbered = held_out.select("row", CONTENT_NUMBER)
    both = numbered.join(rows.select(CONTENT_NUMBER).unique(), on=CONTENT_NUMBER, how="semi")
    shared = both.select(pl.col("row").sort()).collect(engine="streaming")["row"].to_list()
    if shared:
        more = f" and {len(shared) - _SHOWN} more" if len(shared) > _SHOWN else ""
        raise MetadataError(
            f"what rows {', '.join(map(str, shared[:_SHOWN]))}{more} hold out is trained on as well",
            where=f"validation_metadata_path = {config.validation_metadata_path}",
            do="take them out of one of the tables",
        )
