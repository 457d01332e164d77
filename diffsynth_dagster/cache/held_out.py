"""Which samples of a data set are held out: none of them is trained on, and all are measured by.

Their table is checked and encoded in a folder of its own inside the run folder, as another data set;
or they are a part of the data set's own samples.
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
from diffsynth_dagster.config.inherited import require_same
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.scan import scan_parquet
from diffsynth_dagster.data.table.checked_table import FILE_NAME as CHECKED
from diffsynth_dagster.data.table.checked_table import PINNED
from diffsynth_dagster.errors import MetadataError, ParameterError, StoreError
from diffsynth_dagster.files import write_whole

FOLDER = "held_out"
_OF_PARTS = re.compile(r"\.(?:trained|held_out|compared)\.(?:parquet|records|bin|captions|json)")
_NUMBERS = 2**64
"""Of different values of `CONTENT_NUMBER`."""


@dataclass(frozen=True)
class Parts:
    """The samples of a training.

    Attributes:
        trained: what it is trained on.
        held_out: what its held-out loss is measured by; None where nothing is held out.
        compared: of what it is trained on, as many as are held out, if there are: the difference
            between the two losses is a sign of memorising.
    """

    trained: Manifest
    held_out: Manifest | None = None
    compared: Manifest | None = None


def held_out_config(config: TrainingConfig) -> TrainingConfig | None:
    """The config of the data set that is held out as a table of its own; None where there is none."""
    if config.validation_metadata_path is None:
        return None
    folder = str(Path(config.output_path) / FOLDER)
    own = {
        "dataset_metadata_path": config.validation_metadata_path,
        "validation_metadata_path": None,
        "customized_dataset": None,
        "folder_repeats": {},
        "sample_prompts": (),
        "output_path": folder,
    }
    return config.model_copy(update=own)


def held_out_manifest(config: TrainingConfig, manifest: Manifest) -> Manifest | None:
    """The manifest of the data set that is held out, beside that of a training; None where none is.

    Raises:
        StoreError: the data set was encoded without it.
        ParameterError: it was encoded with another table.
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
            do="encode it again: materialize the latents, or run the task with :data_process with this "
            "parameter",
        ) from error
    if Path(path).absolute() != (held_out.folder / CHECKED).absolute():  # as it was checked there
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
    """Let what a run folder holds out no longer belong to its data set, which is encoded anew."""
    folder = Path(config.output_path) / FOLDER
    for name in (FILE_NAME, PLANNED, CHECKED, PINNED, "rejected.csv", "long_captions.parquet"):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # not there, or files of others are in it
        folder.rmdir()


def forget_parts(config: TrainingConfig, folder: Path) -> None:
    """Remove from a run folder what `parts_of` and `resolve` wrote there for a training that held samples
    out, where this one holds none."""
    if not config.holds_out:
        for path in folder.glob(".*"):
            if _OF_PARTS.fullmatch(path.name):
                path.unlink(missing_ok=True)


def parts_of(config: TrainingConfig, manifest: Manifest, folder: Path) -> Parts:
    """Part the samples of a training; what is a part of a manifest is written into a folder.

    Raises:
        ParameterError: nothing would be held out, or nothing be left to train on.
        MetadataError: something is held out and trained on as well.
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
    held_out = held_out_manifest(config, manifest)
    trained = manifest
    if held_out is not None:
        _require_apart(manifest.rows, held_out.rows, config)
    else:
        last = last_held_out(config, manifest.rows)
        is_held_out = pl.col(CONTENT_NUMBER) <= last
        held_out = _part(manifest, is_held_out, folder / ".held_out.parquet")
        trained = _part(manifest, ~is_held_out, folder / ".trained.parquet")
        _require_some(config, held_out.samples, trained.samples)
    count = min(held_out.samples, trained.samples)
    numbers = trained.rows.select(pl.col(CONTENT_NUMBER).bottom_k(count).max())
    last = numbers.collect(engine="streaming").item()
    compared = _part(trained, pl.col(CONTENT_NUMBER) <= last, folder / ".compared.parquet")
    return Parts(trained, held_out, compared)


def rows_apart(
    config: TrainingConfig, rows: pl.LazyFrame, held_out: pl.LazyFrame | None
) -> tuple[pl.LazyFrame, pl.LazyFrame | None]:
    """The rows that are trained on, and those that are held out, if there are any. Nothing is written.

    Args:
        rows: of the data set, with their `CONTENT_NUMBER`.
        held_out: the same of the data set that is held out as a table of its own.

    Raises:
        ParameterError, MetadataError: see `parts_of`.
    """
    if held_out is not None:
        _require_apart(rows, held_out, config)
    if held_out is not None or not config.holds_out:
        return rows, held_out
    is_held_out = pl.col(CONTENT_NUMBER) <= last_held_out(config, rows)
    held_out, trained = rows.filter(is_held_out), rows.filter(~is_held_out)
    counts = [part.select(pl.len()).collect().item() for part in (held_out, trained)]
    _require_some(config, *counts)
    return trained, held_out


def last_held_out(config: TrainingConfig, rows: pl.LazyFrame) -> int:
    """The greatest `CONTENT_NUMBER` of a sample that `validation_split` holds out. Equal contents go
    together."""
    split = config.validation_split
    assert split is not None
    if split < 1:
        return min(int(split * _NUMBERS), _NUMBERS - 1)
    numbers = rows.select(pl.col(CONTENT_NUMBER).bottom_k(int(split)).max())
    return numbers.collect(engine="streaming").item()


def _part(manifest: Manifest, chosen: pl.Expr, path: Path) -> Manifest:
    """The part of a manifest whose rows are chosen, written as a file."""
    rows = manifest.rows.filter(chosen)
    write_whole(path, lambda staged: rows.sink_parquet(staged, compression="lz4"))
    count = scan_parquet(path).select(pl.len()).collect().item()
    return replace(manifest, path=path, samples=count)


def _require_some(config: TrainingConfig, held_out: int, trained: int) -> None:
    """Refuse a split that leaves no sample on one side. Raises `ParameterError`."""
    if held_out and trained:
        return
    whole = held_out + trained
    what = "left to train on" if held_out else "held out"
    raise ParameterError(
        f"of {whole} samples none is {what}",
        where=f"validation_split = {config.validation_split:g}",
        do="give a number of samples, or a fraction that fits these",
    )


def _require_apart(rows: pl.LazyFrame, held_out: pl.LazyFrame, config: TrainingConfig) -> None:
    """Refuse a sample that is held out and trained on: its loss would say nothing of others.

    Raises:
        MetadataError: there is one.
    """
    mine = held_out.select("row", CONTENT_NUMBER)
    both = mine.join(rows.select(CONTENT_NUMBER).unique(), on=CONTENT_NUMBER, how="semi")
    found = both.select(pl.col("row").sort()).collect(engine="streaming")["row"].to_list()
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise MetadataError(
            f"what rows {', '.join(map(str, found[:5]))}{more} hold out is trained on as well",
            where=f"validation_metadata_path = {config.validation_metadata_path}",
            do="take them out of one of the tables",
        )
