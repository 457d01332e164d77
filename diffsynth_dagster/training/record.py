"""`run.json`: what a training did, for people and for the step that exports it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from diffsynth_dagster import __version__
from diffsynth_dagster.cache.encode import step_components
from diffsynth_dagster.cache.manifest import Manifest
from diffsynth_dagster.config.effect import trained_components, values_that_affect
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import OutputError, WeightsError
from diffsynth_dagster.facts import FactCache, digest_file, digest_of
from diffsynth_dagster.files import write_text
from diffsynth_dagster.weights.identify import FoundModel
from diffsynth_dagster.weights.models import component_digest

FILE_NAME = "run.json"
METRICS, PICTURES = "metrics.csv", "samples"
_DIGEST = "digest"
"""Of all else that the file says; those of older versions have none."""


@dataclass(frozen=True)
class RunRecord:
    """What a training did, as `run.json` says it.

    Attributes:
        identity: digest of everything that the result depends on.
        base: component → digest of its files.
        checkpoints: file name → digest of its bytes, in the order they were written.
        newest: the files of the checkpoint that was written last.
        lora: rank and alpha, when a LoRA was trained.
        evaluation: metrics of `customized_evaluation`, named before/… and after/….
        pictures: name → file name under samples/.
        clips: the same of sampled videos, named step-<step>-<place of the prompt, from 0>.
        beside: file beside the checkpoints, as a path from the run folder → digest of its bytes: the
            pictures and clips, and, at the end of the training, its losses.
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
    newest: list[str] = field(default_factory=list)
    evaluation: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    clips: dict[str, str] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    finished: bool = False
    version: str = __version__

    @property
    def newest_digest(self) -> str:
        """Digest of the checkpoint that was written last: of its file, or of its files."""
        digests = [self.checkpoints[name] for name in self.newest]
        return digests[0] if len(digests) == 1 else digest_of(digests)

    @property
    def provenance(self) -> dict[str, Any]:
        """What a weight file says about where it comes from. Holds no time and no path."""
        names = ("identity", "family", "base", "samples", "samples_digest", "config_digest")
        return {name: getattr(self, name) for name in (*names, "lora", "version")}


class RunFile:
    """The one writer of `run.json`.

    It is handed facts as they come, and writes the file whole. On disk it names a checkpoint as
    soon as the checkpoint is written, and says "finished" only at the very end, so that it is true
    after a crash too. Every method may raise `OutputError`.

    Args:
        folder: the run folder. A record that is there, of an older training, is replaced at once.
        writes: whether this process writes: one of a job does, the others only keep the facts.
    """

    def __init__(self, folder: Path, record: RunRecord, writes: bool) -> None:
        self._path = folder / FILE_NAME
        self._writes = writes
        self.record = record
        self._update()

    def _update(self, write: bool = True, **facts: Any) -> None:
        self.record = replace(self.record, **facts)
        if write and self._writes:
            said = asdict(self.record)
            text = json.dumps({**said, _DIGEST: digest_of(said)}, indent=2)
            write_text(self._path, text + "\n")

    def saved(self, files: Mapping[str, str]) -> None:
        """A checkpoint was written: file name → digest."""
        self._update(checkpoints={**self.record.checkpoints, **files}, newest=list(files))

    def pictured(self, name: str, file: str) -> None:
        """A picture was written, as this file under samples/."""
        pictures = {**self.record.pictures, name: file}
        self._update(pictures=pictures, beside=self._with_digest(f"{PICTURES}/{file}"))

    def filmed(self, name: str, file: str) -> None:
        """A sampled video was written, as this file under samples/."""
        clips = {**self.record.clips, name: file}
        self._update(clips=clips, beside=self._with_digest(f"{PICTURES}/{file}"))

    def evaluated(self, when: str, metrics: Mapping[str, float]) -> None:
        """The model was evaluated, before or after the training."""
        named = {f"{when}/{name}": value for name, value in metrics.items()}
        self._update(evaluation={**self.record.evaluation, **named})

    def stepped(self, loss: float) -> None:
        """An optimizer step was made. Written with what comes next: a step writes no file."""
        first = loss if self.record.first_loss is None else self.record.first_loss
        self._update(write=False, first_loss=first, final_loss=loss)

    def diverged(self) -> None:
        """A loss, or the norm of gradients that changed the weights, was not finite."""
        self._update(all_losses_finite=False)

    def measured(self, steps: int, seconds: float, samples: int, peak_memory_bytes: int) -> None:
        """All steps were made.

        Args:
            steps, seconds: of the whole training.
            samples: looked at in all steps, each as often as it was.
            peak_memory_bytes: most memory used: of the GPU, or of the process on a CPU.
        """
        self._update(
            steps=steps,
            seconds=seconds,
            samples_per_second=samples / seconds,
            peak_memory_bytes=peak_memory_bytes,
        )

    def finished(self, trained_tensors: int, changed_tensors: int) -> None:
        """The training reached its end, and so many of the trained tensors changed."""
        self._update(
            trained_tensors=trained_tensors,
            changed_tensors=changed_tensors,
            beside=self._with_digest(METRICS),
            finished=True,
        )

    def _with_digest(self, name: str) -> dict[str, str]:
        """The digests of the files beside the checkpoints, with that of one more."""
        path = self._path.parent / name
        if not (self._writes and path.is_file()):
            return self.record.beside
        return {**self.record.beside, name: digest_file(path)}


