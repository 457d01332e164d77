"""The trainer: `accelerate launch -m diffsynth_dagster.train --flag …`.

It trains, and then writes the files that other tools load. In Dagster the export is an asset of its
own, so the launcher passes `--checkpoints_only`.

Exit codes: 0 done, 2 a user error (one message, no traceback), 130 stopped by a signal.
"""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from diffsynth_dagster.config.flags import Arguments, read_arguments
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import OutputError, Stopped, UserError
from diffsynth_dagster.run.failure import process_number, recognised
from diffsynth_dagster.run.guard import FailureGuard, failure_reporter
from diffsynth_dagster.run.resume_point import resume_sentence
from diffsynth_dagster.run.signals import StopSignal

if TYPE_CHECKING:
    from diffsynth_dagster.run.record import RunRecord
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
        UserError: see `run_locked`, and the functions that this one imports.
        Stopped: a signal came.
    """
    # Imported here, since they take seconds: a mistake in the flags is reported at once.
    from diffsynth_dagster.cache.split import with_settled
    from diffsynth_dagster.data.prepare import require_named
    from diffsynth_dagster.pipeline import run_locked
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


def export(config: TrainingConfig, record: "RunRecord", model: "ResolvedModel") -> None:
    """Export a training that has just finished, and print how to load what was written.

    Raises:
        OutputError: the export failed; the message says that the training is finished.
    """
    from diffsynth_dagster.export import export_locked, how_to_load

    folder = Path(config.output_path).absolute()
    finished = f"the training is finished and its checkpoints are whole, in {folder}"
    try:
        exported = export_locked(config, record, model)
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
                where = resume_sentence(arguments.config)
                raise Stopped(f"stopped; with the same command {where}") from None
    return guard.code


if __name__ == "__main__":
    sys.exit(main())
