"""A folder as a data set: pictures with captions in text files beside them, and no table."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from conftest import Values, make_config, samples_of, train_to_end, why_refused, write_images
from families.ltx2.cases import CASES as LTX2
from media_support import write_clip
from PIL import Image
from test_resume import never, stop_after

from diffsynth_dagster.cache.manifest import read_manifest
from diffsynth_dagster.config.override import overridden
from diffsynth_dagster.config.recipe import dump_config
from diffsynth_dagster.data.listing import list_data
from diffsynth_dagster.data.table.validate import CheckedTable, validate
from diffsynth_dagster.errors import MetadataError, ParameterError
from diffsynth_dagster.facts import FactCache
from diffsynth_dagster.families import find_family
from diffsynth_dagster.inspect.dataset import trained_on
from diffsynth_dagster.inspect.subject import read_subject
from diffsynth_dagster.train import run as run_training
from diffsynth_dagster.training.batches import StepDataset
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model, guess_model

CAPTIONS = ["a cat", "a dog,  on\nthe grass\n", "a bird"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of equal size, each with its caption beside it."""
    path = write_images(tmp_path / "data", 3)
    (path / "metadata.csv").unlink()
    for number, caption in enumerate(CAPTIONS):
        (path / f"{number}.txt").write_text(caption, encoding="utf-8")
    return path


