"""From a checked table of many rows to batches: seconds and peak memory.

    python benchmarks/scale.py --rows 10000000     table → keys → manifest → first batch, random step
    python benchmarks/scale.py --images 100000     real small images through the file check, twice
    python benchmarks/scale.py tiny                both in seconds, of which nothing is written

Rows: the facts about files are made up, since ten million pictures do not fit here; everything after
the file check is the real code, with the demo's real model. Only the shards that the two batches
read are real, the others stand in the store's index alone. Each part that is measured runs in one
process, whose peak memory counts; what it needs is made in another. The last line is JSON.
"""

import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import report
import torch
from accelerate import Accelerator
from demo_runs import MODEL
from PIL import Image

from diffsynth_dagster.cache.encode import encode_missing
from diffsynth_dagster.cache.keys import Keys
from diffsynth_dagster.cache.layout import LAYOUT_VERSION
from diffsynth_dagster.cache.manifest import Manifest
from diffsynth_dagster.cache.plan_samples import plan_samples
from diffsynth_dagster.cache.resolve import Samples, resolve
from diffsynth_dagster.cache.shards import INDEX_SCHEMA, tensor_digest
from diffsynth_dagster.config import TrainingConfig, read_config
from diffsynth_dagster.data.digests import digest_column
from diffsynth_dagster.data.prepare import prepare_data
from diffsynth_dagster.data.scan import read_parquet, scan_parquet
from diffsynth_dagster.data.table.checked_table import read_checked, write_checked
from diffsynth_dagster.data.table.validate import CheckedTable
from diffsynth_dagster.facts import digest_text, fact_cache_of
from diffsynth_dagster.files import write_tensors
from diffsynth_dagster.seal import write_sealed
from diffsynth_dagster.training.batches import StepDataset
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.models import Models
from diffsynth_dagster.weights.resolved import ResolvedModel

CHUNK = 250_000
KEYS_PER_SHARD = 4_000
"""As many latents of 64 KiB as a shard of 256 MiB holds."""
SIZES = ((1024, 1024), (1216, 832), (832, 1216), (1344, 768), (768, 1344))
Seconds = dict[str, float]


def config_of(work: Path) -> TrainingConfig:
    """A LoRA training of the demo's model on the table in a folder."""
    return read_config(
        {
            **MODEL,
            "dataset_base_path": str(work / "data"),
            "dataset_metadata_path": str(work / "data" / "metadata.csv"),
            "lora_base_model": "dit",
            "lora_target_modules": "to_q",
            "batch_size": 4,
            "output_path": str(work / "run"),
            "cache_path": str(work / "store"),
        },
        "the benchmark",
    )


def made_up_rows(start: int, count: int) -> pl.DataFrame:
    """Rows of a checked table whose files do not exist: five sizes, captions of a sentence."""
    number = pl.int_range(start, start + count, dtype=pl.Int64, eager=True).alias("n")
    sides = pl.Series("side", [list(size) for size in SIZES])
    frame = number.to_frame().with_columns(
        pl.lit("ok").alias("status"),
        pl.lit("").alias("message"),
        pl.format("a street at night seen from the hill above village number {}", "n").alias(
            "prompt"
        ),
        pl.format("images/{}/{}.jpg", pl.col("n") % 1000, "n").alias("image"),
        sides.gather((number * 7919 % len(SIZES)).to_list()).alias("image:target"),
    )
    side = pl.col("image:target")
    return frame.select(
        (pl.col("n") + 1).cast(pl.UInt32).alias("row"),
        "status",
        "message",
        "prompt",
        "image",
        pl.format("/data/{}", "image").alias("image:path"),
        digest_column(pl.col("image")).alias("image:digest"),
        (pl.col("n") % 100_000 + 50_000).alias("image:size"),
        (pl.col("n") * 1_000_000_007).alias("image:modified"),
        side.list.get(0).alias("image:width"),
        side.list.get(1).alias("image:height"),
        "image:target",
        pl.lit(1, pl.Int64).alias("image:frames"),
        pl.lit(1.0).alias("image:stride"),
        pl.lit(None, pl.List(pl.UInt32)).alias("image:shown"),
        pl.lit(None, pl.String).alias("image:reading"),
        side.list.get(0).alias("width"),
        side.list.get(1).alias("height"),
        pl.lit(1, pl.Int64).alias("frames"),
        pl.format("{}x{}", side.list.get(0), side.list.get(1)).alias("shape"),
    )


