"""`run.json`: what a training did, for people and for the step that exports it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffsynth_dagster import __version__
from diffsynth_dagster.cache.encode import step_components
from diffsynth_dagster.cache.manifest import Manifest
from diffsynth_dagster.config.effect import trained_components, values_that_affect
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import OutputError, WeightsError
from diffsynth_dagster.facts import FactBook, digest_of
from diffsynth_dagster.files import write_text
from diffsynth_dagster.weights.identify import FoundModel
from diffsynth_dagster.weights.models import component_digest

FILE_NAME = "run.json"


@dataclass
class RunRecord:
    """What a training did.

    Attributes:
        identity: digest of everything that the result depends on.
        base: component → digest of its files.
        checkpoints: file name → digest of its bytes, in the order they were written.
        lora: rank and alpha, when a LoRA was trained.
        evaluation: metrics of `customized_evaluation`, named before/… and after/….
        pictures: name → file name under samples/.
        finished: whether the training reached its end.
    """

    identity: str
    family: str
    trained: list[str]
    base: dict[str, str]
    samples: int
    samples_digest: str
    config_digest: str
    lora: dict[str, Any] | None
    steps: int = 0
    seconds: float = 0.0
    samples_per_second: float = 0.0
    peak_memory_bytes: int = 0
    devices: list[str] = field(default_factory=list)
    mixed_precision: str = "no"
    first_loss: float | None = None
    final_loss: float | None = None
    all_losses_finite: bool = True
    changed_tensors: int = 0
    trained_tensors: int = 0
    checkpoints: dict[str, str] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    finished: bool = False
    version: str = __version__

    def write(self, folder: Path) -> Path:
        """Write `run.json`. Raises `OutputError`."""
        return write_text(folder / FILE_NAME, json.dumps(asdict(self), indent=2) + "\n")

    @property
    def provenance(self) -> dict[str, Any]:
        """What a weight file says about where it comes from. Holds no time and no path."""
        names = ("identity", "family", "base", "samples", "samples_digest", "config_digest")
        return {name: getattr(self, name) for name in (*names, "lora", "version")}


def config_digest(config: TrainingConfig) -> str:
    """Digest of the parameters that count by value, up to those that affect the training.

    What counts by content is in the digests of files beside it.
    """
    return digest_of(values_that_affect(config, "weights", "rows", "latents", "training"))


def start_record(
    config: TrainingConfig, found: FoundModel, manifest: Manifest, book: FactBook
) -> RunRecord:
    """The record of a training that is about to start.

    Raises:
        WeightsError: the file of `lora_checkpoint` is missing.
    """
    names = step_components(found, trained_components(config))
    base = manifest.weights | {name: component_digest(found, name, book) for name in names}
    if config.lora_checkpoint is not None:
        base["lora_checkpoint"] = _digest_of_lora(Path(config.lora_checkpoint), book)
    lora = {"rank": config.lora_rank, "alpha": config.alpha} if config.lora_base_model else None
    settings = config_digest(config)
    stages = [stage.name for stage in found.family.stages]
    return RunRecord(
        identity=digest_of([__version__, settings, manifest.digest, base, stages]),
        family=found.family.name,
        trained=[*config.trainable_models, *filter(None, [config.lora_base_model])],
        base=dict(sorted(base.items())),
        samples=manifest.samples,
        samples_digest=manifest.digest,
        config_digest=settings,
        lora=lora,
    )


def _digest_of_lora(path: Path, book: FactBook) -> str:
    if not path.is_file():
        raise WeightsError(
            "the LoRA file does not exist",
            where=f"lora_checkpoint = {path}",
            do="correct the path",
        )
    return book.digest(path)


def read_record(folder: Path) -> RunRecord | None:
    """The record in a run folder; None when there is none.

    Raises:
        OutputError: it is damaged.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        return RunRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(
            f"the record of the run cannot be read: {error}",
            where=str(path),
            do="remove it: the training is then run again",
        ) from error
