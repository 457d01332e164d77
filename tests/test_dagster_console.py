"""What a run prints, line by line. (What `dagster job execute` prints in all: see `test_dagster_ui.py`.)"""

import logging
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pytest

from diffsynth_dagster.run import progress
from diffsynth_dagster.run.events import Encoding, Started, StepMetrics
from diffsynth_dagster.run.progress import ProgressLines, Throttle
from diffsynth_dagster.run.reporting import TerminalReporter
from resources.console import ConsoleHandler
from resources.executor import is_temporary


def test_what_cannot_be_printed_breaks_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.makeLogRecord({"msg": "not one of Dagster's"})
    ConsoleHandler({}, logging.INFO).handle(record)
    assert "KeyError: 'dagster_meta'" in capsys.readouterr().err


def test_a_run_that_is_kept_nowhere_says_so(tmp_path: Path) -> None:
    """And is not said to be in the UI."""
    for name, temporary in ((".tmp_dagster_home_x", True), ("home", False)):
        (tmp_path / name).mkdir()
        with dg.DagsterInstance.local_temp(str(tmp_path / name)) as instance:
            assert is_temporary(instance) == temporary


def step(number: int) -> StepMetrics:
    return StepMetrics(number, 0, 0.5, 1e-3, 1.0, 0.1, 4, samples_per_second=40.0)


def follow(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Report ten steps of some seconds each to a terminal."""
    now = SimpleNamespace(monotonic=lambda: clock)
    monkeypatch.setattr(progress, "time", now)
    clock = 0.0
    reporter = TerminalReporter()
    reporter.report(Started(10, 0))
    for number in range(1, 11):
        clock += seconds
        reporter.report(step(number))
    reporter.close()


def test_progress_in_a_file_is_a_plain_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    follow(2.0, monkeypatch)
    text = capsys.readouterr().err
    assert "\r" not in text
    assert text.splitlines() == [
        "train: step 1 of 10, loss 0.5000, lr 1.0e-03, samples/s 40, 00:02 passed, 00:18 left",
        "train: step 4 of 10, loss 0.5000, lr 1.0e-03, samples/s 40, 00:08 passed, 00:12 left",
        "train: step 7 of 10, loss 0.5000, lr 1.0e-03, samples/s 40, 00:14 passed, 00:06 left",
        "train: step 10 of 10, loss 0.5000, lr 1.0e-03, samples/s 40, 00:20 passed, 00:00 left",
    ]


def test_encoding_is_shown_for_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = TerminalReporter()
    for stage in ("prompt", "image"):
        for done in (2, 4, 6):
            reporter.report(Encoding(stage, done, 6))
    reporter.close()
    said = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "encode prompt: sample 2 of 6",
        "encode prompt: sample 6 of 6",
        "encode image: sample 2 of 6",
        "encode image: sample 6 of 6",
    ]


def test_progress_in_a_terminal_is_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    follow(2.0, monkeypatch)
    text = capsys.readouterr().err
    assert "\r" in text
    assert "10/10" in text
    assert "loss=0.5000" in text


def test_time_that_is_left_after_going_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps that were made before took none of it."""
    clock = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock))
    lines = ProgressLines("train", 10_000, "step", 9_000)
    clock = 60.0
    lines.reached(9_060, {})
    assert capsys.readouterr().err == "train: step 9060 of 10000, 01:00 passed, 15:40 left\n"


def test_a_long_work_is_reported_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock))
    every, times = Throttle(5, 60), list[float]()
    for second in range(1, 10_001):
        clock = float(second)
        if every.due(second, 10_000):
            times.append(clock)
    pauses = [b - a for a, b in pairwise(times)]
    assert times[0] == 1
    assert times[-1] == 10_000
    assert pauses[0] == 5
    assert max(pauses) == 60
    assert sum(t <= 90 for t in times) < 20
