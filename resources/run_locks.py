"""The lock file that each run holds while it executes. It shows whether the run's process is alive.

A killed process cannot report its end, and Dagster keeps its run as started. The operating system
releases a process's file locks however it ends, so a free lock means that the process has ended.
"""

import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import dagster as dg
from dagster._core.events import EngineEventData
from filelock import lock_descriptor

LockState = Literal["held", "free", "gone"]
_FOLDER = "run_locks"
_EVENT_KEY = "run_lock"
"""Key of an event's metadata. The event reports that a run holds its lock: machine and path."""
_FIRST_EVENTS = 50
"""Number of events at the start of a run's log that are searched for it."""


def locks_folder(instance: dg.DagsterInstance) -> Path:
    """The folder of the lock files of an instance's runs on this machine."""
    return Path(instance.storage_directory()) / _FOLDER


@contextmanager
def held(instance: dg.DagsterInstance, run: dg.DagsterRun) -> Generator[None]:
    """Hold the lock of a run during the block, and report it in the run's log."""
    folder = locks_folder(instance)
    folder.mkdir(parents=True, exist_ok=True)
    # Readers of the folder skip names with a dot.
    path, staged = folder / run.run_id, folder / f".{run.run_id}"
    with staged.open("w", encoding="utf-8") as file:
        lock_descriptor(file.fileno())
        file.write(str(os.getpid()))
        file.flush()
        staged.replace(path)  # already locked, so nobody finds this lock file unlocked
        try:
            instance.report_engine_event(
                f"Process {os.getpid()} on {socket.gethostname()} holds the lock of this run.",
                run,
                EngineEventData({_EVENT_KEY: _event_value(path)}),
            )
            yield
        finally:
            # Before the lock is released: so a free lock file means that the process was killed.
            path.unlink(missing_ok=True)


def lock_state(path: Path) -> LockState:
    """The state of a run's lock: "held", "free" (left by a killed process) or "gone" (no file)."""
    # If it is free, this locks it for a moment; closing the file releases it.
    try:
        with path.open() as file:
            return "free" if lock_descriptor(file.fileno(), blocking=False) else "held"
    except FileNotFoundError:
        return "gone"


def process_of(path: Path) -> int | None:
    """The id of the process that holds the lock of a run; None if no process does."""
    if lock_state(path) != "held":
        return None
    text = path.read_text(encoding="utf-8")
    return int(text) if text else None


def has_announced(instance: dg.DagsterInstance, run_id: str, path: Path) -> bool:
    """Whether a run has reported that it holds this lock on this machine.

    Runs of other executors hold no lock, and those of other machines hold another one.
    """
    events = instance.get_records_for_run(
        run_id, of_type=dg.DagsterEventType.ENGINE_EVENT, limit=_FIRST_EVENTS
    )
    for record in events.records:
        event = record.event_log_entry.dagster_event
        if event is not None and isinstance(event.event_specific_data, EngineEventData):
            value = event.event_specific_data.metadata.get(_EVENT_KEY)
            if value is not None and value.value == _event_value(path):
                return True
    return False


def _event_value(path: Path) -> str:
    # Lock files of several machines may be in one shared folder.
    return f"{socket.gethostname()}:{path}"
