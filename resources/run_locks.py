"""The lock that each run holds while it executes: it tells a run that works from one that is gone.

A process that is killed cannot say so, and Dagster keeps its run as started. The lock belongs to the
process: the system takes it back however that one ends.
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
_SAID = "run_lock"
"""Metadata of the event by which a run says that it holds a lock: on which machine, and where."""
_FIRST_EVENTS = 50


def locks_folder(instance: dg.DagsterInstance) -> Path:
    """Where the locks of an instance's runs are. (They hold on one machine.)"""
    return Path(instance.storage_directory()) / _FOLDER


@contextmanager
def held(instance: dg.DagsterInstance, run: dg.DagsterRun) -> Generator[None]:
    """Hold the lock of a run, and say so in its log."""
    folder = locks_folder(instance)
    folder.mkdir(parents=True, exist_ok=True)
    path, staged = folder / run.run_id, folder / f".{run.run_id}"
    with staged.open("w", encoding="utf-8") as file:
        lock_descriptor(file.fileno())
        file.write(str(os.getpid()))
        file.flush()
        staged.replace(path)  # locked before anyone can find it
        try:
            instance.report_engine_event(
                f"Process {os.getpid()} on {socket.gethostname()} holds the lock of this run.",
                run,
                EngineEventData({_SAID: _said(path)}),
            )
            yield
        finally:
            path.unlink(missing_ok=True)  # before it is free: nobody finds a free one


def lock_state(path: Path) -> LockState:
    """Whether the lock of a run is held, was left by a process that is gone, or is not there."""
    try:
        with path.open() as file:
            return "free" if lock_descriptor(file.fileno(), blocking=False) else "held"
    except FileNotFoundError:
        return "gone"


def process_of(path: Path) -> int | None:
    """The process that holds the lock of a run; None if none does."""
    if lock_state(path) != "held":
        return None
    text = path.read_text(encoding="utf-8")
    return int(text) if text else None


def said_to_hold(instance: dg.DagsterInstance, run_id: str, path: Path) -> bool:
    """Whether a run has said that it holds this lock, on this machine. Runs of other executors, and of
    other machines, have not."""
    said = instance.get_records_for_run(
        run_id, of_type=dg.DagsterEventType.ENGINE_EVENT, limit=_FIRST_EVENTS
    )
    for record in said.records:
        event = record.event_log_entry.dagster_event
        if event is not None and isinstance(event.event_specific_data, EngineEventData):
            value = event.event_specific_data.metadata.get(_SAID)
            if value is not None and value.value == _said(path):
                return True
    return False


def _said(path: Path) -> str:
    return f"{socket.gethostname()}:{path}"
