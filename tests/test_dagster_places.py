"""A GPU has one training at a time: who waits, for whom, and who has which."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import dagster as dg
import psutil
import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ROOT, Values, train_to_end
from dagster_support import (
    definitions_of,
    endless,
    environment,
    has_stepped,
    home,
    processes_about,
    require_gone,
    wait_for,
    write_recipe,
)
from server_support import Server, serve
from test_dagster_ui import STARTS_WITHIN

from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.config.recipe import RecipeOptions
from diffsynth_dagster.errors import ParameterError
from resources import Launcher, load_recipes
from resources.places import Holder, Place, holder, take
from resources.pools import VARIABLE, devices_of, how_many, pool_of, pools_set, warn_of_waiting
from resources.run_launcher import WatchedRunLauncher
from resources.run_locks import held, locks_folder, process_of

Patch = pytest.MonkeyPatch
STARTED, QUEUED = dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.QUEUED


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("DIFFSYNTH_DAGSTER_PLACES", str(tmp_path / "places"))
    monkeypatch.delenv(VARIABLE, raising=False)


def now(devices: list[str], count: int, who: str = "demo/checkpoints") -> Place | str:
    """The place, or on whom it would wait."""

    class Waits(Exception):
        pass

    def refuse(line: str) -> None:
        raise Waits(line)

    try:
        return take(devices, count, holder(who, "run-of-" + who), refuse)
    except Waits as waits:
        return str(waits)


def test_pools_are_read_from_the_setting(monkeypatch: Patch) -> None:
    monkeypatch.setenv(VARIABLE, "night=0,1  big=GPU-3f2a,MIG-1/2/0")
    assert pools_set() == {"night": ("0", "1"), "big": ("GPU-3f2a", "MIG-1/2/0")}
    assert pool_of(RecipeOptions()) == "night"
    assert devices_of(pool_of(RecipeOptions(pool="big"))) == ("GPU-3f2a", "MIG-1/2/0")
    with pytest.raises(ParameterError, match="there is no pool 'gpu'; there is 'night', 'big'"):
        pool_of(RecipeOptions(pool="gpu"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpu", "'gpu' is no pool with devices"),
        ("gpu=", "'gpu=' is no pool with devices"),
        ("=0", "'=0' is no pool with devices"),
        ("gpu=0, 1", "'gpu=0,' is no pool with devices"),
        ("gpu=0,0", "the pool 'gpu' has a device twice"),
        ("gpu=0 gpu=1", "the pool 'gpu' is there twice"),
        ("gpu=all", "'all' is no id of a device"),
    ],
)
def test_a_setting_that_cannot_be_read_says_why(monkeypatch: Patch, text: str, said: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ParameterError, match=said) as raised:
        pools_set()
    assert f"{VARIABLE} = {text}" in str(raised.value)
    assert "write it like" in str(raised.value)


def test_devices_of_a_machine(monkeypatch: Patch) -> None:
    for visible, devices in {"2,3": ("2", "3"), "": (), "-1": (), "none": ()}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert devices_of("gpu") == devices


def test_a_recipe_takes_all_of_its_pool_or_so_many() -> None:
    assert how_many(RecipeOptions(), "gpu", ("0", "1")) == 2
    assert how_many(RecipeOptions(gpus=1), "gpu", ("0", "1")) == 1
    assert how_many(RecipeOptions(), "gpu", ()) == 0
    with pytest.raises(ParameterError, match="asks for 3 GPUs, and the pool 'gpu' has 2"):
        how_many(RecipeOptions(gpus=3), "gpu", ("0", "1"))
    with pytest.raises(ParameterError, match="asks for 1 GPU, and there is none here"):
        how_many(RecipeOptions(gpus=1), "gpu", ())


def test_a_recipe_names_a_pool_that_there_is(
    values: Values, tmp_path: Path, monkeypatch: Patch
) -> None:
    write_recipe(tmp_path, "plain", values(output_path=str(tmp_path / "a")))
    write_recipe(tmp_path, "big", {**values(output_path=str(tmp_path / "b")), "pool": "big"})
    sound, (broken,) = load_recipes(tmp_path)
    assert [recipe.name for recipe in sound] == ["plain"]
    assert "there is no pool 'big'; there is 'gpu'" in str(broken.error)
    monkeypatch.setenv(VARIABLE, "night=0 big=1")
    definitions = definitions_of(tmp_path)
    for name, pool in (("plain", "night"), ("big", "big")):
        for kind in ("latents", "checkpoints"):
            assert definitions.get_assets_def(dg.AssetKey([name, kind])).op.pool == pool


def test_devices_are_taken_all_at_once_or_none() -> None:
    first = now(["0", "1", "2"], 2, "cats/checkpoints")
    assert isinstance(first, Place)
    assert first.devices == ("0", "1")
    waits = now(["0", "1", "2"], 2)
    assert isinstance(waits, str)
    assert waits.startswith(
        "waiting for 2 of the GPUs 0, 1, 2: 0 is used by cats/checkpoints, run "
    )
    assert f"process {os.getpid()}, since 20" in waits
    second = now(["0", "1", "2"], 1)  # the one that waited holds nothing
    assert isinstance(second, Place)
    assert second.devices == ("2",)
    with first, second:
        pass
    third = now(["2", "1"], 2)
    assert isinstance(third, Place)
    with third:
        assert third.devices == ("2", "1")


def test_without_a_gpu_there_is_one_place() -> None:
    with take([], 0, holder("a", "b"), pytest.fail) as place:
        assert place.devices == ()
        assert str(now([], 0)).startswith("waiting for the CPU: cpu is used by a, run b, process ")


def test_who_waits_says_it_once_and_goes_on_when_it_may() -> None:
    said = list[str]()
    first = take(["0"], 1, holder("a", "b"), pytest.fail)
    with first:
        ending = Thread(target=lambda: (time.sleep(1.5), first.__exit__(None, None, None)))
        ending.start()
        before = time.process_time()
        with take(["0"], 1, Holder("c", "d", 1, "now"), said.append) as place:
            assert place.devices == ("0",)
        assert time.process_time() - before < 0.5
    ending.join()
    assert len(said) == 1


def test_a_device_is_free_when_the_last_process_that_holds_it_is_gone(tmp_path: Path) -> None:
    """That is the supervisor, when a run is killed."""
    program = (
        "import subprocess, sys\n"
        "from resources.places import *\n"
        "place = take(['0'], 1, holder('a', 'b'), print)\n"
        "child = subprocess.Popen(['sleep', '60'], pass_fds=place.descriptors)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
    assert run.stdout is not None
    child = psutil.Process(int(run.stdout.readline()))
    try:
        run.kill()
        run.wait()
        assert f"process {run.pid}" in str(now(["0"], 1))
    finally:
        child.kill()
    place = wait_for(lambda: isinstance(p := now(["0"], 1), Place) and p, 10, "it is free")
    with place:
        pass


def test_a_configuration_of_accelerate_does_not_take_other_devices(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    given = {"distributed_type": "MULTI_GPU", "num_machines": 1, "num_processes": 8}
    file.write_text(yaml.safe_dump({**given, "gpu_ids": "6,7", "mixed_precision": "no"}))

    def args(options: RecipeOptions) -> Any:
        command = Launcher()._launch(TrainingConfig(), options, ["2", "3"])
        parsed = launch_command_parser().parse_args([*command[3:], "-m", "train"])
        return _validate_launch_command(parsed)[0]

    config = str(file)
    assert args(RecipeOptions(accelerate_config=config)).gpu_ids == "all"
    assert args(RecipeOptions(accelerate_config=config)).num_processes == 8
    assert args(RecipeOptions(accelerate_config=config, gpus=2)).num_processes == 2
    plain = args(RecipeOptions())
    assert (plain.gpu_ids, plain.num_processes, plain.multi_gpu) == ("all", 2, True)


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(home(tmp_path / "home"))) as instance:
        yield instance


def a_run(instance: dg.DagsterInstance) -> dg.DagsterRun:
    @dg.job
    def other() -> None:
        pass

    return instance.create_run_for_job(other, status=STARTED)


def test_a_started_run_is_failed_when_its_lock_is_free(
    instance: dg.DagsterInstance, monkeypatch: Patch
) -> None:
    launcher, run = instance.run_launcher, a_run(instance)
    assert isinstance(launcher, WatchedRunLauncher)
    assert launcher.supports_check_run_worker_health

    def health() -> str:
        return launcher.check_run_worker_health(run).status.value

    monkeypatch.setattr("resources.run_launcher._GONE_SECONDS", 0)
    assert health() == "RUNNING"  # of another executor, or about to take its lock
    with held(instance, run):
        assert health() == "RUNNING"
    assert health() == "FAILED"
    monkeypatch.setattr("resources.run_launcher._GONE_SECONDS", 60)
    assert health() == "RUNNING"  # it is about to say how it ended
    (locks_folder(instance) / run.run_id).touch()
    assert health() == "FAILED"


@pytest.mark.parametrize(
    ("granularity", "limit", "said"),
    [("op", 1, "granularity: run"), ("run", None, "concurrency set gpu 1")],
)
def test_settings_that_let_waiting_runs_start_are_warned_of(
    tmp_path: Path, granularity: str, limit: int | None, said: str
) -> None:
    """(That ours are not: see `test_dagster_ui.py`.)"""
    pools = {"granularity": granularity, **({"default_limit": limit} if limit else {})}
    settings = {"telemetry": {"enabled": False}, "concurrency": {"pools": pools}}
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(settings))

    @dg.asset
    def trained(context: dg.AssetExecutionContext) -> None:
        for _ in range(2):  # the latents, and the checkpoints
            warn_of_waiting(context, "gpu")

    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        run = dg.materialize([trained], instance=instance).run_id
        warnings = [
            entry.user_message
            for entry in instance.all_logs(run)
            if entry.level == logging.WARNING and "the pool 'gpu'" in entry.user_message
        ]
    (warning,) = warnings
    assert said in warning


@dataclass
class Night:
    """Recipes that never end, in a running `dagster dev`."""

    server: Server
    instance: dg.DagsterInstance

    def record(self, run: str) -> Any:
        (record,) = self.instance.get_run_records(dg.RunsFilter(run_ids=[run]))
        return record

    def status(self, run: str) -> dg.DagsterRunStatus:
        return self.record(run).dagster_run.status

    def process(self, run: str) -> psutil.Process:
        """The process of a run."""
        pid = wait_for(lambda: process_of(locks_folder(self.instance) / run), 60, "it executes")
        return psutil.Process(pid)

    def folder(self, name: str) -> Path:
        return self.server.folder / name

    def is_training(self, name: str) -> None:
        wait_for(lambda: has_stepped(self.folder(name)), 180, f"{name} trains")

    def devices(self, name: str) -> set[str]:
        """What the processes of a training see."""
        processes = processes_about(str(self.folder(name) / ".launch.yaml"))
        return {p.environ()["CUDA_VISIBLE_DEVICES"] for p in processes}

    def servers(self) -> list[psutil.Process]:
        """The code server, and what stands before it."""
        own = psutil.Process(self.server.process.pid).children(recursive=True)
        names = (("code-server", "start"), ("api", "grpc"))
        return [p for p in own if any(set(name) <= set(p.cmdline()) for name in names)]


@pytest.fixture
def night(values: Values, tmp_path: Path, monkeypatch: Patch) -> Iterator[Night]:
    monkeypatch.setenv(VARIABLE, "gpu=0,1")
    encoded = train_to_end(values(), tmp_path / "encoded", "--task", "sft:data_process")
    for name in "abcd":
        recipe = endless(values(), encoded, tmp_path / name)
        write_recipe(tmp_path / "recipes", name, {**recipe, "gpus": 1})
    env = environment(home(tmp_path / "home"), tmp_path / "recipes")
    with (
        dg.DagsterInstance.from_config(env["DAGSTER_HOME"]) as instance,
        serve(tmp_path, env) as server,
    ):
        night = Night(server, instance)
        try:
            yield night
        finally:  # runs outlive a code server that was killed
            for lock in locks_folder(instance).iterdir():
                if (pid := process_of(lock)) is not None:
                    os.kill(pid, signal.SIGKILL)
            for name in "abcd":
                require_gone(tmp_path / name)


def launched_after(instance: dg.DagsterInstance, run: str, moment: float) -> float:
    """Seconds until the queue let a run start. (How long its process then takes is the machine's.)"""
    launched = instance.get_run_stats(run).launch_time
    assert launched is not None
    return launched - moment


def wait_until_it_starts(night: Night, run: str, seconds: float) -> None:
    wait_for(lambda: night.status(run) == STARTED, seconds, f"run {run} starts")


@pytest.mark.soak  # the short form is in `test_dagster_ui.py`
@pytest.mark.timeout(900)
@pytest.mark.parametrize("server_killed", ["all", "inner"])
def test_a_run_waits_without_a_process_and_starts_when_a_place_is_free(
    night: Night, show: Callable[[str], None], server_killed: str
) -> None:
    """One place; then two, each with a device of its own; then `kill -9` of a run and the code server."""
    server, instance = night.server, night.instance
    first = server.launch("a", {})
    night.is_training("a")
    before = set(psutil.Process(server.process.pid).children(recursive=True))
    second = server.launch("b", {})
    time.sleep(12)
    assert night.status(second) == QUEUED
    assert set(psutil.Process(server.process.pid).children(recursive=True)) == before

    instance.event_log_storage.set_concurrency_slots("gpu", 2)
    wait_until_it_starts(night, second, 60)
    night.is_training("b")
    assert [night.devices(name) for name in "ab"] == [{"0"}, {"1"}]

    third = server.launch("c", {})
    time.sleep(6)
    assert night.status(third) == QUEUED
    server.client.terminate_run(second)
    wait_until_it_starts(night, third, 60)
    free = launched_after(instance, third, night.record(second).end_time)
    assert free < STARTS_WITHIN
    night.is_training("c")
    assert [night.devices(name) for name in "ac"] == [{"0"}, {"1"}]

    fourth = server.launch("d", {})
    time.sleep(6)
    assert night.status(fourth) == QUEUED
    killed = [p for p in night.servers() if server_killed == "all" or "api" in p.cmdline()]
    assert len(killed) == (2 if server_killed == "all" else 1)
    began = time.time()
    for process in [night.process(first), *killed]:
        process.kill()
    wait_until_it_starts(night, fourth, 60)
    assert night.status(first) == dg.DagsterRunStatus.FAILURE
    show(
        f"launched {free:.1f} s after the end of a run, "
        f"{launched_after(instance, fourth, began):.1f} s after kill -9; "
        f"started {night.record(fourth).start_time - began:.1f} s after it"
    )
    server.client.terminate_run(third)  # the code server that started it is gone
    assert server.wait(third, 60) == dg.DagsterRunStatus.CANCELED
    require_gone(night.folder("c"))
