"""Which samples a training sees, and under which keys the store holds them.

`samples.parquet` in a run folder has a row for each sample: `sample` (its identity), `content` (a
number between 0 and 2 to the 64 that follows from what is trained on alone), `row`,
`width`, `height`, `frames`, `shape` and, where there is one, `repeat` as the checked table has them, `tokens` (patches of its
latents), `key:<stage>` for each cached stage, and `input:<column>` for what the stages of the
training step read: a text, or files as JSON (see `data.samples`). Where a row has several captions,
some of these are lists (see `cache.captions`). It is read in parts, where it is needed: a manifest may be larger
than memory.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import polars as pl

from diffsynth_dagster.cache.layout import LAYOUT_VERSION
from diffsynth_dagster.data.scan import read_notes, scan_parquet
from diffsynth_dagster.errors import StoreError
from diffsynth_dagster.facts import digest_of
from diffsynth_dagster.files import require_held
from diffsynth_dagster.seal import seal_is_broken, write_sealed

FILE_NAME = "samples.parquet"
PLANNED = ".samples.planned.parquet"
"""The manifest of samples of which the store may still lack some."""
CONTENT_NUMBER = "content"
_NOTES = "diffsynth_dagster"
_OF_A_TABLE: dict[str, Any] = {
    "sample_rows": [],
    "unprompted_rows": [],
    "sample_table": "",
    "negative_prompt": None,
}
_DO = (
    "encode it first: materialize the recipe's latents, or run the task sft:data_process with this "
    "folder as output_path"
)


class SampleRow(TypedDict):
    """A row of the table of `sample_prompts`: the size of what is made of it (0 where its files have
    none), stage → key, and column → text or files as JSON, for the stages of the training step."""

    width: int
    height: int
    frames: int
    keys: dict[str, str]
    inputs: dict[str, str]


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
        sample_rows: what they are made of where a table names them.
        unprompted_rows: the same rows with the negative prompt, where there is guidance.
        negative_prompt: of these rows.
        sample_table: digest of this table.
        weights: component → digest of the files that it was encoded with.
        parameters: what encoding has settled: see `config.affects.settled_by_encoding`.
        data: the data set, as absolute paths: see `config.inherited.named_data`.
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
    sample_rows: list[SampleRow] = field(default_factory=list[SampleRow])
    unprompted_rows: list[SampleRow] = field(default_factory=list[SampleRow])
    sample_table: str = ""
    negative_prompt: str | None = None


@dataclass(frozen=True)
class SampleRows:
    """What samples are made of where `sample_prompts` names a table: see `Notes`."""

    rows: list[SampleRow]
    unprompted: list[SampleRow]
    table: str
    negative_prompt: str | None = None

    def noted(self, notes: Notes) -> Notes:
        """The notes with these rows: what is trained on is another data set with others."""
        rows = {"sample_rows": self.rows, "unprompted_rows": self.unprompted}
        digest = digest_of([notes.digest, rows])
        about = {"sample_table": self.table, "negative_prompt": self.negative_prompt}
        return replace(notes, digest=digest, **about, **rows)


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
        listed = self.listed
        prompts = [key for stages in self.prompts.values() for key in stages.values()]
        for row in (*self.sample_rows, *self.unprompted_rows):
            prompts += row["keys"].values()
        parts = [
            self.rows.select((pl.col(c).explode() if c in listed else pl.col(c)).alias("key"))
            for c in columns
        ]
        parts.append(pl.LazyFrame({"key": prompts}, schema={"key": pl.String}))
        return pl.concat(parts).unique()

    @property
    def listed(self) -> list[str]:
        """The columns that have a text for each caption of a row: see `cache.captions`."""
        kinds = self.rows.collect_schema()
        return [name for name, kind in kinds.items() if isinstance(kind, pl.List)]

    def publish(self) -> "Manifest":
        """Put the planned manifest in the place of the run folder's: its samples are encoded.

        Does nothing where another node that shares the folder did it. Raises `OutputError`.
        """
        require_held(self.folder)
        path = self.folder / FILE_NAME
        if self.path.exists():
            self.path.replace(path)
        return replace(self, path=path)


def write_manifest(rows: pl.LazyFrame, notes: Notes, path: Path) -> Manifest:
    """Write a manifest whole, its rows in batches. Raises `OutputError`."""
    values: dict[str, Any] = asdict(notes)
    of_none = _OF_A_TABLE.items()
    said = {n: value for n, value in values.items() if (n, value) not in of_none}
    text = {_NOTES: json.dumps(said)}
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
        given: dict[str, Any] = json.loads(read_notes(path)[_NOTES])
        notes: dict[str, Any] = {"digest": "", "samples": 0, **given}
        manifest = Manifest(**notes, path=path)
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
