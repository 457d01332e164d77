"""Dagster's own daemon, with a recipe that is looked at each minute."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import psutil
import pytest
from conftest import ROOT, lora_values
from dagster_support import environment, home, start, wait_for, write_recipe
from retrain_support import short

RUN_WITHIN = 600.0
ALL = {"latents", "checkpoints", "exports", "promoted"}


@dataclass
class Daemon:
    """A daemon at work on the recipe `tiny`."""

    data: Path
    instance: dg.DagsterInstance

    def runs(self, *statuses: dg.DagsterRunStatus) -> list[set[str]]:
        """What each run makes beside the list of files, first to last."""
        found = self.instance.get_runs(dg.RunsFilter(statuses=statuses or None))
        return [{short(key) for key in run.asset_selection or ()} - {"data"} for run in found][::-1]

    def wait_for_runs(self, *wanted: set[str], after: int = 0) -> int:
        """Wait until runs of these assets, and no others, have succeeded in this order.

        Args:
            after: how many runs before are left out.

        Returns:
            The count of all runs.
        """

        def found() -> bool:
            done = list(filter(None, self.runs(dg.DagsterRunStatus.SUCCESS)[after:]))
            assert done == list(wanted)[: len(done)]
            return done == list(wanted)

        wait_for(found, RUN_WITHIN, f"runs of {wanted}")
        return len(self.runs())

    def wait_for_quiet(self, runs: int) -> None:
        """Wait for some more runs, which must list files alone."""
        count = len(self.runs())
        wait_for(lambda: len(self.runs()) >= count + runs, RUN_WITHIN, f"{runs} minutes")
        assert not any(self.runs()[count:])

    def facts(self, kind: str) -> dict[str, object]:
        event = self.instance.get_latest_materialization_event(dg.AssetKey(["tiny", kind]))
        assert event is not None
        assert event.asset_materialization is not None
        return {n: v.value for n, v in event.asset_materialization.metadata.items()}


@pytest.fixture
def daemon(tmp_path: Path, tiny_qwen: Path, pictures: Path) -> Iterator[Daemon]:
    data = Path(shutil.copytree(pictures, tmp_path / "data"))
    values = lora_values(tiny_qwen, data, tmp_path / "cache")
    values |= {"output_path": str(tmp_path / "run"), "retrain": {"cron": "* * * * *"}}
    write_recipe(tmp_path / "recipes", "tiny", values)
    folder = home(tmp_path / "home")
    workspace = str(ROOT / "workspace.yaml")
    arguments = ["-m", "dagster._daemon", "run", "-w", workspace]
    with dg.DagsterInstance.from_config(str(folder)) as instance:
        instance.get_runs_count()  # it makes the databases, which two processes must not do at once
        process = start(arguments, environment(folder, tmp_path / "recipes"), tmp_path / "log")
        try:
            yield Daemon(data, instance)
        finally:
            daemon = psutil.Process(process.pid)
            started = [daemon, *daemon.children(recursive=True)]
            for each in started:
                each.terminate()
            for each in psutil.wait_procs(started, timeout=20)[1]:
                each.kill()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_minutes_of_a_daemon(daemon: Daemon) -> None:
    """A first training; minutes in which nothing has changed; one caption."""
    daemon.wait_for_runs({"weights"}, {"metadata"}, ALL)
    daemon.wait_for_quiet(3)
    table, count = daemon.data / "metadata.csv", len(daemon.runs())
    table.write_text(table.read_text().replace("picture", "drawing", 1))
    daemon.wait_for_runs({"metadata"}, ALL, after=count)
    facts = daemon.facts("latents")
    assert (facts["misses/prompt"], facts["misses/image"]) == (1, 0)
    assert daemon.facts("checkpoints")["trained_in_this_run"] is True
    daemon.wait_for_quiet(2)
