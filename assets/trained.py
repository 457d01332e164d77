"""Metadata of the checkpoints asset: why and with what was trained, what came of it, and where it is.

Dagster shows it in this order, and plots every number over time. Only the losses are numbers,
which are plotted while it trains, too; all others are text.
"""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.common import number, table
from assets.losses import hardest_facts, held_out_facts
from assets.pictures import animation, curves, inline, stacked
from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.report.words import duration

if TYPE_CHECKING:
    from diffsynth_dagster.run.record import RunRecord

_MEBIBYTE = 1024 * 1024


def describe(
    config: TrainingConfig, record: "RunRecord", changed: Collection[Path]
) -> dict[str, Any]:
    """What a finished training did, what came of it, and its pictures.

    Args:
        changed: files that were changed since the training wrote them. They are not read: they may
            not even be readable.
    """
    folder = Path(config.output_path)
    clips = [clip for clip in _newest_clips(record, folder) if clip not in changed]
    return {
        **_settings(config, record),
        **_results(record, folder, changed),
        **_shown_pictures(record, folder, changed, clips),
        **hardest_facts(config, list(changed)),
        "devices": ", ".join(record.devices),
        "duration": duration(record.seconds),
        "samples_per_second": f"{record.samples_per_second:.4g}",
        "peak_memory": f"{record.peak_memory_bytes / _MEBIBYTE:.0f} MiB",
        **{f"clip/{i}": dg.MetadataValue.path(str(p.absolute())) for i, p in enumerate(clips)},
        **_places(record, folder),
    }


def _settings(config: TrainingConfig, record: "RunRecord") -> dict[str, Any]:
    """The parameters that people look for first."""
    from diffsynth_dagster.config.entries import model_entries
    from diffsynth_dagster.config.models import adapter_text

    with_adapter = ", ".join(config.lora_base_model)
    adapter = [] if record.lora is None else [f"{adapter_text(record.lora)}, of {with_adapter}"]
    in_full = [f"{name} in full" for name in config.trainable_models]
    rates = [f"{name} {rate:.4g}" for name, rate in config.learning_rates.items()]
    rate = ", ".join([f"{config.learning_rate:.4g}", *rates, config.lr_scheduler])
    epochs = "epoch" if config.num_epochs == 1 else "epochs"
    length = "" if config.max_train_steps else f" in {config.num_epochs} {epochs}"
    batch = config.batch_size * config.gradient_accumulation_steps * max(1, len(record.devices))
    return {
        "trained": "; ".join([*adapter, *in_full]),
        "base": f"{record.family}: {', '.join('/'.join(e.name) for e in model_entries(config))}",
        "learning_rate": rate,
        "steps": f"{record.steps}{length}, of {batch} samples",
        "trained_samples": str(record.samples),
        **({"resumed_after_step": str(record.resumed_from[-1])} if record.resumed_from else {}),
    }


def _results(record: "RunRecord", folder: Path, changed: Collection[Path]) -> dict[str, Any]:
    """The losses, and what an evaluation measured."""
    from diffsynth_dagster.export.judged import mean_of_last_steps

    metrics = folder / "metrics.csv"
    last = None if metrics in changed else mean_of_last_steps(metrics, record.steps)
    loss = record.final_loss if last is None else last
    return {
        **({} if loss is None else {"loss": number(loss)}),
        **held_out_facts(record),
        **({"evaluated": table(_evaluated(record))} if record.evaluation else {}),
    }


def _evaluated(record: "RunRecord") -> list[dict[str, str]]:
    """What an evaluation measured before and after the training."""
    names = dict.fromkeys(name.partition("/")[2] for name in record.evaluation)
    times = ("before", "after")
    return [
        {"metric": name} | {when: _short(record.evaluation.get(f"{when}/{name}")) for when in times}
        for name in names
    ]


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _shown_pictures(
    record: "RunRecord", folder: Path, changed: Collection[Path], clips: list[Path]
) -> dict[str, Any]:
    """Pictures inside the metadata, which are kept with it."""
    from diffsynth_dagster.report.metrics import read_metrics
    from diffsynth_dagster.run.record import LOGS

    losses = None
    if folder / LOGS[0] not in changed:
        losses = curves(read_metrics(folder).loss_chart())
    sampled, evaluated = (
        [(title, path) for title, path in _pictures(record, folder, kind) if path not in changed]
        for kind in (False, True)
    )
    pictures = {"samples": stacked(sampled), "evaluation": stacked(evaluated)}
    playing = animation(clips)
    return {
        **({} if losses is None else {"loss_curve": losses}),
        **{name: inline(picture) for name, picture in pictures.items() if picture is not None},
        **({} if playing is None else {"clips": playing}),
    }


def _places(record: "RunRecord", folder: Path) -> dict[str, Any]:
    """Where the files are, and their digests."""
    from diffsynth_dagster.run.record import REPORT

    report = folder / REPORT
    paths = {"report": report} if report.is_file() else {}
    return {
        **{n: dg.MetadataValue.path(str(p.absolute())) for n, p in paths.items()},
        "run_folder": dg.MetadataValue.path(str(folder.absolute())),
        "checkpoints": table(
            {"file": str(folder / name), "blake3": digest}
            for name, digest in record.checkpoints.items()
        ),
    }


def _pictures(record: "RunRecord", folder: Path, evaluated: bool) -> list[tuple[str, Path]]:
    """(title, file) of the evaluation's pictures, or of the first and the last sample pictures."""
    # Sample pictures are named after their step; all others are of the evaluation.
    names = [name for name in record.pictures if name.startswith("step-") != evaluated]
    if not evaluated and len(names) > 2:
        names = [names[0], names[-1]]
    return [(name, folder / "samples" / record.pictures[name]) for name in names]


def _newest_clips(record: "RunRecord", folder: Path) -> list[Path]:
    """The videos of the last samples, in the order of the prompts."""
    # A clip's name is its step and the number of its prompt: "step-100-0".
    steps = [name.rpartition("-")[0] for name in record.clips]
    files = zip(steps, record.clips.values(), strict=True)
    return [folder / "samples" / file for step, file in files if step == steps[-1]]
