"""Recipes that are trained again by themselves."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from conftest import lora_values
from dagster_support import definitions_of, failure_of, write_recipe
from process_support import forked_launches
from retrain_support import CRON, Nights, Stubs, nights_of

from resources import load_recipes

ALL = {"latents", "checkpoints", "exports", "promoted"}
VALUES: dict[str, Any] = {
    "family": "qwen_image",
    "dataset_base_path": "none",
    "dataset_metadata_path": "none/metadata.csv",
    "model_paths": ["none/dit.safetensors"],
    "lora_base_model": "dit",
    "retrain": CRON,
}
MADE = {"customized_dataset": "conftest.write_images"}
SCHEDULE = {"schedule": "0 4 * * *"}
ENCODED = {"task": "sft:train", "dataset_metadata_path": None}


@pytest.mark.soak
def test_nights(
    tmp_path: Path, tiny_qwen: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changes is made anew in the next night, with what follows from it, and nothing else is."""
    data = Path(shutil.copytree(pictures, tmp_path / "data"))
    values: dict[str, Any] = {
        **lora_values(tiny_qwen, data, tmp_path / "cache"),
        "height": 32,
        "width": 32,
        "output_path": str(tmp_path / "run"),
        "retrain": CRON,
    }
    table = data / "metadata.csv"

    def edit(**changes: Any) -> None:
        values.update(changes)
        write_recipe(tmp_path / "recipes", "tiny", values)

    edit()
    with forked_launches(), dg.instance_for_test(temp_dir=str(tmp_path)) as instance:
        nights = nights_of(tmp_path / "recipes", instance)
        assert nights.noon() == []
        assert nights.night() == [{"data"}, {"weights"}, {"metadata"}, ALL]
        assert nights.facts("latents")["misses/prompt"] == 8
        assert nights.night() == [{"data"}]

        monkeypatch.setattr("diffsynth_dagster.__version__", "9.9.9")
        assert nights.night() == [{"data"}]

        table.touch()
        assert nights.night() == [{"data"}, {"metadata"}]

        lines = table.read_text().splitlines()
        lines[1] = lines[1].replace("picture", "drawing", 1)
        table.write_text("\n".join(lines))
        assert nights.noon() == []
        assert nights.night() == [{"data"}, {"metadata"}, ALL]
        latents = nights.facts("latents")
        assert (latents["misses/prompt"], latents["misses/image"]) == (1, 0)
        assert nights.facts("checkpoints")["trained_in_this_run"]

        edit(learning_rate=2e-3)
        assert nights.night() == [{"data"}, ALL - {"latents"}]
        assert "learning_rate" in nights.facts("checkpoints")["trained_because"]

        edit(export_formats=["guide"])
        assert nights.night() == [{"data"}, {"exports", "promoted"}]
        assert nights.night() == [{"data"}]

        # A night that fails is tried again, and nothing goes on from it.
        nights.failing = True
        table.write_text("\n".join([*lines, "none.png,a picture that is not there"]))
        edit(learning_rate=3e-3)
        assert nights.night() == [{"data"}, {"metadata"}]
        assert nights.night() == [{"data"}, {"metadata"}]
        table.write_text("\n".join(lines))
        assert nights.night()[:2] == [{"data"}, {"metadata"}]


