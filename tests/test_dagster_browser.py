"""What a person sees and clicks: the real webserver and daemon, in Chromium without a window.

Its pictures are those of `docs/ui.md`: `docs/make_ui.py` keeps them.
"""

import io
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from browser import INSTALL, Browser, browsing, look
from conftest import ROOT, lora_values, train_to_end
from dagster import DagsterRunStatus
from dagster_support import (
    endless,
    environment,
    home,
    require_gone,
    wait_for,
    wait_until_training,
    write_recipe,
)
from PIL import Image
from server_support import Server, serve

# Its page of a cancelled run is in `test_dagster_ui.py` too.
pytestmark = pytest.mark.soak
LARGEST = 120 * 1024
CANCELLED = "cancelled: the run was asked to stop"
MISTAKE = "unknown parameter 'learning_rat'; did you mean 'learning_rate'?"
CHECK = "loss_finite_and_parameters_changed"
NEWEST = """const [image] = [...document.querySelectorAll("img")].filter(
        (x) => x.src.endsWith("/newest/svg") && x.complete && x.naturalWidth);
    const place = image && image.getBoundingClientRect();
    return image && [image.src, image.naturalWidth, Math.round(place.left), Math.round(place.top)]"""
OPEN = 222
"""Pixels that are free of Dagster's "Show more" where a description is longer."""
HELD_OUT = (0xD0, 0x65, 0x1B)
"""The colour of its curve."""
SHOW_CURVE = """[...document.querySelectorAll("tr")].find(
    (row) => row.innerText.startsWith("loss_curve")).querySelector("a").click()"""
CURVE_SHOWN = """const image = document.querySelector("img[src^='data:image/svg+xml']");
    return image && image.naturalWidth"""
EDGES = "return document.querySelectorAll('svg:has(marker[id^=arrow]) > path').length"
PLOTTED = "return document.querySelectorAll('canvas').length > 0"
CAN_LAUNCH = """return [...document.querySelectorAll("button:enabled")].some(
    (button) => button.innerText.includes("Launch Run"))"""
LONG = 120.0
"""Seconds for what takes a tenth of them when nothing else runs."""


@dataclass(frozen=True)
class Window:
    """A browser that looks at a server, and the folder of its pictures."""

    browser: Browser
    server: Server
    pictures: Path

    def open(self, page: str) -> None:
        self.browser.open(f"http://127.0.0.1:{self.server.port}/{page}")

    def keep(self, name: str) -> None:
        path = self.pictures / f"{name}.png"
        self.browser.keep(path)
        assert path.stat().st_size <= LARGEST, name


@pytest.fixture(scope="module")
def window(
    tmp_path_factory: pytest.TempPathFactory, tiny_qwen: Path, pictures: Path
) -> Iterator[Window]:
    """Recipes: `tiny` encodes and trains, `digits` is a short demo, `finished` has been trained, `endless`
    goes on for ever, and `broken` has a mistake."""
    if not Browser.is_installed():
        pytest.skip(f"Chromium is not installed: {INSTALL}")
    folder = tmp_path_factory.mktemp("browser")
    recipes = folder / "recipes"
    values = lora_values(tiny_qwen, pictures, folder / "cache")
    write_recipe(recipes, "tiny", {**values, "output_path": str(folder / "tiny")})
    write_recipe(recipes, "broken", {**values, "learning_rat": 0.1})
    write_recipe(recipes, "digits", short_demo(folder))
    encoded = train_to_end(values, folder / "encoded", "--task", "sft:data_process")
    write_recipe(recipes, "endless", endless(values, encoded, folder / "endless"))
    finished = {**endless(values, encoded, folder / "finished"), "num_epochs": 1}
    write_recipe(recipes, "finished", finished)
    train_to_end(finished, folder / "finished")
    env = environment(home(folder / "home"), recipes)
    kept = Path(os.environ.get("BROWSER_PICTURES", folder))
    with ExitStack() as leaving:
        server = leaving.enter_context(serve(folder, env))
        yield Window(leaving.enter_context(browsing()), server, kept)


