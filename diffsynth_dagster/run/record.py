"""`run.json`, the record of a training: for people, and for the step that exports it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

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
"""Files to which the training appends lines while it runs."""
ROWS = "rows.parquet"
"""The losses of each row over its visits: see `training/row_losses.py`."""
OLD_ROWS = "sample_losses.parquet"
"""What older trainings have in its place."""
REPORT = "report.html"
"""What came of the training, for a browser: see the room `report`."""
STARTS = ("lora_checkpoint", "resume_from_checkpoint")
"""The parameters that name a file to start from."""
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")
"""The libraries whose version may change the results."""
VERSION = "the version of training"
# The field of `run.json` with the digest of all other fields. Records of older versions have none.
_DIGEST = "digest"


class ShownSample(TypedDict):
    """A sample in the picture of a step; see `RunRecord.shown`."""

    prompt: str
    box: list[int]


@dataclass(frozen=True)
class RunRecord:
    """The content of `run.json`. Fields that older versions did not write have their defaults.

    Attributes:
        identity: digest of everything that the result depends on.
        base: component → digest of its files.
        checkpoints: file name → digest of its bytes, in the order in which they were written.
        newest: the files of the checkpoint that was written last.
        writing: the files of a checkpoint that is being written.
        parameters: name → value of the parameters that the result depends on by their value, not by
            the content of a file.
        weight_norms: component → layer with a LoRA → the Frobenius norm of its base weights.
        lora: rank and alpha of the LoRA; see `TrainingConfig.adapter` for other methods. None if
            everything was trained in full.
        evaluation: metrics of `customized_evaluation`, named before/… and after/….
        pictures: name → file name under samples/.
        shown: for each of `sample_prompts` its prompt and its `box` in the picture of every step:
            left, top, right and bottom in pixels. It holds the sample and, to its left, the
            pictures that it was made from.
        clips: the same as `pictures` for sampled videos, named step-<step>-<number of the prompt, from 0>.
        beside: other files that the training wrote, as paths from the run folder → digest of their
            bytes: pictures, clips, and, once it is finished, the logs of its losses.
        held_out_digest: digest of the held-out samples, if they have a table of their own.
        sampled_digest: digest of the rows of `sample_table`.
        left_out_digest: digest of the samples that are left out since they are near copies of
            held-out ones.
        held_out: each measurement of the held-out loss: see `events.HeldOutMetrics`.
        best: the files of the checkpoint with the smallest held-out loss, if `keep_best` keeps it.
        total_steps: the number of steps of the whole training.
        resumed_from: the steps from which it was resumed.
        architecture: the name of the architecture in ModelSpec: see `Family`.
        libraries: name → version of the libraries in `LIBRARIES`.
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
    shown: list[ShownSample] = field(default_factory=list[ShownSample])
    clips: dict[str, str] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    held_out_digest: str | None = None
    sampled_digest: str | None = None
    left_out_digest: str | None = None
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
        """The files of the checkpoint to export: the best one if it is kept, else the newest."""
        return self.best or self.newest

    @property
    def chosen_digest(self) -> str:
        """Digest of the checkpoint to export."""
        return self.digest_of_checkpoint(self.chosen)

    def digest_of_checkpoint(self, names: Iterable[str]) -> str:
        """Digest of a checkpoint: of its one file, or of the digests of several."""
        digests = [self.checkpoints[name] for name in names]
        return digests[0] if len(digests) == 1 else digest_of(digests)

    @property
    def sample_pictures(self) -> dict[int, str]:
        """Step → file name under samples/ of the picture with its samples, in order of the steps."""
        # Other pictures are of the evaluation, named before-… and after-….
        numbers = {name: name.removeprefix("step-") for name in self.pictures}
        found = {int(n): self.pictures[name] for name, n in numbers.items() if n.isdigit()}
        return dict(sorted(found.items()))

    @property
    def fingerprint(self) -> Fingerprint:
        """What the result depends on, as far as it has a name."""
        more = {
            "the held-out samples": self.held_out_digest,
            "the table of samples": self.sampled_digest,
            "the near copies that are left out": self.left_out_digest,
        }
        return Fingerprint(
            {
                **self.parameters,
                "the samples": self.samples_digest,
                **{name: digest for name, digest in more.items() if digest is not None},
                **{f"the weights of {name}": digest for name, digest in self.base.items()},
                VERSION: self.training_version,
            }
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """The provenance that is written into the header of a weight file.

        It contains no time, no path, and no fact of the machine, so that equal trainings give equal
        bytes.
        """
        # `inspect` requires these fields in a header, and so does `model_spec`.
        names = ("identity", "family", "base", "samples", "samples_digest", "config_digest")
        facts = {name: getattr(self, name) for name in (*names, "lora", "version", "trained")}
        size = [self.parameters.get("width"), self.parameters.get("height")]
        sized = {} if None in size else {"size": size}
        return {
            **facts,
            **({"architecture": self.architecture} if self.architecture else {}),
            **sized,
        }


class RunFile:
    """The only writer of `run.json`.

    Each method adds a fact and replaces the whole file. A checkpoint is named as soon as it is
    written, and "finished" is set only at the very end, so the file is true even after a crash.
    Every method may raise `OutputError`.

    Args:
        folder: the run folder.
        record: the record to start with.
        writes: whether this process writes the file. One process of a training does; the others
            only keep the facts in memory.
    """

    def __init__(self, folder: Path, record: RunRecord, writes: bool) -> None:
        self.folder = folder
        self._path = folder / FILE_NAME
        self._writes = writes
        self._record = record
        self._final_loss = record.final_loss

    @property
    def record(self) -> RunRecord:
        """The record so far."""
        return replace(self._record, final_loss=self._final_loss)

    def begin(
        self, total_steps: int, weight_norms: Mapping[str, dict[str, float]] | None = None
    ) -> None:
        """Write the record, which replaces the one of an older training."""
        self._update(total_steps=total_steps, weight_norms=dict(weight_norms or {}))

    def _update(self, write: bool = True, **facts: Any) -> None:
        self._record = replace(self._record, **facts)
        if write and self._writes:
            values = asdict(self.record)
            text = json.dumps({**values, _DIGEST: digest_of(values)}, indent=2)
            write_text(self._path, text + "\n")

    def saving(self, names: Iterable[str]) -> None:
        """Files of a checkpoint are about to be written."""
        # Named before they exist: after a kill, such a file is still known as one of this training.
        self._update(writing=list(names))

    def saved(self, files: Mapping[str, str]) -> None:
        """A checkpoint was written: file name → digest."""
        checkpoints = {**self.record.checkpoints, **files}
        self._update(checkpoints=checkpoints, newest=list(files), writing=[])

    def held_out(self, metrics: Mapping[str, Any]) -> None:
        """The held-out loss was measured."""
        self._update(held_out=[*self.record.held_out, dict(metrics)])

    def saved_best(self, files: Mapping[str, str]) -> None:
        """The best checkpoint so far was written. It replaces the best one before it."""
        others = {n: d for n, d in self.record.checkpoints.items() if n not in self.record.best}
        self._update(checkpoints={**others, **files}, best=list(files), writing=[])

    def dropped(self, names: Iterable[str]) -> None:
        """Files of checkpoints are about to be removed."""
        # Before the files are removed: a kill in between leaves a stray file, not a missing one.
        kept = {n: d for n, d in self.record.checkpoints.items() if n not in set(names)}
        self._update(checkpoints=kept)

    def pictured(self, name: str, file: str) -> None:
        """A picture was written to `file` under samples/."""
        pictures = {**self.record.pictures, name: file}
        self._update(pictures=pictures, beside=self._with_digests(f"{PICTURES}/{file}"))

    def sampled(self, shown: Sequence[ShownSample]) -> None:
        """Samples are about to be written, which lie at these places in the picture."""
        self._update(write=False, shown=[*shown])

    def filmed(self, name: str, file: str) -> None:
        """A sampled video was written to `file` under samples/."""
        clips = {**self.record.clips, name: file}
        self._update(clips=clips, beside=self._with_digests(f"{PICTURES}/{file}"))

    def evaluated(self, when: str, metrics: Mapping[str, float]) -> None:
        """The model was evaluated. `when` is "before" or "after" the training."""
        named = {f"{when}/{name}": value for name, value in metrics.items()}
        self._update(evaluation={**self.record.evaluation, **named})

    def stepped(self, loss: float) -> None:
        """An optimizer step was made. Its loss is written with the next fact, not by itself."""
        self._final_loss = loss
        if self._record.first_loss is None:
            self._update(write=False, first_loss=loss)

    def diverged(self) -> None:
        """A loss, or the norm of gradients that were applied, was not finite."""
        self._update(all_losses_finite=False)

    def measured(self, steps: int, seconds: float, samples: int, peak_memory_bytes: int) -> None:
        """All steps were made.

        Args:
            steps, seconds: number of steps and duration of the whole training.
            samples: number of samples in all steps; a sample counts each time it is used.
            peak_memory_bytes: peak memory of the GPU, or of the process on a CPU.
        """
        self._update(
            steps=steps,
            seconds=seconds,
            samples_per_second=samples / seconds,
            peak_memory_bytes=peak_memory_bytes,
        )

    def finished(self, trained_tensors: int, changed_tensors: int) -> None:
        """The training reached its end. `changed_tensors` of its `trained_tensors` have changed."""
        self._update(
            trained_tensors=trained_tensors,
            changed_tensors=changed_tensors,
            beside=self._with_digests(*LOGS, ROWS),
            finished=True,
        )

    def _with_digests(self, *names: str) -> dict[str, str]:
        """`RunRecord.beside` with the digests of some more files; missing ones are skipped."""
        # Processes that do not write the record need no digests.
        paths = {name: self.folder / name for name in names if self._writes}
        found = {name: digest_file(path) for name, path in paths.items() if path.is_file()}
        return {**self.record.beside, **found}


def written_files(record: Mapping[str, Any]) -> set[str]:
    """The checkpoints and samples in a record, as paths from the run folder.

    Only names that a training gives its files: an edited record cannot make us remove other files.
    """
    samples = [*record["pictures"].values(), *record["clips"].values()]
    checkpoints = {Path(name).name for name in [*record["checkpoints"], *record["writing"]]}
    names = checkpoints | {f"{PICTURES}/{Path(name).name}" for name in samples}
    return {name for name in names if is_trained(name)}


def read_record(folder: Path) -> RunRecord | None:
    """Read the record in a run folder; None if there is none.

    Raises:
        OutputError: the record is damaged.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        digest = facts.pop(_DIGEST, None)
        if digest is not None and digest != digest_of(facts):
            raise ValueError("its content has changed since it was written")
        # The default of the class is the present version; older records lack the field.
        facts.setdefault("training_version", 0)
        # A field of a newer version raises TypeError: such a record is refused, not half read.
        return RunRecord(**facts)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise OutputError(
            f"the record of the run cannot be read: {error}",
            where=str(path),
            do="remove it: the training is then run again",
        ) from error


def require_record(folder: Path) -> RunRecord:
    """The record in a run folder.

    Raises:
        OutputError: there is none, or it is damaged.
    """
    record = read_record(folder)
    if record is None:
        raise OutputError(
            "the folder holds no training",
            where=str(folder),
            do=f"give a run folder (output_path), which has a {FILE_NAME}",
        )
    return record
