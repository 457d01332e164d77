"""Videos and several images for a row: checked, sized, cut, and read as samples."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_config
from hypothesis import given, settings
from hypothesis import strategies as st
from media_support import animation_bytes, convert, picture, real_clip
from video_family import EDITS, FIRST, VIDEO, video_family

from diffsynth_dagster.cache.encode import encode_missing
from diffsynth_dagster.cache.keys import Keys
from diffsynth_dagster.cache.plan_samples import plan_samples
from diffsynth_dagster.cache.resolve import Samples, resolve
from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.data.geometry import (
    ClipRule,
    FrameRule,
    Geometry,
    clip_rule,
    frame_indices,
)
from diffsynth_dagster.data.samples import files_of, load_files, trained_sizes
from diffsynth_dagster.data.table.validate import CheckedTable, validate
from diffsynth_dagster.data.table.values import REASONS
from diffsynth_dagster.errors import MetadataError, ParameterError
from diffsynth_dagster.facts import FactCache
from diffsynth_dagster.families.contract import Family
from diffsynth_dagster.training.batches import StepDataset
from diffsynth_dagster.weights.resolved import resolve as resolve_model


def config_of(folder: Path, family: Family, **more: object) -> TrainingConfig:
    return make_config(
        {
            "dataset_base_path": str(folder),
            "dataset_metadata_path": str(folder / "t.json"),
            "data_file_keys": [i.column for i in family.file_inputs],
            "model_paths": ["x.safetensors"],
            "lora_base_model": "dit",
            **more,
        }
    )


def check(
    folder: Path,
    rows: list[dict[str, Any]],
    family: Family,
    fact_cache: FactCache | None = None,
    **more: object,
) -> CheckedTable:
    (folder / "t.json").write_text(json.dumps(rows))
    config = config_of(folder, family, **more)
    return validate(config, family.columns, fact_cache or FactCache(folder.parent / "facts.sqlite"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "clip.mp4").write_bytes(real_clip().read_bytes())
    return folder


def test_every_row_of_videos_keeps_its_reason(data: Path) -> None:
    clip = (data / "clip.mp4").read_bytes()
    (data / "half.mp4").write_bytes(clip[: len(clip) // 2])
    (data / "empty.mp4").write_bytes(b"")
    (data / "text.mp4").write_text("no video")
    convert(data / "short.mp4", "-frames:v", "7", "-c:v", "mpeg4")
    convert(data / "tiny.mp4", "-frames:v", "9", "-c:v", "mpeg4", "-vf", "scale=8:8")
    convert(data / "half.mkv", "-c", "copy")
    (data / "half.mkv").write_bytes((data / "half.mkv").read_bytes()[:200_000])
    (data / "moving.gif").write_bytes(animation_bytes("GIF", 6))
    (data / "moving.webp").write_bytes(animation_bytes("WEBP", 9))
    (data / "still.gif").write_bytes(animation_bytes("GIF", 1))
    picture().save(data / "still.jpg")
    cases = [
        ("clip.mp4", "ok", 81),
        ("half.mp4", "unreadable", 0),
        ("empty.mp4", "unreadable", 0),
        ("text.mp4", "unreadable", 0),
        ("short.mp4", "ok", 5),
        ("tiny.mp4", "too_small", 0),
        ("half.mkv", "unreadable", 0),
        ("moving.gif", "ok", 5),
        ("moving.webp", "ok", 9),
        ("still.gif", "ok", 1),
        ("still.jpg", "ok", 1),
        ("none.mp4", "file_missing", 0),
        ("https://example.com/a.mp4", "url", 0),
        ("clip.mp4", "ok", 81),
    ]
    rows = [{"video": name, "prompt": "a"} for name, _, _ in cases]
    frame = check(data, rows, video_family(VIDEO)).frame
    assert list(zip(*(frame[c] for c in ("video", "status", "frames")), strict=True)) == cases
    assert frame["width"][0] == 192
    assert frame["height"][0] == 144
    assert frame["shape"][0] == "192x144x81"
    assert all(m for m, s in zip(frame["message"], frame["status"], strict=True) if s != "ok")


def test_clips_too_short_for_the_family(data: Path) -> None:
    (data / "moving.gif").write_bytes(animation_bytes("GIF", 6))
    family = video_family(VIDEO, frames=FrameRule(8, 7))
    rows = [{"video": name, "prompt": "a"} for name in ("clip.mp4", "moving.gif")]
    validated = check(data, rows, family, num_frames=15)
    assert validated.frame["status"].to_list() == ["ok", "too_short"]
    assert "6 frames" in validated.frame["message"][1]


def test_clips_are_resampled(data: Path) -> None:
    """120 frames at 29.97 per second last 4.004 s: at 16 per second the 65th is shown at 4 s."""
    family = video_family(VIDEO)
    rows = [{"video": "clip.mp4", "prompt": "a"}]
    validated = check(data, rows, family, frame_rate=16.0)
    row = validated.frame.row(0, named=True)
    assert row["frames"] == 65
    assert row["video:stride"] == pytest.approx(29.97 / 16, abs=0.01)
    usual = replace(family, geometry=Geometry(16, FrameRule(4, 1), 49, 16.0))
    assert check(data, rows, usual).frame["frames"].to_list() == [49]
    assert check(data, rows, family, num_frames=17).frame["frames"].to_list() == [17]


def test_several_images_and_their_sizes(data: Path) -> None:
    for index, size in enumerate([(64, 48), (100, 33), (40, 40)]):
        picture(index, size).save(data / f"{index}.png")
    rows = [
        {"video": "clip.mp4", "first": "0.png", "edits": ["1.png", "2.png"], "prompt": "a"},
        {"video": "clip.mp4", "first": "0.png", "edits": "1.png", "prompt": "a"},
        {"video": "clip.mp4", "first": "0.png", "edits": ["1.png", "../2.png"], "prompt": "a"},
        {"video": "clip.mp4", "first": "0.png", "edits": ["1.png", "none.png"], "prompt": "a"},
        {"video": "clip.mp4", "first": "0.png", "edits": [], "prompt": "a"},
        {"video": "clip.mp4", "first": "0.png", "edits": ["1.png", "2.png"], "prompt": "a"},
    ]
    family = video_family(VIDEO, FIRST, EDITS)
    validated = check(data, rows, family, num_frames=5)
    frame = validated.frame
    want = ["ok", "ok", "outside_base_path", "file_missing", "missing_value", "ok"]
    assert frame["status"].to_list() == want
    assert "'../2.png'" in frame["message"][2]
    assert frame["shape"][0] == "192x144x5 64x48 96x32,32x32"
    assert frame["shape"][1] == "192x144x5 64x48 96x32"
    assert validated.duplicates() == 1
    row = frame.row(0, named=True)
    assert trained_sizes(files_of(row, VIDEO), VIDEO) == [
        [[192, 144]],
        [5],
        [1.0],
        [[0, 1, 2, 3, 4]],
    ]
    files = json.loads(json.dumps(files_of(row, EDITS)))
    images = load_files(files, EDITS, 1)
    assert isinstance(images, list)
    assert [tuple(image.shape) for image in images] == [(3, 32, 96), (3, 32, 32)]
    single = load_files(files_of(frame.row(1, named=True), EDITS), EDITS, 2)
    assert isinstance(single, list)
    assert torch.equal(single[0], images[0])
    clip = load_files(files_of(row, VIDEO), VIDEO, 1)
    assert isinstance(clip, torch.Tensor)
    assert clip.shape == (3, 5, 144, 192)


def test_files_outside_the_base_may_be_allowed(data: Path) -> None:
    picture().save(data.parent / "outside.png")
    os.symlink(data.parent / "outside.png", data / "link.png")
    names = ["../outside.png", str(data.parent / "outside.png"), "link.png"]
    rows = [{"first": name, "prompt": "a"} for name in names]
    family = video_family(FIRST)
    assert check(data, rows, family).counts == {"outside_base_path": 3}
    assert check(data, rows, family, allow_outside_base_path=True).counts == {"ok": 3}


def test_changed_files_are_checked_again(data: Path, tmp_path: Path) -> None:
    """Also where the length and the time of modification are the same."""
    fact_cache, family = FactCache(tmp_path / "facts.sqlite"), video_family(VIDEO)
    rows = [{"video": "clip.mp4", "prompt": "a"}]
    first = check(data, rows, family, fact_cache).frame
    path = data / "clip.mp4"
    stat, content = path.stat(), path.read_bytes()
    path.write_bytes(bytes(len(content)))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = check(data, rows, family, fact_cache).frame
    assert again["status"].to_list() == ["unreadable"]
    assert check(data, rows, family, fact_cache).frame.equals(again)
    path.write_bytes(content)
    mended = check(data, rows, family, fact_cache).frame
    since = "video:modified"  # the one thing that writing it anew has changed
    assert mended.drop(since).equals(first.drop(since))
    # What a clip is trained at is not remembered with it.
    assert check(data, rows, family, fact_cache, num_frames=9).frame["frames"].to_list() == [9]


def test_the_book_answers_for_many_files_at_once(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}" for i in range(3000)]
    for path in paths[:-1]:
        path.write_bytes(b"x")
    fact_cache = FactCache(tmp_path / "facts.sqlite")
    read: list[Path] = []
    counted: list[int] = []

    def find_out(path: Path) -> dict[str, Any]:
        read.append(path)
        return {"name": path.name} if path.exists() else {"status": "file_missing"}

    found = fact_cache.look_up("a", [*paths, *paths], find_out, progress=counted.append)
    assert {path: fact.get("name") for path, fact in found.items()} == {
        **{path: path.name for path in paths[:-1]},
        paths[-1]: None,
    }
    assert sorted(read) == sorted(paths)
    assert sum(counted) == 3000
    read.clear()
    paths[5].write_bytes(b"xy")
    assert len(fact_cache.look_up("a", paths, find_out)) == 3000
    assert sorted(read) == sorted([paths[5], paths[-1]])
    assert len(fact_cache.look_up("b", paths[:2], find_out)) == 2
    fact_cache.close()


@pytest.mark.parametrize(
    ("values", "says"),
    [({"num_frames": 5}, "num_frames = 5 is given"), ({"frame_rate": 8.0}, "frame_rate = 8.0")],
)
def test_lengths_for_a_family_of_images(data: Path, values: dict[str, Any], says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        check(data, [{"first": "a", "prompt": "a"}], video_family(FIRST, frames=None), **values)


@pytest.mark.parametrize(("count", "near"), [(80, "77 is, or 81"), (2, "1 is, or 5")])
def test_lengths_that_the_family_does_not_take(count: int, near: str) -> None:
    with pytest.raises(ParameterError, match="no length that wan takes") as error:
        clip_rule(count, None, Geometry(16, FrameRule(4, 1)), "wan")
    assert error.value.do == near
    with pytest.raises(ParameterError, match="not a multiple of 8"):
        clip_rule(9, None, Geometry(16, FrameRule(8, 0)), "other")
    assert clip_rule(None, None, Geometry(16, FrameRule(4, 1)), "wan") == ClipRule(
        81, None, FrameRule(4, 1)
    )


@given(
    st.integers(1, 500),
    st.none() | st.floats(1, 120),
    st.none() | st.floats(1, 120),
    st.integers(1, 9),
    st.integers(0, 8),
    st.integers(1, 30),
)
def test_any_clip(
    frames: int, rate: float | None, new_rate: float | None, step: int, rest: int, blocks: int
) -> None:
    rule = FrameRule(step, rest % step)
    asked = rule.smallest + step * (blocks - 1)
    count, stride = ClipRule(asked, new_rate, rule).clip(frames, rate)
    assert ClipRule(asked, new_rate, rule).taken(frames, rate) == frame_indices(count, stride)
    assert 0 <= count <= asked
    assert count == 0 or count % step == rest % step
    indices = frame_indices(count, stride)
    assert indices == sorted(indices)
    assert all(0 <= index < frames for index in indices)
    if count < asked:  # no longer one would have fitted
        longer = frame_indices(count + step if count else rule.smallest, stride)
        assert longer[-1] >= frames
    if rate is None or new_rate is None:
        assert indices == list(range(count))
        assert count == max(0, min(asked, frames - (frames - rule.remainder) % step))


def test_captions_alone_differ(data: Path) -> None:
    rows = [{"video": "clip.mp4", "prompt": text} for text in ("a", "b")]
    assert check(data, rows, video_family(VIDEO)).duplicates() == 0


class _Models:
    """Stands for loaded models: the family's stages use none."""

    def __init__(self, family: Family) -> None:
        self.resolved = resolve_model(TrainingConfig(lora_base_model=("dit",)), family)

    def get(self, names: Iterable[str]) -> dict[str, Any]:
        return {}

    def free(self, names: Iterable[str]) -> None:
        pass


