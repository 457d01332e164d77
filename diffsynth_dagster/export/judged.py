"""Judge a new export: its losses, and whether they are worse than those of the promoted version."""

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
"""Names of the numbers that exports are compared by, the more reliable one first."""
TITLES = {HELD_OUT: "held-out loss", LAST_STEPS: "loss of the last steps"}
# `loss_of_last_steps` is the mean over the last 1/10 of the steps.
_LAST_PART = 10
# Two losses can be compared only if these parameters are equal: each changes the loss of the same
# weights on the same samples.
_LOSS = (
    *("task", "min_timestep_boundary", "max_timestep_boundary", "timestep_shift"),
    *("prediction_type", "zero_terminal_snr", "min_snr_gamma", "audio_loss_weight"),
    *("caption_lists", "caption_dropout_rate", "sample_weight_column", "loss_mask_column"),
)
_HELD_OUT_LOSS = (*_LOSS, "validation_timesteps")
# A training loss also depends on how timesteps are drawn, and on the size of the samples.
_TRAINED_LOSS = (
    *(*_LOSS, "timestep_sampling", "logit_mean", "logit_std", "mode_scale"),
    *("height", "width", "max_pixels", "num_frames", "frame_rate"),
)


@dataclass(frozen=True)
class Verdict:
    """The comparison of a new export with the promoted one.

    Attributes:
        number: which number was compared: a key of `TITLES`.
        old: the smallest value among the versions promoted so far; smaller is better.
        new: the value of the new export.
        margin: how much larger `new` may be, as a fraction of `old`.
    """

    number: str
    old: float
    new: float
    margin: float

    @property
    def is_worse(self) -> bool:
        """Whether the new export is worse by more than the margin. NaN is worse than any number."""
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
    """Compare two exports by the first number that both have, measured on the same samples in the
    same way. None if they have no such number."""
    for name in TITLES:
        if name in new and name in old and new[name].of == old[name].of:
            return Verdict(name, old[name].bar, new[name].value, margin)
    return None


def with_best(new: Mapping[str, Measured], old: Mapping[str, Measured]) -> dict[str, Measured]:
    """The numbers of an export that replaces another one. The best value so far is carried over."""
    return {
        name: replace(each, best=min(each.value, old[name].bar))
        if name in old and old[name].of == each.of and math.isfinite(old[name].bar)
        else each
        for name, each in new.items()
    }


def numbers_of(folder: Path, record: RunRecord, step: int) -> dict[str, Measured]:
    """The numbers of a checkpoint: those that its training measured, by name.

    Args:
        folder: the run folder.
        step: the step after which the checkpoint was written.
    """
    numbers: dict[str, Measured] = {}
    losses = [float(entry["loss"]) for entry in record.held_out if entry["step"] == step]
    rows = _held_out_rows(folder, record) if losses else None
    if rows is not None:
        # The last one: a resumed training may measure a step twice.
        numbers[HELD_OUT] = Measured(losses[-1], _conditions(record, _HELD_OUT_LOSS, rows))
    loss = mean_of_last_steps(folder / LOGS[0], step)
    if loss is not None:
        conditions = _conditions(record, _TRAINED_LOSS, record.samples_digest)
        numbers[LAST_STEPS] = Measured(loss, conditions)
    return numbers


def _conditions(record: RunRecord, parameters: tuple[str, ...], rows: str) -> str:
    """Digest of the samples that a loss was measured on, and of the parameters it depends on."""
    values: dict[str, Any] = {name: record.parameters.get(name) for name in parameters}
    return digest_of([record.family, rows, values])


def _held_out_rows(folder: Path, record: RunRecord) -> str | None:
    """Digest of the held-out samples, from a table of their own or split off from the data set.
    None if they are no longer known."""
    path = folder / ".held_out.parquet"  # see `cache.held_out.parts_of`
    if not path.is_file():
        return record.held_out_digest
    from diffsynth_dagster.cache.manifest import CONTENT_NUMBER
    from diffsynth_dagster.data.scan import read_parquet

    rows = read_parquet(path)
    # Sorted, because the order in the table does not matter. The keys say how a sample was encoded.
    names = ["sample", CONTENT_NUMBER, *(c for c in rows.columns if c.startswith("key:"))]
    found = rows.select(names).sort(names[:2]).write_json()
    return digest_text((record.held_out_digest or "") + found)


def mean_of_last_steps(metrics: Path, step: int) -> float | None:
    """Mean loss of the last tenth of the steps before a checkpoint, from `metrics.csv`. None if the
    file is missing, or lacks these steps.

    The loss of a single step says little: it is taken over few samples, each at one timestep.
    """
    first = step - max(1, step // _LAST_PART)
    losses: dict[int, float] = {}
    try:
        with metrics.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if first < int(row["step"]) <= step:
                    losses[int(row["step"])] = float(row["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a person may have edited the file; nothing else depends on it
    return sum(losses.values()) / len(losses) if losses else None