@pytest.fixture
def given(values: Values, folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A training on the folder, with a store of its own: others have pictures of equal content."""
    chosen = values(dataset_base_path=str(folder), cache_path=str(tmp_path / "cache"), batch_size=2)
    return {name: value for name, value in chosen.items() if name != "dataset_metadata_path"}


def check(folder: Path, family: str = "qwen_image", **more: Any) -> CheckedTable:
    given = {"dataset_base_path": str(folder), "model_paths": ["x"], "lora_base_model": "dit"}
    config = make_config({**given, **more})
    with_files = find_family(family).columns
    return validate(config, with_files, FactCache(folder.parent / "facts.sqlite"))


def told(table: CheckedTable) -> list[Any]:
    assert table.counts == {"ok": table.frame.height}, table.frame["message"].to_list()
    return table.frame["prompt"].to_list()


def test_a_folder_trains_as_the_table_of_its_captions(
    given: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    table = tmp_path / "table.csv"
    texts = [" ".join(text.split()) for text in CAPTIONS]
    pl.DataFrame({"image": [f"{n}.png" for n in range(3)], "prompt": texts}).write_csv(table)
    ends: list[bytes] = []
    for number, path in enumerate((None, folder, table)):
        named = {} if path is None else {"dataset_metadata_path": str(path)}
        run = train_to_end({**given, **named}, tmp_path / f"run{number}")
        ends.append((run / "epoch-0.safetensors").read_bytes())
    assert ends[0] == ends[1] == ends[2]


def test_captions_are_read_from_files_beside_the_rows_of_a_table(folder: Path) -> None:
    (folder / "0.caption").write_bytes("\ufeffä cat".encode())
    (folder / "table.csv").write_text("image\n0.png\n")
    given = {"dataset_metadata_path": str(folder / "table.csv"), "caption_extension": ".caption"}
    assert told(check(folder, **given)) == ["ä cat"]
    (folder / "table.csv").write_text("image,prompt\n0.png,x\n")
    with pytest.raises(ParameterError, match="has the column 'prompt', and caption_extension"):
        check(folder, **given)


def test_each_line_of_a_file_is_a_caption_where_rows_have_several(
    folder: Path, given: dict[str, Any]
) -> None:
    config = make_config({**given, "caption_lists": True, "caption_prefix": "sks"})
    found = find_model(config, ModelHub(folder, skip_download=True))
    (folder / "2.txt").write_text("\n\n a bird \na wren\n")
    table = validate(config, found.family.columns, FactCache(folder.parent / "facts.sqlite"))
    assert told(table) == [
        ["sks a cat"],
        ["sks a dog, on", "sks the grass"],
        ["sks a bird", "sks a wren"],
    ]


def test_what_has_no_caption_is_rejected_with_the_name_of_its_file(folder: Path) -> None:
    (folder / "0.txt").unlink()
    (folder / "1.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "2.txt").write_text(" \n")
    table = check(folder)
    rows = table.frame.select("status", "message").rows()
    assert rows[0] == ("no_caption_file", "there is no caption file '0.txt'")
    assert rows[1] == ("unreadable_caption", "the caption file '1.txt': is not utf-8 text")
    assert rows[2][0] == "empty_caption"


def test_a_prefix_stands_before_every_caption(folder: Path) -> None:
    (folder / "0.txt").unlink()
    (folder / "2.txt").write_text(" \n")
    expected = ["ohwx", "ohwx a dog, on the grass", "ohwx"]
    table = check(folder, caption_prefix="ohwx")
    assert told(table) == expected
    assert any("2 rows, the first is 1, have no caption" in text for text in table.warnings())
    csv = folder / "table.csv"
    csv.write_text('image,prompt\n0.png,\n1.png,"a dog, on the grass"\n2.png,  \n')
    table = check(folder, dataset_metadata_path=str(csv), caption_prefix="ohwx")
    assert told(table) == expected


def test_only_what_is_a_sample_is_taken(folder: Path) -> None:
    for name in (".hidden/a.png", "run/samples/step-1.png", "more/b.PNG", "more/c.jpeg.bak"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "0.png", folder / name)
    (folder / "run" / "run.json").write_text("{}")
    (folder / "more" / "b.txt").write_text("b")
    (folder / "clip.mp4").write_bytes(b"")
    held = folder / "held_out"
    held.mkdir()
    shutil.copy(folder / "1.png", held / "1.png")
    table = check(folder, validation_metadata_path=str(held))
    assert table.frame["image"].to_list() == ["0.png", "1.png", "2.png", "more/b.PNG"]


def test_what_is_no_data_set_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MetadataError, match="the folder holds no picture"):
        check(tmp_path / "empty")
    with pytest.raises(MetadataError, match="the data set's folder does not exist"):
        check(tmp_path / "absent")
    config = make_config(
        {
            "dataset_base_path": str(folder),
            "model_paths": ["x"],
            "lora_base_model": "dit",
            "extra_inputs": "kontext_images",
            "data_file_keys": "image,kontext_images",
        }
    )
    family = find_family("flux")
    assert family.variant is not None
    columns = family.variant(family, config, {}).columns
    with pytest.raises(MetadataError, match="also reads kontext_images here"):
        validate(config, columns, FactCache(tmp_path / "facts.sqlite"))
    (folder / "metadata.csv").write_text("image,prompt\n")
    with pytest.raises(MetadataError, match=r"holds 'metadata\.csv', and no metadata table"):
        check(folder)


def test_a_training_whose_folder_is_wrong_leaves_nothing(
    given: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    (folder / "1.txt").unlink()
    assert "row 2: there is no caption file '1.txt'" in why_refused(given, tmp_path / "run")


@pytest.fixture
def folders(folder: Path) -> Path:
    """Pictures in folders whose names say how often they are taken: 3, 2 and 1 times."""
    for name, files in (
        ("3_sks cat", "0.png"),
        ("2_dog", "1.png 1.txt"),
        ("2024_x", "2.png 2.txt"),
    ):
        (folder / name).mkdir()
        for file in files.split():
            shutil.move(folder / file, folder / name / file)
    (folder / "0.txt").unlink()
    return folder


def visits_of(values: dict[str, Any], run: Path, **more: Any) -> list[tuple[int, int]]:
    """Row and number of every visit of an epoch."""
    train_to_end(values, run, "--task", "sft:data_process")
    config = make_config({**values, "output_path": str(run), **more})
    found = find_model(config, ModelHub(run, skip_download=True))
    data = StepDataset(config, found, samples_of(run), 0, 1)
    steps = [data.order.step(step) for step in range(data.order.steps_per_epoch)]
    visits = [visit for micros in steps for micro in micros for visit in micro]
    assert data.order.samples_per_epoch == len(visits)
    return sorted((data._samples.at(v.bucket, v.index).row, v.visit) for v in visits)


def test_names_of_folders_say_how_often_and_what(
    given: dict[str, Any], folders: Path, tmp_path: Path
) -> None:
    table = check(folders)
    assert told(table) == ["a bird", "a dog, on the grass", "sks cat"]
    assert table.frame["repeat"].to_list() == [1, 2, 3]
    visits = visits_of({**given, "dataset_repeat": 2}, tmp_path / "run")
    assert Counter(row for row, _ in visits) == {1: 2, 2: 4, 3: 6}
    assert len(set(visits)) == 12  # none is the same visit of a sample
    assert read_manifest(tmp_path / "run").samples == 3


def test_repeats_are_said_by_the_recipe(folders: Path) -> None:
    table = check(folders, folder_repeats={"2_dog": 5, "2024_x": 4})
    assert table.frame["repeat"].to_list() == [4, 5, 1]
    assert "repeat" not in check(folders, folder_repeats={"2_dog": 1}).frame.columns
    with pytest.raises(ParameterError, match=r"'2_dogs'; did you mean '2_dog'\?"):
        check(folders, folder_repeats={"2_dogs": 1})
    csv = folders / "table.csv"
    csv.write_text("image,prompt\n2_dog/1.png,a\n2024_x/2.png,b\n")
    given = {"dataset_metadata_path": str(csv)}
    assert "repeat" not in check(folders, **given).frame.columns
    repeated = check(folders, **given, folder_repeats="2_dog=7")
    assert repeated.frame["repeat"].to_list() == [7, 1]


def test_repeats_hold_where_samples_are_held_out(
    given: dict[str, Any], folders: Path, tmp_path: Path
) -> None:
    run = train_to_end({**given, "validation_split": 1, "batch_size": 1}, tmp_path / "run")
    trained = pl.read_parquet(run / ".trained.parquet")
    assert trained.height == 2
    assert pl.read_csv(run / "metrics.csv")["step"].max() == trained["repeat"].sum()


def test_repeats_do_not_depend_on_processes_or_stops(
    given: dict[str, Any], folders: Path, tmp_path: Path
) -> None:
    given |= {"batch_size": 1, "shuffle_tags": True, "caption_prefix": "sks"}
    whole = train_to_end(given, tmp_path / "whole")
    config = make_config({**given, "output_path": str(whole)})
    found = find_model(config, ModelHub(whole, skip_download=True))

    def seen(world: int, accumulation: int) -> list[list[tuple[str, int, float]]]:
        """Sample, visit and caption of all that each step sees."""
        split = config.model_copy(update={"gradient_accumulation_steps": accumulation})
        ranks = [StepDataset(split, found, samples_of(whole), n, world) for n in range(world)]
        steps = range(ranks[0].order.steps_per_epoch)
        batches = [[b for rank in ranks for b in rank[step] if b.scale] for step in steps]
        return [
            sorted(
                (b.samples[0], b.visits[0], b.outputs["prompt_embeds"].sum().item()) for b in each
            )
            for each in batches
        ]

    assert seen(1, 2) == seen(2, 1)
    given["output_path"] = str(tmp_path / "stopped")
    stop_after(given, 2, 4)
    run_training(make_config(given), never)
    stopped = (tmp_path / "stopped" / "epoch-0.safetensors").read_bytes()
    assert stopped == (whole / "epoch-0.safetensors").read_bytes()


def test_the_sound_of_a_folder_is_that_of_its_clips(tmp_path: Path) -> None:
    """Clips without sound, and pictures, are trained on without."""
    case = next(case for case in LTX2 if case.name == "ltx2_t2av")
    data = case.rows(tmp_path / "data").parent
    for path in [*data.glob("*.wav"), data / "metadata.json"]:
        path.unlink()
    noise = np.random.default_rng(0).integers(-9000, 9000, (2, 2 * 44100), dtype=np.int16)
    write_clip(data / "9.mp4", 40, 24, noise)
    for clip in data.glob("*.mp4"):
        clip.with_suffix(".txt").write_text("a caption")
    given = {"family": "ltx2", "dataset_base_path": str(data), "model_paths": ["x"]}
    config = make_config({**case.parameters, **given, "lora_base_model": "dit"})
    columns = guess_model(config).family.columns
    checked = validate(config, columns, FactCache(tmp_path / "facts.sqlite")).frame
    assert set(checked["status"]) == {"ok"}
    assert checked["input_audio"].to_list() == [None] * 4 + ["9.mp4"]


def test_repeats_of_the_training_are_none_of_what_is_held_out(
    folders: Path, given: dict[str, Any], tmp_path: Path
) -> None:
    held = folders / "held_out" / "5_x"
    held.mkdir(parents=True)
    shutil.copy(folders / "2_dog" / "1.png", held / "other.png")
    (held / "other.txt").write_text("another dog")
    with Image.open(held / "other.png") as picture:
        picture.rotate(90).save(held / "other.png")
    more = {"validation_metadata_path": str(held.parent), "folder_repeats": {"2_dog": 4}}
    run = train_to_end({**given, **more, "batch_size": 1}, tmp_path / "run")
    assert pl.read_parquet(run / "metadata.parquet")["repeat"].to_list() == [1, 4, 1]
    lines = trained_on(read_subject(run / "epoch-0.safetensors"))
    assert [line for line in lines if "changed" in line] == ["  changed since: nothing"] * 2
    (held / "other.txt").write_text("a cat")
    before = list_data(make_config({**given, **more})).digest
    (held / "other.txt").write_text("a cat that sleeps")
    assert list_data(make_config({**given, **more})).digest != before


def test_a_folder_is_that_of_the_config_that_overrides_it(folders: Path) -> None:
    """A table is kept; a folder without one follows `dataset_base_path`."""
    values = {"dataset_base_path": str(folders), "model_paths": ["x"], "lora_base_model": "dit"}
    config = make_config(values)
    other = str(folders / "2_dog")
    changed = make_config(overridden(config.model_dump(), {"dataset_base_path": other}))
    assert changed.dataset_metadata_path == other
    assert "dataset_metadata_path: null" in dump_config(config)
    table = {**values, "dataset_metadata_path": "a.csv"}
    kept = make_config(overridden(table, {"dataset_base_path": other}))
    assert kept.dataset_metadata_path == "a.csv"


def test_a_folder_in_the_folder_of_the_data_set_is_a_table(folders: Path) -> None:
    table = check(folders.parent, dataset_metadata_path=str(folders))
    assert table.frame["image"].to_list()[0] == "data/2024_x/2.png"
    assert told(table) == ["a bird", "a dog, on the grass", "sks cat"]
    assert table.frame["repeat"].to_list() == [1, 2, 3]
    rows = "image,prompt\n./2_dog/1.png,a\n"
    (folders / "rows.csv").write_text(rows)
    given = {"dataset_metadata_path": str(folders / "rows.csv"), "folder_repeats": {"2_dog": 3}}
    assert check(folders, **given).frame["repeat"].to_list() == [3]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ({"image": [1, 2]}, "file_missing"),
        ({"image": [["a"], ["b"]]}, "wrong_type"),
        ({"image": [None, None]}, "missing_value"),
    ],
)
def test_odd_columns_of_files_are_rejected(
    folder: Path, rows: dict[str, list[Any]], reason: str
) -> None:
    table = folder / "table.parquet"
    pl.DataFrame(rows).write_parquet(table)
    given = {"dataset_metadata_path": str(table), "caption_extension": ".txt"}
    assert set(check(folder, **given, caption_prefix="a").frame["status"]) == {reason}


def test_an_encoding_that_there_is_not_is_refused(folder: Path) -> None:
    with pytest.raises(ParameterError, match="there is no text encoding 'foo'"):
        check(folder, metadata_encoding="foo")
    (folder / "0.txt").write_bytes("\ufeffa cat".encode())
    assert told(check(folder, metadata_encoding="utf_8"))[0] == "a cat"


def test_a_prefix_fills_any_column_without_captions(folder: Path) -> None:
    table = folder / "table.parquet"
    for kind in (pl.Null(), pl.Int64(), pl.Categorical()):
        pl.DataFrame(
            {"image": ["0.png"], "prompt": [None]}, schema_overrides={"prompt": kind}
        ).write_parquet(table)
        rows = check(folder, dataset_metadata_path=str(table), caption_prefix="sks")
        assert told(rows) == ["sks"]
