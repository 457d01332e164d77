"""`<recipe>/checkpoints`: runs the training and reports what came of it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from assets.common import (
    asset_key,
    code_version,
    description,
    require_passed,
    table,
    tried_again,
    user_errors,
)
from assets.launched import launched, step_tags
from assets.losses import hardest_facts, held_out_facts
from assets.pictures import animation, inline, loss_curve, stacked
from assets.unchanged import look
from diffsynth_dagster.config import Recipe, TrainingConfig
from diffsynth_dagster.older import older_runs
from diffsynth_dagster.run.events import (
    MEASURED,
    Event,
    HeldOutMetrics,
    Sampled,
    Saved,
    Started,
    StepMetrics,
)
from diffsynth_dagster.run.progress import every_line
from diffsynth_dagster.run.warm_start import with_warm_start
from resources import Hub, Launcher, Parameters, pool_of

if TYPE_CHECKING:
    from diffsynth_dagster.run.record import RunRecord

CHECK = "loss_finite_and_parameters_changed"
OBSERVE_SECONDS = 5.0
"""Least time between two observations of steps."""
_OBSERVED = ("loss", "learning_rate", "grad_norm", *MEASURED)
_MEBIBYTE = 1024 * 1024


class CheckpointsConfig(dg.Config):
    """Choices of one run."""

    retrain: bool = Field(
        default=False, description="Train even if nothing that the result depends on has changed."
    )


def make_checkpoints(recipe: Recipe, upstream: list[dg.AssetKey]) -> dg.AssetsDefinition:
    """The checkpoints asset of a recipe, with its check.

    Args:
        upstream: the weights, and assets of other recipes that this training starts from or whose
            encoded samples it reads.
    """
    key = asset_key(recipe.name, "checkpoints")
    has_latents = recipe.config.dataset_metadata_path is not None

    @dg.asset(
        key=key,
        deps=[*([asset_key(recipe.name, "latents")] if has_latents else []), *upstream],
        group_name=recipe.name,
        kinds={"pytorch", "accelerate"},
        description=description(recipe, "The trained weights."),
        code_version=code_version(recipe.config, "checkpoints"),
        pool=pool_of(recipe.options),
        op_tags=step_tags(recipe),
        check_specs=[
            dg.AssetCheckSpec(
                CHECK,
                asset=key,
                blocking=True,
                description="Every loss was a number, and training changed what it trains.",
            )
        ],
    )
    def checkpoints(
        context: dg.AssetExecutionContext,
        config: CheckpointsConfig,
        diffsynth_parameters: Parameters,
        diffsynth_hub: Hub,
        diffsynth_launcher: Launcher,
    ) -> Iterator[dg.MaterializeResult]:
        result = _train(
            context, recipe, config, diffsynth_parameters, diffsynth_hub, diffsynth_launcher
        )
        yield result
        require_passed(result)

    return checkpoints


def _train(
    context: dg.AssetExecutionContext,
    recipe: Recipe,
    config: CheckpointsConfig,
    parameters: Parameters,
    hub: Hub,
    launcher: Launcher,
) -> dg.MaterializeResult:
    """The work of the step: train if something changed, then describe the training in the folder."""
    with user_errors():
        ran = launched(context, recipe, parameters, launcher)
        options = recipe.options
        processes = launcher.num_processes or options.num_processes or options.gpus
        warm = options.retrain is not None and options.retrain.warm_start
        # Both change the result: the size of a step, and the weights at its start.
        seen = look(context, "checkpoints", ran, [processes, warm])
        same = None if config.retrain else seen.unchanged()
    if same is not None:
        return same
    from diffsynth_dagster.cache.split import second_half
    from diffsynth_dagster.run.up_to_date import changed_exports, say_changed, why_train

    with tried_again(context, recipe.options.retries), user_errors():
        settings = second_half(ran.config)
        folder = Path(settings.output_path)
        began = _began(context, recipe, folder)
        before = older_runs(folder)
        why = "retrain was asked for"
        if began or not config.retrain:  # a retry goes on with what the first try began
            why = why_train(settings, hub.open(), processes, warm)
        if why is not None:
            context.log.info(f"it trains, because: {why}")
            settings = with_warm_start(settings) if warm else settings
            resume = _resume(settings, config.retrain, began)
            settings = settings.model_copy(update={"resume": resume})
            _launch(context, recipe, settings, launcher)
        else:
            context.log.info("nothing that the training depends on has changed")
        record = _finished_record(settings)
        changed = changed_exports(folder, record)
        if changed:
            context.log.warning(say_changed(changed))
        check = _check(record)
        moved = [run for run in older_runs(folder) if run not in before]
    return dg.MaterializeResult(
        metadata={
            "trained_in_this_run": why is not None,
            **({} if why is None else {"trained_because": why}),
            **_describe(settings, record, changed),
            **({"moved_to": dg.MetadataValue.path(str(moved[-1].absolute()))} if moved else {}),
            **ran.facts,
        },
        data_version=dg.DataVersion(record.chosen_digest),
        tags=seen.marked if check.passed and not changed else seen.tags,
        check_results=[check],
    )


def _launch(
    context: dg.AssetExecutionContext, recipe: Recipe, config: TrainingConfig, launcher: Launcher
) -> None:
    """Run the training processes to their end, and show their progress."""
    progress = Progress(context)
    with user_errors(config):
        for event in launcher.run(context, config, recipe.options):
            progress.hear(event)
    progress.last()


def _began(context: dg.AssetExecutionContext, recipe: Recipe, folder: Path) -> bool:
    """Whether an earlier try of this step already began the training.

    It did if the record in the run folder differs from the one at the start of the run. The digest
    of that one is kept in a tag of the run, which all tries share.
    """
    from diffsynth_dagster.facts import digest_file
    from diffsynth_dagster.run.record import FILE_NAME

    path, tag = folder / FILE_NAME, f"diffsynth/{recipe.name}/record_before"
    digest = digest_file(path) if path.is_file() else "none"
    run = context.instance.get_run_by_id(context.run.run_id)
    before = run.tags.get(tag) if run is not None else None
    # The first try (or a first try that died before this line) only notes the record.
    if context.retry_number == 0 or before is None:
        context.instance.add_run_tags(context.run.run_id, {tag: digest})
        return False
    return before != digest


def _resume(config: TrainingConfig, retrain: bool, began: bool) -> str:
    """The value of `resume` for the training processes.

    `auto` becomes `same`: inside Dagster the inputs define the training, so a leftover state of
    another training must not block it. A retry always resumes what its earlier try left.

    Args:
        retrain: whether the run asks for a training from the beginning.
        began: see `_began`.
    """
    if began:
        return "same"
    if retrain:
        return "never"
    return "same" if config.resume == "auto" else config.resume


class Progress:
    """Turns the events of a training into log lines and observations.

    Observations are plotted over time in the UI. Each one is a row of the event log, so at most one
    step every `OBSERVE_SECONDS` is observed.
    """

    def __init__(self, context: dg.AssetExecutionContext) -> None:
        self._context = context
        self._total = 0
        self._waiting: StepMetrics | None = None
        self._observed = time.monotonic()
        self._line = every_line()

    def hear(self, event: Event) -> None:
        """Handle one event; logs an observation when one is due."""
        log = self._context.log
        match event:
            case Started():
                self._total = event.total_steps
                log.info(f"training {self._total} steps")
                if event.line is not None:
                    log.info(event.line)
            case Saved() | HeldOutMetrics():
                log.info(event.line)
            case Sampled():
                log.info(event.line)
                self._picture(event.step, Path(event.path))
            case StepMetrics():
                # Steps in between are dropped: only the newest is observed.
                self._waiting = event
                if time.monotonic() - self._observed >= OBSERVE_SECONDS:
                    self.last()
            case _:
                pass

    def _picture(self, step: int, path: Path) -> None:
        """Log an observation with the sample picture of a step."""
        from PIL import Image

        # Clips have an event too, but no observation: the picture of the step shows their frames.
        if path.suffix == ".png" and path.is_file():
            with Image.open(path) as picture:
                shown = inline(picture.convert("RGB"))
            self._observe({"step": step, "samples": shown})

    def last(self) -> None:
        """Log an observation of the newest step, unless it has one."""
        metrics, self._waiting = self._waiting, None
        if metrics is None:
            return
        self._observed = time.monotonic()
        step, values = metrics.step, metrics.row()
        if self._line.due(step, self._total):
            self._context.log.info(f"step {step} of {self._total}: loss {metrics.loss:.4f}")
        self._observe({"step": step, **{name: float(values[name]) for name in _OBSERVED}})

    def _observe(self, facts: dict[str, Any]) -> None:
        """Log an observation."""
        # Not with `yield`: a cancel at that moment would be raised inside Dagster's own code, and
        # the step would end without a reason.
        self._context.log_event(dg.AssetObservation(self._context.asset_key, metadata=facts))


def _finished_record(config: TrainingConfig) -> "RunRecord":
    """The record of the finished training in the run folder.

    Raises:
        OutputError: there is no such record.
    """
    from diffsynth_dagster.errors import OutputError
    from diffsynth_dagster.run.record import read_record

    record = read_record(Path(config.output_path))
    if record is None or not record.finished or not record.checkpoints:
        raise OutputError(
            "the training ended without a record of it",
            where=config.output_path,
            do="make sure that nothing else writes into this folder, and train again",
        )
    return record


def _check(record: "RunRecord") -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name=CHECK,
        passed=record.all_losses_finite and record.changed_tensors > 0,
        description=f"{record.changed_tensors} of {record.trained_tensors} trained tensors "
        f"changed; the losses are {'' if record.all_losses_finite else 'not '}all finite",
        metadata={
            "changed_tensors": record.changed_tensors,
            "trained_tensors": record.trained_tensors,
            "all_losses_finite": record.all_losses_finite,
        },
    )


def _describe(config: TrainingConfig, record: "RunRecord", changed: list[Path]) -> dict[str, Any]:
    """Metadata of the materialization: what the training did, and its pictures.

    Args:
        changed: files that were changed since the training wrote them. They are not read: they may
            not even be readable.
    """
    folder = Path(config.output_path)
    facts: dict[str, Any] = {
        "steps": record.steps,
        "trained_samples": record.samples,
        "seconds": record.seconds,
        "samples_per_second": record.samples_per_second,
        "peak_memory_mib": record.peak_memory_bytes / _MEBIBYTE,
        "devices": ", ".join(record.devices),
        "checkpoints": table(
            {"file": str(folder / name), "blake3": digest}
            for name, digest in record.checkpoints.items()
        ),
        "run_folder": dg.MetadataValue.path(str(folder.absolute())),
        **record.evaluation,
        **({"resumed_after_step": record.resumed_from[-1]} if record.resumed_from else {}),
    }
    if record.final_loss is not None:
        facts["final_loss"] = record.final_loss
    losses = folder / "metrics.csv"
    sampled, evaluated = (
        [(title, path) for title, path in _pictures(record, folder, kind) if path not in changed]
        for kind in (False, True)
    )
    pictures = {
        "loss_curve": loss_curve(losses) if losses not in changed else None,
        "samples": stacked(sampled),
        "evaluation": stacked(evaluated),
    }
    hardest = hardest_facts(config, changed)
    clips = [clip for clip in _newest_clips(record, folder) if clip not in changed]
    shown = {name: inline(p) for name, p in pictures.items() if p is not None}
    playing = animation(clips)
    return {
        **facts,
        **shown,
        **held_out_facts(record),
        **hardest,
        **({} if playing is None else {"clips": playing}),
        **{f"clip/{i}": dg.MetadataValue.path(str(p.absolute())) for i, p in enumerate(clips)},
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
