"""Trainings in processes of their own, forked from one that has imported the large libraries."""

import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from soak_support import start_server


@dataclass(frozen=True)
class Done:
    """How a job ended: 0, or the code of the process that failed first, and what all printed."""

    returncode: int
    stderr: str


def train_in_process(recipe: Path, environment: dict[str, str], log: Path) -> None:
    """What a process does: the trainer's command line, as a launcher starts it."""
    os.environ.update(environment)
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(said, stream)
    from diffsynth_dagster.train import main

    code = main(["--recipe", str(recipe)])
    sys.stderr.flush()
    sys.exit(code)


def in_processes(count: int, config: dict[str, Any], recipe: Path, seconds: float = 120) -> Done:
    """Train with some processes on the CPU, which find each other as torchrun's do.

    Where one fails, the others are ended.
    """
    recipe.write_text(json.dumps(config), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start_server()
    logs = [recipe.with_name(f"{recipe.name}.{rank}.log") for rank in range(count)]
    shared = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    jobs: list[Any] = []
    for rank, log in enumerate(logs):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        jobs.append(server.Process(target=train_in_process, args=(recipe, own, log)))
    for job in jobs:
        job.start()
    code, until = 0, time.monotonic() + seconds
    while code == 0 and (left := [job for job in jobs if job.exitcode is None]):
        assert wait([job.sentinel for job in left], until - time.monotonic()), "it hangs"
        codes = [job.exitcode for job in jobs]
        code = next((each for each in codes if each), 0)
    for job in jobs:
        job.join(5 if code else None)
        job.kill()
        job.join()
    return Done(code, "".join(log.read_text(encoding="utf-8") for log in logs))


def two_processes(config: dict[str, Any], recipe: Path) -> Done:
    """Train with two processes on the CPU."""
    return in_processes(2, config, recipe)
