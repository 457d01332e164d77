"""Two hundred nights: a recipe that is trained again by itself, with edits, kills and restarts."""

import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import dagster as dg
import psutil
import pytest
from conftest import lora_values
from dagster_support import told, wait_for, write_recipe
from deployment_support import Deployment, deployed
from recipe_edits import EDITS, FORMATS, Recipe
from soak_support import make_attempt, start_server

from resources.places import CPU
from resources.run_locks import lock_state, locks_folder, process_of

NIGHT_WITHIN = 420.0
AGAIN_AFTER = 20.0
"""A night that failed is tried again at the next time of the cron: here after so many quiet seconds."""
KEPT_SECONDS = 150
KILLS = ("run", "training", "code server", "its child", "daemon", "webserver", "all")
MEASURED = ("bytes of events", "files of events", "bytes of ticks", "files of all")
ENOUGH_TO_GROW = 40
"""So many nights have to be for it to be seen whether something grows; the first fill what is kept."""
STAGED = re.compile(r"-\d+-[0-9a-f]{8}$")
"""How the names of files end that are being written: see `hidden_beside`."""
UNDER_WAY = [
    *(dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING),
    *(dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING),
]


def weights_of(run: Path) -> dict[str, str]:
    """Name → digest of checkpoints and exports in a run folder, but for the promoted ones."""
    files = [*run.glob("*.safetensors"), *(run / "exports").glob("*/*.safetensors")]
    files = [p for p in files if p.parent.name != "current"]
    return {str(p.relative_to(run)): blake2b(p.read_bytes()).hexdigest() for p in files}


