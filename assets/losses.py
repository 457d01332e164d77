"""Metadata of the checkpoints asset: the held-out loss, and the hardest samples."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.common import number, table
from assets.pictures import MAX_BYTES, contact_sheet, curves, inline
from assets.rows import files_of_rows, markdown

if TYPE_CHECKING:
    from polars import DataFrame

    from diffsynth_dagster.config import TrainingConfig
    from diffsynth_dagster.data.table.validate import CheckedTable
    from diffsynth_dagster.run.record import RunRecord

_HARDEST = 24
"""How many of the hardest samples are shown."""
_EASIEST = 8
"""How many of the easiest are shown: among them are near copies and blank pictures."""
_SIDE, _FILES = 72, 4
"""Width and height of a thumbnail in pixels, and how many of them stand side by side."""


def held_out_facts(record: "RunRecord") -> dict[str, Any]:
    """The held-out losses: the newest, all as a table, and curves; empty if nothing is held out."""
    from diffsynth_dagster.report.summary import held_out_charts
    from diffsynth_dagster.run.events import HeldOutMetrics

    if not record.held_out:
        return {}
    rows = [HeldOutMetrics(**values).row() for values in record.held_out]
    drawn = curves(held_out_charts(record)[0])
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
        **({} if drawn is None else {"held_out_curve": drawn}),
    }


def hardest_facts(config: "TrainingConfig", changed: list[Path]) -> dict[str, Any]:
    """The samples that were hardest to learn and the easiest ones, with their pictures, and which
    stand out; empty without `rows.parquet`.

    Args:
        config: the config of the training.
        changed: files that were changed since the training wrote them. They are not read.
    """
    from diffsynth_dagster.data.scan import read_parquet
    from diffsynth_dagster.data.table.checked_table import FILE_NAME as CHECKED
    from diffsynth_dagster.data.table.checked_table import find_checked
    from diffsynth_dagster.run.record import ROWS

    path = Path(config.output_path) / ROWS
    checked = find_checked(Path(config.output_path) / CHECKED)
    if path in changed or not path.is_file() or checked is None:
        return {}
    losses = read_parquet(path)  # the file is sorted, hardest first
    others = max(0, losses.height - _HARDEST)
    named = losses.filter("stands_out")["row"].to_list()
    more = f" and {len(named) - _HARDEST} more" if len(named) > _HARDEST else ""
    found: dict[str, Any] = {
        "hardest_samples": _as_table(losses.head(_HARDEST), checked),
    }
    if named:
        rows = ", ".join(map(str, named[:_HARDEST]))
        found["samples_that_stand_out"] = f"rows {rows}{more}"
    if others:
        easiest = losses.tail(min(_EASIEST, others)).reverse()
        found["easiest_samples"] = _as_table(easiest, checked)
    return found


def _as_table(losses: "DataFrame", checked: "CheckedTable") -> dg.MarkdownMetadataValue:
    """A table in markdown: of each row its pictures, number, losses and texts.

    Args:
        losses: some rows of `rows.parquet`.
        checked: the table of the data set.
    """
    from diffsynth_dagster.data.columns import described_inputs

    # A semi join first, so that only these few rows of a table of any size are loaded.
    rows = checked.accepted.join(losses.lazy(), on="row", how="semi").collect()
    rows = losses.join(rows, on="row", how="inner", maintain_order="left")
    read = described_inputs(checked.read_as)
    texts = [i.column for i in read if i.is_file or i.kind == "text"]
    texts.sort(key=lambda c: f"{c}:path" in rows.columns)  # captions before names of files
    lines: list[list[object]] = []
    for index, row in enumerate(rows.iter_rows(named=True)):
        files = files_of_rows(rows[index : index + 1], accepted=True)
        sheet = contact_sheet(files, side=_SIDE, columns=_FILES)
        stands_out = ", stands out" if row["stands_out"] else ""
        lines.append(
            [
                "" if sheet is None else inline(sheet, MAX_BYTES // (_HARDEST + _EASIEST)),
                row["row"],
                f"{row['difficulty']:.2f}{stands_out}",
                row["visits"],
                *(" / ".join(v) if isinstance(v := row[name], list) else v for name in texts),
            ]
        )
    return dg.MetadataValue.md(markdown(["picture", "row", "difficulty", "visits", *texts], lines))
