"""Promoted versions: what they hold and outlast, which export may become the current one, and the way
back. The Dagster side is in `test_dagster_promoted`."""

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffsynth_dagster.errors import OutputError
from diffsynth_dagster.export.judged import Verdict
from diffsynth_dagster.export.listing import Listing, list_files, read_listing, write_listing
from diffsynth_dagster.export.promote import Outcome, promote, roll_back
from diffsynth_dagster.facts import digest_file
from diffsynth_dagster.own_names import is_own, is_promoted
from diffsynth_dagster.promoted import FILE_NAME, current_promoted, promoted_versions
from diffsynth_dagster.run.earlier import clear
from diffsynth_dagster.run.folder import owned
from diffsynth_dagster.run.record import RunFile, RunRecord

LORA = "diffusers/pytorch_lora_weights.safetensors"


class Training:
    """A run folder in which trainings follow each other, as they leave it: only their tensors are texts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def made(
        self,
        content: str,
        loss: float = 1.0,
        held_out: float | None = None,
        unfinished: str | None = None,
        loads: bool = True,
        **facts: Any,
    ) -> "Training":
        """The next training, and its exports, in the place of those before."""
        if self.folder.exists():
            clear(self.folder, lambda text: None)
        exported, checkpoint = self.folder / "exports" / LORA, self.folder / "epoch-0.safetensors"
        exported.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(f"checkpoint {content}")
        exported.write_text(f"export {content}")
        (self.folder / "samples").mkdir(exist_ok=True)
        (self.folder / "samples" / "step-20.png").write_text(content)
        card = f"{content}\n\n![after 20](../samples/step-20.png)\n"
        (self.folder / "exports" / "README.md").write_text(card)
        losses = [9.0] * 18 + [loss - 0.5, loss + 0.5]  # two steps are the last tenth
        rows = [f"{step},{value}" for step, value in enumerate(losses, 1)]
        (self.folder / "metrics.csv").write_text("\n".join(["step,loss", *rows]) + "\n")
        measured = [] if held_out is None else [{"step": 20, "loss": held_out}]
        known = RunRecord(
            identity=content,
            family="qwen_image",
            trained=["dit"],
            base={},
            samples=1,
            samples_digest="rows",
            config_digest="c",
            lora=None,
            checkpoints={checkpoint.name: digest_file(checkpoint)},
            newest=[checkpoint.name],
            pictures={"step-20": "step-20.png"},
            held_out=measured,
            held_out_digest=None if held_out is None else "held out",
            finished=unfinished is None,
        )
        RunFile(self.folder, replace(known, **facts), writes=True).begin(total_steps=20)
        files = list_files(self.folder / "exports", {exported: digest_file(exported)})
        listing = Listing(content, 20, unfinished, loads, dict(known.checkpoints), files)
        write_listing(self.folder, listing)
        return self

    def promote(self, margin: float = 0.05, keep: int = 3, force: bool = False) -> Outcome:
        return promote(self.folder, margin, keep, digest_file, force)

    @property
    def versions(self) -> list[str]:
        return [version.version for version in promoted_versions(self.folder)]

    @property
    def current(self) -> str:
        """What others read."""
        text = (self.folder / "exports" / "current" / LORA).read_text()
        checkpoint = (self.folder / "exports" / "current" / "checkpoint.safetensors").read_text()
        assert checkpoint.split()[1] == text.split()[1]
        return text.split()[1]


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path / "run")


def test_a_version_outlasts_its_training(training: Training, tmp_path: Path) -> None:
    """It is complete, takes no space while the training is there, and stays whole when that is moved to
    `older/` and removed, and when the run folder is moved."""
    first = training.made("a").promote()
    assert (first.what, first.why) == ("promoted", "it is the first one")
    run = training.folder
    found = current_promoted(run)
    assert found == first.current
    assert found is not None
    assert found.folder == run / "exports" / "promoted" / found.version
    assert os.path.samefile(found.checkpoint_files[0], run / "epoch-0.safetensors")
    held = {p.relative_to(found.folder).as_posix() for p in found.folder.rglob("*") if p.is_file()}
    beside = {"README.md", "samples/step-20.png"}
    assert held == {LORA, "checkpoint.safetensors", FILE_NAME, *beside}
    assert "(samples/step-20.png)" in (found.folder / "README.md").read_text()
    left = [p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()]
    assert [name for name in left if not is_own(name)] == []
    assert is_promoted("exports/current/checkpoint.safetensors")

    training.made("b")
    (older,) = (run / "older").iterdir()
    assert (older / "exports" / LORA).read_text() == "export a"
    assert not (older / "exports" / "promoted").exists()
    assert (older / "exports" / "exported.json").is_file()
    shutil.rmtree(older)
    assert training.current == "a"
    moved = Training(run.rename(tmp_path / "elsewhere"))
    assert moved.current == "a"
    assert moved.promote().what == "promoted"
    assert moved.current == "b"
    assert moved.promote().what == "unchanged"
    assert moved.made("b").promote().current.version == moved.versions[-1], "of the same content"
    assert len(moved.versions) == 2


@pytest.mark.parametrize(
    ("old", "new", "margin", "worse"),
    [
        (1.0, 1.05, 0.05, False),
        (1.0, 1.06, 0.05, True),
        (1.0, 0.5, 0.0, False),
        (1.0, 1.0, 0.0, False),
        (1.0, math.nextafter(1.0, 2.0), 0.0, True),
        (-1.0, -0.94, 0.05, True),
        (1.0, math.nan, 9.0, True),
        (1.0, math.inf, 9.0, True),
        (math.nan, 1.0, 0.0, False),
        (math.nan, math.nan, 0.0, True),
        (0.0, 0.0, 0.05, False),
    ],
)
def test_worse_by_more_than_the_margin(old: float, new: float, margin: float, worse: bool) -> None:
    assert Verdict("held_out_loss", old, new, margin).is_worse is worse


def test_a_worse_export_is_refused_and_named(training: Training) -> None:
    """By the held-out loss where both have one of the same samples, whatever they were trained on; else by
    the last steps on the same rows."""
    training.made("a", loss=1.0).promote()
    measured = training.made("a", loss=1.0, held_out=0.5).promote()
    assert measured.what == "unchanged"
    assert measured.current.numbers["held_out_loss"].value == 0.5
    worse = training.made("b", loss=0.1, held_out=0.6, samples_digest="other").promote()
    assert worse.what == "refused"
    assert worse.verdict is not None
    assert (worse.verdict.old, worse.verdict.new) == (0.5, 0.6)
    assert (
        "its held-out loss is 0.6 (+20.0%), and 0.5 the best of those promoted before" in worse.why
    )
    assert training.current == "a"
    assert training.promote(margin=0.25).what == "promoted", "within the margin"
    assert training.made("c", loss=1.2, held_out=None).promote().why.startswith("it cannot be")
    assert (
        training.made("d", loss=1.3).promote().why.startswith("it is worse: its loss of the last")
    )
    other = {"parameters": {"min_snr_gamma": 5.0}}
    for name, way in {"x": other, "y": {"samples_digest": "more"}, "z": {"family": "flux"}}.items():
        assert training.made(name, loss=9.0, **way).promote().what == "promoted"
        assert training.made("c", loss=1.2).promote().what == "promoted"
    assert training.made("f", loss=1.3).promote(force=True).what == "promoted"
    assert training.made("g", loss=math.nan).promote().what == "refused"
    assert training.current == "f"


def test_many_that_are_a_little_worse_do_not_add_up(training: Training) -> None:
    for content, loss in (("a", 1.0), ("b", 1.04)):
        assert training.made(content, loss=loss).promote().what == "promoted"
    worse = training.made("c", loss=1.06).promote()
    assert worse.what == "refused"
    assert worse.verdict is not None
    assert worse.verdict.old == 1.0
    assert training.promote(force=True).what == "promoted"
    assert training.made("d", loss=1.1).promote().what == "promoted", "the one asked for is the bar"


def test_what_was_rolled_back_from_does_not_come_again_in_another_format(
    training: Training,
) -> None:
    a, b = (training.made(name).promote().current.version for name in "ab")
    roll_back(training.folder, a)
    exported = training.folder / "exports" / LORA
    exported.unlink()  # the version has a second name of it
    exported.write_text("export b, otherwise")
    listing = read_listing(training.folder)
    write_listing(training.folder, replace(listing, files={LORA: digest_file(exported)}))
    stays = training.promote()
    assert (stays.what, training.current) == ("kept", "a")
    assert f"version {b} was rolled back from" in stays.why


def test_the_last_ones_are_kept(training: Training) -> None:
    names = [training.made(name).promote(keep=2).current.version for name in "abc"]
    assert training.versions == names[1:]
    assert training.made("d").promote(keep=1).current.version == training.versions[0]
    assert len(training.versions) == 1
    assert not [*(training.folder / "exports" / "promoted").glob(".*.*")]


def test_the_way_back(training: Training) -> None:
    """Nothing is compared, no training is waited for, and what was rolled back from does not come again
    unless it is asked for."""
    a, b = (training.made(name).promote().current.version for name in "ab")
    with owned(training.folder, "training"):
        back = roll_back(training.folder, a[:6])
    assert (back.what, back.current.version, training.current) == ("rolled back", a, "a")
    assert roll_back(training.folder, a).what == "unchanged"
    stays = training.promote()
    assert (stays.what, training.current) == ("kept", "a")
    assert f"version {b} was rolled back from at 20" in stays.why
    c = training.made("c", loss=0.9).promote(keep=2).current.version
    assert training.versions == [a, c], "the one that was current before is kept"
    assert training.made("a").promote().what == "refused", (
        "an older one that is worse than the current"
    )
    assert training.promote(force=True).what == "promoted"
    roll_back(training.folder, c)
    assert training.promote().what == "kept"
    assert training.promote(force=True).what == "promoted"
    assert training.current == "a"
    with pytest.raises(OutputError, match="no promoted version begins with 'x'") as refused:
        roll_back(training.folder, "x")
    assert refused.value.do == f"give one of those that are there, the newest first: {a}, {c}"
    (training.folder / "exports" / "promoted" / c / LORA).unlink()
    with pytest.raises(OutputError, match="are missing"):
        roll_back(training.folder, c)


def test_only_whole_finished_exports_are_promoted(training: Training) -> None:
    with pytest.raises(OutputError, match="holds no export"):
        training.promote()
    assert not training.folder.exists()
    with pytest.raises(OutputError, match=r"unfinished training \(step 5 of 20\)"):
        training.made("a", unfinished="step 5 of 20").promote()
    training.made("b").promote()
    half = training.made("c", unfinished="step 5 of 20").promote(force=True)
    assert (half.what, half.unfinished, training.current) == ("kept", True, "b")
    with pytest.raises(OutputError, match="does not load"):
        training.made("d", loads=False).promote()
    training.made("e")
    (training.folder / "exports" / LORA).write_text("half of it")
    with pytest.raises(OutputError, match="were changed since"):
        training.promote()
    assert training.current == "b"


def test_a_promotion_that_was_cut_short_is_made_again(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link leads to a whole version at every moment."""
    training.made("a").promote()
    training.made("b")

    def cut(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("diffsynth_dagster.export.promote._point", cut)
        with pytest.raises(KeyboardInterrupt):
            training.promote()
    assert training.current == "a"
    assert training.promote().what == "promoted"
    assert training.current == "b"


def test_copied_links_are_named(training: Training, tmp_path: Path) -> None:
    """A copy that made files of the link is read still, and the next promotion says what is wrong."""
    training.made("a").promote()
    copied = Training(tmp_path / "copy")
    shutil.copytree(training.folder, copied.folder)
    assert copied.current == "a"
    found = current_promoted(copied.folder)
    assert found is not None
    assert found.folder.is_relative_to(copied.folder)
    with pytest.raises(OutputError, match="is something else"):
        copied.made("b").promote()
    (copied.folder / "exports" / "current").rename(tmp_path / "aside")
    assert copied.promote().what == "promoted"


def test_promoting_needs_no_large_libraries() -> None:
    code = (
        "import sys, diffsynth_dagster.export.promote\n"
        "sys.exit(' '.join({'torch', 'diffusers', 'polars'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