@dataclass
class Soak:
    """Nights of one recipe, and what was counted in them.

    Attributes:
        seen: run → its status at the last look.
        sizes: at the end of each night: see `MEASURED`.
    """

    deployment: Deployment
    instance: dg.DagsterInstance
    recipe: Recipe
    source: random.Random
    show: Callable[[str], None]
    counted: dict[str, Counter[str]] = field(
        default_factory=lambda: {name: Counter() for name in ("edits", "kills", "runs", "reasons")}
    )
    seen: dict[str, dg.DagsterRunStatus] = field(default_factory=dict[str, dg.DagsterRunStatus])
    sizes: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    wanted: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    again: int = 0

    @property
    def run(self) -> Path:
        return Path(self.recipe.values["output_path"])

    def night(self, number: int) -> None:
        """One edit, perhaps one kill, and all that follows by itself."""
        edit = self.source.choice(EDITS) if number else "first"
        kill = self.source.choice(KILLS) if number and self.source.random() < 1 / 3 else None
        real, by_cron = self.source.random() < 1 / 20, self.source.random() < 1 / 10
        before = (self.run / "run.json").read_bytes() if number else b""
        self.recipe.edit(edit)
        if edit in ("parameter", "formats"):
            self.deployment.reload()
        self.deployment.real.touch() if real else self.deployment.real.unlink(missing_ok=True)
        began = time.time()
        if not by_cron:
            self.begin()
        if kill is not None:
            self.kill(kill)
        self.settle(began)
        after = (self.run / "run.json").read_bytes()
        if edit in ("nothing", "formats"):
            assert after == before, f"night {number}: nothing to train had changed"
        self.counted["edits"][edit] += 1
        self.counted["runs"]["real launches"] += real
        self.counted["runs"]["nights of the cron alone"] += by_cron
        how = f"{edit}{'' if kill is None else f', killed: {kill}'}{', real' * real}"
        self.measure()
        self.show(f"night {number}: {how}: {time.time() - began:.0f} s, {self.sizes[-1]}")

    def begin(self) -> None:
        staged = self.deployment.night.with_name("night.staged")
        staged.write_text(repr(time.time()))
        staged.replace(self.deployment.night)

    def kill(self, kind: str) -> None:
        """Kill something while the night goes on, and start it again as whoever looks after it does."""
        deployment, wait = self.deployment, self.source.uniform(0, 4)
        if kind in ("run", "training"):
            find = self._run_process if kind == "run" else self._training_process
            until = time.monotonic() + 30
            while (found := find()) is None and time.monotonic() < until:
                self.look()
                time.sleep(0.1)
            time.sleep(wait / 2)
            victim = find() or found
            self.counted["kills"][kind if victim else f"{kind} (there was none)"] += 1
            if victim is not None:
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
            return
        time.sleep(2 * wait)
        self.counted["kills"][kind] += 1
        if kind == "all":
            for name in ("webserver", "daemon", "code server"):
                deployment.stop(name)
        elif kind == "its child":
            child = deployment.child_of_code_server()
            if child is not None:
                child.kill()
        else:
            child = deployment.child_of_code_server() if kind == "code server" else None
            deployment.stop(kind, signal.SIGKILL)
            if child is not None:
                child.kill()
        time.sleep(self.source.uniform(0, 3))
        for name in ("code server", "daemon", "webserver"):
            deployment.start(name)
        deployment.wait()
        if kind == "its child":  # nobody but a person starts another one, or a run that is launched
            deployment.reload()

    def _run_process(self) -> int | None:
        for lock in locks_folder(self.instance).glob("[!.]*"):
            with suppress(FileNotFoundError):
                if process := process_of(lock):
                    return process
        return None

    def _training_process(self) -> int | None:
        forks = psutil.Process(self.deployment.processes["forks"].pid)
        with suppress(psutil.NoSuchProcess):
            for watching in forks.children()[1:]:  # the first one forks runs
                for training in watching.children():
                    return training.pid
        return None

    def settle(self, began: float) -> None:
        """Wait until all is made that the recipe and its data say, and nothing is under way."""
        wanted, until = self.reference(), time.time() + NIGHT_WITHIN
        quiet = time.time()
        while True:
            under_way = self.look()
            if under_way:
                quiet = time.time()
            wrong = self.wrong(wanted)
            listed = self.listed()
            if listed > began and not wrong and time.time() - max(quiet, listed) > 3:
                return
            assert time.time() < until, (
                f"after {NIGHT_WITHIN} s: {wrong}; {under_way}; {listed - began}"
            )
            if time.time() - quiet > AGAIN_AFTER and (wrong or listed <= began):
                self.again += listed > began
                self.begin()
                quiet = time.time()
            time.sleep(0.7)

    def reference(self) -> dict[str, str]:
        """What a training from nothing makes of the recipe, by the trainer's command line."""
        state = self.recipe.state
        if state not in self.wanted:
            folder = self.deployment.folder / "reference"
            shutil.rmtree(folder / "run", ignore_errors=True)
            own = {"output_path": str(folder / "run"), "cache_path": str(folder / "cache")}
            values = {k: v for k, v in self.recipe.values.items() if k != "retrain"}
            path = write_recipe(folder, "recipe", values | own)
            done = make_attempt(start_server(), "command", path)
            assert done.code == 0, done.said
            self.wanted[state] = weights_of(folder / "run")
        return self.wanted[state]

    def wrong(self, wanted: dict[str, str]) -> str:
        """What is not as it has to be; empty if all is."""
        with suppress(FileNotFoundError):
            if weights_of(self.run) != wanted:
                return "the exports are others"
            current = self.run / "exports" / "current"
            promoted = {
                f"exports/{p.relative_to(current)}": blake2b(p.read_bytes()).hexdigest()
                for p in current.glob("*/*.safetensors")
            }
            if promoted != {name: digest for name, digest in wanted.items() if "/" in name}:
                return "the promoted exports are others"
            return ""
        return "files are being written"

    def listed(self) -> float:
        """When the data set was last listed, by a run of a night."""
        event = self.instance.get_latest_materialization_event(dg.AssetKey(["tiny", "data"]))
        return 0.0 if event is None else event.timestamp

    def look(self) -> list[str]:
        """Take up what became of the runs; those that are under way."""
        under_way: list[str] = []
        for run in self.instance.get_runs(limit=40):
            if run.status == self.seen.get(run.run_id):
                continue
            self.seen[run.run_id] = run.status
            if run.is_finished:
                self.counted["runs"][run.status.value] += 1
            if run.status == dg.DagsterRunStatus.FAILURE:
                self.counted["reasons"][self._reason(run.run_id)] += 1
        for run_id, status in self.seen.items():
            if status in UNDER_WAY:
                run = self.instance.get_run_by_id(run_id)
                assert run is not None, f"the run {run_id} is lost"
                if run.is_finished:
                    continue  # it is taken up at the next look
                under_way.append(
                    f"{run.job_name} {sorted(map(str, run.asset_selection or ()))}: {run.status}"
                )
        return under_way

    def _reason(self, run_id: str) -> str:
        events = [e.dagster_event for e in self.instance.all_logs(run_id) if e.dagster_event]
        reasons = told(events).reasons or [e.message or "" for e in events if e.is_failure]
        return (reasons[0] if reasons else "no reason").splitlines()[0][:110]

    def measure(self) -> None:
        home = self.deployment.home
        history, schedules = ([*(home / name).rglob("*")] for name in ("history", "schedules"))
        everything = sum(len(files) for _, _, files in os.walk(self.deployment.folder))
        self.sizes.append((bytes_of(history), len(history), bytes_of(schedules), everything))


def bytes_of(files: Iterable[Path]) -> int:
    size = 0
    for path in files:
        with suppress(FileNotFoundError):  # it is being deleted
            size += path.stat().st_size
    return size