_ALONE = SimpleNamespace(process_index=0, num_processes=1, wait_for_everyone=lambda: None)


def test_videos_reach_the_store_and_the_step(data: Path, tmp_path: Path) -> None:
    """One stage is cached; the other uses what is trained, so it reads its files in the step."""
    seen: list[tuple[int, ...]] = []

    def encode(loaded: Any, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, torch.Tensor]]:
        seen.extend(tuple(sample["video"].shape) for sample in samples)
        return [{"video": sample["video"].mean((2, 3))} for sample in samples]

    base = video_family(VIDEO, EDITS)
    prompt, video, edits = base.stages
    family = replace(
        base, stages=(prompt, replace(video, run=encode), replace(edits, uses=("dit",)))
    )
    picture(0, (64, 48)).save(data / "0.png")
    rows = [{"video": "clip.mp4", "edits": ["0.png", "0.png"], "prompt": text} for text in "ab"]
    stored: dict[int, set[str]] = {}
    for count in (5, 9, 5):
        more = {"num_frames": count, "batch_size": 2, "cache_path": str(tmp_path / "cache")}
        more["output_path"] = str(tmp_path / "run")
        validated = check(data, rows, family, **more)
        config = config_of(data, family, **more)
        models: Any = _Models(family)
        keys = Keys(models.resolved, FactCache(tmp_path / "facts.sqlite"), torch.float32)
        manifest = plan_samples(config, models.resolved, validated, keys)
        encode_missing(config, models, manifest, validated, _ALONE)
        again = stored.setdefault(count, set(manifest.frame["key:video"]))
        assert again == set(manifest.frame["key:video"])
        batch = StepDataset(config, models.resolved, resolve(manifest, tmp_path / "run"), 0, 1)[0][
            0
        ]
        assert batch.outputs["video"].shape == (2, 3, count)
        assert [[tuple(x.shape) for x in row["edits"]] for row in batch.inputs] == [
            [(3, 48, 64)] * 2
        ] * 2
    assert stored[5].isdisjoint(stored[9])
    assert seen == [(3, 5, 144, 192), (3, 9, 144, 192)]
    picture(1, (64, 48)).save(data / "0.png")
    data_set = StepDataset(config, models.resolved, Samples(tmp_path / "run"), 0, 1)
    with pytest.raises(MetadataError, match="no longer the one that was checked") as refused:
        _ = data_set[0]
    assert str(data / "0.png") in str(refused.value)
    assert "of the metadata, edits:" in str(refused.value)


