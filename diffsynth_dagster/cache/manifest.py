"""The manifest: which samples a row set has, and under which keys the store holds them.

It is the file `samples.parquet` in the folder of a row set (see `row_sets`), which for the rows
that are trained on is the run folder. It has a row for each sample:

    sample          its identity
    content         a number below 2^64, made from the content of the file that is trained on
    signature       what that file looks like, coarsely (see `media.signature`); null if it was
                    checked by a version without signatures. Older manifests lack the column
    row, width, height, frames, shape, repeat    as in the checked table; not all have `repeat`
    tokens          number of patches of its latents
    key:<stage>     its key in the store, for each cached stage
    input:<column>  what the stages of the training step read: a text, or files as JSON (see
                    `data.samples`)

If rows may have several captions, some of these columns hold lists (see `cache.captions`). The file
is read in batches, since it may be larger than memory.
"""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import polars as pl

from diffsynth_dagster.cache.layout import LAYOUT_VERSION
from diffsynth_dagster.data.scan import read_notes, scan_parquet
from diffsynth_dagster.errors import StoreError
from diffsynth_dagster.files import require_held
from diffsynth_dagster.seal import seal_is_broken, write_sealed

FILE_NAME = "samples.parquet"
PLANNED = ".samples.planned.parquet"
"""The manifest before its samples are encoded: the store may lack some of them."""
CONTENT_NUMBER = "content"
SIGNATURE = "signature"
_NOTES = "diffsynth_dagster"
_DO = (
    "encode it first: materialize the recipe's latents, or run the task sft:data_process with this "
    "folder as output_path"
)


@dataclass(frozen=True)
class Notes:
    """What a manifest says about all of its samples. It is stored as JSON in the file's metadata.

    Attributes:
        store: folder of the store.
        family: name of the model family.
        digest: identity of the data set: its samples, their keys and their order.
        samples: number of samples.
        outputs: cached stage → name of its first output, by which the store's index is searched.
        weights: component → digest of the files that it was encoded with.
        parameters: what encoding has fixed: see `config.affects.settled_by_encoding`.
        data: the data set, as absolute paths: see `config.inherited.named_data`.
        stages: cached stage → digest of its version and outputs: see `keys.stage_digest`.
        layout: `LAYOUT_VERSION` of the keys.
        made_of: what a row set was asked to hold: see `row_sets.asked_of_samples`. Empty for rows
            of a data set.
    """

    store: str
    family: str
    digest: str
    samples: int
    outputs: dict[str, str] = field(default_factory=dict[str, str])
    weights: dict[str, str] = field(default_factory=dict[str, str])
    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    data: dict[str, str] = field(default_factory=dict[str, str])
    stages: dict[str, str] = field(default_factory=dict[str, str])
    layout: int = 0
    made_of: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Manifest(Notes):
    """The samples of a training.

    Attributes:
        path: the file that holds the rows; see the module.
    """

    path: Path = Path(FILE_NAME)

    @property
    def rows(self) -> pl.LazyFrame:
        """A row for each sample."""
        return scan_parquet(self.path)

    @property
    def frame(self) -> pl.DataFrame:
        """`rows` in memory."""
        return self.rows.collect()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.path.parent

    @property
    def keys(self) -> pl.LazyFrame:
        """Every key of the store that the training reads, once: a frame with the column `key`."""
        columns = [c for c in self.rows.collect_schema().names() if c.startswith("key:")]
        listed = self.listed
        parts = [
            self.rows.select((pl.col(c).explode() if c in listed else pl.col(c)).alias("key"))
            for c in columns
        ]
        return pl.concat([pl.LazyFrame(schema={"key": pl.String}), *parts]).unique()

    @property
    def listed(self) -> list[str]:
        """The columns with a list of one text for each caption: see `cache.captions`."""
        schema = self.rows.collect_schema()
        return [name for name, kind in schema.items() if isinstance(kind, pl.List)]

    def publish(self) -> "Manifest":
        """Rename the planned manifest to `samples.parquet`, now that its samples are encoded.

        Raises:
            OutputError: another process took the folder over.
        """
        require_held(self.folder)  # encoding may have taken hours
        path = self.folder / FILE_NAME
        if self.path.exists():  # or another node that shares the folder was faster
            self.path.replace(path)
        return replace(self, path=path)


def write_manifest(rows: pl.LazyFrame, notes: Notes, path: Path) -> Manifest:
    """Write a manifest atomically, its rows in batches. Raises `OutputError`."""
    values: dict[str, Any] = asdict(notes)
    text = {_NOTES: json.dumps(values)}
    write_sealed(path, lambda staged, notes: rows.sink_parquet(staged, metadata=notes), text)
    return Manifest(**values, path=path)


def read_manifest(folder: Path, name: str = FILE_NAME, any_layout: bool = False) -> Manifest:
    """Read the `samples.parquet` of a run folder.

    Args:
        any_layout: read a manifest of another layout too. Its samples may be wrong.

    Raises:
        StoreError: the manifest is missing, damaged, or of another layout.
    """
    path = folder / name
    try:
        # Before parsing: a flipped bit may leave a valid file with another order or caption.
        if path.is_file() and seal_is_broken(path):
            raise StoreError(
                "the list of encoded samples is damaged: its bytes have changed",
                where=str(path),
                do=_DO,
            )
        written: dict[str, Any] = json.loads(read_notes(path)[_NOTES])
        # Manifests of older layouts may lack these; they can be read with `any_layout`.
        notes: dict[str, Any] = {"digest": "", "samples": 0, **written}
        # Older versions noted the prompts of samples here, which are a row set of their own now.
        known = {f.name for f in fields(Notes)}
        manifest = Manifest(**{n: v for n, v in notes.items() if n in known}, path=path)
    except (OSError, pl.exceptions.PolarsError, KeyError, ValueError, TypeError) as error:
        raise StoreError(
            "the folder holds no encoded data set", where=str(path.absolute()), do=_DO
        ) from error
    if manifest.layout != LAYOUT_VERSION and not any_layout:
        raise StoreError(
            f"the data set was encoded by another version (layout {manifest.layout}, not "
            f"{LAYOUT_VERSION}), "
            "whose samples may not be those that were checked",
            where=str(path),
            do="encode it again",
        )
    return manifest