class Place:
    """A folder of recipes, made of stubs, and its nights."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance) -> None:
        self.folder = folder
        self.stubs = Stubs(folder / "recipes")
        self.nights = Nights(self.stubs.definitions, instance)
        self.nights.failing = True

    def recipe(self, name: str = "a", **overrides: Any) -> Path:
        values = {**VALUES, "output_path": str(self.folder / name), **overrides}
        given = {key: value for key, value in values.items() if value is not None}
        return write_recipe(self.folder / "recipes", name, given)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with dg.DagsterInstance.ephemeral() as instance:
        made = Place(tmp_path, instance)
        made.recipe()
        yield made


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """An instance that is not in memory alone: a schedule opens it anew."""
    with dg.instance_for_test(temp_dir=str(tmp_path)) as instance:
        yield instance


@pytest.fixture
def made(place: Place) -> Place:
    """After the first night."""
    assert place.nights.night() == [{"data"}, {"weights"}, {"metadata"}, ALL]
    return place


def test_a_failed_night_is_tried_again(made: Place) -> None:
    """What failed, and what was to follow from it; what had succeeded is not made again."""
    nights = made.nights
    made.stubs.files, made.stubs.rows, made.stubs.fails = 1, 1, {"checkpoints"}
    assert nights.night() == [{"data"}, {"metadata"}, ALL]
    assert nights.noon() == []
    assert nights.night() == [{"data"}, ALL - {"latents"}]
    made.stubs.fails.clear()
    assert nights.night() == [{"data"}, ALL - {"latents"}]
    made.recipe(export_formats=["guide"])
    made.stubs.fails = {"exports"}
    assert nights.night() == [{"data"}, {"exports", "promoted"}]
    assert nights.night() == [{"data"}, {"exports", "promoted"}]


def test_a_recipe_that_was_broken_goes_on_when_it_is_mended(made: Place) -> None:
    """Though nothing of what failed had changed."""
    made.recipe(learning_rat=1e-3)
    job = definitions_of(made.folder / "recipes").resolve_job_def("train_a")
    done = job.execute_in_process(instance=made.nights.instance, raise_on_error=False)
    assert not done.success
    made.recipe(learning_rate=1e-3)
    asked = made.nights.night()
    assert asked[:2] == [{"data"}, {"metadata"}]
    assert set.union(*asked[2:]) >= ALL - {"latents"}
    assert made.nights.night() == [{"data"}]


@pytest.mark.soak
def test_a_cancelled_night_is_tried_again(made: Place) -> None:
    made.recipe(learning_rate=1e-3)
    made.nights.now = made.nights.now.replace(day=5, hour=2)
    made.nights.tick()
    made.nights.now = made.nights.now.replace(hour=3)
    assert made.nights.tick() == [{"data"}]
    assert made.nights.ticks(run=False) == [ALL - {"latents"}], "they are not made"
    assert made.nights.night() == [{"data"}, ALL - {"latents"}]
    assert made.nights.night() == [{"data"}]


def test_one_training_for_several_changes(made: Place) -> None:
    """The training waits for what the files turn out to be."""
    made.recipe(learning_rate=1e-3)
    made.stubs.files = 1
    assert made.nights.night() == [{"data"}, {"metadata"}, ALL - {"latents"}]
    made.recipe(learning_rate=2e-3)
    made.stubs.files, made.stubs.rows = 2, 2
    assert made.nights.night() == [{"data"}, {"metadata"}, ALL]
    assert made.nights.night() == [{"data"}]


def test_what_a_person_makes_by_day_waits_for_the_night(made: Place) -> None:
    made.stubs.files, made.stubs.rows = 1, 1
    job = made.stubs.definitions().resolve_implicit_global_asset_job_def()
    by_hand = [dg.AssetKey(["a", kind]) for kind in ("data", "metadata")]
    assert job.execute_in_process(instance=made.nights.instance, asset_selection=by_hand).success
    assert made.nights.noon() == []
    assert made.nights.night() == [{"data"}, ALL]


@pytest.mark.soak
def test_weights_that_are_missing_are_tried_each_night(place: Place) -> None:
    place.stubs.fails = {"weights"}
    assert place.nights.night() == [{"data"}, {"weights"}, {"metadata"}]
    place.stubs.fails.clear()
    assert place.nights.night() == [{"data"}, {"weights"}, ALL]
    assert place.nights.night() == [{"data"}]


def test_a_recipe_that_fails_holds_up_no_other(place: Place) -> None:
    """Weights are shared, and each recipe has a night of its own."""
    place.recipe("b", retrain={"cron": "0 12 * * *", "timezone": "Asia/Tokyo"})
    place.stubs.fails = {"a/metadata"}
    place.nights.night()  # it is noon in Tokyo
    made = {
        event.step_materialization_data.materialization.asset_key.to_user_string()
        for event in place.nights.events
        if event.event_type == dg.DagsterEventType.ASSET_MATERIALIZATION
    }
    assert made == {"a/data", "weights/none/dit", *(f"b/{k}" for k in ("data", "metadata", *ALL))}


@pytest.mark.soak
def test_encoded_samples_of_another_recipe(place: Place) -> None:
    """A recipe without a data set looks at its times at what it depends on."""
    place.recipe("a", task="sft:data_process")
    place.recipe(
        "b", **ENCODED, dataset_base_path=str(place.folder / "a"), retrain={"cron": "0 4 * * *"}
    )
    nights = place.nights
    assert nights.night() == [{"data"}, {"weights"}, {"metadata"}, {"latents"}]
    nights.now = nights.now.replace(hour=4)
    assert nights.ticks() == [ALL - {"latents"}]
    place.stubs.files, place.stubs.rows = 1, 1
    assert nights.night() == [{"data"}, {"metadata"}, {"latents"}]
    nights.now = nights.now.replace(hour=4)
    assert nights.ticks() == [ALL - {"latents"}]
    assert nights.night() == [{"data"}]
    nights.now = nights.now.replace(hour=4)
    assert nights.ticks() == []


@pytest.mark.soak
def test_a_data_set_that_is_made_is_made_each_night(place: Place) -> None:
    place.recipe(**MADE)
    assert place.nights.night()[-1] == ALL
    assert place.nights.night() == [{"data"}, {"metadata"}]


def tick_of(
    schedule: dg.ScheduleDefinition, definitions: dg.Definitions, instance: dg.DagsterInstance
) -> Any:
    """What a schedule asks for. (A context that is not closed leaves the instance behind, for other tests.)"""
    repository = definitions.get_repository_def()
    with dg.build_schedule_context(instance=instance, repository_def=repository) as context:
        return schedule.evaluate_tick(context)


def test_a_whole_training_at_each_time(place: Place, kept: dg.DagsterInstance) -> None:
    place.recipe(retrain={**CRON, "timezone": "Europe/Berlin", "when": "always"})
    definitions = definitions_of(place.folder / "recipes")
    dg.Definitions.validate_loadable(definitions)
    assert not definitions.sensors
    schedule = definitions.resolve_schedule_def("retrain_a")
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("0 3 * * *", "Europe/Berlin")
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING
    (request,) = tick_of(schedule, definitions, kept).run_requests or []
    job = definitions.resolve_job_def("train_a")
    assert schedule.job_name == job.name
    dg.validate_run_config(job, request.run_config)
    assert request.run_config == {"retrain": True}
    under_way = kept.create_run_for_job(job)
    assert under_way.run_id in (tick_of(schedule, definitions, kept).skip_message or "")
    graph = definitions.resolve_asset_graph()
    policies = {
        kind: graph.get(dg.AssetKey(["a", kind])).freshness_policy for kind in ("metadata", *ALL)
    }
    assert {kind for kind, policy in policies.items() if policy} == ALL - {"latents"}
    place.recipe(retrain={"cron": "0 3 * * 1-5", "when": "always"})
    graph = definitions_of(place.folder / "recipes").resolve_asset_graph()
    assert graph.get(dg.AssetKey(["a", "exports"])).freshness_policy


def test_sensors_are_on(place: Place) -> None:
    place.recipe("b", retrain={"files": True})
    definitions = definitions_of(place.folder / "recipes")
    dg.Definitions.validate_loadable(definitions)
    sensors = {sensor.name: sensor for sensor in definitions.sensors or ()}
    assert set(sensors) == {"changed_a", "changed_weights", "files_b"}
    assert {s.default_status for s in sensors.values()} == {dg.DefaultSensorStatus.RUNNING}
    # None is left to a sensor of Dagster's, which is off.
    repository = definitions.get_repository_def()
    assert {sensor.name for sensor in repository.sensor_defs} == set(sensors)


@pytest.mark.parametrize(
    ("retrain", "others", "message"),
    [
        ("0 3 * * *", {}, "'retrain' is not a mapping"),
        ({}, {}, "neither 'cron' nor 'files'"),
        ({"crom": "0 3 * * *"}, {}, "unknown key 'crom' in 'retrain'; did you mean 'cron'"),
        ({**CRON, "timezone": "Mars"}, {}, "'timezone' = 'Mars' in 'retrain' is no time zone"),
        ({**CRON, "timezone": "Europe"}, {}, "is no time zone"),
        ({**CRON, "when": "often"}, {}, "'when' = 'often'"),
        ({**CRON, "when": "always", "files": True}, {}, "whether files have changed or not"),
        ({**CRON, "settle_minutes": 1}, {}, "no 'files: true'"),
        ({"files": True, "timezone": "Asia/Tokyo"}, {}, "'timezone' and no 'cron'"),
        ({"files": True, "settle_minutes": -1}, {}, "'settle_minutes' = '?-1'?"),
        (None, SCHEDULE, "(?s)'schedule' is now `retrain: .* write `retrain: {cron: \"0 4 "),
        ({"files": True}, MADE, "'customized_dataset' writes the files in each run"),
        ({"files": True}, ENCODED, "the recipe has no data set"),
    ],
)
def test_wrong_times_are_refused(
    place: Place, retrain: object, others: dict[str, Any], message: str
) -> None:
    path = place.recipe(retrain=retrain, **others)
    (broken,) = load_recipes(place.folder / "recipes")[1]
    with pytest.raises(type(broken.error), match=message):
        raise broken.error
    assert str(path) in str(broken.error)
    definitions = definitions_of(place.folder / "recipes")
    assert [schedule.name for schedule in definitions.schedules or ()] == ["forget_old_runs"]


@pytest.mark.parametrize("wrong", [{"batch_sise": 4}, {"batch_size": "many"}])
def test_a_recipe_that_breaks_keeps_its_times(
    place: Place, wrong: dict[str, Any], kept: dg.DagsterInstance
) -> None:
    place.recipe(**wrong, retrain={"cron": "0 4 * * *", "timezone": "Asia/Tokyo"})
    definitions = definitions_of(place.folder / "recipes")
    dg.Definitions.validate_loadable(definitions)
    schedule = definitions.resolve_schedule_def("retrain_a")
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("0 4 * * *", "Asia/Tokyo")
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING
    (request,) = tick_of(schedule, definitions, kept).run_requests or []
    result = definitions.resolve_job_def(schedule.job_name).execute_in_process(
        request.run_config, raise_on_error=False
    )
    assert next(iter(wrong)) in failure_of(result, "a__metadata")


def watch(place: Place, cursor: str | None) -> dg.SensorResult:
    """One look of the sensor of the recipe's files."""
    definitions = definitions_of(place.folder / "recipes")
    sensor = definitions.resolve_sensor_def("files_a")
    context = dg.build_sensor_context(
        instance=place.nights.instance,
        cursor=cursor,
        repository_def=definitions.get_repository_def(),
    )
    found = sensor(context)
    assert isinstance(found, dg.SensorResult)
    return found


