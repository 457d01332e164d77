"""The pools, and which devices are in each.

A pool of Dagster has only a name and a limit. Which devices it stands for comes from an environment
variable. Without it there is one pool with all devices of the machine.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from itertools import takewhile
from pathlib import Path

import dagster as dg
from dagster._core.instance.config import PoolGranularity

from diffsynth_dagster.config.recipe import RecipeOptions
from diffsynth_dagster.errors import ParameterError
from resources.failing import StepFailure

VARIABLE = "DIFFSYNTH_DAGSTER_POOLS"
DEFAULT_POOL = "gpu"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_DEVICE = re.compile(r"\d+|(GPU|MIG)-.+")
_DRIVERS = ("nvidia*", "nvhost*", "nvgpu*", "nvmap", "dxg", "kfd")
"""Device files on Linux. Without any of these there is neither CUDA nor ROCm."""
_COUNT = "import torch; print(torch.cuda.device_count())"
_DO = f"write it like {VARIABLE}='gpu=0,1 big=2,3': the pools with the ids of their devices"


def pools_set() -> Mapping[str, tuple[str, ...]]:
    """Pool → ids of its devices, in the order of the environment variable; empty if it is not set.

    Raises:
        ParameterError: the variable is malformed.
    """
    text = os.environ.get(VARIABLE, "")
    pools: dict[str, tuple[str, ...]] = {}
    for part in text.split():
        name, equals, listed = part.partition("=")
        devices = tuple(listed.split(","))
        problem = None
        if not (name and equals and all(devices)):
            problem = f"'{part}' is no pool with devices"
        elif odd := [device for device in devices if not _DEVICE.fullmatch(device)]:
            problem = f"'{odd[0]}' is no id of a device: '0', 'GPU-…' or 'MIG-…' is one"
        elif name in pools:
            problem = f"the pool '{name}' is there twice"
        elif len(set(devices)) < len(devices):
            problem = f"the pool '{name}' has a device twice"
        if problem is not None:
            raise ParameterError(problem, where=f"{VARIABLE} = {text}", do=_DO)
        pools[name] = devices
    return pools


def pool_of(options: RecipeOptions) -> str:
    """The pool that a recipe's runs wait for.

    Raises:
        ParameterError: the recipe names a pool that does not exist; or see `pools_set`.
    """
    pools = pools_set()
    name = options.pool or next(iter(pools), DEFAULT_POOL)
    known = list(pools) or [DEFAULT_POOL]
    if name not in known:
        raise ParameterError(
            f"there is no pool '{name}'; there is {', '.join(map(repr, known))}",
            where=f"pool = {name}",
            do=f"name one of these, or add it to the environment variable {VARIABLE}",
        )
    return name


def devices_of(pool: str) -> tuple[str, ...]:
    """The ids of a pool's devices; empty on a machine without a GPU.

    Raises:
        ParameterError: see `pools_set`.
        StepFailure: the GPUs could not be counted.
    """
    pools = pools_set()
    if pools:
        return pools[pool]
    visible = os.environ.get(_VISIBLE)
    if visible is not None:
        # CUDA ignores everything after the first invalid id, so "-1" and "none" hide all devices.
        return tuple(takewhile(_DEVICE.fullmatch, (part.strip() for part in visible.split(","))))
    return tuple(str(index) for index in range(_counted()))


@cache
def _counted() -> int:
    """How many GPUs a process on this machine sees. Raises `StepFailure`."""
    # In a process of its own, since importing torch would make this one much larger.
    # Counting takes seconds. Without a driver there is nothing to count.
    if sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in _DRIVERS):
        return 0
    done = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True)
    if done.returncode != 0:
        raise StepFailure("the GPUs of this machine could not be counted", done.stderr)
    return int(done.stdout.split()[-1])


def how_many(options: RecipeOptions, pool: str, devices: tuple[str, ...]) -> int:
    """How many of a pool's devices a recipe takes.

    Args:
        devices: ids of all devices of the pool.

    Raises:
        ParameterError: the pool has fewer than the recipe asks for.
    """
    count = len(devices) if options.gpus is None else options.gpus
    if count > len(devices):
        there = f"the pool '{pool}' has {len(devices)}" if devices else "there is none here"
        raise ParameterError(
            f"the recipe asks for {count} GPU{'s' * (count > 1)}, and {there}",
            where=f"gpus = {count}",
            do="lower 'gpus', or leave it out: then all of the pool are taken"
            if devices
            else "leave 'gpus' out to train without a GPU",
        )
    return count


_warned: set[str] = set()
"""Runs in this process that already logged the warning of `warn_of_waiting`."""


def warn_of_waiting(context: dg.AssetExecutionContext, pool: str) -> None:
    """Warn, once in a run, if the instance's settings let runs start before their pool is free.

    Such runs wait in a process each instead of in Dagster's queue.
    """
    run, instance = context.run.run_id, context.instance
    storage = instance.event_log_storage
    if run in _warned or instance.is_ephemeral or not storage.supports_global_concurrency_limits:
        return
    _warned.add(run)
    settings, file = storage.get_pool_config(), f"{instance.root_directory}/dagster.yaml"
    if settings.pool_granularity != PoolGranularity.RUN:
        context.log.warning(
            f"a run that waits for the pool '{pool}' starts, and keeps a core of the CPU busy until it "
            f"may go on. To let it wait in the queue, write into {file}: "
            "concurrency: {pools: {granularity: run, default_limit: 1}}"
        )
    elif settings.default_pool_limit is None and not any(
        limit.name == pool for limit in storage.get_pool_limits()
    ):
        context.log.warning(
            f"the pool '{pool}' has no limit in this instance: runs that wait for its devices start, and "
            f"wait in a process each. To let them wait in the queue: dagster instance concurrency set {pool} 1"
        )
