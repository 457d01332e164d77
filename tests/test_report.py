"""`report.html`: it holds what came of a training, loads nothing, and no training ends because of it."""

import base64
import io
import os
import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from browser import INSTALL, browsing
from browser import Browser as Chromium
from conftest import Values, make_config, record_of, train, train_to_end
from PIL import Image
from test_resume import after, never

from diffsynth_dagster.errors import Stopped
from diffsynth_dagster.report import pictures as report_pictures
from diffsynth_dagster.report.__main__ import main as command
from diffsynth_dagster.report.charts import Chart, Line, plot
from diffsynth_dagster.report.metrics import read_metrics
from diffsynth_dagster.report.page import load_templates, render
from diffsynth_dagster.report.pictures import read_samples
from diffsynth_dagster.report.summary import verdicts
from diffsynth_dagster.run.record import LOGS, REPORT, ROWS, RunRecord
from diffsynth_dagster.train import run as run_training
from diffsynth_dagster.training import reports
from diffsynth_dagster.training.sampling import Evaluation

HOSTILE = "<script>alert(1)</script><img src=x>"
RED, BLUE = (220, 30, 30), (30, 30, 220)
SHORT = {
    "max_train_steps": 6,
    "save_steps": 2,
    "validation_split": 2,
    "validation_timesteps": 2,
    "sample_prompts": [HOSTILE, "a second prompt"],
    "sample_num_inference_steps": 2,
    "height": 32,
    "width": 32,
}
EVALUATION = "test_report.evaluation"


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and its text without styles and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.styles, self.text, self._inside = "", "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.styles += data
        elif self._inside != "script":
            self.text += f" {data.strip()}"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def evaluation(generate: Any) -> Any:
    """A `customized_evaluation` that looks at nothing, and puts a folder where it is told to."""
    if "BLOCKED" in os.environ:
        Path(os.environ["BLOCKED"]).mkdir(parents=True, exist_ok=True)
    return Evaluation({"accuracy": 0.25}, {"sheet": Image.new("RGB", (40, 20), BLUE)})


