"""Which samples a training sees, and under which keys the store holds them.

`samples.parquet` in a run folder has a row for each sample: `sample` (its identity), `row`,
`width`, `height`, `frames` and `shape` as the checked table has them, `tokens` (patches of its
latents), `key:<stage>` for each cached stage, and `input:<column>` for what the stages of the
training step read: a text, or files as JSON (see `data.samples`). It is read in
parts, where it is needed: a manifest may be larger than memory.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from diffsynth_dagster.cache.layout import LAYOUT_VERSION
from diffsynth_dagster.errors import StoreError
from diffsynth_dagster.seal import seal_is_broken, write_sealed

FILE_NAME = "samples.parquet"
PLANNED = ".samples.planned.parquet"
"""The manifest of samples of which the store may still lack some."""
_NOTES = "diffsynth_dagster"
_DO = (
    "encode it first: materialize the recipe's latents, or run the task sft:data_process with this "
    "folder as output_path"
)


@dataclass(frozen=True)
class Notes:
    """What a manifest says about all of its samples.

    Attributes:
        store: folder of the store.
        family: name of the model family.
        digest: identity of what is trained on: the samples, their keys and order.
        samples: how many there are.
        outputs: cached stage → name of its first output, by which the store's index is searched.
        prompts: sample prompt → stage → key, for the images made during training.
        weights: component → digest of the files that it was encoded with.
        parameters: what encoding has settled: see `config.effect.settled_by_encoding`.
        data: the data set, as absolute paths: see `config.settled.named_data`.
        stages: cached stage → digest of its version and outputs.
        layout: `LAYOUT_VERSION` of the keys.
    """

    store: str
    family: str
    digest: str
    samples: int
    outputs: dict[str, str] = field(default_factory=dict[str, str])
    prompts: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    weights: dict[str, str] = field(default_factory=dict[str, str])
    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    data: dict[str, str] = field(default_factory=dict[str, str])
    stages: dict[str, str] = field(default_factory=dict[str, str])
    layout: int = 0


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
        return pl.scan_parquet(self.path)

    @property
    def frame(self) -> pl.DataFrame:
        """The same in memory."""
        return self.rows.collect()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.path.parent

    @property
    def keys(self) -> pl.LazyFrame:
        """Every key of the store that the training reads, each once: a column `key`."""
        columns = [c for c in self.rows.collect_schema().names() if c.startswith("key:")]
        prompts = [key for stages in self.prompts.values() for key in stages.values()]
        parts = [self.rows.select(pl.col(c).alias("key")) for c in columns]
        parts.append(pl.LazyFrame({"key": prompts}, schema={"key": pl.String}))
        return pl.concat(parts).unique()

    def publish(self) -> "Manifest":
        """Put the planned manifest in the place of the run folder's: its samples are encoded.

        Does nothing where another node that shares the folder did it.
        """
        path = self.folder / FILE_NAME
        if self.path.exists():
            self.path.replace(path)
        return replace(self, path=path)


def write_manifest(rows: pl.LazyFrame, notes: Notes, path: Path) -> Manifest:
    """Write a manifest whole, its rows in batches. Raises `OutputError`."""
    values: dict[str, Any] = asdict(notes)
    text = {_NOTES: json.dumps(values)}
    write_sealed(path, lambda staged, said: rows.sink_parquet(staged, metadata=said), text)
    return Manifest(**values, path=path)


def read_manifest(folder: Path, name: str = FILE_NAME, any_layout: bool = False) -> Manifest:
    """Read the `samples.parquet` of a run folder.

    Args:
        any_layout: read one of another version too. Its keys are named; its samples may be wrong.

    Raises:
        StoreError: it is missing or damaged, or older than files are compared with what was
            checked when they are read.
    """
    path = folder / name
    try:
        if path.is_file() and seal_is_broken(path):
            raise StoreError(
                "the list of encoded samples is damaged: its bytes have changed",
                where=str(path),
                do=_DO,
            )
        given: dict[str, Any] = json.loads(pl.read_parquet_metadata(path)[_NOTES])
        notes: dict[str, Any] = {"digest": "", "samples": 0, **given}
        manifest = Manifest(**notes, path=path)
    except (OSError, pl.exceptions.PolarsError, KeyError, ValueError, TypeError) as error:
        raise StoreError("the folder holds no encoded data set", where=str(path), do=_DO) from error
    if manifest.layout != LAYOUT_VERSION and not any_layout:
        raise StoreError(
            f"the data set was encoded by another version (layout {manifest.layout}, not "
            f"{LAYOUT_VERSION}), "
            "whose samples may not be those that were checked",
            where=str(path),
            do="encode it again",
        )
    return manifest
