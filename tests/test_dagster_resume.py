"""Through Dagster: what is killed goes on from its last state, by a retry or by the next run."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import torch
from conftest import Values, make_config, train_to_end
from dagster_support import (
    environment,
    execute,
    home,
    job,
    processes_about,
    start,
    wait_for,
    wait_until_training,
    write_recipe,
)
from process_support import ForkedProcesses, forked_launches
from safetensors.torch import load_file

from diffsynth_dagster.cache.split import second_half
from diffsynth_dagster.run.up_to_date import why_train
from diffsynth_dagster.weights.hub import ModelHub

LONG = {"num_epochs": 80, "save_steps": 80, "state_steps": 10, "learning_rate": 1e-3}


def wait_for_state(run: Path, after: int, works: Callable[[], bool]) -> int:
    """Wait until there is a state after more steps than that; returns its step."""

    def newest() -> int:
        assert works()
        steps = [int(p.name.removeprefix("step-")) for p in (run / "state").glob("step-*")]
        return max((step for step in steps if step > after), default=0)

    return wait_for(newest, 120, f"a state after step {after}")


def kill_training(run: Path) -> None:
    """SIGKILL to the process that trains: not to those that wait for it."""
    ours = [p for p in processes_about(str(run)) if "diffsynth_dagster.train" in p.cmdline()]
    (process,) = [p for p in ours if not p.children()]
    process.send_signal(signal.SIGKILL)


def told(folder: Path) -> dict[str, Any]:
    """What the last materialization of the checkpoints says."""
    with dg.DagsterInstance.from_config(str(folder / "home")) as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey(["tiny", "checkpoints"]))
        assert event is not None
        assert event.asset_materialization is not None
        return dict(event.asset_materialization.metadata)


class FailsForNow(torch.optim.AdamW):
    """An optimizer that fails in its third step while there is a file."""

    made = 0

    def step(self, closure: Any = None) -> Any:
        self.made += 1
        if self.made == 3 and Path(os.environ["FAILS_WHILE"]).exists():
            raise RuntimeError("it fails for now")
        return super().step(closure)


def test_a_run_that_is_executed_again_goes_on_with_what_it_began(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it trains without a reason: `retrain`. A new run with that begins anew."""
    fails = tmp_path / "fails"
    fails.touch()
    monkeypatch.setenv("FAILS_WHILE", str(fails))
    config = values(num_epochs=2, customized_optimizer="test_dagster_resume.FailsForNow")
    folder, run = tmp_path / "recipes", tmp_path / "run"
    write_recipe(folder, "tiny", {**config, "output_path": str(run), "retries": 0})
    named: Any = (str(folder), "train_tiny")
    job_of_recipe = dg.build_reconstructable_job("dagster_support", "make_job", named)

    def execute_job(**again: Any) -> dg.DagsterRun:
        given: Any = {"run_config": {"retrain": True}, "raise_on_error": False, **again}
        with dg.execute_job(job_of_recipe, instance, **given) as result:
            return result.dagster_run

    def resumed_from() -> list[int]:
        return json.loads((run / "run.json").read_text())["resumed_from"]

    with (
        dg.DagsterInstance.from_config(str(home(tmp_path / "home"))) as instance,
        forked_launches(),
    ):
        first = execute_job()
        assert first.status == dg.DagsterRunStatus.FAILURE
        fails.unlink()
        tags = instance.get_run_by_id(first.run_id).tags  # as Dagster copies them
        again = dg.ReexecutionOptions(parent_run_id=first.run_id)
        second = execute_job(tags=tags, reexecution_options=again)
        assert second.parent_run_id == first.run_id
        assert second.status == dg.DagsterRunStatus.SUCCESS
        assert resumed_from() == [2]
        again = dg.ReexecutionOptions(parent_run_id=second.run_id)
        assert execute_job(tags=tags, reexecution_options=again).is_success
        assert resumed_from() == []


