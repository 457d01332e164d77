"""Which samples a training sees, and under which keys the store holds them.

`samples.parquet` in a run folder: a row for each sample with `sample` (its identity), `row`,
`width`, `height`, `frames` and `shape` as the checked table has them, `key:<stage>` for each cached
stage, and `input:<column>` for what the stages of the training step read: a text, or a reference to
files as JSON (see `data.samples`).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from diffsynth_dagster.errors import StoreError
from diffsynth_dagster.facts import digest_of
from diffsynth_dagster.files import write_whole

FILE_NAME = "samples.parquet"
_NOTES = "diffsynth_dagster"


@dataclass(frozen=True)
class Manifest:
    """The samples of a training.

    Attributes:
        frame: see the module.
        store: folder of the store.
        family: name of the model family.
        prompts: sample prompt → stage → key, for the images made during training.
        weights: component → digest of the files that it was encoded with.
        parameters: what `config.effect.settled_by_encoding` gives for the config.
    """

    frame: pl.DataFrame
    store: str
    family: str
    prompts: dict[str, dict[str, str]]
    weights: dict[str, str]
    parameters: dict[str, Any]

    @property
    def digest(self) -> str:
        """Identity of what is trained on: the samples, their keys and order."""
        columns = sorted(c for c in self.frame.columns if not c.startswith("input:"))
        rows = self.frame.select(columns).rows()
        return digest_of([self.family, columns, rows, self.prompts])

    @property
    def keys(self) -> list[str]:
        """Every key of the store that the training reads."""
        columns = [c for c in self.frame.columns if c.startswith("key:")]
        keys = [key for column in columns for key in self.frame[column]]
        return list(
            dict.fromkeys(keys + [k for stages in self.prompts.values() for k in stages.values()])
        )

    def write(self, folder: Path) -> Path:
        """Write `samples.parquet` into a run folder. Raises `OutputError`."""
        notes = {
            "store": self.store,
            "family": self.family,
            "prompts": self.prompts,
            "weights": self.weights,
            "parameters": self.parameters,
        }
        return write_whole(
            folder / FILE_NAME,
            lambda staged: self.frame.write_parquet(staged, metadata={_NOTES: json.dumps(notes)}),
        )


def read_manifest(folder: Path) -> Manifest:
    """Read the `samples.parquet` of a run folder.

    Raises:
        StoreError: it is missing or damaged.
    """
    path = folder / FILE_NAME
    try:
        frame = pl.read_parquet(path)
        notes: dict[str, Any] = {"parameters": {}}
        notes |= json.loads(pl.read_parquet_metadata(path)[_NOTES])
        return Manifest(frame, **notes)
    except (OSError, pl.exceptions.PolarsError, KeyError, ValueError, TypeError) as error:
        raise StoreError(
            "the folder holds no encoded data set",
            where=str(path),
            do="run the task sft:data_process with this folder as output_path first, or give "
            "dataset_metadata_path",
        ) from error
