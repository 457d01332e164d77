"""Nights that fail are heard, runs of long ago are forgotten, and tags reach the runs."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import dagster as dg
import pytest
from dagster_support import definitions_of, execute, write_recipe
from test_dagster_definitions import recipe

from assets.launched import ours_of
from assets.prefix import Prefix
from diffsynth_dagster.errors import ParameterError
from jobs import failures, notifications
from jobs.failures import make_failure_sensor, make_failure_sensors
from jobs.notifications import FailedRun, NotTold
from jobs.upkeep import forget_runs, make_upkeep
from resources import load_recipes

BROKEN = recipe(batch_sise=4)
REASON = "unknown parameter 'batch_sise'"


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dg.DagsterInstance]:
    """A real instance in files, for all tests here: each looks at its own runs."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "dagster.yaml").write_text("telemetry: {enabled: false}\n", encoding="utf-8")
    with dg.DagsterInstance.from_config(str(folder)) as made:
        yield made


@dg.op
def fails() -> None:
    raise ValueError("of someone else")


@dg.job
def theirs() -> None:
    fails()


class Sensor:
    """A sensor as the daemon evaluates it: what a tick leaves is what the next one starts from."""

    def __init__(self, sensor: dg.SensorDefinition, instance: dg.DagsterInstance) -> None:
        self._sensor, self._instance = sensor, instance
        self._cursor: str | None = None

    def tick(self) -> list[str]:
        """What the tick ended with: for each failure that was due its error, empty if it was told."""
        context = dg.build_sensor_context(instance=self._instance, cursor=self._cursor)
        done = self._sensor.evaluate_tick(context)
        self._cursor = done.cursor
        return [r.error.message if r.error else "" for r in done.dagster_run_reactions or ()]


@contextmanager
def server(codes: list[int]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A web server that answers with these codes; its address, and what it was sent."""
    heard: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(codes.pop(0) if codes else 200)
            self.send_header("Location", "/")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    web = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=web.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{web.server_port}/secret?token=x", heard
    finally:
        web.shutdown()
        web.server_close()
        thread.join()


def hook(tmp_path: Path, patch: pytest.MonkeyPatch) -> Path:
    """A function of the user's, which writes down what it is told; returns where."""
    heard = tmp_path / "heard.jsonl"
    (tmp_path / "own_hook.py").write_text(
        "import json\n"
        "def hear(failure):\n"
        f"    with open({str(heard)!r}, 'a') as file:\n"
        "        print(json.dumps(failure), file=file)\n"
        "def two(a, b): pass\n",
        encoding="utf-8",
    )
    patch.syspath_prepend(str(tmp_path))
    return heard


def test_failures_are_heard_once_with_their_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instance: dg.DagsterInstance
) -> None:
    """By a function and by an address; those of others by neither. An address that is out of order is told
    again later, and the function not again."""
    heard = hook(tmp_path, monkeypatch)
    path = write_recipe(tmp_path / "recipes", "cats", BROKEN)
    with server([500, 302]) as (address, posted):
        sensors: list[Sensor] = []
        for value in ("own_hook:hear", address):
            monkeypatch.setenv(notifications.VARIABLE, value)
            (sensor,) = make_failure_sensors(["cats__metadata"])
            assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
            sensors.append(Sensor(sensor, instance))
        by_function, by_address = sensors
        assert by_function.tick() == by_address.tick() == []
        execute(tmp_path / "recipes", "train_cats", instance)
        (failed,) = instance.get_runs(limit=1)
        theirs.execute_in_process(instance=instance, raise_on_error=False)
        instance.report_run_failed(failed, "once more, by the daemon")

        assert by_function.tick() == [""]
        assert by_function.tick() == []
        (line,) = heard.read_text().splitlines()
        told = json.loads(line)
        assert told["recipe"] == "cats"
        assert told["run_id"] == failed.run_id
        assert told["job"] == "train_cats"
        assert REASON in told["reason"]
        assert str(path) in told["reason"]
        assert "what to do:" in told["reason"]
        assert "Traceback" not in told["reason"]
        assert datetime.now(UTC) - datetime.fromisoformat(told["when"]) < timedelta(minutes=5)
        assert REASON in told["text"]

        monkeypatch.setattr(failures, "FIRST_WAIT", 0.0)
        (error,) = by_address.tick()
        assert "127.0.0.1 answered 500" in error
        assert "secret" not in error
        (error,) = by_address.tick()
        assert "127.0.0.1 answered 302" in error
        assert by_address.tick() == [""]
        assert by_address.tick() == []
        assert posted == [told] * 3


