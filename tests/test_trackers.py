"""Trackers get the numbers of every step and the sample pictures. Those that are not installed are
refused with a message."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Values, make_config, why_refused

from diffsynth_dagster.config.validate import TRACKERS
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.run.trackers import project_of

Seen = tuple[dict[int, float], list[int]]
"""Step → loss, and the steps that have a picture."""


def in_tensorboard(run: Path) -> Seen:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = run.rglob("events.out.tfevents.*")
    events: Any = EventAccumulator(str(file), size_guidance={"images": 0})
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    return losses, [event.step for event in events.Images("sample_pictures")]


def in_mlflow(run: Path) -> Seen:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'DiffSynth-Studio'")
    (found,) = client.search_runs([experiment.experiment_id])
    losses = {m.step: m.value for m in client.get_metric_history(found.info.run_id, "loss")}
    images = client.list_artifacts(found.info.run_id, "images")
    names = [Path(image.path).name for image in images if image.path.endswith(".png")]
    return losses, sorted(int(name.replace("%", "+").split("+")[2]) for name in names)


def in_trackio(run: Path) -> Seen:
    from trackio.sqlite_storage import SQLiteStorage

    storage: Any = SQLiteStorage
    (name,) = storage.get_runs("DiffSynth-Studio")
    rows = storage.get_logs("DiffSynth-Studio", name)
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    return losses, [row["step"] for row in rows if "sample_pictures" in row]


READERS: dict[str, Callable[[Path], Seen]] = {
    "tensorboard": in_tensorboard,
    "mlflow": in_mlflow,
    "trackio": in_trackio,
}


@pytest.mark.parametrize("name", list(READERS))
def test_a_tracker_gets_numbers_and_pictures(
    name: str, values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }
    for variable, value in places.items():
        monkeypatch.setenv(variable, value)
    pytest.importorskip(name)
    given = values(
        sample_prompts=["a", "b"],
        sample_num_inference_steps=1,
        sample_steps=1,
        height=32,
        width=32,
        **{f"enable_{name}_log": True},
    )
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(given))
    # A process of its own: trackers keep their run in the process, and files in its folder.
    command = [sys.executable, "-m", "diffsynth_dagster.train", "--recipe", str(recipe)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = Path(given["output_path"])
    losses, pictured = READERS[name](run)
    lines = (run / "metrics.csv").read_text().splitlines()[1:]
    wanted = {int(line.split(",")[0]): float(line.split(",")[2]) for line in lines}
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert pictured == [0, 1, 2]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_refused(
    name: str, values: Values, tmp_path: Path
) -> None:
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    said = why_refused(values(**{f"enable_{name}_log": True}), tmp_path / "run")
    assert f"{name} is not installed" in said
    assert f"pip install {name}" in said


def test_a_run_has_one_project() -> None:
    given: dict[str, Any] = {
        "dataset_base_path": "d",
        "dataset_metadata_path": "m.csv",
        "model_paths": json.dumps(["x.safetensors"]),
        "lora_base_model": "dit",
        "enable_trackio_log": True,
        "trackio_project": "mine/too",
    }
    assert project_of(make_config(given)) == "mine-too"
    with pytest.raises(ParameterError, match="'mlflow_project' and 'trackio_project' differ"):
        make_config({**given, "enable_mlflow_log": True})
