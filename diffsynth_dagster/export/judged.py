"""The numbers that a new export is judged by, and whether it is worse than the promoted one."""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffsynth_dagster.facts import digest_of, digest_text
from diffsynth_dagster.promoted import Measured
from diffsynth_dagster.run.record import LOGS, RunRecord

HELD_OUT, LAST_STEPS = "held_out_loss", "loss_of_last_steps"
"""Names of the numbers, the one that says more first."""
TITLES = {HELD_OUT: "held-out loss", LAST_STEPS: "loss of the last steps"}
_LAST_PART = 10
_LOSS = (
    *("task", "min_timestep_boundary", "max_timestep_boundary", "timestep_shift"),
    *("prediction_type", "zero_terminal_snr", "min_snr_gamma", "audio_loss_weight"),
    *("caption_lists", "caption_dropout_rate", "sample_weight_column", "loss_mask_column"),
)
"""Parameters by which equal weights have another loss on equal samples."""
_HELD_OUT_LOSS = (*_LOSS, "validation_timesteps")
_TRAINED_LOSS = (
    *(*_LOSS, "timestep_sampling", "logit_mean", "logit_std", "mode_scale"),
    *("height", "width", "max_pixels", "num_frames", "frame_rate"),
)


@dataclass(frozen=True)
class Verdict:
    """A new export compared with the promoted one.

    Attributes:
        number: the name of what was compared.
        old: the best of the promoted exports that led to the present one; smaller is better.
        new: of the new one.
        margin: how much worse the new one may be, as a fraction of the old one.
    """

    number: str
    old: float
    new: float
    margin: float

    @property
    def is_worse(self) -> bool:
        """Whether the new export is worse by more than the margin. What is not a number is the worst."""
        if math.isnan(self.new) or math.isnan(self.old):
            return math.isnan(self.new)
        return self.new > self.old + self.margin * abs(self.old)

    def __str__(self) -> str:
        change = self.new / self.old - 1 if self.old else math.nan
        by = f" ({change:+.1%})" if math.isfinite(change) else ""
        return (
            f"its {TITLES[self.number]} is {self.new:.6g}{by}, and {self.old:.6g} the best of those "
            f"promoted before; promote_margin = {self.margin:g}"
        )


def compare(
    new: Mapping[str, Measured], old: Mapping[str, Measured], margin: float
) -> Verdict | None:
    """Compare the numbers of two exports: by the first that both have of the same samples, measured in the
    same way. None where there is none."""
    for name in TITLES:
        if name in new and name in old and new[name].of == old[name].of:
            return Verdict(name, old[name].bar, new[name].value, margin)
    return None


def with_best(new: Mapping[str, Measured], old: Mapping[str, Measured]) -> dict[str, Measured]:
    """The numbers of an export that takes the place of another one, with the best of both."""
    return {
        name: replace(each, best=min(each.value, old[name].bar))
        if name in old and old[name].of == each.of and math.isfinite(old[name].bar)
        else each
        for name, each in new.items()
    }


def numbers_of(folder: Path, record: RunRecord, step: int) -> dict[str, Measured]:
    """The numbers of a checkpoint, as far as its training measured them.

    Args:
        folder: the run folder.
        step: of the checkpoint.
    """
    numbers: dict[str, Measured] = {}
    losses = [float(said["loss"]) for said in record.held_out if said["step"] == step]
    rows = _held_out_rows(folder, record) if losses else None
    if rows is not None:
        numbers[HELD_OUT] = Measured(losses[-1], _way(record, _HELD_OUT_LOSS, rows))
    loss = _mean_of_last_steps(folder / LOGS[0], step)
    if loss is not None:
        way = _way(record, _TRAINED_LOSS, record.samples_digest)
        numbers[LAST_STEPS] = Measured(loss, way)
    return numbers


def _way(record: RunRecord, parameters: tuple[str, ...], rows: str) -> str:
    """Digest of what a loss was measured on, and of how."""
    values: dict[str, Any] = {name: record.parameters.get(name) for name in parameters}
    return digest_of([record.family, rows, values])


def _held_out_rows(folder: Path, record: RunRecord) -> str | None:
    """Digest of the samples that were held out: of their table, or of the part of the data set; None where
    they are not known any more."""
    if record.held_out_digest is not None:
        return record.held_out_digest
    path = folder / ".held_out.parquet"  # see `cache.held_out.parts_of`
    if not path.is_file():
        return None
    from diffsynth_dagster.cache.manifest import CONTENT_NUMBER
    from diffsynth_dagster.data.frames import read_parquet

    rows = read_parquet(path)
    # Where in the table a sample stands changes nothing; its keys say how it was encoded.
    names = ["sample", CONTENT_NUMBER, *(c for c in rows.columns if c.startswith("key:"))]
    return digest_text(rows.select(names).sort(names[:2]).write_json())


def _mean_of_last_steps(metrics: Path, step: int) -> float | None:
    """Mean loss of the last tenth of the steps up to a checkpoint, by `metrics.csv`. None where the file is
    gone or says nothing of them.

    One step says little: it looks at few samples, each at one timestep.
    """
    first = step - max(1, step // _LAST_PART)
    losses: dict[int, float] = {}
    try:
        with metrics.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if first < int(row["step"]) <= step:
                    losses[int(row["step"])] = float(row["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # people may edit it: nothing else is made from it
    return sum(losses.values()) / len(losses) if losses else None
