"""Writes `report.html`: what lies in a run folder, as one page that needs neither a server nor the
network."""

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from diffsynth_dagster.files import write_text
from diffsynth_dagster.own_names import OLDER
from diffsynth_dagster.report.charts import Chart, Plot, plot
from diffsynth_dagster.report.metrics import read_metrics
from diffsynth_dagster.report.pictures import evaluation_pictures, read_samples
from diffsynth_dagster.report.rows import (
    TABLE_ERRORS,
    DataFacts,
    HardRow,
    data_facts,
    find_table,
    hardest_rows,
)
from diffsynth_dagster.report.settings import (
    as_yaml,
    best_saved,
    changed_parameters,
    checkpoints,
    made_by,
    read_recipe,
    what_is_trained,
)
from diffsynth_dagster.report.summary import (
    evaluation_compared,
    held_out_charts,
    measurements,
    numbers,
    ranges_compared,
    status_of,
    tone_of,
    verdicts,
)
from diffsynth_dagster.report.usage import usage_of
from diffsynth_dagster.report.words import amount, counted, duration, percent, whole
from diffsynth_dagster.run.record import REPORT, RunRecord

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Data:
    """What the report says of the data set."""

    facts: DataFacts | None = None
    hardest: Sequence[HardRow] = ()


def write_report(folder: Path, record: RunRecord) -> Path:
    """Write the report of a training into its run folder; returns its path.

    It is made of what lies in the run folder. What is missing or damaged there is left out.

    Args:
        record: of the training, finished or not.

    Raises:
        OutputError: the folder cannot be written.
    """
    return write_text(folder / REPORT, render(folder, record))


def render(folder: Path, record: RunRecord) -> str:
    """The report of a training, as HTML. Makes no request and writes nothing."""
    metrics, recipe = read_metrics(folder), read_recipe(folder)
    data = _data(folder, recipe)
    found = verdicts(record, metrics)
    measured = measurements(record)
    best_step = measured[-1].best_step if measured else None
    script = load_templates().get_template("steps.js").render()
    values: dict[str, Any] = {
        "title": title_of(folder),
        "folder": str(folder.absolute()),
        "record": record,
        "trained": what_is_trained(record, recipe),
        "status": status_of(record, metrics),
        "tone": tone_of(found),
        "verdicts": found,
        "numbers": numbers(record, metrics),
        "samples": read_samples(folder, record),
        "charts": _plots([*held_out_charts(record), metrics.loss_chart()]),
        "ranges": ranges_compared(record),
        "small_charts": _plots(metrics.small_charts()),
        "parts": metrics.parts(),
        "evaluation": evaluation_compared(record),
        "evaluation_pictures": evaluation_pictures(folder, record),
        "data": data,
        "split": recipe.get("validation_split"),
        "usage": usage_of(folder, record, recipe.get("export_formats")),
        "checkpoints": checkpoints(folder, record),
        "better": best_saved(record, best_step),
        "changed": as_yaml(changed_parameters(recipe)),
        "recipe": as_yaml(recipe),
        "made_by": made_by(record, recipe),
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "script": script,
        "script_digest": _digest(script),
    }
    return load_templates().get_template("report.html").render(values)


def title_of(folder: Path) -> str:
    """The name of a run folder; of a training in `older/`, that of the run folder above it and
    when it ended."""
    folder = folder.absolute()
    if OLDER.fullmatch(f"{folder.parent.name}/{folder.name}"):
        return f"{folder.parent.parent.name}, {folder.name}"
    return folder.name or "training"


def _data(folder: Path, recipe: dict[str, Any]) -> Data:
    """Facts of the data set and its hardest rows, as far as they can be read."""
    encoded_in = recipe.get("dataset_base_path")
    table = find_table(folder, Path(encoded_in) if isinstance(encoded_in, str) else None)
    if table is None:
        return Data()
    try:
        facts = data_facts(folder, table)
    except TABLE_ERRORS:
        return Data()
    try:
        return Data(facts, hardest_rows(folder, table))
    except TABLE_ERRORS:
        return Data(facts)


def _plots(charts: Sequence[Chart]) -> list[Plot]:
    """The charts that have something to show."""
    return [laid for chart in charts if (laid := plot(chart)) is not None]


def _digest(script: str) -> str:
    """The digest by which the page's policy allows its own script, and no other."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _code(text: str) -> Markup:
    """A sentence of ours as HTML: what is in backquotes is shown as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


@cache
def load_templates() -> Environment:
    """Read all templates. Later changes of their files change nothing in this process."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,  # captions and prompts are texts of others
        undefined=StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    functions = (amount, counted, duration, percent, whole)
    filters: dict[str, Any] = {function.__name__: function for function in functions}
    filters["code"] = _code
    environment.filters.update(filters)
    for name in environment.list_templates():
        environment.get_template(name)
    return environment
