"""The trainer: `accelerate launch -m diffsynth_dagster.train --flag …`.

It trains, and then writes the files that other tools load. In Dagster the export is an asset of its
own, so the launcher passes `--checkpoints_only`.

Exit codes: 0 done, 2 a user error (one message, no traceback), 130 stopped by a signal.
"""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffsynth_dagster.config.flags import Arguments, read_arguments
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import OutputError, Stopped, UserError
from diffsynth_dagster.run.failure import process_number, recognised
from diffsynth_dagster.run.guard import FailureGuard, failure_reporter
from diffsynth_dagster.run.resume_point import say_where_it_goes_on
from diffsynth_dagster.run.signals import StopSignal

if TYPE_CHECKING:
    from diffsynth_dagster.run.record import RunRecord
    from diffsynth_dagster.training.parallel import Parallel
    from diffsynth_dagster.weights.resolved import ResolvedModel


def run(
    config: TrainingConfig, stop_asked: StopSignal, exports: bool = False
) -> "RunRecord | None":
    """Do what a config asks for; returns the record of the training, None if the config only
    encodes.

    Args:
        stop_asked: says whether a signal came.
        exports: whether to export the finished training too.

    Raises:
        UserError: see the modules that this function and `run_locked` import.
        Stopped: a signal came.
    """
    # Imported here, since they take seconds: a mistake in the flags is reported at once.
    from diffsynth_dagster.cache.split import with_settled
    from diffsynth_dagster.data.prepare import require_named
    from diffsynth_dagster.preflight import check_config
    from diffsynth_dagster.run.folder import owned
    from diffsynth_dagster.training.join import start_parallel
    from diffsynth_dagster.weights.identify import guess_model

    # Everything that can be checked without a file.
    config = with_settled(config)
    model = guess_model(config)
    check_config(config, model)
    require_named(config)
    parallel = start_parallel(config)
    with ExitStack() as leaving:
        # The main process locks the run folder for all of them.
        lock = owned(Path(config.output_path), config.task)
        parallel.from_main(lambda: leaving.enter_context(lock))
        trained = run_locked(config, model, parallel, stop_asked)
        if trained is None:
            return None
        if exports:
            parallel.let_go()  # frees the memory of the model
            parallel.from_main(lambda: export(config, *trained))
        return trained[0]


def run_locked(
    config: TrainingConfig, model: "ResolvedModel", parallel: "Parallel", stop_asked: StopSignal
) -> "tuple[RunRecord, ResolvedModel] | None":
    """Do what a checked config asks for, in a run folder that is locked; see `run`.

    Args:
        model: guessed from the config, without its files.

    Returns:
        The record of the training and the model with its files; None if the config only encodes.
    """
    from diffsynth_dagster.data.media.budget import DECODING
    from diffsynth_dagster.facts import fact_cache_of
    from diffsynth_dagster.files import require_writable
    from diffsynth_dagster.preflight import check_data, check_encoded, check_headers
    from diffsynth_dagster.run.record import RunFile
    from diffsynth_dagster.run.reporting import make_reporter
    from diffsynth_dagster.run.start import start_record
    from diffsynth_dagster.training.batches import StepDataset
    from diffsynth_dagster.training.encoded_data import (
        checked_table,
        encoded_before,
        encoded_manifest,
        open_store,
        resolved_samples,
    )
    from diffsynth_dagster.training.loop import train
    from diffsynth_dagster.training.memory import Memory
    from diffsynth_dagster.training.resume import choose_state, going_on
    from diffsynth_dagster.training.setup import Inputs, make_models
    from diffsynth_dagster.weights.hub import ModelHub
    from diffsynth_dagster.weights.identify import find_model

    DECODING.megapixels = config.decode_megapixels
    output = Path(config.output_path)
    require_writable(output, "output_path")
    require_writable(Path(config.cache_path), "cache_path")
    fact_cache = fact_cache_of(config.cache_path)

    # Metadata: the checked table, unless the data set was encoded before.
    table = checked_table(
        config,
        model.family.columns,
        fact_cache,
        parallel,
        lambda tables: check_data(config, model, tables),
    )

    # Weights: the files are found and recognised, and their headers are checked. Each component is
    # loaded when it is used.
    warnings = table.warnings() if table is not None and parallel.is_main_process else []
    with parallel.node_main_first():
        resolved = find_model(config, ModelHub.from_environment())
        warnings += resolved.family.warnings if parallel.is_main_process else ()
        check_headers(config, resolved, parallel.trained_dtype, warnings.append)
    # Sample order and noise do not depend on these random numbers; dropout and user functions do.
    parallel.seed(config.seed)
    models = make_models(config, resolved, parallel)
    memory = Memory(config, models)

    reporter = make_reporter(config, parallel.is_main_process, parallel.trackers)
    for text in warnings:
        reporter.warn(text)
    store = open_store(config)
    with closing(reporter), store.in_use(waiting=reporter.warn), memory.explained():
        # Latents: all in the store, and the manifest that names them.
        if table is None:
            manifests = [manifest for manifest in encoded_before(config) if manifest is not None]
            check_encoded(config, resolved, manifests, fact_cache)
        manifest = encoded_manifest(
            config, parallel, models, table, fact_cache, reporter, stop_asked
        )
        if config.encodes_only:
            return None

        # Training, from the manifest alone.
        devices, mixed_precision = parallel.device_names(), parallel.mixed_precision
        record = start_record(config, resolved, manifest, fact_cache, devices, mixed_precision)
        samples = resolved_samples(config, manifest, parallel)
        record = replace(record, samples=len(samples.trained))
        rank, world = parallel.process_index, parallel.num_processes
        data = StepDataset(config, resolved, samples.trained, rank, world)
        # The main process chooses, so that all go on from the same state.
        state = parallel.from_main(
            lambda: choose_state(config, record, data, parallel.can_save_state, reporter.warn)
        )
        record = going_on(record, state)
        run_file = RunFile(output, record, writes=parallel.is_main_process)
        trained = train(
            Inputs(
                config,
                parallel,
                models,
                manifest,
                run_file,
                reporter,
                stop_asked,
                state,
                samples,
                data,
                memory,
            )
        )
        return trained, resolved


