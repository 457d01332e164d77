"""Find the data set for a new recipe, and check it as a training does at its start."""

import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from diffsynth_dagster.config.output import TABLES
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import MetadataError
from diffsynth_dagster.facts import FACTS, FactCache, fact_cache_of

if TYPE_CHECKING:
    from diffsynth_dagster.data.table.validate import CheckedTable
    from diffsynth_dagster.families.contract import Family

_PROMPTS, _LONGEST_PROMPT = 3, 400


@dataclass(frozen=True)
class Data:
    """The folder of a data set, and its table, if there is one."""

    base: Path
    table: Path | None


@dataclass(frozen=True)
class Found:
    """The facts about a data set that a recipe is made from.

    Attributes:
        samples: number of rows that can be trained on.
        repeats: how often a pass over the data set takes a sample → number of such samples.
        files: "pictures" or "clips".
        smallest, largest: (width, height) in pixels of the files with the least and most pixels.
        summary: how many rows are usable, and why the others are not.
        warnings: see `CheckedTable.warnings`.
        prompts: some of the captions, with the caption prefix.
    """

    samples: int
    repeats: dict[int, int]
    files: str
    smallest: tuple[int, int]
    largest: tuple[int, int]
    summary: str
    warnings: list[str]
    prompts: list[str]

    @property
    def described(self) -> str:
        """Number and sizes of the files: `12 pictures of 512x512 to 1024x768 pixels`."""
        # A dict keeps the order, and only one of two equal sizes.
        ends = dict.fromkeys(f"{width}x{height}" for width, height in (self.smallest, self.largest))
        what = self.files.removesuffix("s") if self.samples == 1 else self.files
        return f"{self.samples} {what} of {' to '.join(ends)} pixels"


def find_data(given: Path) -> Data:
    """The data set that a path names: a folder with a metadata table or without one, or a table.

    Raises:
        MetadataError: the path does not exist, is a file but not a table, or is a folder with
            several tables.
    """
    given = given.absolute()
    if not given.is_dir():
        if not given.is_file():
            raise MetadataError(
                "there is no such folder or table",
                where=str(given),
                do="name the folder of your pictures or clips, or a metadata table",
            )
        if given.suffix.lower() not in TABLES:
            raise MetadataError(
                "it is neither a folder nor a metadata table",
                where=str(given),
                do=f"name a folder, or a file that ends in {', '.join(TABLES)}",
            )
        return Data(given.parent, given)
    tables = [given / f"metadata{kind}" for kind in TABLES if (given / f"metadata{kind}").is_file()]
    if len(tables) > 1:
        raise MetadataError(
            f"the folder holds {' and '.join(table.name for table in tables)}",
            where=str(given),
            do=f"name the one that is meant, such as {tables[0]}",
        )
    return Data(given, tables[0] if tables else None)


@contextmanager
def facts_in(folder: Path) -> Generator[FactCache]:
    """Open the cache of facts about files in the folder of a store.

    If the folder does not exist, it is created only if the block succeeds.

    Raises:
        OutputError: the folder exists and cannot be written.
    """
    if folder.exists():
        with fact_cache_of(folder) as facts:
            yield facts
        return
    with tempfile.TemporaryDirectory() as scratch:
        with fact_cache_of(scratch) as facts:
            yield facts
        with suppress(OSError):  # no harm: the training will check the files again
            folder.mkdir(parents=True)
            shutil.move(Path(scratch, FACTS), folder / FACTS)


def look_at(config: TrainingConfig, family: "Family", facts: FactCache) -> Found:
    """Check every row and every file of a data set, without reading weights.

    Raises:
        MetadataError: it cannot be read, or too many rows are rejected.
    """
    # Imported here because it imports Polars and torch, which `--list` and `--help` do not need.
    from diffsynth_dagster.data.prepare import check_data

    with tqdm(desc="check files", unit="file", delay=2, disable=None) as bar:
        table = check_data(config, family.columns, facts, bar.update)
    table.require_accepted(config.max_rejected_fraction)
    smallest, largest = _sizes(table, family)
    return Found(
        samples=table.counts["ok"],
        repeats=_repeats(table),
        files="clips" if family.file_inputs[0].kind == "video" else "pictures",
        smallest=smallest,
        largest=largest,
        summary=table.summary(config.max_rejected_fraction),
        warnings=table.warnings(),
        prompts=_prompts(table, family),
    )


def _sizes(table: "CheckedTable", family: "Family") -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) of the smallest and the largest file."""
    import polars as pl

    # The files whose size `max_pixels` bounds.
    bounded = [
        i for i in family.file_inputs if i.kind != "audio" and not i.same_size and i.area is None
    ]
    parts: list[pl.LazyFrame] = []
    for item in bounded:
        sides = [pl.col(f"{item.column}:{side}").alias(side) for side in ("width", "height")]
        part = table.accepted.select(sides)
        parts.append(part.explode("width", "height") if item.many else part)
    sizes = pl.concat(parts).drop_nulls().unique().collect()
    sizes = sizes.sort(pl.col("width").cast(pl.Int64) * pl.col("height"), "width")
    return sizes.row(0), sizes.row(-1)


def _repeats(table: "CheckedTable") -> dict[int, int]:
    """How often a pass over the data set takes a row → number of such rows."""
    import polars as pl

    from diffsynth_dagster.data.table.rows import REPEAT

    if REPEAT not in table.rows.collect_schema().names():
        return {1: table.counts["ok"]}
    counted = table.accepted.group_by(REPEAT).agg(pl.len()).sort(REPEAT).collect()
    return dict(counted.iter_rows())


def _prompts(table: "CheckedTable", family: "Family") -> list[str]:
    """The first, the middle and the last of the distinct captions, as sample prompts."""
    import polars as pl

    caption = family.caption
    if caption is None or caption.many:
        return []
    text = pl.col(caption.column)
    column = table.accepted.select(text).unique(maintain_order=True).collect().to_series()
    texts = [" ".join(text.split()) for text in column]
    # `sample_prompts` would take a caption that ends in .csv for the name of a table.
    short = [t for t in texts if len(t) <= _LONGEST_PROMPT and not t.lower().endswith(TABLES)]
    places = dict.fromkeys((0, len(short) // 2, len(short) - 1) if short else ())
    return [short[place] for place in places][:_PROMPTS]
