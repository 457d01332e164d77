"""A training from its data to its last step: data, model, latents, steps.

On the command line these follow one another in one process. In Dagster each is an asset, and the
checkpoints asset starts from what was encoded.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.media.budget import DECODING
from diffsynth_dagster.data.table.validate import CheckedTable
from diffsynth_dagster.facts import FactCache, fact_cache_of
from diffsynth_dagster.files import require_writable
from diffsynth_dagster.preflight import check_data, check_disk, check_encoded, check_headers
from diffsynth_dagster.run.record import RunFile, RunRecord
from diffsynth_dagster.run.reporting import Reporter, make_reporter
from diffsynth_dagster.run.start import start_record
from diffsynth_dagster.training.batches import StepDataset
from diffsynth_dagster.training.encoded_data import (
    Manifests,
    checked_table,
    encode_data,
    encode_samples,
    encoded_before,
    open_store,
    register_users,
    resolved_samples,
)
from diffsynth_dagster.training.loop import train
from diffsynth_dagster.training.memory import Memory
from diffsynth_dagster.training.parallel import Parallel
from diffsynth_dagster.training.resume import choose_state, going_on, require_going_on
from diffsynth_dagster.training.setup import Inputs, make_models
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.models import Models
from diffsynth_dagster.weights.resolved import ResolvedModel


def run_locked(
    config: TrainingConfig,
    model: ResolvedModel,
    parallel: Parallel,
    stop_asked: Callable[[], bool],
) -> tuple[RunRecord, ResolvedModel] | None:
    """Do what a checked config asks for, in a run folder that is locked. Collective.

    Args:
        model: guessed from the config, without its files.
        stop_asked: says whether a signal came.

    Returns:
        The record of the training and the model with its files; None if the config only encodes.

    Raises:
        UserError: see the functions that this one calls, in their order.
        Stopped: a signal came.
    """
    DECODING.megapixels = config.decode_megapixels
    require_writable(Path(config.output_path), "output_path")
    require_writable(Path(config.cache_path), "cache_path")
    if not config.encodes_only:
        # Asked again, with the content of all files, when everything is encoded: see `choose_state`.
        parallel.from_main(lambda: require_going_on(config))
    fact_cache = fact_cache_of(config.cache_path)

    # The data first: the model files may have to be downloaded.
    table = checked_table(
        config,
        model.family.columns,
        fact_cache,
        parallel,
        lambda made: check_data(config, model, [made]),
    )
    warnings = table.warnings() if table is not None and parallel.is_main_process else []
    resolved = _found_model(config, parallel, warnings)
    # Sample order and noise do not depend on these random numbers; dropout and user functions do.
    parallel.seed(config.seed)
    # Only now, and one by one, are components loaded: when each is used.
    models = make_models(config, resolved, parallel)
    memory = Memory(config, models)

    reporter = make_reporter(config, parallel.is_main_process, parallel.trackers)
    for text in warnings:
        reporter.warn(text)
    store = open_store(config)
    with closing(reporter), store.in_use(waiting=reporter.warn), memory.explained():
        manifests = _latents(config, parallel, models, table, fact_cache, reporter, stop_asked)
        if config.encodes_only:
            return None
        inputs = _inputs(
            config, parallel, models, manifests, fact_cache, reporter, stop_asked, memory
        )
        return train(inputs), resolved


def _found_model(config: TrainingConfig, parallel: Parallel, warnings: list[str]) -> ResolvedModel:
    """The model with its files, after the checks of their headers. Collective.

    Args:
        warnings: gets what the family and the checks warn of.
    """
    # One process of each node downloads; the others then find the files.
    with parallel.node_main_first():
        model = find_model(config, ModelHub.from_environment())
        warnings += model.family.warnings if parallel.is_main_process else ()
        size = check_headers(config, model, parallel.trained_dtype, warnings.append)
        if parallel.is_main_process:  # which writes the checkpoints
            check_disk(config, model, size)
    return model


def _latents(
    config: TrainingConfig,
    parallel: Parallel,
    models: Models,
    table: CheckedTable | None,
    fact_cache: FactCache,
    reporter: Reporter,
    stop_asked: Callable[[], bool],
) -> Manifests:
    """The manifests of the row sets, with all their rows in the store. Collective.

    Args:
        table: None if the data set was encoded before.
    """
    if table is None:
        found = encoded_before(config, models.resolved.family)
        check_encoded(config, models.resolved, found, fact_cache)
        manifests = encode_samples(
            config, found, parallel, models, fact_cache, reporter, stop_asked
        )
    else:
        manifests = encode_data(config, parallel, models, fact_cache, reporter, stop_asked)
    if parallel.is_main_process:
        register_users(manifests)
    return manifests


def _inputs(
    config: TrainingConfig,
    parallel: Parallel,
    models: Models,
    manifests: Manifests,
    fact_cache: FactCache,
    reporter: Reporter,
    stop_asked: Callable[[], bool],
    memory: Memory,
) -> Inputs:
    """What the training loop is given, from the manifests alone. Collective."""
    model = models.resolved
    devices, mixed_precision = parallel.device_names(), parallel.mixed_precision
    record = start_record(config, model, manifests.train, fact_cache, devices, mixed_precision)
    samples = resolved_samples(config, manifests, parallel)
    for text in samples.warnings:
        reporter.warn(text)
    record = replace(record, samples=len(samples.trained))
    rank, world = parallel.process_index, parallel.num_processes
    data = StepDataset(config, model, samples.trained, rank, world)
    # The main process chooses, so that all go on from the same state.
    state = parallel.from_main(
        lambda: choose_state(config, record, data, parallel.can_save_state, reporter.warn)
    )
    run_file = RunFile(
        Path(config.output_path), going_on(record, state), writes=parallel.is_main_process
    )
    return Inputs(
        config,
        parallel,
        models,
        manifests,
        run_file,
        reporter,
        stop_asked,
        state,
        samples,
        data,
        memory,
    )
