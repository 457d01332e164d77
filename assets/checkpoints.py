"""`<recipe>/checkpoints`: runs the training and reports what came of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from assets.common import (
    asset_key,
    code_version,
    description,
    require_passed,
    tried_again,
    user_errors,
)
from assets.launched import launched, step_tags
from assets.overview import overview
from assets.progress import Progress
from assets.served import NEWEST, serve, shown
from assets.trained import describe
from assets.unchanged import look
from diffsynth_dagster.config import Recipe, TrainingConfig
from diffsynth_dagster.older import older_runs
from diffsynth_dagster.run.warm_start import with_warm_start
from resources import Hub, Launcher, Parameters, pool_of

if TYPE_CHECKING:
    from diffsynth_dagster.run.record import RunRecord

CHECK = "loss_finite_and_parameters_changed"


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
        description=f"{shown(recipe, NEWEST)}\n\n{description(recipe, 'The trained weights.')}",
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
            **_result(context, recipe, record, folder, changed),
            **({} if why is None else {"trained_because": why}),
            "trained_in_this_run": why is not None,
            **ran.facts,
            **describe(settings, record, changed),
            **({"moved_to": dg.MetadataValue.path(str(moved[-1].absolute()))} if moved else {}),
        },
        data_version=dg.DataVersion(record.chosen_digest),
        tags=seen.marked if check.passed and not changed else seen.tags,
        check_results=[check],
    )


def _launch(
    context: dg.AssetExecutionContext, recipe: Recipe, config: TrainingConfig, launcher: Launcher
) -> None:
    """Run the training processes to their end, and show their progress."""
    folder, made = Path(config.output_path), dict[str, str]()

    def show() -> None:
        """Show the pictures and curves so far."""
        record = _record_so_far(folder)
        svg = None if record is None else overview(record, folder, made=made)
        if svg is not None:
            serve(context, recipe, NEWEST, svg)

    progress = Progress(context, show)
    with user_errors(config):
        for event in launcher.run(context, config, recipe.options):
            progress.hear(event)
    progress.last()


def _began(context: dg.AssetExecutionContext, recipe: Recipe, folder: Path) -> bool:
    """Whether an earlier try of this step already began the training: in this run, or in the one that
    ended early and is executed again.

    It did if the record in the run folder differs from the one at the start of the run. The digest
    of that one is kept in a tag of the run, which all tries share, and which Dagster copies where it
    executes a run again.
    """
    from diffsynth_dagster.facts import digest_file
    from diffsynth_dagster.run.record import FILE_NAME

    path, tag = folder / FILE_NAME, f"diffsynth/{recipe.name}/record_before"
    digest = digest_file(path) if path.is_file() else "none"
    run = context.instance.get_run_by_id(context.run.run_id)
    before = run.tags.get(tag) if run is not None else None
    # The first try (or a first try that died before this line) only notes the record.
    if before is None or (context.retry_number == 0 and not _ended_early(context)):
        context.instance.add_run_tags(context.run.run_id, {tag: digest})
        return False
    return before != digest


def _ended_early(context: dg.AssetExecutionContext) -> bool:
    """Whether this run is executed in place of one that failed or was cancelled."""
    before = context.run.parent_run_id
    run = None if before is None else context.instance.get_run_by_id(before)
    ended_early = (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
    return run is not None and run.status in ended_early


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


def _record_so_far(folder: Path) -> "RunRecord | None":
    """The record of a training that runs; None if it cannot be read from here."""
    from diffsynth_dagster.errors import OutputError
    from diffsynth_dagster.run.record import read_record

    try:
        return read_record(folder)
    except OutputError:
        return None


def _result(
    context: dg.AssetExecutionContext,
    recipe: Recipe,
    record: "RunRecord",
    folder: Path,
    changed: list[Path],
) -> dict[str, dg.MetadataValue[str]]:
    """The picture of what came of a training, which is shown open; empty if it cannot be shown."""
    svg = overview(record, folder, changed)
    name = record.chosen_digest[:16]
    if svg is None or not serve(context, recipe, name, svg):
        return {}
    serve(context, recipe, NEWEST, svg)
    return {"result": dg.MetadataValue.md(shown(recipe, name))}


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
