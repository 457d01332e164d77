"""Fill the store: run the cacheable stages over the samples whose keys it lacks."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import polars as pl
import torch

from diffsynth_dagster.cache.manifest import Manifest
from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.config.effect import settled_by_encoding, trained_components
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.samples import content, load, plain, reading, reference
from diffsynth_dagster.data.table.check import Validated
from diffsynth_dagster.facts import FactBook, digest_of
from diffsynth_dagster.families.contract import Family, Sample, Stage
from diffsynth_dagster.weights.identify import FoundModel
from diffsynth_dagster.weights.models import Models, component_digest

LAYOUT_VERSION = 3


class Ranks(Protocol):
    """What encoding needs of accelerate's `Accelerator`."""

    @property
    def process_index(self) -> int: ...
    @property
    def num_processes(self) -> int: ...
    def wait_for_everyone(self) -> None: ...


@dataclass
class EncodeReport:
    """How many samples of each stage were in the store, and how many were encoded."""

    hits: dict[str, int] = field(default_factory=dict)
    misses: dict[str, int] = field(default_factory=dict)


def step_components(found: FoundModel, trained: frozenset[str]) -> list[str]:
    """The components and tokenizers that a training step uses: the denoiser first."""
    family = found.family
    used = {name for stage in family.step_stages(trained) for name in stage.uses}
    used |= {family.part(name).of for name in trained}
    used |= {name for name in family.denoise_uses if name in found.components}
    return list(dict.fromkeys([family.denoiser, *sorted(used)]))


def _all_reads(stage: Stage, family: Family) -> list[Input]:
    """The inputs that a stage depends on, itself or through its needs."""
    inputs = list(stage.reads)
    for name in stage.needs:
        inputs += _all_reads(family.stage(name), family)
    return list(dict.fromkeys(inputs))


def _all_uses(stage: Stage, family: Family) -> set[str]:
    names = set(stage.uses)
    for name in stage.needs:
        names |= _all_uses(family.stage(name), family)
    return names


class Keys:
    """Keys of stage outputs: a digest of all that they depend on."""

    def __init__(self, found: FoundModel, book: FactBook, dtype: torch.dtype) -> None:
        self._found = found
        self._book = book
        self._dtype = str(dtype)
        self._weights: dict[str, list[str]] = {}

    def key(self, stage: Stage, row: Mapping[str, Any]) -> str:
        """Key of a stage's outputs for a sample.

        Args:
            row: of the checked table; the text columns are enough for a stage that reads no other.
        """
        family = self._found.family
        reads = _all_reads(stage, family)
        return digest_of(
            [
                LAYOUT_VERSION,
                family.name,
                stage.name,
                stage.version,
                [[o.name, o.role, o.ragged] for o in stage.yields],
                self._dtype,
                {i.column: content(row, i) for i in reads},
                {i.column: reading(row, i) for i in reads if i.is_file},
                self._digests(stage),
            ]
        )

    def weights(self, stages: Sequence[Stage]) -> dict[str, str]:
        """Component or tokenizer → digest of its files, for all that the stages use."""
        names = sorted({name for stage in stages for name in stage.uses})
        return {name: component_digest(self._found, name, self._book) for name in names}

    def _digests(self, stage: Stage) -> list[str]:
        if stage.name not in self._weights:
            names = sorted(_all_uses(stage, self._found.family))
            self._weights[stage.name] = [
                component_digest(self._found, name, self._book) for name in names
            ]
        return self._weights[stage.name]


def plan_samples(
    config: TrainingConfig, found: FoundModel, validated: Validated, keys: Keys
) -> Manifest:
    """The manifest of a validated table: nothing is encoded yet.

    Raises:
        WeightsError: a component that a cached stage uses is missing.
    """
    family = found.family
    trained = trained_components(config)
    cached, in_step = family.cached_stages(trained), family.step_stages(trained)
    step_inputs = {i for stage in in_step for i in stage.reads}
    seen: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    for row in validated.accepted.iter_rows(named=True):
        sample = _identity(row, family)
        seen[sample] = seen.get(sample, 0) + 1
        rows.append(
            {
                "sample": f"{sample}-{seen[sample]}",
                **{name: row[name] for name in ("row", "width", "height", "frames", "shape")},
                **{f"key:{s.name}": keys.key(s, row) for s in cached},
                **{f"input:{i.column}": _input(row, i) for i in step_inputs},
            }
        )
    return Manifest(
        pl.DataFrame(rows, infer_schema_length=None),
        str(Path(config.cache_path).absolute()),
        family.name,
        _plan_prompts(config, family, keys, trained),
        keys.weights(cached),
        settled_by_encoding(config),
    )