def test_a_failure_that_cannot_be_told_holds_up_no_other_and_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instance: dg.DagsterInstance
) -> None:
    told: list[tuple[str, str]] = []

    def tell(failed: FailedRun) -> None:
        told.append((failed.run_id, failed.reason))
        if len(told) == 1:
            raise NotTold("no")

    def deaf(failed: FailedRun) -> None:
        raise NotTold("never")

    write_recipe(tmp_path, "cats", BROKEN)
    job = definitions_of(tmp_path).resolve_job_def("train_cats")
    patient, vain = (
        Sensor(make_failure_sensor(t, ["cats__metadata"]), instance) for t in (tell, deaf)
    )
    assert patient.tick() == vain.tick() == []
    first, second = (instance.create_run_for_job(job) for _ in range(2))
    for run in (first, second):
        instance.report_run_failed(run, "Exceeded maximum runtime of 3600 seconds.")
    errors = patient.tick()
    assert errors[0] == ""
    assert "it is told again at" in errors[1]
    assert patient.tick() == []  # not yet
    reason = "Exceeded maximum runtime of 3600 seconds."
    assert told == [(first.run_id, reason), (second.run_id, reason)]
    assert len(vain.tick()) == 2
    assert vain.tick() == []
    monkeypatch.setattr(failures, "GIVEN_UP_AFTER", 0.0)
    later = failures.time.time() + failures.FIRST_WAIT + 1
    monkeypatch.setattr(failures.time, "time", lambda: later)
    assert patient.tick() == [""]
    assert told[2:] == told[:1]
    assert all("it is told no more" in error for error in vain.tick())
    assert vain.tick() == []


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("no_such_module_of_mine:hear", "cannot be imported"),
        ("own_hook:no", "has no attribute 'no'"),
        ("own_hook.two", "cannot be called with (failure)"),
        ("ftp://host/", "no address"),
        ("http://", "no address"),
        ("http://host:port/", "no address"),
    ],
)
def test_nobody_to_tell_is_said_when_the_location_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, words: str
) -> None:
    hook(tmp_path, monkeypatch)
    monkeypatch.setenv(notifications.VARIABLE, value)
    (tmp_path / "recipes").mkdir()
    with pytest.raises(ParameterError) as raised:
        definitions_of(tmp_path / "recipes")
    assert words in str(raised.value)
    assert notifications.VARIABLE in str(raised.value)
    assert raised.value.do