def short_demo(folder: Path) -> dict[str, Any]:
    """The demo with a third of its steps, and without its evaluation."""
    demo = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text(encoding="utf-8"))
    del demo["customized_evaluation"]
    data = folder / "digits_data"
    return {
        **demo,
        "dataset_base_path": str(data),
        "dataset_metadata_path": str(data / "metadata.csv"),
        "validation_metadata_path": str(data / "held_out.csv"),
        "dataset_repeat": 8,
        "validation_steps": 23,
        "sample_steps": 46,
        "cache_path": str(folder / "cache"),
        "output_path": str(folder / "digits"),
    }


def newest(window: Window) -> tuple[str, Image.Image]:
    """What the page of the digits' checkpoints shows first, in this session of the browser, without a
    click: the picture's content, and how it looks."""
    window.open("assets/digits/checkpoints")
    window.browser.wait("Description", seconds=60)
    place = wait_for(lambda: window.browser.run(NEWEST), 30, "the picture is loaded")
    source, width, left, top = place
    assert width > 600
    seen = Image.open(io.BytesIO(window.browser.picture())).convert("RGB")
    part = seen.crop((left, top, left + width, top + OPEN))
    assert top + OPEN < seen.height
    return requests.get(source, timeout=20).text, part


def test_the_page_of_checkpoints_opens_with_samples_and_curves(window: Window) -> None:
    """While it trains, and at its end, though the browser has seen an older picture."""
    run = window.server.launch("digits", {})
    pictured = window.server.folder / "digits" / "samples" / "step-46.png"
    wait_for(pictured.is_file, 2 * LONG, "samples while it trains")
    time.sleep(2)  # until it is shown
    text, before = newest(window)
    assert "step 46" in text
    assert "step 184" not in text
    window.browser.open("about:blank")  # The page of a run that goes on takes a core.
    assert window.server.wait(run, 2 * LONG) == DagsterRunStatus.SUCCESS
    text, after = newest(window)
    assert "step 184" in text
    assert "a handwritten eight" in text
    assert before.tobytes() != after.tobytes()
    colours = {colour: count for count, colour in after.getcolors(1 << 20) or []}
    assert colours[HELD_OUT] > 50  # the curve
    dark = sum(after.convert("L").histogram()[:20])
    assert dark > 10 * 88 * 88 / 3  # ten digits on black
    window.keep("checkpoints")
    window.browser.click("Plots")
    wait_for(lambda: window.browser.run(PLOTTED), 30, "the losses are plotted")
    window.browser.show("held_out_loss")
    window.keep("loss")
    window.browser.click("Table")
    window.browser.wait("loss_curve")
    window.browser.run(SHOW_CURVE)
    assert wait_for(lambda: window.browser.run(CURVE_SHOWN), 30, "the curve is shown") == 640


@pytest.fixture(scope="module")
def launched(window: Window) -> str:
    """The run of `endless`, launched by clicks in the Launchpad, which shows the recipe's values."""
    browser = window.browser
    window.open("locations/diffsynth_dagster/jobs/train_endless/playground")
    encoded = window.server.folder / "encoded"
    browser.wait("batch_size: 4", f"dataset_base_path: {encoded}", "family: qwen_image", seconds=60)
    browser.wait("No errors")
    wait_for(lambda: browser.run(CAN_LAUNCH), 30, "the config is checked")
    window.keep("launchpad")
    browser.click("Launch Run")
    wait_for(lambda: "/runs/" in browser.address(), 60, "the page of the run is open")
    return browser.address().split("/runs/")[1].split("?")[0]


@pytest.fixture(scope="module")
def waiting(window: Window, launched: str) -> str:
    """The run of `finished`, launched while `endless` has the place."""
    # Dagster's queue sets the limit of a pool that it never saw beside the first run of it.
    status = window.server.client.get_run_status
    wait_for(lambda: status(launched) != DagsterRunStatus.QUEUED, LONG, "the first run is launched")
    run = window.server.launch("finished", {})
    assert run != launched
    return run


def test_the_graph_shows_assets_and_edges(window: Window) -> None:
    """Five edges from `data` to `promoted`, and from each of four weights to latents and checkpoints."""
    browser = window.browser
    window.open("locations/diffsynth_dagster/asset-groups/tiny/lineage")
    shown = ("data", "metadata", "latents", "checkpoints", "exports", "promoted")
    weights = ("text_encoder_", "tokenizer_", "transformer_", "vae_")
    browser.wait(*(f"\n{name}" for name in (*shown, *weights)), seconds=60)
    wait_for(lambda: browser.run(EDGES) == 5 + 4 * 2, 30, "the edges are drawn")
    window.keep("graph")