TRICKS = (
    "0.png ./0.png ../data/0.png ../outside.png /etc/passwd link.png . .. // 0.png/ ~ é file:///0.png "
    "http://x data:, a\x00b"
)
tricks = st.sampled_from(["", " ", "x" * 5000, *TRICKS.split(" ")]) | st.text(max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(tricks, max_size=3) | tricks | st.none(), min_size=1, max_size=6))
def test_any_paths_are_judged_row_by_row(values: list[list[str] | str | None]) -> None:
    """Only the one file that is there passes, however it is called."""
    with TemporaryDirectory() as name:
        folder = Path(name).resolve() / "data"
        folder.mkdir()
        picture(0, (64, 48)).save(folder / "0.png")
        picture(0, (64, 48)).save(folder.parent / "outside.png")
        os.symlink(folder.parent / "outside.png", folder / "link.png")
        frame = check(
            folder, [{"edits": v, "prompt": "a"} for v in values], video_family(EDITS)
        ).frame
        assert frame.height == len(values)
        for value, status, paths in zip(
            values, frame["status"], frame["edits:path"].to_list(), strict=True
        ):
            assert status == "ok" or status in REASONS
            named = value if isinstance(value, list) else [value]
            fine = [
                v is not None
                and "\x00" not in v
                and len(v) < 255
                and os.path.isfile(folder / v)
                and os.path.realpath(folder / v) == str(folder / "0.png")
                for v in named
            ]
            assert (status == "ok") == (bool(named) and all(fine))
            if status == "ok":
                assert set(paths) == {str(folder / "0.png")}