def test_a_function_that_raises_or_hangs_is_an_error_of_the_tick(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed = FailedRun("", "", "", "", "", "")
    with pytest.raises(NotTold, match=r"'hook' raised KeyError: missing: recipe"):
        notifications._call(lambda _: {}["recipe"], "hook", failed)
    monkeypatch.setattr(notifications, "HOOK_SECONDS", 0.1)
    end = Event()
    with pytest.raises(NotTold, match="'hook' did not return within"):
        notifications._call(lambda _: end.wait(), "hook", failed)
    end.set()
    with pytest.raises(NotTold, match="did not answer"):
        notifications._post("http://127.0.0.1:9/", failed)


CHECK = dg.AssetCheckSpec("sound", asset="kept")


@dg.asset(check_specs=[CHECK], op_tags={"diffsynth/own": "true"})
def kept(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    print("seen in the log")
    result = dg.AssetCheckResult(check_name="sound", passed=True)
    return dg.MaterializeResult(
        data_version=dg.DataVersion("1"), check_results=[result], metadata={"n": 1}
    )


@dg.asset(op_tags={"diffsynth/own": "true"})
def seen(context: dg.AssetExecutionContext) -> Any:
    context.log_event(dg.AssetObservation("seen", metadata={"loss": 0.5}))
    raise ValueError("before it is made")


RETAINED = dg.Definitions(
    assets=[kept, seen],
    jobs=[
        dg.define_asset_job("only_kept", dg.AssetSelection.assets("kept")),
        dg.define_asset_job("only_seen", dg.AssetSelection.assets("seen")),
    ],
)


def test_old_runs_are_forgotten_but_for_what_is_newest(instance: dg.DagsterInstance) -> None:
    """Of assets and of others; and what is deleted leaves nothing, not even of its logs."""

    def run(job: dg.JobDefinition) -> str:
        return job.execute_in_process(instance=instance, raise_on_error=False).run_id

    def may_go(run: dg.DagsterRun) -> bool:
        return run.run_id in mine and ours_of(instance, run).all

    make, see = (RETAINED.resolve_job_def(f"only_{name}") for name in ("kept", "seen"))
    old, foreign, newest = [run(make), run(see)], run(theirs), [run(make), run(see)]
    mine = {*old, foreign, *newest}
    assert all(len(list(_files_of(instance, run_id))) >= 2 for run_id in old)  # events, logs
    (forget,) = make_upkeep(Prefix(("team",))).jobs
    assert forget.name == "team_forget_old_runs"
    assert forget.execute_in_process(instance=instance).success  # nothing is old enough
    assert mine <= set(instance.get_run_ids())

    done = forget_runs(instance, datetime.now(UTC) + timedelta(seconds=1), may_go)
    assert set(done.deleted) == set(old)
    assert set(done.kept) == set(newest)
    assert {*newest, foreign} <= set(instance.get_run_ids())
    assert not [path for run_id in old for path in _files_of(instance, run_id)]
    rows = _rows(instance)
    assert not [run_id for run_id in old if run_id in rows]
    assert all(run_id in rows for run_id in newest)

    key = dg.AssetKey("kept")
    (record,) = instance.fetch_materializations(key, limit=10).records
    assert record.run_id == newest[0]
    assert instance.fetch_observations(dg.AssetKey("seen"), limit=1).records
    check = instance.event_log_storage.get_asset_check_execution_history(CHECK.key, limit=10)
    assert [execution.run_id for execution in check] == [newest[0]]
    missing = dg.AutomationCondition.missing()
    automatic = kept.map_asset_specs(lambda s: s.replace_attributes(automation_condition=missing))
    assert dg.evaluate_automation_conditions([automatic], instance).total_requested == 0


def _files_of(instance: dg.DagsterInstance, run_id: str) -> Iterator[Path]:
    return (p for p in Path(instance.root_directory).rglob("*") if run_id in str(p))


def _rows(instance: dg.DagsterInstance) -> str:
    """All that is in the databases that all runs share."""
    history = Path(instance.root_directory) / "history"
    lines: list[str] = []
    for path in (history / "runs.db", history / "runs" / "index.db"):
        with closing(sqlite3.connect(path)) as connection:
            lines += connection.iterdump()
    return "\n".join(lines)


def test_days_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_DAGSTER_KEEP_RUNS_DAYS", "0")
    assert make_upkeep().jobs == make_upkeep().schedules == []
    monkeypatch.setenv("DIFFSYNTH_DAGSTER_KEEP_RUNS_DAYS", "7")
    assert "older than 7 days" in (make_upkeep().schedules[0].description or "")
    monkeypatch.setenv("DIFFSYNTH_DAGSTER_KEEP_RUNS_DAYS", "a week")
    with pytest.raises(ParameterError, match="'a week' is no number of days"):
        make_upkeep()


def test_tags_reach_the_run(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    """Also the run that a schedule starts."""
    tags = {"dagster/priority": 5, "dagster/max_runtime": "3600", "team": "vision"}
    write_recipe(
        tmp_path / "recipes",
        "cats",
        recipe(retrain={"cron": "0 3 * * *", "when": "always"}, tags=tags),
    )
    execute(tmp_path / "recipes", "train_cats", instance, dg.AssetKey(["cats", "metadata"]))
    (run,) = instance.get_runs(limit=1)
    expected = {"dagster/priority": "5", "dagster/max_runtime": "3600", "team": "vision"}
    assert expected.items() <= run.tags.items()
    definitions = definitions_of(tmp_path / "recipes")
    schedule = definitions.resolve_schedule_def("retrain_cats")
    with dg.build_schedule_context(
        instance=instance,
        scheduled_execution_time=datetime.now(UTC),
        repository_def=definitions.get_repository_def(),
    ) as context:
        (request,) = schedule.evaluate_tick(context).run_requests or ()
    job = definitions.resolve_job_def("train_cats")
    assert expected.items() <= {**job.run_tags, **request.tags}.items()


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"dagster/priority": "high"}, "dagster/priority must be a whole number, such as 5"),
        ({"dagster/priority": 1.5}, "dagster/priority must be a whole number"),
        ({"dagster/max_runtime": "1h"}, "dagster/max_runtime must be a number of seconds above 0"),
        ({"dagster/max_runtime": "nan"}, "number of seconds above 0"),
        ({"dagster/max_runtime": 0}, "number of seconds above 0"),
        ({"team": None}, "the value of team must be a text: write it in quotes"),
        ({"team": True}, "write it in quotes"),
        ({"my team": "x"}, "'my team', which is no name of a tag"),
        ({"dagster/run_key": "x"}, "'dagster/run_key', which Dagster sets itself"),
        (["a"], "it must map texts to texts"),
    ],
)
def test_tags_that_cannot_be_are_refused(tmp_path: Path, tags: Any, words: str) -> None:
    path = write_recipe(tmp_path, "cats", recipe(tags=tags))
    sound, (broken,) = load_recipes(tmp_path)
    assert not sound
    assert words in str(broken.error)
    assert str(path) in str(broken.error)
    assert broken.error.do
