"""Joining the processes that the launcher started."""

import logging
import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    is_bf16_available,
)

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.run.trackers import tracker_names
from diffsynth_dagster.training.parallel import Parallel

_PATIENCE = timedelta(days=7)
"""How long processes wait for each other: one may be downloading, checking files or sampling."""


def start_parallel(config: TrainingConfig) -> Parallel:
    """Join the processes that the launcher started.

    Raises:
        ParameterError: accelerate's configuration partitions the weights; or a tracker that the
            config switches on is not installed.
    """
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    trackers = trackers_of(config)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(
        # Without a GPU, accelerate would not join the processes unless it is told to use CPUs.
        cpu=processes > 1 and not torch.accelerator.is_available(),
        mixed_precision=precision(config.mixed_precision, _gpu_has_bf16()),
        log_with=[*trackers] or None,
        project_dir=config.output_path,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=config.find_unused_parameters),
            InitProcessGroupKwargs(timeout=_PATIENCE),
        ],
    )
    # Only the Accelerator knows what the configuration file or the launcher says.
    _require_whole_weights(accelerator)
    return Parallel(accelerator)


def trackers_of(config: TrainingConfig) -> list[str]:
    """The trackers that a config switches on, by accelerate's names. Raises `ParameterError`: one
    is not installed."""
    return tracker_names(config, {str(getattr(t, "value", t)) for t in get_available_trackers()})


def _require_whole_weights(accelerator: Accelerator) -> None:
    """Refuse a launcher that partitions the weights over processes. Raises `ParameterError`."""
    kind = accelerator.distributed_type
    plugin = accelerator.state.deepspeed_plugin
    third_stage = plugin is not None and plugin.zero_stage == 3
    if third_stage or kind in (DistributedType.FSDP, DistributedType.MEGATRON_LM):
        named = "ZeRO stage 3" if third_stage else kind.value
        raise ParameterError(
            f"{named}, which partitions the weights, is not supported yet",
            where="the configuration of accelerate",
            do="use several GPUs without it, or ZeRO stage 2: recipes/accelerate/zero2_offload.yaml",
        )


def precision(asked: str | None, gpu_has_bf16: bool) -> str | None:
    """The precision to compute in: as the config asks; otherwise as accelerate is configured
    (None), but bf16 instead of float32 on a GPU that has it. In float32 the published models rarely
    fit."""
    if asked is None and gpu_has_bf16:
        # The launcher passes its configuration in this variable.
        given = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        return "bf16" if given == "no" else None
    return asked


def _gpu_has_bf16() -> bool:
    if torch.cuda.is_available():
        # Emulated bf16 would be slow: older GPUs stay at float32.
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.accelerator.is_available() and is_bf16_available()
