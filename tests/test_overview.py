"""The picture that the page of the checkpoints shows first, and how often a training is observed."""

import base64
import csv
import io
import re
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import dagster as dg
import pytest
from PIL import Image

from assets import progress
from assets.overview import overview
from assets.progress import Progress
from assets.served import NEWEST, address, serve
from diffsynth_dagster.report.svg import cut
from diffsynth_dagster.report.words import duration
from diffsynth_dagster.run import progress as throttle
from diffsynth_dagster.run.events import HeldOutMetrics, Sampled, Started, StepMetrics
from diffsynth_dagster.run.record import RunRecord

SVG = "{http://www.w3.org/2000/svg}"
PROMPTS = ["手写数字八", 'a <b> & "c" \x0b', "a cat " * 60]
COLOURS = [(250, 20, 20), (20, 250, 20), (20, 20, 250)]
HOUR = 3600


def write_run(folder: Path, steps: list[int], losses: int = 40) -> RunRecord:
    """A run folder with a picture of three samples for each of some steps: the later, the brighter."""
    (folder / "samples").mkdir(parents=True)
    boxes = [
        [0, 0, 64, 64],
        [66, 0, 130, 64],
        [0, 66, 130, 130],
    ]  # the last one has an input beside it
    for number, step in enumerate(steps):
        picture = Image.new("RGB", (130, 130), "white")
        for colour, box in zip(COLOURS, boxes, strict=True):
            share = 0.5 + number / len(steps) / 2
            left, top, right, bottom = box
            part = tuple(round(share * value) for value in colour)
            picture.paste(part, (left, top, right, bottom))
        picture.save(folder / "samples" / f"step-{step}.png")
    with (folder / "metrics.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["step", "epoch", "loss"])
        table.writerows([step, 0, 1 / step] for step in range(1, losses + 1))
    return RunRecord(
        *("", "tiny", ["dit"], {}, 8, "", "", None),
        pictures={
            "before-x": "before-x.png",
            **{f"step-{step}": f"step-{step}.png" for step in steps},
        },
        shown=[{"prompt": p, "box": b} for p, b in zip(PROMPTS, boxes, strict=True)],
        held_out=[
            {"step": step, "loss": 0.5, "trained_loss": 0.4, "ranges": [], "best_step": 0}
            for step in (0, losses)
        ],
    )


def drawn(svg: str | None) -> tuple[list[str], list[str], dict[str, Image.Image]]:
    """The texts of an SVG, the names of the pictures at their places, and the pictures."""
    assert svg is not None
    root = ElementTree.fromstring(svg)
    pictures: dict[str, Image.Image] = {}
    for image in root.iter(f"{SVG}image"):
        data = image.attrib["href"].removeprefix("data:image/jpeg;base64,")
        pictures[image.attrib["id"]] = Image.open(io.BytesIO(base64.b64decode(data)))
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    return texts, [use.attrib["href"][1:] for use in root.iter(f"{SVG}use")], pictures


def test_every_sample_is_shown_with_its_prompt_and_the_curves_beside(tmp_path: Path) -> None:
    record = write_run(tmp_path, [0, 20, 40])
    texts, places, pictures = drawn(overview(record, tmp_path))
    assert PROMPTS[0] in texts
    assert 'a <b> & "c"  ' in texts
    assert any(each.startswith("a cat a cat") and each.endswith("…") for each in texts)
    names = [f"s{step}-{index}" for index in range(3) for step in (0, 20, 40)]
    # Beside the curves there is room for two with an input; then come all.
    assert places == [name for name in names if not name.startswith("s20")] + names
    assert sorted(pictures) == sorted(names)
    for index, colour in enumerate(COLOURS):
        middle = pictures[f"s40-{index}"].resize((1, 1)).getpixel((0, 0))
        assert isinstance(middle, tuple)
        assert max(range(3), key=middle.__getitem__) == max(range(3), key=colour.__getitem__)
    assert pictures["s0-2"].width == pytest.approx(2 * pictures["s0-2"].height, abs=6)
    wanted = {
        "step 0",
        "step 20",
        "step 40",
        "mean of 2 steps",
        "held-out rows",
        "as many trained rows",
    }
    assert wanted <= set(texts)


def test_what_was_changed_or_is_not_there_is_left_out(tmp_path: Path) -> None:
    record = write_run(tmp_path, [0, 20, 40])
    changed = [tmp_path / "samples" / "step-20.png", tmp_path / "metrics.csv"]
    (tmp_path / "samples" / "step-0.png").unlink()
    texts, places, _ = drawn(overview(record, tmp_path, changed))
    assert places == ["s40-0", "s40-1", "s40-2"]
    assert "mean of 2 steps" not in texts
    older = RunRecord("", "tiny", [], {}, 8, "", "", None, pictures=record.pictures)
    assert drawn(overview(older, tmp_path))[1] == ["s20-0", "s40-0"]
    assert overview(RunRecord("", "tiny", [], {}, 8, "", "", None), tmp_path, changed) is None


def test_of_many_steps_first_some_are_shown_then_all(tmp_path: Path) -> None:
    steps = list(range(0, 2000, 100))
    record = write_run(tmp_path, steps)
    made: dict[str, str] = {}
    svg = overview(record, tmp_path, made=made)
    texts, places, pictures = drawn(svg)
    count = texts.index(PROMPTS[0])
    shown = [int(each.removeprefix("step ")) for each in texts[:count]]
    assert (shown[0], shown[-1]) == (0, 1900)
    assert 2 <= count < len(steps)
    assert len(pictures) == 3 * len(steps)
    assert places[3 * count :] == [f"s{s}-{i}" for i in range(3) for s in steps]
    for path in (tmp_path / "samples").iterdir():
        path.write_bytes(b"")  # nothing is read again
    assert overview(record, tmp_path, made=made) == svg


def test_texts_are_cut_to_their_room() -> None:
    assert cut("short", 200, 13) == "short"
    assert len(cut("x" * 100, 200, 13)) == pytest.approx(30, abs=3)
    assert len(cut("字" * 100, 200, 13)) == pytest.approx(15, abs=2)


def observed(monkeypatch: pytest.MonkeyPatch, hours: float, per_step: float) -> Any:
    """What is logged of a training of some hours, measured and sampled every few seconds."""
    seen: list[dict[str, Any]] = []
    lines: list[str] = []
    clock = 0.0
    for module in (progress, throttle):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock))
    context: Any = SimpleNamespace(
        log=SimpleNamespace(info=lines.append),
        log_event=lambda event: seen.append({"at": clock, **event.metadata}),
        asset_key=dg.AssetKey("checkpoints"),
    )
    shows: list[float] = []
    told = Progress(context, lambda: shows.append(clock))
    total = round(hours * HOUR / per_step)
    told.hear(HeldOutMetrics(0, 2.0, 1.0, [], 0))
    told.hear(Started(total, 0))
    for step in range(1, total + 1):
        clock += per_step
        told.hear(StepMetrics(step, 0, 1 / step, 1e-3, 1.0, per_step, 4))
        if step % 10 == 0:
            told.hear(HeldOutMetrics(step, 2.0, 1.0, [], 0))
            told.hear(Sampled(step, "none.png"))
    told.last()
    return SimpleNamespace(seen=seen, lines=lines, shows=shows, total=total)