@pytest.mark.soak
def test_a_training_that_dies_before_it_begins_is_not_taken_for_done(
    values: Values, tmp_path: Path
) -> None:
    """`retrain`: what the older run left is there still when the retry looks."""
    run = train_to_end(values(num_epochs=2), tmp_path / "run")
    config = {**values(num_epochs=2), "output_path": str(run)}
    hub = ModelHub.from_environment()
    assert why_train(second_half(make_config(config)), hub, None) is None
    before = (run / "run.json").read_bytes()
    write_recipe(tmp_path / "recipes", "tiny", config)
    env, log = environment(home(tmp_path / "home"), tmp_path / "recipes"), tmp_path / "log"
    given = tmp_path / "retrain.yaml"
    given.write_text("ops: {tiny__checkpoints: {config: {retrain: true}}}\n", encoding="utf-8")
    process = start([*job("train_tiny"), "-c", str(given)], env, log)

    def trains() -> bool:
        """The supervisor, the launcher, and a training that has not begun."""
        recipes = [p.read_text() for p in run.glob(".launch.yaml*")]
        return any("sft:train" in text for text in recipes) and len(processes_about(str(run))) == 3

    wait_for(trains, 120, "the training")
    kill_training(run)
    assert process.wait(240) == 0, log.read_text()
    assert "tried again in 5 s" in log.read_text()
    assert told(tmp_path)["trained_in_this_run"].value
    assert (run / "run.json").read_bytes() != before


def test_killed_trainings_go_on(
    values: Values, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """First all of `dagster job execute` is killed, then the training of the next run."""
    encoded = train_to_end(values(), tmp_path / "encoded", "--task", "sft:data_process")
    given = {k: v for k, v in values(**LONG).items() if k != "dataset_metadata_path"}
    given |= {"dataset_base_path": str(encoded), "task": "sft:train"}
    undisturbed = train_to_end(given, tmp_path / "undisturbed")
    folder, run = tmp_path / "b", tmp_path / "b" / "run"
    write_recipe(folder / "recipes", "tiny", {**given, "output_path": str(run)})
    env, log = environment(home(folder / "home"), folder / "recipes"), folder / "log"
    (folder / "temp").mkdir()
    env["TMPDIR"] = str(folder / "temp")

    process = start(job("train_tiny"), env, log)
    wait_until_training(run, process, log)
    first = wait_for_state(run, 0, lambda: process.poll() is None)
    assert list((folder / "temp").glob("diffsynth-launch-*"))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    wait_for(lambda: not processes_about(str(run)), 60, "no process is left")
    assert not list((folder / "temp").glob("diffsynth-launch-*"))

    second: list[int] = []

    def kill() -> None:
        second.append(wait_for_state(run, first + 20, lambda: True))
        ForkedProcesses.newest.kill()

    killer = threading.Thread(target=kill)
    with dg.DagsterInstance.from_config(str(folder / "home")) as instance, forked_launches():
        killer.start()
        events = execute(folder / "recipes", "train_tiny", instance)
    killer.join()
    assert any(event.event_type == dg.DagsterEventType.RUN_SUCCESS for event in events)
    said = capfd.readouterr().err
    assert "tried again in 5 s" in said
    assert said.count("going on after step") == 2
    assert (
        said.count("the training in the run folder is not finished; the training goes on after")
        == 2
    )
    assert "run it again: the training goes on after step" in said

    record, facts = json.loads((run / "run.json").read_text()), told(folder)
    assert len(record["resumed_from"]) == 2
    assert record["resumed_from"][0] >= first
    assert record["resumed_from"][1] >= second[0]
    assert facts["resumed_after_step"].value == str(record["resumed_from"][1])
    assert facts["trained_in_this_run"].value
    for name in record["checkpoints"]:
        one, other = (load_file(f / name) for f in (undisturbed, run))
        assert all(bool((one[tensor] == other[tensor]).all()) for tensor in one)
