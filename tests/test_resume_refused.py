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
from diffsynth_dagster.run.resume_point import resume_sentence
from diffsynth_dagster.train import run as run_training


def newer(state: dict[str, Any]) -> None:
    """A state of a newer version that holds the same."""
    state["identity"]["dict"][-1] = ["the version of training", 99]


def richer(state: dict[str, Any]) -> None:
    """A state of a newer version that holds something more, and something else not."""
    newer(state)
    state["something new"] = state.pop("seconds")


def reordered(state: dict[str, Any]) -> None:
    """A state of a newer version that tells the order of its samples in another way."""
    newer(state)
    state["something new"] = state.pop("order")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (newer, "differs in: the version of training\n"),
        (richer, "differs in: the version of training, the layout of a state\n"),
        (reordered, "differs in: the version of training, the layout of a state"),
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
    assert words.rstrip() in refusal(config, "--dry_run")
    assert {p: p.read_bytes() for p in (tmp_path / "run").glob("state/*/*")} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 2e-3}, "differs in: learning_rate"),
        ({"height": 48, "width": 48}, "differs in: height (was 32), width (was 32)"),
        ({"resume": "must", "output_path": "other"}, "there is no whole state to go on from"),
    ],
)
def test_what_cannot_go_on_is_refused_before_anything_is_encoded(
    values: Values, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    """The tables of the training that is there stay."""
    config = values(**LONG, output_path=str(tmp_path / "run"))
    stop_after(config, 3)
    store = Path(config["cache_path"])
    before = {p: p.read_bytes() for p in (tmp_path / "run").glob("*.parquet")}
    encoded = sorted(store.glob("shards/*"))
    if "output_path" in change:
        change = {**change, "output_path": str(tmp_path / change["output_path"]), "height": 48}
    assert words in refusal({**config, **change})
    assert {p: p.read_bytes() for p in before} == before
    assert sorted(store.glob("shards/*")) == encoded


def test_a_stop_says_what_comes_of_a_finished_training(values: Values, tmp_path: Path) -> None:
    config = make_config(values(output_path=str(tmp_path / "run")))
    assert "begins with its first step" in resume_sentence(config)
    assert run_training(config, never) is not None
    said = resume_sentence(config)
    assert "goes on after step 2 if it is the finished one" in said
    assert "else begins with its first step" in said


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
