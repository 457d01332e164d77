"""`run.json`: what a training did, for people and for the step that exports it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from diffsynth_dagster import __version__
from diffsynth_dagster.errors import OutputError
from diffsynth_dagster.facts import digest_file, digest_of
from diffsynth_dagster.files import write_text
from diffsynth_dagster.fingerprint import Fingerprint
from diffsynth_dagster.own_names import is_trained
from diffsynth_dagster.versions import TRAINING

FILE_NAME = "run.json"
PICTURES = "samples"
LOGS = ("metrics.csv", "loss.csv", "held_out.csv")
"""Files that grow with the steps."""
SAMPLE_LOSSES = "sample_losses.parquet"
STARTS = ("lora_checkpoint", "resume_from_checkpoint")
"""The parameters that name a file to start from."""
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")
"""Those that compute: other versions may give other numbers."""
VERSION = "the version of training"
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
        writing: the files of one that is about to be written.
        parameters: those that the result depends on and that count by value, by name; none in records of
            older versions.
        weight_norms: component → layer that gets a LoRA → the Frobenius norm of its weights.
        lora: rank and alpha, when a LoRA was trained; see `TrainingConfig.adapter` for others.
        evaluation: metrics of `customized_evaluation`, named before/… and after/….
        pictures: name → file name under samples/.
        clips: the same of sampled videos, named step-<step>-<place of the prompt, from 0>.
        beside: file beside the checkpoints, as a path from the run folder → digest of its bytes: the
            pictures and clips, and, at the end of the training, its losses.
        held_out_digest: of the samples that are held out as a table of their own, if they are.
        held_out: each measurement of the held-out loss: see `events.HeldOutMetrics`.
        best: the files of the checkpoint with the smallest held-out loss, where it is kept.
        total_steps: that the training was to make; 0 in records of older versions.
        resumed_from: the steps after which it was stopped, and gone on with.
        architecture: of the model, as ModelSpec calls it: see `Family`; empty in records of older versions.
        libraries: name → version, of those that compute; none in records of older versions.
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
    parameters: dict[str, Any] = field(default_factory=dict)
    weight_norms: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    total_steps: int = 0
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
    writing: list[str] = field(default_factory=list)
    evaluation: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    clips: dict[str, str] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    held_out_digest: str | None = None
    held_out: list[dict[str, Any]] = field(default_factory=list)
    best: list[str] = field(default_factory=list)
    resumed_from: list[int] = field(default_factory=list)
    finished: bool = False
    version: str = __version__
    training_version: int = TRAINING
    architecture: str = ""
    libraries: dict[str, str] = field(default_factory=dict)

    @property
    def chosen(self) -> list[str]:
        """The files of the checkpoint that is exported: the best where it is kept, else the newest."""
        return self.best or self.newest

    @property
    def chosen_digest(self) -> str:
        """Digest of the checkpoint that is exported."""
        return self.digest_of_checkpoint(self.chosen)

    def digest_of_checkpoint(self, names: Iterable[str]) -> str:
        """Digest of a checkpoint: of its file, or of its files."""
        digests = [self.checkpoints[name] for name in names]
        return digests[0] if len(digests) == 1 else digest_of(digests)

    @property
    def fingerprint(self) -> Fingerprint:
        """What the result depends on, as far as it has a name."""
        held_out = self.held_out_digest
        return Fingerprint(
            {
                **self.parameters,
                "the samples": self.samples_digest,
                **({} if held_out is None else {"the held-out samples": held_out}),
                **{f"the weights of {name}": digest for name, digest in self.base.items()},
                VERSION: self.training_version,
            }
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """What a weight file says about where it comes from. Holds no time, no path, and nothing of the machine:
        equal trainings give equal bytes."""
        names = ("identity", "family", "base", "samples", "samples_digest", "config_digest")
        said = {name: getattr(self, name) for name in (*names, "lora", "version", "trained")}
        size = [self.parameters.get("width"), self.parameters.get("height")]
        sized = {} if None in size else {"size": size}
        return {
            **said,
            **({"architecture": self.architecture} if self.architecture else {}),
            **sized,
        }


class RunFile:
    """The one writer of `run.json`.

    It is handed facts as they come, and writes the file whole. On disk it names a checkpoint as
    soon as the checkpoint is written, and says "finished" only at the very end, so that it is true
    after a crash too. Every method may raise `OutputError`.

    Args:
        folder: the run folder.
        writes: whether this process writes: one of a job does, the others only keep the facts.
    """

    def __init__(self, folder: Path, record: RunRecord, writes: bool) -> None:
        self.folder = folder
        self._path = folder / FILE_NAME
        self._writes = writes
        self._record = record
        self._final_loss = record.final_loss

    @property
    def record(self) -> RunRecord:
        """What is known so far."""
        return replace(self._record, final_loss=self._final_loss)

    def begin(
        self, total_steps: int, weight_norms: Mapping[str, dict[str, float]] | None = None
    ) -> None:
        """Put the record in the place of that of an older training."""
        self._update(total_steps=total_steps, weight_norms=dict(weight_norms or {}))

    def _update(self, write: bool = True, **facts: Any) -> None:
        self._record = replace(self._record, **facts)
        if write and self._writes:
            said = asdict(self.record)
            text = json.dumps({**said, _DIGEST: digest_of(said)}, indent=2)
            write_text(self._path, text + "\n")

    def saving(self, names: Iterable[str]) -> None:
        """Files of a checkpoint are about to be written."""
        self._update(writing=list(names))

    def saved(self, files: Mapping[str, str]) -> None:
        """A checkpoint was written: file name → digest."""
        checkpoints = {**self.record.checkpoints, **files}
        self._update(checkpoints=checkpoints, newest=list(files), writing=[])

    def held_out(self, metrics: Mapping[str, Any]) -> None:
        """The held-out loss was measured."""
        self._update(held_out=[*self.record.held_out, dict(metrics)])

    def saved_best(self, files: Mapping[str, str]) -> None:
        """The best checkpoint so far was written, in place of the one before."""
        left = {n: d for n, d in self.record.checkpoints.items() if n not in self.record.best}
        self._update(checkpoints={**left, **files}, best=list(files), writing=[])

    def dropped(self, names: Iterable[str]) -> None:
        """Files of checkpoints are about to be removed."""
        left = {n: d for n, d in self.record.checkpoints.items() if n not in set(names)}
        self._update(checkpoints=left)

    def pictured(self, name: str, file: str) -> None:
        """A picture was written, as this file under samples/."""
        pictures = {**self.record.pictures, name: file}
        self._update(pictures=pictures, beside=self._with_digests(f"{PICTURES}/{file}"))

    def filmed(self, name: str, file: str) -> None:
        """A sampled video was written, as this file under samples/."""
        clips = {**self.record.clips, name: file}
        self._update(clips=clips, beside=self._with_digests(f"{PICTURES}/{file}"))

    def evaluated(self, when: str, metrics: Mapping[str, float]) -> None:
        """The model was evaluated, before or after the training."""
        named = {f"{when}/{name}": value for name, value in metrics.items()}
        self._update(evaluation={**self.record.evaluation, **named})

    def stepped(self, loss: float) -> None:
        """An optimizer step was made. Written with what comes next: a step writes no file."""
        self._final_loss = loss
        if self._record.first_loss is None:
            self._update(write=False, first_loss=loss)

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
            beside=self._with_digests(*LOGS, SAMPLE_LOSSES),
            finished=True,
        )

    def _with_digests(self, *names: str) -> dict[str, str]:
        """The digests of the files beside the checkpoints, with those of some more that are there."""
        paths = {name: self.folder / name for name in names if self._writes}
        found = {name: digest_file(path) for name, path in paths.items() if path.is_file()}
        return {**self.record.beside, **found}


def written_files(record: Mapping[str, Any]) -> set[str]:
    """The checkpoints and samples that a record names, as paths from the run folder, of those names that a
    training gives them."""
    samples = [*record["pictures"].values(), *record["clips"].values()]
    checkpoints = {Path(name).name for name in [*record["checkpoints"], *record["writing"]]}
    names = checkpoints | {f"{PICTURES}/{Path(name).name}" for name in samples}
    return {name for name in names if is_trained(name)}


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
        facts.setdefault("training_version", 0)  # of before there were versions of training
        return RunRecord(**facts)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise OutputError(
            f"the record of the run cannot be read: {error}",
            where=str(path),
            do="remove it: the training is then run again",
        ) from error
