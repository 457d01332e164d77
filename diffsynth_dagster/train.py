"""The trainer: `accelerate launch -m diffsynth_dagster.train --flag …`.

Flags → `TrainingConfig` → checks → store → loop. Exit codes: 0 done, 2 a mistake in the input
(one message, no traceback), 130 stopped by a signal.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from diffsynth_dagster.config.flags import read_arguments
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.config.recipe import dump_config
from diffsynth_dagster.errors import Stopped
from diffsynth_dagster.training.failure import FailureGuard, failure_reporter

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffsynth_dagster.cache.store import Store
    from diffsynth_dagster.training.record import RunRecord


class StopSignal:
    """Remembers that SIGINT or SIGTERM came while it is entered; a second one acts at once."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(number, signal.SIG_DFL)

    def __call__(self) -> bool:
        return self._asked


def run(config: TrainingConfig, stop_asked: StopSignal) -> "RunRecord | None":
    """Do what a config asks for; returns the record of the training, if there was one.

    Raises:
        UserError: see the modules this goes through, in the order of the imports below.
        Stopped: a signal came.
    """
    from accelerate.utils import set_seed

    from diffsynth_dagster.cache.split import as_encoded
    from diffsynth_dagster.facts import FactBook
    from diffsynth_dagster.files import require_writable, write_text
    from diffsynth_dagster.plan import check_plan
    from diffsynth_dagster.training.loop import Session, train
    from diffsynth_dagster.training.modules import check_model
    from diffsynth_dagster.training.record import start_record
    from diffsynth_dagster.training.reporting import make_reporter
    from diffsynth_dagster.weights.hub import ModelHub
    from diffsynth_dagster.weights.identify import find_model, guess_family
    from diffsynth_dagster.weights.models import Models

    config = as_encoded(config)
    check_plan(config, guess_family(config))
    accelerator = _accelerator(config)
    output = Path(config.output_path)
    require_writable(output, "output_path")
    require_writable(Path(config.cache_path), "cache_path")
    book = FactBook(Path(config.cache_path) / "facts.sqlite")
    validated = None
    if config.dataset_metadata_path is not None:
        with accelerator.main_process_first():
            validated = _prepare(config, book, accelerator.is_main_process)
    with accelerator.main_process_first():
        found = find_model(config, ModelHub.from_environment())
        check_plan(config, found.family)  # the files may tell more than their names
        check_model(config, found)
    set_seed(config.seed % 2**32)  # numpy takes no more
    bare = {found.family.part(name).of for name in filter(None, [config.lora_base_model])}
    models = Models(
        found,
        accelerator.device,
        _dtype(accelerator),
        config.initialize_model_on_cpu,
        frozenset(bare),
    )
    with closing(make_reporter(accelerator, config)) as reporter, _store(config).in_use():
        manifest = _encode(config, accelerator, models, validated, book, reporter, stop_asked)
        if config.encodes_only:
            return None
        record = start_record(config, found, manifest, book)
        record.devices = _devices(accelerator)
        record.mixed_precision = accelerator.mixed_precision
        if accelerator.is_main_process:
            write_text(output / "config.yaml", dump_config(config))
            record.write(output)  # not finished: an older one is true no more
        train(Session(config, accelerator, models, manifest, record, reporter, stop_asked))
        if accelerator.is_main_process:
            record.write(output)
        reporter.finished(record)
        return record


def _store(config: TrainingConfig) -> "Store":
    """The store that a config reads: its own, or that of the encoded data set it names."""
    from diffsynth_dagster.cache.manifest import read_manifest
    from diffsynth_dagster.cache.store import Store

    if config.dataset_metadata_path is not None:
        return Store(Path(config.cache_path))
    return Store(Path(read_manifest(Path(config.dataset_base_path)).store))


def _prepare(config: TrainingConfig, book: Any, main: bool) -> Any:
    """The checked rows of the data set. Raises `MetadataError` when too many are rejected.

    The main process makes, checks and writes; the others then read what it found out.
    """
    from tqdm import tqdm

    from diffsynth_dagster.data.prepare import prepare_data
    from diffsynth_dagster.data.table.check import require_accepted, validate
    from diffsynth_dagster.weights.identify import guess_family

    if not main:
        looked_up = config.model_copy(update={"verify_content": False})
        return validate(looked_up, guess_family(config).columns, book)
    with tqdm(desc="check files", unit="file", delay=2) as bar:
        validated = prepare_data(config, guess_family(config).columns, book, bar.update)
    require_accepted(validated, config.max_rejected_fraction)
    return validated


