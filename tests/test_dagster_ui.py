"""The UI's way: a webserver with its daemon on loopback, driven through GraphQL. (In a browser: see
`test_dagster_browser.py`.)"""

import re
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import requests
import yaml
from browser import INSTALL, Browser, browsing, look
from conftest import lora_values, train_to_end
from dagster import DagsterRunStatus
from dagster_graphql import DagsterGraphQLClientError
from dagster_support import (
    endless,
    environment,
    home,
    job,
    require_gone,
    start,
    told,
    wait_for,
    wait_until_training,
    write_recipe,
)
from server_support import Server, serve

MOST_LINES = 60
TABLES = {"metadata.parquet", ".metadata.encoded.parquet", "samples.parquet", "rejected.csv"}
"""What a training that reads encoded samples leaves out."""
CANCELLED = "cancelled: the run was asked to stop"
LAUNCHPAD = """{ runConfigSchemaOrError(selector: {
    repositoryLocationName: "diffsynth_dagster", repositoryName: "__repository__", pipelineName: "train_tiny"
}) { ... on RunConfigSchema { rootDefaultYaml } } }"""
STARTS_WITHIN = 10.0
DESCRIPTIONS = "{ assetNodes { assetKey { path } description } }"
LINEAGE = "{ assetNodes { assetKey { path } dependencyKeys { path } } }"


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, tiny_qwen: Path, pictures: Path
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("ui")
    values = lora_values(tiny_qwen, pictures, folder / "cache")
    values["output_path"] = str(folder / "line")
    write_recipe(folder / "recipes", "tiny", values)
    again = {key: value for key, value in values.items() if key != "dataset_metadata_path"}
    again |= {"dataset_base_path": str(folder / "line"), "task": "sft:train"}
    write_recipe(folder / "recipes", "again", {**again, "output_path": str(folder / "ui")})
    encoded = train_to_end(values, folder / "encoded", "--task", "sft:data_process")
    endless_values = endless(values, encoded, folder / "endless")
    write_recipe(folder / "recipes", "endless", endless_values)
    values |= {"dataset_metadata_path": "none.csv", "output_path": str(folder / "next")}
    write_recipe(folder / "recipes", "next", values)
    env = environment(home(folder / "home"), folder / "recipes")
    with serve(folder, env) as served:
        yield served


def files(run: Path) -> dict[str, bytes]:
    """The weights and pictures of a run folder, and the names of its other files."""
    found = {str(p.relative_to(run)): p for p in run.rglob("*") if p.is_file()}
    same = (".safetensors", ".png")
    return {name: p.read_bytes() if p.suffix in same else b"" for name, p in found.items()}


@pytest.fixture(scope="module")
def printed(server: Server) -> list[str]:
    """What `dagster job execute` prints of a run, line by line."""
    log = server.folder / "line.log"
    process = start(job("train_tiny"), server.env, log)
    try:
        assert process.wait(180) == 0, log.read_text()
    finally:
        process.kill()
    return log.read_text(encoding="utf-8").replace("\r", "\n").splitlines()


def test_command_line_prints_what_a_person_follows(server: Server, printed: list[str]) -> None:
    """And no more."""
    text = "\n".join(printed)
    assert len(printed) < MOST_LINES, text
    for asset in ("metadata", "latents", "checkpoints", "exports", "promoted"):
        (done,) = (x for x in printed if ": done" in x and asset in x.split(":")[0])
        assert "tiny" in done
    assert sum(x.startswith("weights/") and ": done: " in x for x in printed) == 4
    assert any("step 1 of 2: loss" in x for x in printed), text
    assert any("step 2 of 2: loss" in x for x in printed), text
    assert "DEBUG" not in text
    assert "torchvision" not in text
    assert "the pool 'gpu'" not in text  # its settings let runs wait in the queue
    (where,) = (x for x in printed if "the whole log is in the UI" in x)
    assert Path(where.split(" processes in ")[1]).is_file()
    assert printed[-2].startswith("train_tiny: done in ")
    assert printed[-2].endswith(": 9 assets, 5 checks passed")
    current = server.folder / "line" / "exports" / "current"
    assert printed[-1].endswith(f": {current}, {current / 'checkpoint.safetensors'}")


@pytest.mark.usefixtures("printed")
def test_a_description_has_the_address_of_the_newest_curves(server: Server) -> None:
    """Definitions were loaded before the training. (In a browser: `test_dagster_browser.py`.)"""
    nodes = server.client._execute(DESCRIPTIONS)["assetNodes"]
    texts = {"/".join(node["assetKey"]["path"]): node["description"] for node in nodes}
    shown = re.match(r"!\[\]\((/logs/\S+)\)\n\nThe trained weights\.", texts["tiny/checkpoints"])
    assert shown is not None
    answer = requests.get(f"http://127.0.0.1:{server.port}{shown[1]}", timeout=20)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/svg+xml")
    assert "mean of 2 steps" in answer.text