def left_over(soak: Soak) -> list[str]:
    """What is there that should not be, when all has ended but what runs for ever."""
    deployment, instance = soak.deployment, soak.instance
    found = [f"lock of a run: {p}" for p in locks_folder(instance).iterdir()]
    place = deployment.folder / "places" / CPU
    found += [] if lock_state(place) == "free" else [f"{place} is {lock_state(place)}"]
    found += [f"temporary: {p}" for p in (deployment.folder / "tmp").rglob("diffsynth*")]
    files = deployment.folder.rglob(".*")
    found += [f"staged: {path}" for path in files if STAGED.search(path.name)]
    for pool in instance.event_log_storage.get_pool_limits():
        taken = instance.event_log_storage.get_concurrency_info(pool.name)
        if taken.active_slot_count or taken.pending_step_count or taken.assigned_step_count:
            found.append(f"place in a pool: {taken}")
    shards = {p.stem for p in (deployment.home / "history" / "runs").glob("[!.]*.db")} - {"index"}
    found += [f"events of no run: {run}" for run in shards - set(instance.get_run_ids())]
    return found


@contextmanager
def soaked(
    folder: Path, model: Path, pictures: Path, seed: int, show: Callable[[str], None]
) -> Generator[Soak]:
    """A deployment with one recipe, at its first night."""
    data = Path(shutil.copytree(pictures, folder / "data"))
    values = lora_values(model, data, folder / "cache") | {
        "output_path": str(folder / "run"),
        "retrain": {"cron": "* * * * *"},
        "export_formats": FORMATS[0],
        "promote_margin": 1e9,
        "retries": 1,
        "runs_keep": 2,
    }
    source = random.Random(seed)
    recipe = Recipe(source, folder / "recipes" / "tiny.yaml", data, values)
    recipe.captions = {f"{index}.png": f"picture {index}" for index in range(8)}
    recipe.write()
    with (
        deployed(folder, DIFFSYNTH_DAGSTER_KEEP_RUNS_DAYS=str(KEPT_SECONDS)) as deployment,
        dg.DagsterInstance.from_config(str(deployment.home)) as instance,
    ):
        yield Soak(deployment, instance, recipe, source, show)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_two_hundred_nights(
    tmp_path: Path, tiny_qwen: Path, pictures: Path, show: Callable[[str], None]
) -> None:
    """`SOAK_SEED` and `SOAK_NIGHTS` in the environment choose others; `SOAK_MINUTES` ends it earlier."""
    seed = int(os.environ.get("SOAK_SEED", random.randrange(1 << 32)))
    nights = int(os.environ.get("SOAK_NIGHTS", "200"))
    until = time.monotonic() + 60 * float(os.environ.get("SOAK_MINUTES", "inf"))
    show(f"SOAK_SEED={seed}, in {tmp_path}")
    began, done = time.monotonic(), 0
    with soaked(tmp_path, tiny_qwen, pictures, seed, show) as soak:
        for number in range(nights):
            soak.night(number)
            done += 1
            if time.monotonic() > until:
                break
        deployment = soak.deployment
        report(soak, done, time.monotonic() - began)
        for name in ("daemon", "webserver"):
            deployment.stop(name)
        wait_for(lambda: not soak.look(), 60, "all runs have ended")
        server, forks = (
            psutil.Process(deployment.processes[n].pid) for n in ("code server", "forks")
        )
        ours = [server, deployment.child_of_code_server(), forks, forks.children()[0]]
        leaked = [p.cmdline() for p in deployment.belonging() if p not in ours]
        for name in ("code server", "forks"):
            deployment.stop(name)
        left = wait_for(lambda: deployment.belonging() == [] or None, 60, "no process is left")
        assert left
        assert left_over(soak) == []
        require_bounded(soak.sizes)
        assert not [line for line in leaked if "resource_tracker" not in " ".join(line)]


def report(soak: Soak, nights: int, seconds: float) -> None:
    soak.show(f"{nights} nights in {seconds:.0f} s; {soak.again} were tried again at the next time")
    for name, counter in soak.counted.items():
        soak.show(f"{name}: {dict(counter.most_common())}")
    for name, sizes in zip(MEASURED, zip(*soak.sizes, strict=True), strict=True):
        soak.show(f"{name} over time: {sizes[:: max(1, nights // 10)]}")


def require_bounded(sizes: list[tuple[int, ...]]) -> None:
    """Fail if the event database has grown in the last half of many nights."""
    if len(sizes) >= ENOUGH_TO_GROW:
        half = [size for size, *_ in sizes[ENOUGH_TO_GROW // 4 : len(sizes) // 2]]
        assert max(size for size, *_ in sizes[len(sizes) // 2 :]) < 2 * max(half), sizes