@pytest.mark.parametrize(("hours", "per_step"), [(0.02, 1.0), (10, 2.0), (24 * 7, 60.0)])
def test_a_training_of_any_length_has_few_observations(
    monkeypatch: pytest.MonkeyPatch, hours: float, per_step: float
) -> None:
    told = observed(monkeypatch, hours, per_step)
    print(hours, "hours:", len(told.seen), "observations")
    # As many may have a sample picture. Dagster plots the newest 100 events.
    assert len(told.seen) <= 100
    early = [each for each in told.seen if each["at"] <= max(60, 5 * per_step)]
    assert len(early) >= 4
    times = [each["at"] for each in told.seen]
    gaps = [b - a for a, b in pairwise(times)]
    assert max(gaps) <= max(60, hours * HOUR / 40)
    assert all({"loss", "held_out_loss"} <= each.keys() for each in told.seen[1:])
    assert told.seen[-1]["step"].value == f"{told.total} of {told.total}"
    assert len(told.shows) >= len(told.seen)


def test_the_log_says_how_long_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    told = observed(monkeypatch, 2, 6.0)
    lines = [line for line in told.lines if " of 1200: loss" in line]
    assert lines[0] == "step 1 of 1200: loss 1.0000, 1 h 59 min left"
    assert lines[-1] == "step 1200 of 1200: loss 0.0008"
    halfway = next(line for line in lines if re.match(r"step 6\d\d ", line))
    assert re.search(r", (1 h( \d min)?|5\d min( \d+ s)?) left$", halfway)
    assert "time_left" not in told.seen[-1]
    assert told.seen[1]["time_left"].value == "1 h 59 min"


def test_durations_in_words() -> None:
    given = {0.2: "0.2 s", 59.0: "59 s", 59.7: "1 min", 200.0: "3 min 20 s", 3599.6: "1 h"}
    assert {seconds: duration(seconds) for seconds in given} == given
    assert duration(4320) == "1 h 12 min"
    assert duration(100 * HOUR) == "4 d 4 h"


def test_pictures_lie_where_the_webserver_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest 50 of a recipe; where there is no folder of logs, or it cannot be written, none."""
    recipe: Any = SimpleNamespace(name="tiny", config=SimpleNamespace(output_path="run"))
    warnings: list[str] = []
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        context: Any = SimpleNamespace(
            instance=instance, log=SimpleNamespace(warning=warnings.append)
        )
        names = [NEWEST, *(str(number) for number in range(60)), NEWEST]
        assert all(serve(context, recipe, name, "<svg/>") for name in names)
        monkeypatch.setenv("DAGSTER_WEBSERVER_PATH_PREFIX", "/dagster")
        place = re.fullmatch(r"/dagster/logs/(.+)/newest/svg", address(recipe, NEWEST))
        assert place is not None
        (folder,) = tmp_path.rglob(place[1])
        left = {path.stem for path in folder.iterdir()}
        assert left == {NEWEST, *(str(number) for number in range(10, 60))}
        shutil.rmtree(folder)
        folder.write_bytes(b"")
        assert not serve(context, recipe, NEWEST, "<svg/>")
        assert len(warnings) == 1
        elsewhere: Any = SimpleNamespace(instance=SimpleNamespace(compute_log_manager=None))
        assert not serve(elsewhere, recipe, NEWEST, "<svg/>")
