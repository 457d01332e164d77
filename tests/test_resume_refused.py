"""States that no training may go on from are refused, and stay as they are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Values, make_config
from test_resume import LONG, never, refusal, stop_after

from diffsynth_dagster.facts import digest_of
from diffsynth_dagster.run.folder import owned
from diffsynth_dagster.train import run as run_training


def newer(state: dict[str, Any]) -> None:
    """A state of a newer version that holds the same."""
    state["identity"]["dict"][-1] = ["the version of training", 99]


def richer(state: dict[str, Any]) -> None:
    """A state of a newer version that holds something more, and something else not."""
    newer(state)
    state["something new"] = state.pop("seconds")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (newer, "differs in: the version of training\n"),
        (richer, "differs in: the version of training, the layout of a state\n"),
    ],
)
def test_a_state_of_a_newer_version_is_refused_and_stays(
    values: Values, tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    config = values(**LONG, output_path=str(tmp_path / "run"))
    stop_after(config, 3)
    path = tmp_path / "run" / "state" / "step-3" / "state.json"
    manifest = json.loads(path.read_text())
    change(manifest["state"])
    path.write_text(json.dumps({**manifest, "digest": digest_of(manifest["state"])}))
    before = {p: p.read_bytes() for p in (tmp_path / "run").glob("state/*/*")}
    assert words in refusal(config)
    assert {p: p.read_bytes() for p in (tmp_path / "run").glob("state/*/*")} == before


def test_of_two_that_go_on_at_once_one_is_refused(values: Values, tmp_path: Path) -> None:
    """And what it would go on from stays. (With real processes: see `test_run_folder.py`.)"""
    config = values(**LONG, output_path=str(tmp_path / "run"))
    stop_after(config, 3)
    before = {p: p.read_bytes() for p in (tmp_path / "run").glob("[!.]*") if p.is_file()}
    before |= {p: p.read_bytes() for p in (tmp_path / "run").glob("state/*/*")}
    with owned(tmp_path / "run", "the first"):
        assert "the run folder is in use: the first by process" in refusal(config)
    assert {p: p.read_bytes() for p in before} == before
    record = run_training(make_config(config), never)
    assert record is not None
    assert record.resumed_from == [3]