def _identity(row: Mapping[str, Any], family: Family) -> str:
    """Digest of what a row says and how its files are read."""
    inputs = {i.column: content(row, i) for i in family.inputs}
    read = {i.column: reading(row, i) for i in family.file_inputs}
    return digest_of([inputs, read])[:32]


def _input(row: Mapping[str, Any], item: Input) -> str:
    """What a stage of the training step reads from: a text, or a reference as JSON."""
    return json.dumps(reference(row, item)) if item.is_file else row[item.column]


def _plan_prompts(
    config: TrainingConfig, family: Family, keys: Keys, trained: frozenset[str]
) -> dict[str, dict[str, str]]:
    prompts = list(config.sample_prompts)
    if prompts and config.sample_cfg_scale > 1:
        prompts.append("")
    stages = [s for s in family.text_stages if s in family.cached_stages(trained)]
    return {
        prompt: {s.name: keys.key(s, {"prompt": prompt}) for s in stages}
        for prompt in dict.fromkeys(prompts)
    }


def encode_missing(
    config: TrainingConfig,
    models: Models,
    manifest: Manifest,
    validated: Validated,
    ranks: Ranks,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> EncodeReport:
    """Run each cached stage over the samples that the store lacks.

    Every process encodes its share and writes shards of its own. Components are freed after the
    last stage that uses them.

    Args:
        progress: called with (stage, samples done, samples to do) of this process.
    """
    family = models.found.family
    store = Store(Path(manifest.store))
    report = EncodeReport()
    cached = family.cached_stages(trained_components(config))
    table = validated.accepted
    for stage in cached:
        wanted = _wanted(stage, family, manifest, table)
        missing = store.missing(wanted)
        report.hits[stage.name] = len(wanted) - len(missing)
        report.misses[stage.name] = len(missing)
        ranks.wait_for_everyone()
        missing.sort(key=lambda key: (_shape(wanted[key]), key))
        # By key and not by place in the list: another run may have added to the store between the
        # looks of two processes.
        world = ranks.num_processes
        share = [key for key in missing if int(key[:8], 16) % world == ranks.process_index]
        if share:
            loaded = models.get(stage.uses)
            with store.writer() as writer, torch.no_grad():
                done = 0
                for batch in _batches(share, wanted, config.batch_size):
                    samples = _read_samples(stage, [wanted[key] for key in batch], store)
                    for key, outputs in zip(batch, stage.run(loaded, samples), strict=True):
                        writer.add(key, outputs)
                    done += len(batch)
                    progress(stage.name, done, len(share))
            del loaded  # or it would keep what is freed
            later = {name for s in cached[cached.index(stage) + 1 :] for name in s.uses}
            models.free(name for name in stage.uses if name not in later)
        ranks.wait_for_everyone()
        store.refresh()
    return report


def _shape(row: Mapping[str, Any]) -> tuple[int, int, int, str]:
    return row["width"], row["height"], row["frames"], row["shape"]


def _wanted(
    stage: Stage, family: Family, manifest: Manifest, table: pl.DataFrame
) -> dict[str, dict[str, Any]]:
    """Key → a row that yields it; with the keys of the stages it needs."""
    wanted: dict[str, dict[str, Any]] = {}
    for entry, row in zip(
        manifest.frame.iter_rows(named=True), table.iter_rows(named=True), strict=True
    ):
        wanted.setdefault(
            entry[f"key:{stage.name}"],
            {**row, "keys": [entry[f"key:{name}"] for name in stage.needs]},
        )
    for prompt, keys in manifest.prompts.items():
        if stage.name in keys:
            row = {"prompt": prompt, "width": 0, "height": 0, "frames": 0, "shape": ""}
            needs = [keys[name] for name in stage.needs]
            wanted.setdefault(keys[stage.name], {**row, "keys": needs})
    return wanted


def _batches(
    keys: Sequence[str], rows: Mapping[str, Mapping[str, Any]], size: int
) -> Iterator[list[str]]:
    """Runs of at most `size` keys of equal shape."""
    batch: list[str] = []
    for key in keys:
        if batch and (len(batch) == size or _shape(rows[key]) != _shape(rows[batch[0]])):
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


def _read_samples(stage: Stage, rows: Sequence[Mapping[str, Any]], store: Store) -> list[Sample]:
    """Decode the inputs of a stage, in threads."""

    def read(row: Mapping[str, Any]) -> Sample:
        sample: dict[str, Any] = {}
        for item in stage.reads:
            if item.is_file:
                sample[item.column] = load(reference(row, item), item)
            else:
                sample[item.column] = plain(row[item.column], item)
        for key in row["keys"]:
            sample |= store.read(key)
        return sample

    with ThreadPoolExecutor(max_workers=min(8, len(rows))) as pool:
        return list(pool.map(read, rows))