def write_table(folder: Path, rows: int) -> None:
    """A checked table of made-up facts, made in parts, since it may be larger than memory."""
    parts = folder / "parts"
    parts.mkdir(parents=True)
    for start in range(0, rows, CHUNK):
        part = made_up_rows(start, min(CHUNK, rows - start))
        part.write_parquet(parts / f"{start:012}.parquet", compression="lz4")
    write_checked(CheckedTable(scan_parquet(sorted(parts.iterdir())), "made up"), folder)
    shutil.rmtree(parts)


@contextmanager
def part(seconds: Seconds, name: str) -> Iterator[None]:
    """Note how long a part takes."""
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)


def plan(config: TrainingConfig, model: ResolvedModel) -> Manifest:
    """The manifest of the table in the run folder."""
    fact_cache = fact_cache_of(config.cache_path)
    keys = Keys(model, fact_cache, torch.float32)
    return plan_samples(config, model, read_checked(Path(config.output_path)), keys)


def fill_index(manifest: Manifest, model: ResolvedModel) -> None:
    """Say in the store's index that it holds every sample."""
    for stage in model.family.stages:
        keys = manifest.rows.select(pl.col(f"key:{stage.name}").alias("key"))
        number = 0
        for batch in keys.collect_batches(chunk_size=100 * KEYS_PER_SHARD, maintain_order=True):
            for held in batch.iter_slices(KEYS_PER_SHARD):
                name = digest_text(f"{stage.name}{number:010}")[:32]
                index = index_of(held, stage.yields[0].name, name)
                write_sealed(
                    Path(manifest.store) / "index" / f"{name}.parquet",
                    lambda staged, said, index=index: index.write_parquet(staged, metadata=said),
                    {"layout": str(LAYOUT_VERSION)},
                )
                number += 1


def index_of(keys: pl.DataFrame, output: str, shard: str) -> pl.DataFrame:
    """The index of a shard that holds one small tensor under each of the keys. Its digests are made
    up, but take the space of real ones."""
    known = {"output": output, "shard": shard, "dtype": "float32", "finite": True, "bytes": 64}
    rows = keys.with_columns(
        *(pl.lit(value).alias(name) for name, value in known.items()),
        pl.lit([4, 4]).alias("shape"),
        digest_column(pl.col("key")).alias("digest"),
    )
    return rows.select(pl.col(column).cast(kind) for column, kind in INDEX_SCHEMA.items())


def random_step(data: StepDataset) -> int:
    """The same step for both processes."""
    return random.Random(0).randrange(data.order.steps_per_epoch)


def write_shards(data: StepDataset, config: TrainingConfig) -> None:
    """Write the shards that the measured batches read, whole: a tensor for each row of their index,
    with its digest in the header."""
    store, samples = Path(config.cache_path), Samples(Path(config.output_path))
    visits = [
        v for step in (0, random_step(data)) for micro in data.order.step(step) for v in micro
    ]
    sampled = [samples.at(visit.bucket, visit.index) for visit in visits]
    for shard in {shard for sample in sampled for shard, _ in sample.places.values()}:
        rows = read_parquet(store / "index" / f"{shard}.parquet").select("key", "output")
        tensors = {f"{key}.{output}": torch.zeros(4, 4) for key, output in rows.iter_rows()}
        digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
        write_tensors(store / "shards" / f"{shard}.safetensors", tensors, digests)