def later(cursor: str | None, seconds: float) -> str:
    """A cursor after some time in which the files lay still."""
    watched = json.loads(cursor or "")
    return json.dumps({**watched, "since": watched["since"] - seconds})


def test_files_that_lie_still_are_trained_on(place: Place) -> None:
    data = place.folder / "data"
    (data / "more").mkdir(parents=True)
    (data / "metadata.csv").write_text("image,prompt\n")
    place.recipe(
        dataset_base_path=str(data),
        dataset_metadata_path=str(data / "metadata.csv"),
        output_path=str(data / "run"),
        cache_path=str(data / "cache"),
        retrain={"files": True, "settle_minutes": 2},
    )

    def why(found: dg.SensorResult) -> str:
        return str(found.skip_reason and found.skip_reason.skip_message)

    found = watch(place, None)
    assert "waits for a change" in why(found)
    # Hidden files, and what the training itself writes, are no change.
    for own in ("run", "cache", ".hidden"):
        (data / own).mkdir()
        (data / own / "x").touch()
    (data / "more" / ".part").touch()
    found = watch(place, later(found.cursor, 999))
    assert why(found) == "nothing has changed in 1 files"

    (data / "more" / "0.png").write_bytes(b"0")
    found = watch(place, later(found.cursor, 999))
    assert "lain still 120 s more" in why(found)
    (data / "more" / "0.png").write_bytes(b"00")
    found = watch(place, later(found.cursor, 999))
    assert "lain still 120 s more" in why(found), "it is still being written"
    settled = later(found.cursor, 121)
    found = watch(place, settled)
    (request,) = list(found.run_requests or [])
    assert watch(place, settled).run_requests == [request], "the same after a crash"
    assert "nothing has changed in 2 files" in why(watch(place, found.cursor))

    (data / "more" / "0.png").unlink()
    found = watch(place, later(found.cursor, 999))
    found = watch(place, later(found.cursor, 121))
    (other,) = list(found.run_requests or [])
    assert other.run_key != request.run_key
    job = definitions_of(place.folder / "recipes").resolve_job_def("train_a")
    run = place.nights.instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)
    os.utime(data / "metadata.csv", (1, 1))
    found = watch(place, later(found.cursor, 999))
    assert run.run_id in why(watch(place, later(found.cursor, 121)))