def _encode(
    config: TrainingConfig,
    accelerator: "Accelerator",
    models: Any,
    validated: Any,
    book: Any,
    reporter: Any,
    stop_asked: StopSignal,
) -> Any:
    """The manifest of the data set, with every key of it in the store."""
    from diffsynth_dagster.cache.encode import Keys, encode_missing, plan_samples
    from diffsynth_dagster.cache.manifest import read_manifest
    from diffsynth_dagster.cache.split import require_encoded_for
    from diffsynth_dagster.cache.store import Store
    from diffsynth_dagster.errors import StoreError

    if validated is None:
        manifest = read_manifest(Path(config.dataset_base_path))
        require_encoded_for(config, models.found, manifest, book)
    else:
        keys = Keys(models.found, book, models.dtype)
        manifest = plan_samples(config, models.found, validated, keys)
        if not config.trains_only:

            def progress(stage: str, done: int, total: int) -> None:
                reporter.encoding(stage, done, total)
                if stop_asked():
                    raise Stopped

            report = encode_missing(config, models, manifest, validated, accelerator, progress)
            reporter.encoded(report)
    missing = Store(Path(manifest.store)).missing(manifest.keys)
    if missing:
        raise StoreError(
            f"the store lacks {len(missing)} of {len(manifest.keys)} encoded inputs",
            where=manifest.store,
            do="run the task with :data_process and the same parameters first",
        )
    if accelerator.is_main_process:
        folder = Path(config.dataset_base_path if validated is None else config.output_path)
        if validated is not None:
            manifest.write(folder)
        Store(Path(manifest.store)).add_user(folder)
    accelerator.wait_for_everyone()
    return manifest


def _accelerator(config: TrainingConfig) -> "Accelerator":
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    from diffsynth_dagster.training.reporting import tracker_names

    logging.getLogger("accelerate").setLevel(logging.ERROR)
    unused = DistributedDataParallelKwargs(find_unused_parameters=config.find_unused_parameters)
    # The others wait while the main process downloads, checks files or makes sample images.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(
        mixed_precision=precision(config.mixed_precision, _gpu_has_bf16()),
        log_with=[*tracker_names(config)] or None,
        project_dir=config.output_path,
        kwargs_handlers=[unused, patient],
    )
    _require_whole_weights(accelerator)
    return accelerator


def _require_whole_weights(accelerator: "Accelerator") -> None:
    """Refuse what partitions the weights themselves over the processes. Raises `ParameterError`."""
    from accelerate.utils import DistributedType

    from diffsynth_dagster.errors import ParameterError

    kind = accelerator.distributed_type
    plugin: Any = accelerator.state.deepspeed_plugin
    third_stage = kind == DistributedType.DEEPSPEED and plugin.zero_stage == 3
    if third_stage or kind in (DistributedType.FSDP, DistributedType.MEGATRON_LM):
        named = "ZeRO stage 3" if third_stage else kind.value
        raise ParameterError(
            f"{named}, which partitions the weights, is not supported yet",
            where="the configuration of accelerate",
            do="use several GPUs without it, or ZeRO stage 2: recipes/accelerate/zero2_offload.yaml",
        )


def precision(asked: str | None, gpu_has_bf16: bool) -> str | None:
    """What to compute in: what a config asks for; else what accelerate says (None), or bf16 on a
    GPU if that is float32, in which the published models do not fit."""
    if asked is None and gpu_has_bf16:
        given = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        return "bf16" if given == "no" else None
    return asked


def _gpu_has_bf16() -> bool:
    import torch
    from accelerate.utils import is_bf16_available

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.accelerator.is_available() and is_bf16_available()


def _dtype(accelerator: "Accelerator") -> Any:
    """Element type of frozen weights: that of the computation."""
    import torch

    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return types.get(accelerator.mixed_precision, torch.float32)


def _devices(accelerator: "Accelerator") -> list[str]:
    """Names of the devices of all processes."""
    import torch
    from accelerate.utils import gather_object

    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return gather_object([name])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    with FailureGuard(failure_reporter()) as guard:
        arguments = read_arguments(sys.argv[1:] if argv is None else argv)
        if arguments.dry_run:
            from diffsynth_dagster.plan import make_plan

            print(json.dumps(make_plan(arguments.config), indent=2))
            return 0
        with StopSignal() as stop_asked:
            run(arguments.config, stop_asked)
    return guard.code


if __name__ == "__main__":
    sys.exit(main())
