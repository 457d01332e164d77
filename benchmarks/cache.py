"""Encoding into the store, against one sample at a time with one torch.save for each.

    python benchmarks/cache.py
    python benchmarks/cache.py tiny      a trial in seconds, of which nothing is written

On the demo's digits and on images of mixed sizes, with the demo's encoders: samples per second and
bytes on disk; then a run with nothing changed, and a run after one file was edited.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import report
import torch
from accelerate import Accelerator
from demo_runs import MODEL, write_digits
from PIL import Image

from diffsynth_dagster.cache.encode import encode_missing
from diffsynth_dagster.cache.keys import Keys
from diffsynth_dagster.cache.plan_samples import plan_samples
from diffsynth_dagster.config import TrainingConfig, read_config
from diffsynth_dagster.data.media.image import load_sample_image
from diffsynth_dagster.data.table.validate import validate
from diffsynth_dagster.facts import fact_cache_of
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.models import Models
from diffsynth_dagster.weights.resolved import ResolvedModel

SIZES = ((64, 64), (96, 64), (64, 96), (128, 96), (80, 80))


def write_mixed(folder: Path, count: int) -> None:
    """Images of five sizes."""
    folder.mkdir(parents=True)
    source = torch.Generator().manual_seed(0)
    lines = ["image,prompt"]
    for index in range(count):
        width, height = SIZES[index % len(SIZES)]
        pixels = torch.randint(0, 255, (height, width, 3), generator=source, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
        lines.append(f"{index}.png,picture {index}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def config_of(data: Path, work: Path) -> TrainingConfig:
    """The parameters of encoding a folder."""
    return read_config(
        {
            **MODEL,
            "dataset_base_path": str(data),
            "dataset_metadata_path": str(data / "metadata.csv"),
            "task": "sft:data_process",
            "batch_size": 16,
            "output_path": str(work / "run"),
            "cache_path": str(work / "store"),
        },
        "the benchmark",
    )


def encode(config: TrainingConfig, model: ResolvedModel) -> int:
    """A whole run without the start of the process; returns how many images were encoded."""
    fact_cache = fact_cache_of(config.cache_path)
    models = Models(model, torch.device("cpu"), torch.float32, on_cpu_first=False)
    validated = validate(config, model.family.columns, fact_cache)
    manifest = plan_samples(config, model, validated, Keys(model, fact_cache, torch.float32))
    done = encode_missing(config, models, manifest, validated, Accelerator(cpu=True))
    manifest.publish()
    fact_cache.close()
    return done.misses["image"]


def encode_one_by_one(config: TrainingConfig, model: ResolvedModel, folder: Path) -> None:
    """The baseline: load, encode and torch.save each sample, named by its position."""
    folder.mkdir()
    models = Models(model, torch.device("cpu"), torch.float32, on_cpu_first=False)
    family = model.family
    loaded = models.get(["tokenizer", "text_encoder", "vae"])
    lines = Path(config.dataset_metadata_path or "").read_text().splitlines()[1:]
    for index, line in enumerate(lines):
        name, prompt = line.split(",", 1)
        path = Path(config.dataset_base_path) / name
        with Image.open(path) as image:
            size = image.size
        sample: dict[str, Any] = {"prompt": prompt, "image": load_sample_image(path, size)}
        outputs: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for stage in family.stages:
                outputs |= stage.run(loaded, [sample])[0]
        torch.save({k: v.clone() for k, v in outputs.items()}, folder / f"{index}.pth")


def size_of(folder: Path) -> int:
    """Bytes of the files under a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def measure(name: str, data: Path, work: Path) -> dict[str, Any]:
    """Time the baseline and our runs on one data set."""
    work.mkdir()
    config = config_of(data, work)
    found = find_model(config, ModelHub(Path("models"), skip_download=True))
    count = len((data / "metadata.csv").read_text().splitlines()) - 1
    baseline, _ = report.timed(lambda: encode_one_by_one(config, found, work / "baseline"))
    first, _ = report.timed(lambda: encode(config, found))
    again, encoded = report.timed(lambda: encode(config, found))
    assert encoded == 0
    edited = next(data.rglob("*.png"))
    with Image.open(edited) as image:
        image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(edited)
    os.utime(edited)
    _, after_edit = report.timed(lambda: encode(config, found))
    return {
        "data": name,
        "samples": count,
        "ours samples/s": round(count / first, 1),
        "baseline samples/s": round(count / baseline, 1),
        "ratio": round(baseline / first, 2),
        "ours MiB": round(size_of(work / "store") / 2**20, 2),
        "baseline MiB": round(size_of(work / "baseline") / 2**20, 2),
        "unchanged run, part of the first": f"{again / first:.2%}",
        "encoded after one edit": after_edit,
    }


def main(tiny: bool) -> dict[str, Any]:
    """Measure both data sets and print the table."""
    work = Path(tempfile.mkdtemp(prefix="bench-cache-"))
    try:
        write_digits(work / "digits", tiny)
        write_mixed(work / "mixed", 10 if tiny else 300)
        rows = [measure(n, work / n, work / f"{n}-run") for n in ("digits", "mixed")]
    finally:
        shutil.rmtree(work)
    print(report.table(rows))
    return {"rows": rows}


if __name__ == "__main__":
    found = report.command_line("cache", main, __doc__)
