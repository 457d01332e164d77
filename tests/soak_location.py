"""The code location of a soak: ours with short intervals and forked processes (`soak_forks`)."""

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._grpc.server import DagsterApiServer
from soak_forks import fork_runs

import jobs.upkeep
from diffsynth_dagster.definitions import make_code_location
from resources import Launcher

FORKS, REAL = "SOAK_FORKS", "SOAK_REAL"
"""Environment variables: the name of the sockets of `soak_forks`, and the path of a file. While
that file exists, trainings are launched by the real launcher."""
_SENSOR_SECONDS = 2
_launch = Launcher._launch


def _fork(self: Launcher, config: Any, options: Any, devices: Sequence[str]) -> list[str]:
    """In the place of `Launcher._launch`: the command line of the stand-in of `soak_forks`."""
    if Path(os.environ[REAL]).exists():
        return _launch(self, config, options, devices)
    script = Path(__file__).with_name("soak_forks.py")
    # Without `site` and Python's environment variables: the stand-in starts in some milliseconds.
    return [sys.executable, "-S", "-E", str(script), os.environ[FORKS]]


def _seconds(days: int) -> timedelta:
    """In the place of `timedelta` in `jobs.upkeep`: a day is a second."""
    return timedelta(seconds=days)


def _make() -> dg.Definitions:
    """Our definitions, after patching what cannot be configured."""
    Launcher._launch = _fork
    server: Any = DagsterApiServer
    runs = fork_runs(os.environ[FORKS])
    # A property without effect on writing: the server's constructor sets the attribute.
    server._mp_ctx = property(lambda _: runs, lambda _self, _value: None)
    jobs.upkeep.timedelta = _seconds
    jobs.upkeep.CRON = "*/2 * * * *"
    made = make_code_location()
    for sensor in made.sensors or ():
        sensor._min_interval = _SENSOR_SECONDS
    return made


definitions = _make()
