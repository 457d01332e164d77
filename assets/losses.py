"""Metadata of the checkpoints asset: the held-out loss, and the samples with the largest losses."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.common import number, table
from assets.pictures import contact_sheet, curves, inline
from assets.rows import files_of_rows, markdown

if TYPE_CHECKING:
    from diffsynth_dagster.config import TrainingConfig
    from diffsynth_dagster.run.record import RunRecord

_HARDEST = 24
"""How many of the hardest samples are shown."""


def held_out_facts(record: "RunRecord") -> dict[str, Any]:
    """The held-out losses: the newest, all as a table, and curves; empty if nothing is held out."""
    from diffsynth_dagster.run.events import HeldOutMetrics

    if not record.held_out:
        return {}
    rows = [HeldOutMetrics(**values).row() for values in record.held_out]
    steps = [row["step"] for row in rows]
    lines = {
        name.replace("_", " "): (steps, [row[name] for row in rows])
        for name in ("loss", "trained_loss")
    }
    return {
        "held_out_loss": number(rows[-1]["loss"]),
        # As text: Dagster has a plot for each number.
        "held_out_loss_before": f"{rows[0]['loss']:.4g}",
        "held_out_gap": f"{rows[-1]['gap']:.4g}",
        "held_out_best_step": str(rows[-1]["best_step"]),
        "held_out": table(
            {
                name: float(f"{value:.4g}") if isinstance(value, float) else value
                for name, value in row.items()
            }
            for row in rows
        ),
        "held_out_curve": inline(curves(lines)),
    }


def hardest_facts(config: "TrainingConfig", changed: list[Path]) -> dict[str, Any]:
    """The samples with the largest losses and their pictures; empty without losses per sample.

    Args:
        config: the config of the training.
        changed: files that were changed since the training wrote them. They are not read.
    """
    import polars as pl

    from diffsynth_dagster.data.scan import read_parquet
    from diffsynth_dagster.data.table.checked_table import FILE_NAME as CHECKED
    from diffsynth_dagster.data.table.checked_table import find_checked
    from diffsynth_dagster.run.record import SAMPLE_LOSSES

    losses = Path(config.output_path) / SAMPLE_LOSSES
    checked = find_checked(Path(config.output_path) / CHECKED)
    if losses in changed or not losses.is_file() or checked is None:
        return {}
    hardest = read_parquet(losses).head(_HARDEST)  # the file is sorted, hardest first
    # A semi join first, so that only these few rows of a table of any size are loaded.
    rows = checked.accepted.join(hardest.lazy(), on="row", how="semi").collect()
    rows = hardest.join(rows, on="row", how="inner", maintain_order="left")
    # Columns with a colon hold what the check found out about a file, such as "image:width".
    texts = [c for c in rows.columns if ":" not in c and rows.schema[c] == pl.String]
    texts = [c for c in texts if c not in ("status", "message", "shape")]
    names = ["row", "difficulty", "visits", *texts]
    shown = (
        [f"{value:.3f}" if isinstance(value, float) else value for value in row]
        for row in rows.select(names).iter_rows()
    )
    found: dict[str, Any] = {"hardest_samples": dg.MetadataValue.md(markdown(names, shown))}
    sheet = contact_sheet(files_of_rows(rows, accepted=True))
    return found if sheet is None else {**found, "hardest_pictures": inline(sheet)}