def test_a_launch_by_clicks_leads_to_the_page_of_the_run(window: Window, launched: str) -> None:
    window.browser.wait(f"Runs\n/\n{launched[:8]}", "Run of \ntrain_endless", seconds=60)
    assert window.server.client.get_run_status(launched) is not None


def test_a_broken_recipe_says_its_mistake(window: Window) -> None:
    """In the description of its assets, and on the page of a run, which waits for no place."""
    browser, server = window.browser, window.server
    run = server.launch("broken", {})
    window.open("assets/broken/checkpoints")
    browser.wait("This recipe cannot be used", MISTAKE, "what to do:", seconds=60)
    window.keep("broken")
    server.wait(run, LONG)
    shown = look(browser, server.port, run, "RUN_FAILURE")
    assert "Failure" in shown
    assert shown.index("STEP_FAILURE") < shown.index(MISTAKE) < shown.index("RUN_FAILURE")
    assert "Stack Trace" not in shown


@pytest.fixture(scope="module")
def training(window: Window, launched: str) -> str:
    """The run of `endless`, which has made a step."""
    server = window.server
    window.browser.open("about:blank")  # The page of a run that goes on takes a core.
    wait_until_training(server.folder / "endless", server.process, server.folder / "log")
    return launched


def test_a_run_waits_while_another_one_trains(window: Window, waiting: str, training: str) -> None:
    window.open(f"runs/{waiting}")
    shown = window.browser.wait("This run is queued for execution")
    assert "Queued" in shown
    assert training not in shown
    window.open("runs")
    shown = window.browser.wait("train_finished", "train_endless")
    assert shown.index("train_finished") < shown.index("Queued…") < shown.index("train_endless")
    window.keep("waiting")


def test_the_loss_is_shown_while_it_trains(window: Window, training: str) -> None:
    browser = window.browser
    look(browser, window.server.port, training, " left")
    assert "Started" in browser.wait("ASSET_OBSERVATION\n", "\nloss\n")
    window.open("assets/endless/checkpoints?view=events")
    browser.wait(
        "is currently refreshing this asset",
        "Observed in run",
        "loss\n",
        "grad_norm",
        "time_left\n",
    )
    window.open("assets/endless/checkpoints?view=overview")
    browser.wait("\nloss\n", "\nlearning_rate\n")
    browser.click("Plots")
    wait_for(lambda: browser.run(PLOTTED), 30, "the loss is plotted")


@pytest.fixture(scope="module")
def unchecked(window: Window, waiting: str) -> str:
    """The run that waits, of whose asset the page says that a check is to come."""
    window.open("assets/finished/checkpoints?view=checks")
    assert "Passed" not in window.browser.wait(CHECK, "Evaluation result\nRunning")
    return waiting


@pytest.fixture(scope="module")
def cancelled(window: Window, unchecked: str, training: str) -> str:
    """The run that trained, after Terminate was clicked; so the one that waits may start."""
    assert unchecked != training
    browser = window.browser
    look(browser, window.server.port, training, "loss")
    browser.click("Terminate")
    browser.click("Terminate 1 run")
    return training


def test_a_run_is_cancelled_by_clicks(window: Window, cancelled: str) -> None:
    """Its page says so, with the reason, and no process is left."""
    browser = window.browser
    browser.wait(CANCELLED, "RUN_CANCELED", seconds=LONG)
    shown = look(browser, window.server.port, cancelled, "RUN_CANCELED")
    assert "Canceled" in shown
    assert shown.index("STEP_FAILURE") < shown.index(CANCELLED) < shown.index("RUN_CANCELED")
    assert shown.count(CANCELLED) == 1
    assert "Stack Trace" not in shown
    assert "AttributeError" not in shown
    window.keep("cancelled")
    require_gone(window.server.folder / "endless")


def test_a_check_turns_green(window: Window, unchecked: str, cancelled: str) -> None:
    """Of the run that waited, when the place is free; nobody reloads the page."""
    assert unchecked != cancelled
    browser = window.browser
    window.open("assets/finished/checkpoints?view=checks")
    browser.wait(CHECK, "Evaluation result", "Passed", seconds=LONG)
    window.keep("check")
    look(browser, window.server.port, unchecked, "RUN_SUCCESS")