def export(config: TrainingConfig, record: "RunRecord", model: "ResolvedModel") -> None:
    """Export a training that has just finished, and print how to load what was written.

    Raises:
        OutputError: the export failed; the message says that the training is finished.
    """
    from diffsynth_dagster.export import export_held, how_to_load

    folder = Path(config.output_path).absolute()
    finished = f"the training is finished and its checkpoints are whole, in {folder}"
    try:
        exported = export_held(config, record, model)
        for problem in exported.problems:
            raise problem
    # Whatever it is, it is raised again, with a note that nothing of the training is lost.
    except Exception as error:
        known = recognised(error)
        if not isinstance(known, UserError):
            error.add_note(finished)
            raise
        raise OutputError(
            f"{finished}; they could not be exported: {known.what}",
            where=known.where,
            do="; then ".join(
                filter(None, [known.do, "give the same command again: it exports them"])
            ),
        ) from error
    if exported.card is not None and exported.card.kept:
        print(f"{exported.card.path} was edited, and stays as it is", flush=True)
    if exported.effect is not None:
        print(f"the LoRA: {exported.effect}", flush=True)
    for item in exported.files:
        print(f"exported {item.path.absolute()}\n  {how_to_load(item, model.family)}", flush=True)


def dry_run(arguments: Arguments) -> None:
    """Print as JSON what a training would do, and its warnings on standard error. Raises: see
    `make_plan` and `look_at_files`."""
    from diffsynth_dagster.dry_run import make_plan

    plan = make_plan(arguments.config)
    if not arguments.no_files:
        from diffsynth_dagster.dry_run import look_at_files

        processes = os.environ.get("WORLD_SIZE") or arguments.num_processes
        looked = look_at_files(arguments.config, int(processes) if processes else None)
        plan |= looked.values
        for text in looked.warnings:
            print(f"warning: {text}", file=sys.stderr)
    print(json.dumps(plan, indent=2))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    with FailureGuard(failure_reporter()) as guard:
        arguments = read_arguments(sys.argv[1:] if argv is None else argv)
        if arguments.recipe is not None:
            from diffsynth_dagster.training.overlap import refuse_own_recipe

            refuse_own_recipe(arguments.config, arguments.recipe)
        if arguments.dry_run:
            if process_number() == 0:
                dry_run(arguments)
            return 0
        with StopSignal() as stop_asked:
            try:
                run(arguments.config, stop_asked, exports=not arguments.checkpoints_only)
            except (Stopped, KeyboardInterrupt):
                if process_number() != 0:  # the main process has written the state, and says where
                    raise
                where = say_where_it_goes_on(arguments.config)
                raise Stopped(f"stopped; with the same command {where}") from None
    return guard.code


if __name__ == "__main__":
    sys.exit(main())