def config_digest(config: TrainingConfig) -> str:
    """Digest of the parameters that count by value, up to those that affect the training.

    What counts by content is in the digests of files beside it.
    """
    return digest_of(values_that_affect(config, "weights", "rows", "latents", "training"))


def start_record(
    config: TrainingConfig,
    found: FoundModel,
    manifest: Manifest,
    fact_cache: FactCache,
    devices: Sequence[str] = (),
    mixed_precision: str = "no",
) -> RunRecord:
    """The record of a training that is about to start.

    Args:
        devices: name of the device of each process.
        mixed_precision: what is computed in. Neither of the two is part of the identity.

    Raises:
        WeightsError: the file of `lora_checkpoint` is missing.
    """
    names = step_components(found, trained_components(config))
    base = manifest.weights | {name: component_digest(found, name, fact_cache) for name in names}
    if config.lora_checkpoint is not None:
        base["lora_checkpoint"] = _digest_of_lora(Path(config.lora_checkpoint), fact_cache)
    lora = {"rank": config.lora_rank, "alpha": config.alpha} if config.lora_base_model else None
    settings = config_digest(config)
    stages = [stage.name for stage in found.family.stages]
    path = found.path.description
    return RunRecord(
        identity=digest_of([__version__, settings, manifest.digest, base, stages, path]),
        family=found.family.name,
        trained=[*config.trainable_models, *config.lora_base_model],
        base=dict(sorted(base.items())),
        samples=manifest.samples,
        samples_digest=manifest.digest,
        config_digest=settings,
        lora=lora,
        devices=list(devices),
        mixed_precision=mixed_precision,
    )


def _digest_of_lora(path: Path, fact_cache: FactCache) -> str:
    if not path.is_file():
        raise WeightsError(
            "the LoRA file does not exist",
            where=f"lora_checkpoint = {path}",
            do="correct the path",
        )
    return fact_cache.digest(path)


def read_record(folder: Path) -> RunRecord | None:
    """The record in a run folder; None when there is none.

    Raises:
        OutputError: it is damaged.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        digest = facts.pop(_DIGEST, None)
        if digest is not None and digest != digest_of(facts):
            raise ValueError("its content has changed since it was written")
        return RunRecord(**facts)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise OutputError(
            f"the record of the run cannot be read: {error}",
            where=str(path),
            do="remove it: the training is then run again",
        ) from error