@pytest.mark.usefixtures("printed")
def test_unchanged_run_says_so_without_torch(server: Server) -> None:
    """And without a process of its own, so that it takes seconds."""
    (server.folder / "torch.py").write_text("raise ImportError('torch was imported')")
    log = server.folder / "again.log"
    env = {**server.env, "PYTHONPATH": f"{server.folder}:{server.env.get('PYTHONPATH', '')}"}
    process = start(job("train_tiny"), env, log)
    try:
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
    text = log.read_text(encoding="utf-8").replace("\r", "\n")
    assert text.count(": unchanged, because ") == 8, text


@pytest.mark.soak
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("printed")
def test_ui_and_command_line_give_the_same_files(server: Server) -> None:
    """Of what the command line encoded."""
    run = server.launch("again", {"seed": 0})
    assert server.wait(run, 180) == DagsterRunStatus.SUCCESS
    ours, line = files(server.folder / "ui"), files(server.folder / "line")
    assert {"epoch-0.safetensors", "run.json", "metrics.csv"} <= ours.keys()
    assert any(name.startswith("exports/") for name in ours)
    assert ours == {name: line[name] for name in ours}
    left_out = {name for name in line if name not in ours}
    assert left_out == TABLES | {f".tables/{name}" for name in TABLES if name[0] != "."}


def test_launchpad_shows_the_recipe_and_refuses_a_typo(server: Server) -> None:
    schema = server.client._execute(LAUNCHPAD)["runConfigSchemaOrError"]
    shown = yaml.safe_load(schema["rootDefaultYaml"])
    assert shown["output_path"] == str(server.folder / "line")
    with pytest.raises(DagsterGraphQLClientError, match="RunConfigValidationInvalid") as caught:
        server.launch("tiny", {**shown, "lr_scheduler": "cosin"})
    assert "got cosin" in str(caught.value)


def test_lineage_runs_from_weights_and_metadata_to_exports(server: Server) -> None:
    nodes = server.client._execute(LINEAGE)["assetNodes"]
    parents = {
        "/".join(node["assetKey"]["path"]): {"/".join(k["path"]) for k in node["dependencyKeys"]}
        for node in nodes
    }
    weights = {name for name in parents if name.startswith("weights/")}
    assert len(weights) == 4
    assert parents["tiny/promoted"] == {"tiny/exports"}
    assert parents["tiny/exports"] == {"tiny/checkpoints"}
    assert parents["tiny/checkpoints"] == {"tiny/latents"} | weights
    assert parents["tiny/latents"] == {"tiny/metadata"} | weights


@pytest.fixture(scope="module")
def followed(server: Server) -> tuple[str, str]:
    """A run that was cancelled while it trained, and one that waited for its place."""
    folder = server.folder / "endless"
    run = server.launch("endless", {})
    # Dagster's queue sets the limit of a pool that it never saw beside the first run of it.
    status = server.client.get_run_status
    wait_for(lambda: status(run) != DagsterRunStatus.QUEUED, 60, "the first run is launched")
    following = server.launch("next", {})
    assert len(wait_until_training(folder, server.process, server.folder / "log")) >= 3
    assert status(following) == DagsterRunStatus.QUEUED
    locks = server.folder / "home" / "storage" / "run_locks"
    assert [lock.name for lock in locks.iterdir()] == [run]
    server.client.terminate_run(run)
    require_gone(folder)
    return run, following


@pytest.fixture(scope="module")
def cancelled(followed: tuple[str, str]) -> str:
    """A run that was cancelled while it trained."""
    return followed[0]


def test_the_next_run_starts_when_the_place_is_free(
    server: Server, followed: tuple[str, str]
) -> None:
    """(With kills, and with two places: see `test_dagster_places.py`.)"""
    first, following = followed
    assert server.wait(following, 60) == DagsterRunStatus.FAILURE  # it has no table
    with dg.DagsterInstance.from_config(server.env["DAGSTER_HOME"]) as instance:
        ended, launched = (
            instance.get_run_stats(first).end_time,
            instance.get_run_stats(following).launch_time,
        )
    assert ended is not None
    assert launched is not None
    assert 0 < launched - ended < STARTS_WITHIN


def test_cancel_stops_the_training(server: Server, cancelled: str) -> None:
    assert server.wait(cancelled, 60) == DagsterRunStatus.CANCELED
    with dg.DagsterInstance.from_config(server.env["DAGSTER_HOME"]) as instance:
        logs = instance.all_logs(cancelled)
    said = told(entry.dagster_event for entry in logs if entry.dagster_event is not None)
    assert len(said.reasons) == 1
    assert said.reason.startswith(CANCELLED)
    assert not said.trace


def test_page_of_a_run_says_the_reason(server: Server, cancelled: str) -> None:
    """In a real browser. (Graph, launch, losses, checks: `test_dagster_browser.py`, in `make soak`.)"""
    if not Browser.is_installed():
        pytest.skip(f"Chromium is not installed: {INSTALL}")
    with browsing() as browser:
        shown = look(browser, server.port, cancelled, "RUN_CANCELED")
    assert shown.index("STEP_FAILURE") < shown.index(CANCELLED) < shown.index("RUN_CANCELED")
    assert shown.count(CANCELLED) == 1
    assert "Stack Trace" not in shown
    assert "AttributeError" not in shown