@pytest.fixture(scope="module")
def run(
    shared_values: dict[str, Any], pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run folder of a training of six steps; the captions of its rows are HTML."""
    folder = tmp_path_factory.mktemp("report")
    data = folder / "data"
    shutil.copytree(pictures, data)
    table = (data / "metadata.csv").read_text().replace("picture number", f"picture {HOSTILE}")
    (data / "metadata.csv").write_text(table)
    of_data = {"dataset_base_path": str(data), "dataset_metadata_path": str(data / "metadata.csv")}
    values = {**shared_values, **of_data, **SHORT, "customized_evaluation": EVALUATION}
    return train_to_end(values, folder / "run")


def page_of(folder: Path) -> Page:
    return Page((folder / REPORT).read_text(encoding="utf-8"))


def opened(uri: str | None) -> Image.Image:
    """The picture in a data URI."""
    assert uri is not None
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")


def test_it_holds_what_came_of_a_training(run: Path) -> None:
    page, record = page_of(run), record_of(run)
    text = page.text
    assert "all 6 steps" in text
    held_out = [f"{record.held_out[n]['loss']:.4f}" for n in (0, -1)]
    for promised in (
        *("finished", "held-out loss", *held_out, "gap to trained rows", "peak memory"),
        *("a second prompt", "before", "step 6", "accuracy", "0.25"),
        *("Held-out loss by timesteps", "0–50 % (most noise)", "Training loss", "Learning rate"),
        *("Hardest rows", "usable", "different captions", "32 × 32", "validation_split: 2"),
        *("step-6.safetensors", "load_lora_weights", "ComfyUI", record.identity),
        *(*record.base.values(), *record.checkpoints.values(), record.libraries["torch"]),
        *("max_train_steps: 6", "lora_rank: 4"),
    ):
        assert promised in text, promised
    shots = [each for each in page.all("figure") if each.get("data-step") is not None]
    assert [each["data-step"] for each in shots] == ["0", "2", "4", "6"] * 2
    rows = re.findall(r"× · row (\d+)", " ".join(text.split()))
    assert len(rows) == 6  # all that are trained on
    # Eight samples, two pictures of the evaluation, six rows.
    assert len(page.all("img")) == 8 + 2 + 6


def test_it_loads_nothing_from_elsewhere_and_escapes_texts(run: Path) -> None:
    page = page_of(run)
    sources = [v for _, given in page.elements for n, v in given.items() if n in ("src", "srcset")]
    assert sources
    assert all(source is not None and source.startswith("data:") for source in sources)
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    links = [each.get("href") or "" for each in page.all("a")]
    assert not [link for link in links if ":" in link or link.startswith("/")]
    (policy,) = (m["content"] for m in page.all("meta") if m.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    # Prompts and captions are shown as they are, and do nothing.
    assert page.all("script") == [{}]
    assert page.text.count(HOSTILE) >= 1 + 6
    assert not [name for _, given in page.elements for name in given if name.startswith("on")]


@pytest.mark.parametrize("how", ["missing", "damaged"])
@pytest.mark.parametrize(
    ("name", "lost"),
    [
        (LOGS[0], "Training loss"),
        (ROWS, "Hardest rows"),
        ("config.yaml", "max_train_steps: 6"),
        ("metadata.parquet", "usable"),
        ("samples/step-2.png", None),
        ("step-6.safetensors", None),
    ],
)
def test_what_is_missing_is_left_out(
    run: Path, tmp_path: Path, name: str, lost: str | None, how: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    # The table has further names; all of them are the same file.
    names = [name, f".tables/{name}", f".{name.replace('.', '.encoded.')}"]
    for path in (folder / each for each in names):
        if path.is_file():
            path.unlink()
            if how == "damaged":
                path.write_bytes(b"\xff\x00 nothing, of any kind: [")
    page = Page(render(folder, record_of(folder)))
    assert lost is None or lost not in page.text
    assert "a second prompt" in page.text
    assert page.text.count("picture is gone") == (2 if "samples" in name else 0)


def sampled(folder: Path, steps: int, shown: int, size: int = 40) -> RunRecord:
    """The record of a training that wrote a red and a blue sample, or more, after each step."""
    (folder / "samples").mkdir(parents=True)
    names = {f"step-{step}": f"step-{step}.png" for step in range(0, steps * 10, 10)}
    for name in names.values():
        sheet = Image.effect_noise((shown * size, size), 90).convert("RGB")
        sheet.paste(RED, (0, 0, size // 2, size))
        sheet.paste(BLUE, (size, 0, size + size // 2, size))
        sheet.save(folder / "samples" / name)
    record = RunRecord("i", "qwen_image", ["dit"], {}, 1, "s", "c", None, pictures=names)
    boxes = [[n * size, 0, (n + 1) * size, size] for n in range(shown)]
    return replace(record, shown=[{"prompt": f"p{n}", "box": box} for n, box in enumerate(boxes)])


def test_a_row_that_stands_out_is_marked(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    rows = pl.read_parquet(folder / ROWS)
    hardest = rows["row"][0]
    rows.with_columns(stands_out=pl.col("row") == hardest).write_parquet(folder / ROWS)
    record = record_of(folder)
    marked = re.findall(r"row <b>(\d+)</b> · <b class=\"outlier\">", render(folder, record))
    assert marked == [str(hardest)]
    assert "stands out" not in render(run, record)


def test_each_sample_is_cut_from_the_picture_of_its_step(tmp_path: Path) -> None:
    record = sampled(tmp_path, 2, 2)
    found = read_samples(tmp_path, record)
    assert [row.prompt for row in found.rows] == ["p0", "p1"]
    for row, color in zip(found.rows, (RED, BLUE), strict=True):
        assert [shot.step for shot in row.shots] == [0, 10]
        for shot in row.shots:
            assert shot.picture is not None
            picture = opened(shot.picture.uri)
            assert picture.size == (40, 40)
            assert picture.getpixel((5, 5)) == color
    # Records of before do not say where each sample lies.
    prompts = {"sample_prompts": ["one", "two"]}
    (whole,) = read_samples(tmp_path, replace(record, shown=[], parameters=prompts)).rows
    assert whole.prompt is None
    assert [shot.picture and shot.picture.width for shot in whole.shots] == [80, 80]
    assert "one\ntwo" in render(tmp_path, replace(record, shown=[], parameters=prompts))


def test_many_samples_fit_into_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_pictures, "BUDGET", 100_000)
    record = sampled(tmp_path, 16, 2, size=256)
    found = read_samples(tmp_path, record)
    assert found.steps == [0, 20, 40, 60, 80, 90, 110, 130, 150]
    assert sorted([*found.steps, *found.left_out]) == list(range(0, 160, 10))
    shots = [shot.picture for row in found.rows for shot in row.shots]
    sizes = [len(picture.uri) for picture in shots if picture is not None]
    assert len(sizes) == 18
    assert 30_000 < sum(sizes) <= 100_000
    page = Page(render(tmp_path, record))
    assert "7 steps are left out" in page.text
    assert [link["href"] for link in page.all("a")] == ["samples/"]


def test_clips_are_inside_or_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_pictures, "BUDGET", 20_000)
    record = sampled(tmp_path, 2, 2)
    clips = {f"step-{s}-{n}": f"step-{s}-{n}.mp4" for s in (0, 10) for n in (0, 1)}
    for file in clips.values():
        (tmp_path / "samples" / file).write_bytes(bytes(5_000))
    page = Page(render(tmp_path, replace(record, clips=clips)))
    # Two fit: those of the last step. The others are named.
    videos = [each["src"] or "" for each in page.all("video")]
    assert [len(base64.b64decode(v.removeprefix("data:video/mp4;base64,"))) for v in videos] == [
        *(5_000, 5_000)
    ]
    links = [link["href"] for link in page.all("a")]
    assert links == ["samples/step-0-0.mp4", "samples/step-0-1.mp4"]


def test_it_is_renewed_while_the_training_runs_and_at_its_end(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "FIRST_SECONDS", 0.0)
    config = make_config(values(max_train_steps=6, save_steps=2))
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        run_training(config, after(folder, 3))
    text = page_of(folder).text
    assert "not finished" in text
    assert "step 2 of 6" in text
    assert "No rows were held out" in text
    run_training(config, never)
    assert "all 6 steps" in page_of(folder).text


def test_a_report_that_cannot_be_written_ends_no_training(
    values: Values,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BLOCKED", str(tmp_path / "run" / REPORT / "mine"))
    code, folder = train(values(customized_evaluation=EVALUATION), tmp_path / "run")
    assert code == 0
    assert record_of(folder).finished
    assert "warning: report.html was not written: " in capfd.readouterr().err


def test_an_upgrade_while_a_training_runs_does_not_change_its_report(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = load_templates().loader
    monkeypatch.setattr(loader, "searchpath", ["/nowhere"])
    assert "all 6 steps" in render(run, record_of(run))


def test_the_command_writes_it_anew(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / REPORT).read_text()
    (run / REPORT).unlink()
    assert command([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / REPORT}\n"
    lines = zip(before.splitlines(), (run / REPORT).read_text().splitlines(), strict=True)
    assert {old for old, new in lines if old != new} <= {
        line for line in before.splitlines() if "Written " in line
    }
    assert command([str(tmp_path)]) == 2
    assert "the folder holds no training" in capsys.readouterr().err


def measured(*losses: float, trained: float = 0.2) -> list[dict[str, Any]]:
    """Measurements of the held-out loss, every ten steps from before the first one."""
    return [
        {"step": 10 * n, "loss": loss, "trained_loss": trained, "ranges": [loss], "best_step": 0}
        for n, loss in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("facts", "tone", "said"),
    [
        ({"held_out": measured(0.4, 0.3, 0.2999)}, "good", "It learned"),
        ({"held_out": measured(0.4, 0.3, 0.2)}, "plain", "still falling at the end"),
        ({"held_out": measured(0.4, 0.3, 0.36)}, "bad", "risen by 20 %: the later steps memorise"),
        ({"held_out": measured(0.4, 0.3, 0.36)}, "bad", "`keep_best: true` keeps those weights"),
        ({"held_out": measured(0.4, 0.3, 0.36), "best": ["b"]}, "bad", "exports take them"),
        ({"held_out": measured(0.4, 0.41)}, "bad", "did not fall"),
        ({"held_out": measured(0.3, float("nan"))}, "bad", "did not fall"),
        ({"held_out": measured(0.3)}, "plain", "before the first step"),
        ({}, "plain", "No rows were held out"),
        ({"all_losses_finite": False}, "bad", "not finite"),
        ({"trained_tensors": 3, "changed_tensors": 0}, "bad", "No trained weight has changed"),
    ],
)
def test_its_head_says_whether_the_training_worked(
    tmp_path: Path, facts: dict[str, Any], tone: str, said: str
) -> None:
    whole = RunRecord("i", "qwen_image", ["dit"], {}, 1, "s", "c", None, finished=True)
    record = RunRecord(**{**asdict(whole), **facts})
    (found,) = (v for v in verdicts(record, read_metrics(tmp_path)) if said in v.text)
    assert found.tone == tone
    assert found.text.replace("`", "") in " ".join(Page(render(tmp_path, record)).text.split())


def test_a_chart_is_not_flattened_by_a_single_peak_or_broken_by_what_is_not_finite() -> None:
    noisy = [(float(n), 1e6 if n == 500 else 1 + n % 7) for n in range(4000)]
    mean = [(float(n), float("nan") if n == 9 else 2 + n / 4000) for n in range(4000)]
    laid = plot(Chart("t", "n", "v", [Line("each", noisy, pale=True), Line("mean", mean)]))
    assert laid is not None
    assert [tick.text for tick in laid.up][-1] in ("7", "8")
    assert all(line.path.count("L") < 1000 for line in laid.lines)
    assert "nan" not in laid.lines[1].path
    assert plot(Chart("t", "n", "v", [Line("none", [(1.0, float("inf"))])])) is None


def test_a_real_browser_shows_it_without_network(run: Path) -> None:
    if not Chromium.is_installed():
        pytest.skip(f"Chromium is not installed: {INSTALL}")
    with browsing(["--host-resolver-rules=MAP * ~NOTFOUND"]) as browser:
        browser.requested()
        browser.open((run / REPORT).as_uri())
        text = browser.wait("What to do with it", HOSTILE)
        assert "all steps" in text  # the slider works, so the script ran
        shown = "return [...document.images].every((i) => i.complete && i.naturalWidth > 0)"
        assert browser.run(shown)
        asked = [address for address in browser.requested() if not address.startswith("data:")]
        assert [address for address in asked if not address.startswith("chrome")] == [
            (run / REPORT).as_uri()
        ]
        browser.run(
            "const slider = document.querySelector('.slider input');"
            "slider.value = 3; slider.dispatchEvent(new Event('input'));"
        )
        visible = "return [...document.querySelectorAll('[data-step]:not([hidden])')].length"
        assert browser.run(visible) == 2
        assert "step 6" in browser.text()
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