def make(work: Path, rows: int) -> None:
    """Make what the measured process needs."""
    config = config_of(work)
    write_table(Path(config.output_path), rows)
    found = find_model(config, ModelHub(Path("models"), skip_download=True))
    manifest = plan(config, found)
    fill_index(manifest, found)
    samples = resolve(manifest, Path(config.output_path))
    write_shards(StepDataset(config, found, samples, 0, 1), config)


def measure(work: Path) -> dict[str, Any]:
    """From the checked table to two batches."""
    config, seconds = config_of(work), Seconds()
    found = find_model(config, ModelHub(Path("models"), skip_download=True))
    start = time.perf_counter()
    with part(seconds, "keys and manifest"):
        manifest = plan(config, found)
    models = Models(found, torch.device("cpu"), torch.float32, on_cpu_first=False)
    with part(seconds, "nothing is left to encode"):
        table = read_checked(Path(config.output_path))
        done = encode_missing(config, models, manifest, table, Accelerator(cpu=True))
        assert not any(done.misses.values())
    with part(seconds, "resolve to shards"):
        samples = resolve(manifest.publish(), Path(config.output_path))
    with part(seconds, "first batch"):
        data = StepDataset(config, found, samples, 0, 1)
        assert len(data[0][0].samples) == config.batch_size
    with part(seconds, "batch at a random step"):
        assert data[random_step(data)]
    return {
        "rows": manifest.samples,
        "seconds": {**seconds, "together": round(time.perf_counter() - start, 2)},
        "peak_gib": round(report.peak_memory() / 2**30, 2),
    }


def check_images(work: Path, count: int) -> dict[str, Any]:
    """Check the files of a folder of pictures, first and again."""
    config, seconds = config_of(work), Seconds()
    data = work / "data"
    source = np.random.default_rng(0)
    lines = ["image,prompt"]
    for number in range(count):
        folder = data / f"{number % 100:02}"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{number % 100:02}/{number}.png"
        pixels = source.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / name, compress_level=1)
        lines.append(f"{name},picture {number}")
    (data / "metadata.csv").write_text("\n".join(lines) + "\n")
    columns = find_model(config, ModelHub(Path("models"), skip_download=True)).family.columns
    before = report.peak_memory()
    for name in ("first", "again"):
        fact_cache = fact_cache_of(config.cache_path)
        with part(seconds, name):
            assert prepare_data(config, columns, fact_cache).counts == {"ok": count}
        fact_cache.close()
    peak = report.peak_memory()
    return {
        "images": count,
        "seconds": seconds,
        "peak_gib": round(peak / 2**30, 2),
        "of it for the check": round((peak - before) / 2**30, 2),
    }


def measured_rows(rows: int, tiny: bool = False) -> dict[str, Any]:
    """From a table of so many rows to batches."""
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as work:
        report.alone(make, Path(work), rows, tiny=tiny)
        return report.alone(measure, Path(work), tiny=tiny)


def measured_images(count: int) -> dict[str, Any]:
    """The check of so many pictures."""
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as work:
        return check_images(Path(work), count)


def main(tiny: bool, rows: int = 100_000, images: int | None = None) -> dict[str, dict[str, Any]]:
    """Measure a table of rows, or a folder of images; both if `tiny`. Name of each → result."""
    if tiny:
        return {"scale_rows": measured_rows(10_000, tiny), "scale_images": measured_images(50)}
    if images:
        return {f"scale_images_{images}": measured_images(images)}
    return {f"scale_{rows}": measured_rows(rows)}


if __name__ == "__main__":
    parser = report.parser(__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--images", type=int)
    options = parser.parse_args()
    found = main(options.scale == "tiny", options.rows, options.images)
    for name, result in found.items():
        if options.scale == "full":
            report.write(name, result)
        print(json.dumps(result))
