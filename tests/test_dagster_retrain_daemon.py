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
ALL = {"latents", "checkpoints", "exports"}


@dataclass
class Daemon:
    """A daemon at work on the recipe `tiny`."""

    data: Path
    instance: dg.DagsterInstance

    def runs(self) -> list[set[str]]:
        """What each run makes, first to last."""
        runs = reversed(self.instance.get_runs())
        return [{short(key) for key in run.asset_selection or ()} for run in runs]

    def wait_for_runs(self, *wanted: set[str], after: int = 0) -> int:
        """Wait until runs of these assets have succeeded in this order; the count of all runs."""

        def found() -> bool:
            done = [
                {short(key) for key in run.asset_selection or ()}
                for run in reversed(self.instance.get_runs())
                if run.status == dg.DagsterRunStatus.SUCCESS
            ][after:]
            others = [assets for assets in done if assets != {"data"}]
            assert len(others) <= len(wanted), others
            return others == list(wanted)

        wait_for(found, RUN_WITHIN, f"runs of {wanted}")
        return len(self.runs())

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
    wait_for(lambda: ALL in daemon.runs(), RUN_WITHIN, "the first training is asked for")
    count = daemon.wait_for_runs({"weights"}, {"metadata"}, ALL)
    wait_for(lambda: len(daemon.runs()) >= count + 3, RUN_WITHIN, "three minutes")
    assert daemon.runs()[count:] == [{"data"}] * (len(daemon.runs()) - count)
    table = daemon.data / "metadata.csv"
    count = len(daemon.runs())
    table.write_text(table.read_text().replace("picture", "drawing", 1))
    daemon.wait_for_runs({"metadata"}, ALL, after=count)
    facts = daemon.facts("latents")
    assert (facts["misses/prompt"], facts["misses/image"]) == (1, 0)
    assert daemon.facts("checkpoints")["trained_in_this_run"] is True
    count = len(daemon.runs())
    wait_for(lambda: len(daemon.runs()) >= count + 2, RUN_WITHIN, "two minutes")
    assert daemon.runs()[count:] == [{"data"}] * (len(daemon.runs()) - count)
